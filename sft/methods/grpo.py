"""Group relative policy optimisation (Shao and others, arXiv 2402.03300): the model answers each prompt several times, and
answers with a higher reward than the others of their prompt become likelier.

A step is a rollout (rollouts.py) and an update. With `method.num_iterations` above 1 more updates follow by the same rollout.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

from sft.config.schema import MethodLoss, MethodSettings, Settings
from sft.data.collators import PaddingFreeCollator
from sft.data.shared_prompt import SharedPromptCollator
from sft.data.token_cache import token_counts
from sft.data.tokenize import IGNORED
from sft.distributed import group as processes
from sft.distributed import strategy
from sft.export import measure
from sft.methods import rollouts, sft
from sft.methods.answers import TAKEN, difference, on_device, padded, token_log_probs
from sft.methods.arguments import training_arguments
from sft.methods.rollouts import Generator, Group, Rollout, Scored
from sft.model.adapters import without_adapter
from sft.plan.plan import Plan
from sft.rewards import load_rewards
from sft.signals import Interrupted
from sft.training import acceleration, held_out_rows, metrics, samplers
from sft.training.context import RunContext
from sft.training.trainer import Loop, ResumableTrainer

log = logging.getLogger(__name__)

SHOWN = (*rollouts.SHOWN, "kl", "clipped", "sampler_gap")
"""What is logged of rollouts. Means over completions: `reward`, `ended` (the share that did so by itself), `length`; over
groups: `reward_std`, and `zero_groups`, the share whose rewards are all equal; over drawn tokens: `entropy`, their negative log
probability, whose mean is the entropy; over trained tokens: `kl` from the reference, the `clipped` share, and `sampler_gap`,
how far the log probability of a token is from what it was when it was drawn."""

FAR = 0.3
"""Nats between the log probability of a token as it was drawn and as it is trained, from which on it is said. Rounding in 16
bits makes some hundredths of them."""

CHECKED = 64
"""Tokens of a prompt by which shared prompts are tried."""

OF_TOKENS = ("trained", "gap", "clipped", "kl")
"""What is summed over trained tokens, on the device."""


# ------------------------------------------------------------------------------------------------------- the loss


def token_losses(log_probs: Any, old: Any, advantages: Any, method: MethodSettings) -> tuple[Any, Any]:
    """(the loss of each token, whether its ratio is clipped), [tokens]. `old` are the log probabilities by the weights that the
    rollout was made with. Formula and names are those of TRL's GRPOTrainer.
    """
    import torch

    high = method.epsilon if method.epsilon_high is None else method.epsilon_high
    ratio = torch.exp(log_probs - old)
    bounded = ratio.clamp(1 - method.epsilon, 1 + high)
    clipped = ((ratio < 1 - method.epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return -torch.min(ratio * advantages, bounded * advantages), clipped


def kl_from(reference: Any, log_probs: Any) -> Any:
    """The estimate of each token's KL divergence from the reference that GRPO adds: never below 0, and right on the mean."""
    import torch

    return torch.exp(reference - log_probs) - (reference - log_probs) - 1


def weight_of(completion: Scored, method: MethodSettings, tokens: int, completions: int) -> float:
    """What a token of this completion counts in the loss of a step with so many tokens and completions in all."""
    if method.mask_truncated_completions and not completion.ended:
        return 0.0
    if method.loss_type == MethodLoss.grpo:
        return 1 / (len(completion.ids) * completions)
    if method.loss_type == MethodLoss.dr_grpo:
        return 1 / (completions * method.max_completion_length)
    return 1 / max(1, tokens)


# ---------------------------------------------------------------------------------------------------- micro-batches


@dataclass
class Item:
    """A completion in a micro-batch."""

    group: int
    """Items of one group share their prompt."""
    prompt_ids: list[int]
    scored: Scored
    weight: float
    """Of each of its tokens in the loss."""
    row_number: int = 0
    """The prompt's number in the data."""

    @property
    def row(self) -> tuple[list[int], list[int]]:
        """Ids and labels of the prompt with the completion."""
        return self.prompt_ids + self.scored.ids, [IGNORED] * len(self.prompt_ids) + self.scored.ids


