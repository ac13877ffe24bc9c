"""Direct preference optimisation (Rafailov and others, arXiv 2305.18290): of two answers to a prompt the chosen one becomes
likelier than the rejected, measured against the weights the run begins with.

The reference's log probabilities are computed once, before anything is trained: no second model, no second pass at every step.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.config.batching import effective_batch_size, planned_steps
from sft.config.method import DPO
from sft.config.schema import MethodLoss, MethodSettings, Reference, Settings
from sft.data.collators import PaddingFreeCollator, cut
from sft.data.shared_prompt import SharedPromptCollator, cut_shared, shared_length
from sft.data.token_cache import row_lengths, token_counts
from sft.data.tokenize import IGNORED
from sft.distributed import group, strategy
from sft.export import measure
from sft.methods import sft
from sft.methods.answers import TAKEN, difference, on_device, padded, token_log_probs
from sft.methods.arguments import training_arguments
from sft.methods.reference import computed_once, reference_hash
from sft.model import warm_cache
from sft.model.adapters import without_adapter
from sft.plan.plan import Plan
from sft.storage.jsonio import append_jsonl
from sft.training import acceleration, metrics, samplers
from sft.training.context import RunContext
from sft.training.trainer import Loop, ResumableTrainer

log = logging.getLogger(__name__)

SHOWN = ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
"""What is logged of pairs: means over pairs. `accuracy` counts a tie half; `margin` and `reward_*` are times `beta`."""

FALL, LEAST_FALL = 0.2, 10.0
"""The chosen answers have become unlikely when their mean log probability is down by this share and by so many nats: a fifth is
beyond the noise of rounding, and 10 nats are more than the wording of a short answer."""

SHORT = 300
"""Characters of a text in margins.jsonl."""

CHECKED = 64
"""Tokens of a prompt and of an answer by which shared prompts are tried."""

ORDERS = {"data_seed", "train_sampling_strategy", "dataloader_num_workers"}
"""Options of `trainer.extra` by which other pairs, or more of them, are taken than is known before the first step."""


# ------------------------------------------------------------------------------------------------------- the loss


def pair_losses(policy: Any, reference: Any, lengths: Any, method: MethodSettings) -> Any:
    """The loss of each pair, [pairs]. `policy`, `reference` and `lengths` are [pairs, 2]: the summed log probability of the
    chosen and of the rejected answer, and their target tokens. Formulas and names are those of TRL's DPOTrainer.
    """
    import torch
    from torch.nn.functional import logsigmoid

    beta, smoothing, kind = method.beta, method.label_smoothing, method.loss_type
    ratios = policy - reference
    if kind in (MethodLoss.ipo, MethodLoss.sigmoid_norm):
        ratios = ratios / lengths
    delta = ratios[:, 0] - ratios[:, 1]
    if kind in (MethodLoss.sigmoid, MethodLoss.sigmoid_norm):
        return -logsigmoid(beta * delta)
    if kind == MethodLoss.hinge:
        return torch.relu(1 - beta * delta)
    if kind == MethodLoss.ipo:
        return (delta - 1 / (2 * beta)) ** 2
    if kind == MethodLoss.robust:
        flipped = smoothing * logsigmoid(-beta * delta)
        return (-(1 - smoothing) * logsigmoid(beta * delta) + flipped) / (1 - 2 * smoothing)
    return 1 - torch.sigmoid(beta * ratios[:, 0]) + torch.sigmoid(beta * ratios[:, 1])


def pair_facts(policy: Any, reference: Any, losses: Any, beta: float) -> Any:
    """The sums over pairs of the loss and of SHOWN, one vector in float64."""
    import torch

    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    columns = [losses, right, margin, rewards[:, 0], rewards[:, 1], policy[:, 0], policy[:, 1]]
    return torch.stack([column.detach().double().sum() for column in columns])


def fell_far(logp_chosen: float, reward_chosen: float, margin: float, beta: float) -> bool:
    """Whether the chosen answers have become far less likely than the reference finds them, while the margin grew from 0. All
    are means over the same pairs: what the reference says of them is where they began.
    """
    fall = -reward_chosen / beta
    began = logp_chosen + fall
    return margin > 0 and fall > max(LEAST_FALL, FALL * abs(began))


# ---------------------------------------------------------------------------------------------------- micro-batches


@dataclass
class PairCollator:
    """A micro-batch of pairs by another collator, with what the reference says of them."""

    layout: Any
    """SharedPromptCollator; or PaddingFreeCollator or `padded`, for which the two answers of a pair are two rows."""

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """`pairs` hold DPO's columns, `shared_length` and, but for the reference pass, `reference`: two numbers. Adds to the
        micro-batch `target_counts`, the targets of each answer, and `reference` [pairs, 2].
        """
        import torch

        if isinstance(self.layout, SharedPromptCollator):
            batch = self.layout(pairs)
        else:
            rows = [row for pair in pairs for row in _answers(pair)]
            batch = self.layout(rows)
            batch["target_counts"] = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
        if "reference" in pairs[0]:
            batch["reference"] = torch.tensor([pair["reference"] for pair in pairs], dtype=torch.float32)
        return batch


def _answers(pair: dict[str, Any]) -> list[dict[str, Any]]:
    rejected = {"input_ids": pair["rejected_ids"], "labels": pair["rejected_labels"]}
    return [{"input_ids": pair["input_ids"], "labels": pair["labels"]}, rejected]


def _real(batch: dict[str, Any]) -> list[int]:
    """Which pairs of a micro-batch are none that fill up the share of a process: those have no target."""
    counts = batch["target_counts"]
    return [at for at, both in enumerate(zip(counts[::2], counts[1::2], strict=True)) if any(both)]


def log_probs(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """(summed log probability, target tokens) of each answer of a micro-batch, both [pairs, 2], with gradients."""
    import torch

    counts = batch["target_counts"]
    inputs = {key: value for key, value in batch.items() if key not in ("target_counts", "reference")}
    found = token_log_probs(model, inputs)
    sums = torch.stack([part.sum() for part in torch.split(found, counts)]).view(-1, 2)
    return sums, torch.tensor(counts, device=sums.device, dtype=sums.dtype).view(-1, 2)


def reference_log_probs(ctx: RunContext, trainer: Any, dataset: Any) -> list[list[float]]:
    """`summed_log_probs` of a data set's pairs by the reference, a share in each process. Raises Interrupted if it is to stop.

    It is called before anything is trained or a checkpoint is read: a fresh adapter adds nothing, one of `lora.start_from` is
    part of what the run begins with. With `method.reference=base` no adapter takes part.
    """
    rows, ranks = ctx.settings.trainer.per_device_train_batch_size, group.world_size()
    shares = [[i for i in range(len(dataset)) if i // rows % ranks == rank] for rank in range(ranks)]  # whole micro-batches
    mine, checks = shares[group.rank()], -(-len(shares[0]) // rows)

    def pairs_at(begin: int, end: int) -> list[dict[str, Any]]:
        ctx.stop.check()
        return [dataset[i] for i in mine[begin:end]]  # a data set of its own would take longer to make

    base = ctx.settings.method.reference == Reference.base
    with without_adapter(trainer.model) if base else contextlib.nullcontext():
        found = summed_log_probs(ctx, trainer, len(mine), pairs_at)
    for _ in range(checks - -(-len(mine) // rows)):
        ctx.stop.check()  # which all processes have to ask equally often
    by_row = {i: pair for share, pairs in zip(shares, group.gathered(found), strict=True)
              for i, pair in zip(share, pairs, strict=True)}  # fmt: skip
    return [by_row[i] for i in range(len(dataset))]


def summed_log_probs(ctx: RunContext, trainer: Any, count: int, pairs_at: Callable[[int, int], list]) -> list[list[float]]:
    """The summed log probabilities of both answers of `count` pairs by the weights in memory, [pairs, 2].

    `pairs_at(begin, end)` gives some of them.
    """
    import torch

    model, collate, found = trainer.model, trainer.eval_collator, []
    rows = ctx.settings.trainer.per_device_train_batch_size
    was_training = model.training

    def predict(batch):
        return log_probs(model, on_device(batch, model))[0].tolist()

    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager(), acceleration.evaluating(model, trainer.plan):
        for at in range(0, count, rows):
            batch = collate(pairs_at(at, min(at + rows, count)))
            found += [pair for some, _ in trainer.oom_retry.evaluate(predict, batch) for pair in some]
    model.train(was_training)
    return found


def write_margins(folder: Path, step: int, policy: Any, reference: Any, beta: float, texts: Callable[[], list[dict]]) -> None:
    """Add what an evaluation finds of each held-out pair to margins.jsonl: its margin, and how much likelier the chosen answer
    is than the rejected one. The first line has the `texts` of the pairs as well.
    """
    ratios, before = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    found = {"margins": beta * (ratios - before), "log_ratios": ratios}
    line = {"step": step} | {name: [round(one, 6) for one in numbers.tolist()] for name, numbers in found.items()}
    path = folder / "margins.jsonl"
    append_jsonl(path, line if path.exists() else line | {"pairs": texts()})


def _texts_of(pairs: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The row, the prompt and both answers of each pair, cut to SHORT."""

    def short(text: str) -> str:
        return text if len(text) <= SHORT else text[: SHORT - 1] + "…"

    def answer(labels: list[int]) -> str:
        targets = [label for label in labels if label != IGNORED]
        return short(tokenizer.decode(targets[:SHORT], skip_special_tokens=True))

    return [
        {"row": pair["row"], "prompt": short(pair["question"]), "chosen": answer(pair["labels"]),
         "rejected": answer(pair["rejected_labels"])}
        for pair in pairs
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the trainer


def cut_pairs(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of a micro-batch, each with its reference where it has one: what PairCollator makes one of."""
    if "key_index" in inputs:
        pairs = cut_shared(inputs)
    else:
        rows = cut(inputs)
        pairs = [
            chosen | {"rejected_ids": rejected["input_ids"], "rejected_labels": rejected["labels"]}
            for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)
        ]
    if "reference" not in inputs:
        return pairs
    return [pair | {"reference": reference} for pair, reference in zip(pairs, inputs["reference"].tolist(), strict=True)]


class PairSteps(ResumableTrainer):
    """Put before transformers' trainer as a base, it counts pairs, where that one counts target tokens, and evaluates to means
    over pairs.
    """

    shown, cut = SHOWN, staticmethod(cut_pairs)
    eval_collator: Any = None
    """The collator of held-out pairs, whose micro-batches are not captured."""
    pairs_seen, facts_seen = 0, 0.0
    """Pairs since the last log line, and their `pair_facts`."""
    before_step: Any = (0, 0.0)
    """Both as they were before this step."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.tokens_seen = self.tokens_seen + metrics.count_tokens(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def repeat_step(self):
        self.pairs_seen, self.facts_seen = self.before_step

    def get_batch_samples(self, *args, **kwargs):
        self.before_step = self.pairs_seen, self.facts_seen
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, group.total(sum(len(_real(batch)) for batch in batches))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        method = self.ctx.settings.method
        policy, lengths = log_probs(model, inputs)
        reference, real = inputs["reference"], _real(inputs)
        if len(real) < len(policy):
            policy, lengths, reference = policy[real], lengths[real], reference[real]
        losses = pair_losses(policy, reference, lengths, method)
        if method.sft_weight:
            losses = losses - method.sft_weight * policy[:, 0] / lengths[:, 0]
        facts = pair_facts(policy, reference, losses, method.beta)
        if not model.training:
            return losses.sum(), facts, policy
        self.pairs_seen, self.facts_seen = self.pairs_seen + len(losses), self.facts_seen + facts
        # The gradients of several processes are averaged.
        return losses.sum() / (num_items_in_batch / group.world_size() if num_items_in_batch else len(losses))

    def floating_point_ops(self, inputs):
        return 0

    def get_eval_dataloader(self, *args, **kwargs):
        usual, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = usual

    def prediction_step(self, model, inputs, *args, **kwargs):
        import torch

        def predict(batch):
            with torch.no_grad(), self.compute_loss_context_manager():
                return len(_real(batch)), *self.compute_loss(model, self._prepare_inputs(batch))

        found = [one for one, _ in self.oom_retry.evaluate(predict, inputs)]
        pairs, loss, facts = (sum(parts) for parts in zip(*(one[:3] for one in found), strict=True))
        self.eval_facts, self.eval_pairs = self.eval_facts + facts, self.eval_pairs + pairs
        self.eval_policy.append(torch.cat([policy for *_, policy in found]).double())
        return loss / max(1, pairs), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        import torch

        data = self.ctx.prepared.eval
        self.eval_facts, self.eval_pairs, self.eval_policy = 0.0, 0, []
        with acceleration.evaluating(self.model, self.plan):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        pairs = group.total(self.eval_pairs)
        facts = zip(*group.gathered(self.eval_facts.tolist()), strict=True)
        names, means = ("loss", *SHOWN), [sum(parts) / pairs for parts in facts]
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in zip(names, means, strict=True)})
        dealt = zip(*group.gathered([policy.tolist() for policy in self.eval_policy]), strict=True)
        policy = torch.tensor([pair for turn in dealt for some in turn for pair in some], dtype=torch.float64)
        if group.is_first():
            reference = torch.tensor(self.eval_dataset["reference"][: len(data)], dtype=torch.float64)
            write_margins(self.loop.folder, self.state.global_step, policy, reference, self.ctx.settings.method.beta,
                          lambda: _texts_of(data, self.ctx.tokenizer))  # fmt: skip
        return output

    def take_line(self, *args, **kwargs):
        super().take_line(*args, **kwargs)
        from transformers.trainer_pt_utils import nested_gather

        facts = nested_gather(self.facts_seen, self.args.parallel_mode).view(-1, 1 + len(SHOWN)).sum(0)
        self.line.numbers["facts"] = (facts / group.total(self.pairs_seen)).to("cpu", non_blocking=True)
        self.pairs_seen, self.facts_seen = 0, 0.0

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.written is not None:
            _, *means = self.written.numbers["facts"].tolist()
            logs |= dict(zip(SHOWN, means, strict=True))
        super().log(logs, *args, **kwargs)
        self.watch_chosen(logs)

    def watch_chosen(self, logs):
        """Say it once a run, of held-out pairs if there are any, where the chosen answers have become unlikely."""
        method = self.ctx.settings.method
        prefix, final = "" if self.eval_dataset is None else "eval_", self.loop.recorder.final
        if f"{prefix}logp_chosen" not in logs or "chosen_fell_at" in final:
            return
        logp, reward, margin = (logs[prefix + name] for name in ("logp_chosen", "reward_chosen", "margin"))
        if fell_far(logp, reward, margin, method.beta):
            final["chosen_fell_at"] = self.state.global_step
            log.warning(
                "Step %d: the chosen answers' log probability fell from %.1f to %.1f while the margin grew: the model "
                "forgets how to answer. hint: method.sft_weight=%g, or a lower trainer.learning_rate",
                self.state.global_step, logp - reward / method.beta, logp, 2 * method.sft_weight or 0.1,
            )  # fmt: skip

    def components(self):
        return super().components() | {"pairs": _PairsSeen(self)}

    def _get_train_sampler(self, train_dataset=None):
        sampler, rows = super()._get_train_sampler(train_dataset), self.args.per_device_train_batch_size
        data, micro_batches = self.ctx.prepared.train, self.ctx.settings.trainer.gradient_accumulation_steps
        if not self.plan.padding_free:
            return samplers.share_rows(sampler, len(data), rows)
        return samplers.balance_steps(sampler, token_counts(data).tolist(), rows, micro_batches, filler=2)

    def _get_eval_sampler(self, eval_dataset):
        from torch.utils.data import SequentialSampler

        pairs = len(self.ctx.prepared.eval)
        sampler = SequentialSampler(range(pairs))  # margins.jsonl has the pairs in their order
        return samplers.share_rows(sampler, pairs, self.args.per_device_eval_batch_size)


def build_trainer(ctx: RunContext, model: Any, loop: Loop) -> Any:
    """A trainer over the pairs of `ctx.prepared`; it goes on from `loop.checkpoint` if there is one.

    The loss of a step is the mean over its pairs, in however many micro-batches.
    """
    import transformers

    class Trainer(PairSteps, transformers.Trainer):
        pass

    settings, data, tokenizer = ctx.settings, ctx.prepared, ctx.tokenizer
    plan = acceleration.settle(model, settings, data, tokenizer.pad_token_id, ctx.plan, segments=2)
    args = training_arguments(settings, loop.folder, data.eval is not None, plan)
    strategy.settle_device(args)
    splits = {"train": data.train} | ({"eval": data.eval} if data.eval is not None else {})
    splits = {name: split.select_columns([*DPO.columns, "shared_length"]) for name, split in splits.items()}
    rows, layout, captured = _choose_layout(model, settings, plan, splits, tokenizer.pad_token_id)
    trainer = Trainer(model=model, args=args, data_collator=PairCollator(captured), train_dataset=splits["train"],
                      eval_dataset=splits.get("eval"), processing_class=tokenizer)  # fmt: skip
    trainer.eval_collator = PairCollator(layout)
    strategy.settle_accelerator(trainer.accelerator, trainer.model)
    trainer.plan, trainer.padding_free_collator = plan, rows if plan.padding_free else None
    trainer.model_accepts_loss_kwargs = True  # so that transformers does not divide by the micro-batches once more
    sft.watch(trainer, ctx, loop)
    reached = {name: list(range(len(split))) for name, split in splits.items()}
    reached["train"] = _reached(trainer, settings, len(data.train), kept=measure.ROWS if data.eval is None else 0)
    known = _reference(ctx, trainer, splits, reached, type(layout).__name__)
    if group.is_first():
        measure.note_log_probs(ctx.folder, "reference_log_probs", known["train" if data.eval is None else "eval"])
    pad = tokenizer.pad_token_id
    filler = {"rejected_ids": [pad], "rejected_labels": [IGNORED], "shared_length": 0, "reference": [0.0, 0.0]}
    splits = {
        name: samplers.with_filler(split.add_column("reference", known[name]), pad, **filler) for name, split in splits.items()
    }
    trainer.train_dataset, trainer.eval_dataset = splits["train"], splits.get("eval")
    return trainer