@dataclass
class CompletionCollator:
    """A micro-batch of prompts as they are, or of items by another collator, with what their loss needs."""

    layout: Any
    """SharedPromptCollator; or PaddingFreeCollator or `padded`, for which each completion has its prompt to itself."""

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """`rows` are rows of the data set, which become `prompts`; or items, of which `advantages`, `weights`, `drawn`, and,
        where they have that, `old` and `reference` are given for each of their tokens, [tokens].
        """
        import torch

        if isinstance(rows[0], dict):
            return {"prompts": rows}
        if isinstance(self.layout, SharedPromptCollator):
            groups: dict[int, list[Item]] = {}
            for item in rows:
                groups.setdefault(item.group, []).append(item)
            rows = [item for some in groups.values() for item in some]
            batch = self.layout.lay_out([([item.row for item in some], len(some[0].prompt_ids)) for some in groups.values()])
            del batch["target_counts"]
        else:
            batch = self.layout([dict(zip(("input_ids", "labels"), item.row, strict=True)) for item in rows])
        counts = torch.tensor([len(item.scored.ids) for item in rows])

        def each(values: list[float]) -> Any:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)

        def joined(lists: list[list[float]]) -> Any:
            return torch.tensor([value for one in lists for value in one], dtype=torch.float32)

        batch |= {"advantages": each([item.scored.advantage for item in rows]), "weights": each([item.weight for item in rows])}
        for name, lists in (("drawn", [item.scored.log_probs for item in rows]), ("old", [item.scored.old for item in rows]),
                            ("reference", [item.scored.reference for item in rows])):  # fmt: skip
            if all(one is not None for one in lists):
                batch[name] = joined(lists)
        return batch | {"items": tuple(rows)}


def micro_batches(rollout: Rollout, method: MethodSettings, rows: int, count: int, pad: int) -> list[list[Item]]:
    """The items of a rollout in `count` micro-batches of up to `rows` groups, with about as many tokens each. Groups without
    variance are left out; a micro-batch that is left without any has one token to learn nothing from.
    """
    items = [
        [Item(at, group.prompt_ids, one, weight_of(one, method, rollout.tokens, rollout.completions), group.row)
         for one in group.completions]
        for at, group in enumerate(rollout.groups) if group.std
    ]  # fmt: skip
    lengths = [len(some[0].prompt_ids) + sum(len(item.scored.ids) for item in some) for some in items]
    parts = samplers.balance_micro_batches(range(len(items)), lengths, rows)
    filler = [Item(-1, [pad], Scored([pad], [0.0], False, "", reference=[0.0]), 0.0)]
    return [[item for at in part for item in items[at]] for part in parts] + [filler] * (count - len(parts))


OF_LOSS = ("advantages", "weights", "drawn", "old", "reference", "items")
"""What the loss takes of a micro-batch, and not the model."""


# ------------------------------------------------------------------------------------------------------- the trainer