def _choose_layout(
    model: Any, settings: Settings, plan: Plan, splits: dict[str, Any], pad_token_id: int
) -> tuple[Any, Any, Any]:
    """(collator of rows, collator of pairs, the same for micro-batches that are captured): prompts are shared where the model
    is seen to take that."""
    if not plan.padding_free:
        return (padded(pad_token_id),) * 3
    longest = int(max(lengths.max() for split in splits.values() for lengths in row_lengths(split)))
    count = settings.trainer.per_device_train_batch_size
    rows, shared = PaddingFreeCollator(pad_token_id, longest), SharedPromptCollator(pad_token_id, longest)
    first = [splits["train"][i] for i in range(min(3, len(splits["train"])))]
    why_not = next(filter(None, group.gathered(_difference(model, plan, first, rows, shared))), "")
    if why_not:
        log.info("Speed  each answer has its prompt to itself: %s", why_not)
        return rows, rows, replace(rows, lengths=plan.capture_sizes, rows=2 * count)
    return rows, shared, replace(shared, lengths=plan.capture_sizes, pairs=count)


def _reached(trainer: Any, settings: Settings, count: int, kept: int) -> list[int]:
    """Which training pairs need a reference: those that the steps of less than an epoch come to, and the first `kept`. All of
    them where there are more steps, or where the order is not known before the first one.
    """
    pairs = planned_steps(settings.trainer, count) * effective_batch_size(settings.trainer)
    pairs += settings.trainer.per_device_train_batch_size * group.world_size()  # accelerate makes one micro-batch ahead
    if pairs >= count or ORDERS & settings.trainer.extra.keys():
        return list(range(count))
    order = samplers.settle_order(trainer._get_train_sampler(), count)
    return sorted(row for row in {*itertools.islice(order, pairs), *range(kept)} if row < count)  # the rest are fillers


def _reference(ctx: RunContext, trainer: Any, splits: dict[str, Any], reached: dict[str, Any], layout: str) -> dict[str, list]:
    """`reference_log_probs` of the pairs in `reached` of each split, as an earlier run of this process or of this machine found
    them, or found now; None of the others, which no micro-batch can be made of.
    """
    data, sizes = ctx.prepared, {name: len(split) for name, split in splits.items()}
    splits = {name: split.select(reached[name]) for name, split in splits.items()}
    key, origin = group.broadcast(reference_hash(ctx, trainer.model, splits, layout)), "sweep"

    def compute():
        return {name: reference_log_probs(ctx, trainer, split) for name, split in splits.items()}

    def find():
        nonlocal origin
        found, origin = computed_once(key, compute, ctx.stop) if key else (compute(), "computed")
        return found

    with ctx.record.timed("reference"):
        what = key or [data.facts["data_hash"], reached, layout, ctx.settings.method.reference]
        known = warm_cache.of_base("reference", trainer.model, ctx.settings, what, find)
    named = {"weights": ctx.settings.method.reference.value, "hash": key, "from": origin}
    ctx.record.update(reference={name: text for name, text in named.items() if text})
    spread = {name: [None] * size for name, size in sizes.items()}
    for name, pairs in known.items():
        for row, pair in zip(reached[name], pairs, strict=True):
            spread[name][row] = pair
    return spread