class RolloutSteps(ResumableTrainer):
    """Put before transformers' trainer as a base, it makes a rollout of each step's prompts, trains on it, and evaluates to the
    rewards of greedy completions.
    """

    cut = staticmethod(lambda inputs: list(inputs["items"]))
    rollout: Rollout
    names: list[str]
    """Of the rewards."""
    sums: Any = 0.0
    """Over trained tokens since the last log line: OF_TOKENS, in float64."""
    before_step: Any = 0.0
    """The same before this step."""

    # ------------------------------------------------------------------------------------------ a step

    def get_batch_samples(self, *args, **kwargs):
        batches, _ = super().get_batch_samples(*args, **kwargs)
        self.before_step = self.sums
        entries = [entry for batch in batches for entry in batch["prompts"] if entry["row"]]
        try:
            self.rollout.settle(self.state.global_step, entries)
        except Interrupted:  # it will be made again, by the same weights
            self.end_step()
            return [], None
        rows, pad = self.ctx.settings.trainer.per_device_train_batch_size, self.ctx.tokenizer.pad_token_id
        parts = micro_batches(self.rollout, self.ctx.settings.method, rows, len(batches), pad)
        return [self.data_collator(part) for part in parts], 1

    def training_step(self, model, inputs, *args, **kwargs):
        self.tokens_seen = self.tokens_seen + metrics.count_tokens(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def repeat_step(self):
        self.sums = self.before_step

    def row_numbers(self, inputs):
        return [item.row_number for item in inputs["items"] if item.row_number]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        import torch

        method, items, weights = self.ctx.settings.method, inputs["items"], inputs["weights"]
        found = token_log_probs(model, _of_model(inputs), method.temperature)
        old = inputs.get("old", found.detach())
        if "old" not in inputs and method.num_iterations > 1:
            for item, values in zip(items, _by_item(found.detach(), items), strict=True):
                item.scored.old = values
        losses, clipped = token_losses(found, old, inputs["advantages"], method)
        kl = kl_from(inputs["reference"], found) if method.beta else torch.zeros_like(found)
        counted = (weights > 0).double()
        gap = (found.detach() - inputs["drawn"]).abs() if "old" not in inputs else torch.zeros_like(found)
        parts = [torch.ones_like(counted), gap, clipped.double(), kl.detach()]
        self.sums = self.sums + torch.stack([(counted * part).sum() for part in parts])
        # The gradients of several processes are averaged.
        return ((losses + method.beta * kl) * weights).sum() * processes.world_size()

    def floating_point_ops(self, inputs):
        return 0

    # ------------------------------------------------------------------------------------------ held-out prompts

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        from transformers.trainer_utils import EvalLoopOutput

        data, names = self.ctx.prepared.eval, self.names
        rows = [data[i] for i in range(processes.rank(), len(data), processes.world_size())]
        groups = self.rollout.greedy(rows)
        facts = zip(*processes.gathered(rollouts.facts_of(groups, names)), strict=True)
        rewards = processes.gathered([group.completions[0].reward for group in groups])
        dealt = [some[turn] for turn in range(len(rewards[0])) for some in rewards if turn < len(some)]
        held_out_rows.write_rewards(self.loop.folder, self.state.global_step, dealt)
        means = rollouts.means_of([sum(parts) for parts in facts], names)
        found = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items() if name not in rollouts.OF_GROUPS}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=found, num_samples=len(data))

    # ------------------------------------------------------------------------------------------ the log line

    def take_line(self, *args, **kwargs):
        super().take_line(*args, **kwargs)
        facts = processes.gathered([*_listed(self.sums), *self.rollout.take_facts()])
        self.line.numbers["facts"] = [sum(parts) for parts in zip(*facts, strict=True)]
        self.sums = 0.0

    def log(self, logs, *args, **kwargs):
        method, final = self.ctx.settings.method, self.loop.recorder.final
        if "loss" in logs and self.written is not None:
            trained, gap, clipped, kl, *facts = self.written.numbers["facts"]
            logs |= rollouts.means_of(facts, self.names)
            logs |= {"sampler_gap": gap / trained} if trained else {}
            logs |= {"clipped": clipped / trained} if trained and method.num_iterations > 1 else {}
            logs |= {"kl": kl / trained} if trained and method.beta else {}
        super().log(logs, *args, **kwargs)
        if logs.get("sampler_gap", 0.0) > FAR and "sampler_differs_at" not in final:
            final["sampler_differs_at"] = self.state.global_step
            log.warning(
                "Step %d: tokens were drawn with log probabilities %.2f nats from those in the training, on the mean: the "
                "model computes otherwise when it completes, and its rewards are those of another one. "
                "hint: model.attn_implementation=eager", self.state.global_step, logs["sampler_gap"],
            )  # fmt: skip

    def components(self):
        return super().components() | {"rollout": self.rollout, "token_sums": _TokenSums(self)}

    # ------------------------------------------------------------------------------------------ the order of prompts

    def _get_train_sampler(self, train_dataset=None):
        sampler, rows = super()._get_train_sampler(train_dataset), self.args.per_device_train_batch_size
        settings, method, count = self.ctx.settings, self.ctx.settings.method, len(self.ctx.prepared.train)
        if method.num_iterations > 1:
            sampler = samplers.settle_order(sampler, count)
        sampler = samplers.share_rows(sampler, count, rows)
        sizes = rows * settings.trainer.gradient_accumulation_steps, rows
        if method.num_iterations == 1:
            return sampler
        repeated = samplers.RepeatedSteps(sampler, sizes, method.num_iterations, count)
        self.epoch_rows = len(samplers.RepeatedSteps(range(count), sizes, method.num_iterations, count))
        return repeated


def build_trainer(ctx: RunContext, model: Any, loop: Loop) -> Any:
    """A trainer over the prompts of `ctx.prepared`; it goes on from `loop.checkpoint` if there is one.

    The loss of a step is the sum over its completions' tokens, each with its weight, in however many micro-batches.
    """
    import transformers

    class Trainer(RolloutSteps, transformers.Trainer):
        pass

    settings, data, tokenizer, method = ctx.settings, ctx.prepared, ctx.tokenizer, ctx.settings.method
    plan = acceleration.settle(model, settings, data, tokenizer.pad_token_id, ctx.plan)
    rewards = load_rewards(method)
    args = training_arguments(settings, loop.folder, data.eval is not None, plan)
    strategy.settle_device(args)
    splits = {"train": data.train} | ({"eval": data.eval} if data.eval is not None else {})
    several = method.num_iterations > 1
    splits = {name: samplers.with_filler(split, tokenizer.pad_token_id, several, **BLANK) for name, split in splits.items()}
    layout = _choose_layout(model, plan, settings, data, tokenizer.pad_token_id)
    trainer = Trainer(model=model, args=args, data_collator=CompletionCollator(layout), train_dataset=splits["train"],
                      eval_dataset=splits.get("eval"), processing_class=tokenizer)  # fmt: skip
    strategy.settle_accelerator(trainer.accelerator, trainer.model)
    trainer.plan, trainer.names = plan, [reward.name for reward in rewards]
    trainer.shown = (*SHOWN, *(f"reward/{name}" for name in trainer.names))
    trainer.padding_free_collator = PaddingFreeCollator(tokenizer.pad_token_id, layout.longest) if plan.padding_free else None
    trainer.model_accepts_loss_kwargs = True  # so that transformers does not divide by the micro-batches once more
    reference = functools.partial(_add_reference, trainer, settings) if method.beta else None
    trainer.rollout = Rollout(ctx, loop.timed, Generator(model, ctx), rewards, reference)
    sft.watch(trainer, ctx, loop)
    return trainer