def _difference(model: Any, plan: Plan, pairs: list[dict[str, Any]], rows: Any, shared: Any) -> str:
    """Why a few pairs would not be the same where they share their prompts; empty if they are."""
    pairs = [_short(pair) for pair in pairs]
    one, other = (PairCollator(layout)(pairs) for layout in (shared, rows))
    counts = one["target_counts"]
    return difference(model, plan, *({k: x for k, x in batch.items() if k in TAKEN} for batch in (one, other)), counts)


def _short(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair with the last tokens of its prompt and the first ones of its answers: enough to compare."""
    shared = pair["shared_length"]
    begin = max(0, shared - CHECKED)
    cut_down = {name: pair[name][begin : shared + CHECKED] for name in DPO.columns}
    return cut_down | {"shared_length": shared - begin}


class _PairsSeen:
    """What a trainer has seen of pairs since the last log line, as a component of a checkpoint."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Pairs and the sums of their facts, over all ranks."""
        facts = self.trainer.facts_seen
        parts = [part for part in group.gathered(facts if isinstance(facts, float) else facts.tolist()) if part]
        sums = [sum(some) for some in zip(*parts, strict=True)]
        return {"pairs": int(group.total(self.trainer.pairs_seen)), "facts": sums or 0.0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing from a checkpoint."""
        import torch

        if not group.is_first():
            return

        device, facts = self.trainer.args.device, state["facts"]
        self.trainer.pairs_seen = state["pairs"]
        self.trainer.facts_seen = facts if isinstance(facts, float) else torch.tensor(facts, dtype=torch.float64, device=device)


def held_out_loss(ctx: RunContext, trainer: Any) -> float:
    """The mean loss of the chosen answers of held_out.jsonl by the weights in memory; what these find of both answers is kept
    there.
    """
    rows = measure.read_rows(ctx.folder)
    pairs = [{name: getattr(row, name) for name in DPO.columns} for row in rows]
    pairs = [pair | {"shared_length": shared_length(pair)} for pair in pairs]
    found = summed_log_probs(ctx, trainer, len(pairs), lambda begin, end: pairs[begin:end])
    measure.note_log_probs(ctx.folder, "trained_log_probs", found)
    return -sum(chosen for chosen, _ in found) / sum(row.targets[0] for row in rows)