def _add_reference(trainer: Any, settings: Settings, groups: list[Group]) -> None:
    """Have each completion that is trained on keep its log probabilities by the model without its adapter."""
    import torch

    model, rows = trainer.model, settings.trainer.per_device_train_batch_size
    varied = [group for group in groups if group.std]
    items = [[Item(at, group.prompt_ids, one, 0.0) for one in group.completions] for at, group in enumerate(varied)]
    was_training = model.training

    def predict(batch: dict[str, Any]) -> None:
        found = token_log_probs(model, _of_model(on_device(batch, model)), settings.method.temperature)
        for item, values in zip(batch["items"], _by_item(found, batch["items"]), strict=True):
            item.scored.reference = values

    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager(), without_adapter(model), \
            acceleration.evaluating(model, trainer.plan):  # fmt: skip
        for at in range(0, len(items), rows):
            batch = trainer.data_collator([item for some in items[at : at + rows] for item in some])
            trainer.oom_retry.evaluate(predict, batch)
    model.train(was_training)


def _by_item(values: Any, items: tuple[Item, ...]) -> list[list[float]]:
    """What is known of each token, [tokens], by the completions of a micro-batch."""
    return [part.tolist() for part in values.split([len(item.scored.ids) for item in items])]


def _choose_layout(model: Any, plan: Plan, settings: Settings, data: Any, pad_token_id: int) -> Any:
    """The collator of rows: prompts are shared where the model is seen to take that."""
    if not plan.padding_free:
        return padded(pad_token_id)
    longest = int(max(token_counts(split).max() for split in (data.train, data.eval) if split is not None))
    longest += settings.method.max_completion_length
    rows, shared = PaddingFreeCollator(pad_token_id, longest), SharedPromptCollator(pad_token_id, longest)
    prompts = [data.train[i]["input_ids"][-CHECKED:] for i in range(min(3, len(data.train)))]
    tried = [Item(at, ids, Scored(completion, [0.0] * len(completion), True, ""), 1.0)
             for at, ids in enumerate(prompts) for completion in (ids[: CHECKED // 2], ids[: CHECKED // 4])]  # fmt: skip
    batches = [{k: x for k, x in CompletionCollator(layout)(tried).items() if k in TAKEN} for layout in (shared, rows)]
    why_not = difference(model, plan, *batches, [len(item.scored.ids) for item in tried])
    why_not = next(filter(None, processes.gathered(why_not)), "")
    if why_not:
        log.info("Speed  each completion has its prompt to itself: %s", why_not)
    return rows if why_not else shared


BLANK = {"row": 0, "prompt_length": 1, "question": "", "reference": "", "columns": "{}"}
"""What else a row has that fills up the share of a process."""


def _of_model(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in OF_LOSS}


class _TokenSums:
    """What a trainer has summed over trained tokens since the last log line, as a component of a checkpoint."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """OF_TOKENS over all processes."""
        return {"sums": [sum(parts) for parts in zip(*processes.gathered(_listed(self.trainer.sums)), strict=True)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing from a checkpoint."""
        import torch

        if processes.is_first():
            self.trainer.sums = torch.tensor(state["sums"], dtype=torch.float64, device=self.trainer.args.device)


def _listed(sums: Any) -> list[float]:
    return sums.tolist() if hasattr(sums, "tolist") else [0.0] * len(OF_TOKENS)


def held_out_loss(ctx: RunContext, trainer: Any) -> float:
    """The mean loss of the model's own greedy completions of the first held-out prompts, which are kept in held_out.jsonl:
    there is no reference answer that exports could be compared on.
    """
    rows, source = (ctx.prepared.eval, "held_out") if ctx.prepared.eval is not None else (ctx.prepared.train, "train")
    groups = trainer.rollout.greedy([rows[i] for i in range(min(measure.ROWS, len(rows)))])
    measure.write_completions(ctx.folder, source, [
        (row, group.completions[0].ids, group.completions[0].rewards) for group, row in zip(groups, rows, strict=False)
    ])  # fmt: skip
    return sft.mean_loss(ctx, trainer)
