"""Rollouts: what the model that trains says to the prompts of a step, what that is rewarded with, and how it compares.

    prompts -> completions -> rewards -> advantages -> rollouts.jsonl

Everything here is a function of the weights, the prompts and counters, so that a resumed run makes the same rollouts again.
"""

import functools
import logging
import statistics
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sft.config.schema import MethodSettings, ScaleRewards, Settings
from sft.distributed import group as processes
from sft.distributed import watchdog
from sft.errors import first_line, refuse
from sft.generation import by_generate
from sft.generation.decoding import Completion, Decoder, fits
from sft.generation.drawing import Drawing, key_of
from sft.generation.samples import inference_mode
from sft.model.structure import base_of
from sft.rewards import Reward, RewardFault, reward_row
from sft.storage.jsonio import append_jsonl
from sft.training.context import RunContext
from sft.training.oom import free_memory

log = logging.getLogger(__name__)

JUDGED = 16
"""Further prompts that are completed before a run is refused: the few of a small step may all be too hard."""

STD_FLOOR = 1e-4
"""Added to the standard deviation that advantages are divided by, as TRL's GRPOTrainer has it."""


@dataclass
class Scored:
    """One completion of a prompt."""

    ids: list[int]
    log_probs: list[float]
    """Of each token, by the model that drew it."""
    ended: bool
    text: str
    """Without its end mark."""
    rewards: list[float] = field(default_factory=list)
    """By each function of `method.reward_funcs`."""
    reward: float = 0.0
    """Their weighted sum."""
    advantage: float = 0.0
    old: list[float] | None = None
    """Log probabilities of the tokens by the weights at the first update, where more follow."""
    reference: list[float] | None = None
    """The same by the reference, where `method.beta` is above 0."""


@dataclass
class Group:
    """A prompt and its completions."""

    row: int
    """The prompt's number in the data."""
    prompt_ids: list[int]
    completions: list[Scored]

    @property
    def std(self) -> float:
        """Standard deviation of the rewards, with one less than their number below the line; exactly 0 where all are equal."""
        rewards = [one.reward for one in self.completions]
        return statistics.stdev(rewards) if max(rewards) > min(rewards) else 0.0


class Generator:
    """Completes prompts with the weights in memory."""

    def __init__(self, model: Any, ctx: RunContext):
        self.model, self.settings, self.tokenizer, self.stop_ids = model, ctx.settings, ctx.tokenizer, ctx.stop_ids
        self.rows, self.places = ctx.plan.rollout_rows, ctx.plan.rollout_places
        """Completions at once, fewer where these do not fit into the memory, and the tokens of the longest with its prompt."""
        self.decoder: Any = None

    def complete(
        self, prompts: list[list[int]], check_stop: Callable[[], None], keys: list[list[tuple[int, int]]] | None = None
    ) -> list[list[Completion]]:
        """The completions of each prompt, up to `method.max_completion_length`: one for each of its `keys`
        (generation/drawing.py), or the likeliest tokens. Raises torch.OutOfMemoryError where one prompt does not fit.
        """
        import torch

        copies, found = len(keys[0]) if keys else 1, []
        with inference_mode(self.model, self.settings):
            while len(found) < len(prompts):
                count = max(1, min(len(prompts) - len(found), self.rows // copies))
                part = slice(len(found), len(found) + count)
                try:
                    found += self._complete(prompts[part], check_stop, keys[part] if keys else None, copies)
                except torch.OutOfMemoryError as error:
                    least, many = self.settings.method.num_generations, self.rows
                    if many <= least:
                        raise
                    traceback.clear_frames(error.__traceback__)  # they hold what has to be freed
                    self.rows, self.decoder = max(least, many // 2), None
                    free_memory()
                    log.warning("%d completions at once do not fit into the memory; from now on %d.", many, self.rows)
                except RuntimeError as error:  # what CUDA says where a step cannot be captured
                    if self.model.device.type != "cuda" or isinstance(self.decoder, by_generate.Decoder):
                        raise
                    log.warning("Rollouts are slow: they come from transformers' generate. %s", first_line(error))
                    self.decoder = by_generate.Decoder(base_of(self.model), self.rows, self.places)
        return found

    def _complete(self, prompts: list[list[int]], check_stop: Any, keys: Any, copies: int) -> list[list[Completion]]:
        limit, base = self.settings.method.max_completion_length, base_of(self.model)
        if self.decoder is None:
            kind = functools.partial(Decoder, trained=True) if fits(base) else by_generate.Decoder
            self.decoder = kind(base, self.rows, self.places)
        drawing = Drawing(self.settings.method.temperature, keys) if keys else None
        return self.decoder.complete(prompts, self.stop_ids, limit, check_stop, drawing)

    def text_of(self, completion: Completion) -> str:
        """A completion's text without its end mark."""
        return self.tokenizer.decode(completion.ids[:-1] if completion.ended else completion.ids)


def score(
    entries: list[dict[str, Any]], completions: list[list[Completion]], generator: Generator, rewards: list[Reward]
) -> list[Group]:
    """Groups of completions with their rewards. `entries` are the prompts' rows of the prepared data.

    Raises RewardFault where a reward function fails.
    """
    groups = [
        Group(entry["row"], list(entry["input_ids"]),
              [Scored(one.ids, one.log_probs, one.ended, generator.text_of(one)) for one in some])
        for entry, some in zip(entries, completions, strict=True)
    ]  # fmt: skip
    texts = [one.text for group in groups for one in group.completions]
    rows = [
        reward_row(entry, "ended" if one.ended else "length", len(one.ids))
        for entry, group in zip(entries, groups, strict=True)
        for one in group.completions
    ]
    found = zip(*(reward.score(texts, rows) for reward in rewards), strict=True)
    for one, values in zip((one for group in groups for one in group.completions), found, strict=True):
        one.rewards = list(values)
        one.reward = sum(reward.weight * value for reward, value in zip(rewards, values, strict=True))
    return groups


def compare(groups: list[Group], method: MethodSettings, others: list[float]) -> None:
    """Give each completion its advantage: its reward less the mean of its group, divided as `method.scale_rewards` says.
    `others` are the rewards of the whole step, those of other processes included.
    """
    of_step = statistics.stdev(others) if method.scale_rewards == ScaleRewards.batch else 0.0
    for group in groups:
        mean = statistics.fmean(one.reward for one in group.completions)
        scale = {ScaleRewards.group: group.std + STD_FLOOR, ScaleRewards.batch: of_step + STD_FLOOR, ScaleRewards.none: 1.0}
        for one in group.completions:
            one.advantage = (one.reward - mean) / scale[method.scale_rewards] if group.std else 0.0


def keys_of(settings: Settings, rollout: int, entries: list[dict[str, Any]]) -> list[list[tuple[int, int]]]:
    """By what each completion of each prompt is drawn in the `rollout`th rollout of a run."""
    return [
        [key_of(settings.seed, rollout, entry["row"], i) for i in range(settings.method.num_generations)] for entry in entries
    ]


def line_of(group: Group, step: int, names: list[str], prompt: str) -> dict[str, Any]:
    """A line of rollouts.jsonl."""
    return {
        "step": step,
        "row": group.row,
        "prompt": prompt,
        "completions": [
            {"text": one.text, "finish": "ended" if one.ended else "length", "tokens": len(one.ids),
             "rewards": dict(zip(names, one.rewards, strict=True)), "reward": round(one.reward, 6),
             "advantage": round(one.advantage, 6)}
            for one in group.completions
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is counted

SHOWN = ("reward", "ended", "length", "reward_std", "zero_groups", "entropy")

OF_GROUPS = ("reward_std", "zero_groups", "entropy")
"""Of SHOWN, what one greedy completion a prompt says nothing of."""


def facts_of(groups: list[Group], names: list[str]) -> list[float]:
    """Sums over groups: their number, their completions and tokens, then what `means_of` makes means of."""
    scored = [one for group in groups for one in group.completions]
    return [
        float(len(groups)),
        float(len(scored)),
        float(sum(len(one.ids) for one in scored)),
        float(sum(one.reward for one in scored)),
        float(sum(one.ended for one in scored)),
        float(sum(group.std for group in groups)),
        float(sum(not group.std for group in groups)),
        -float(sum(sum(one.log_probs) for one in scored)),
        *(float(sum(one.rewards[at] for one in scored)) for at in range(len(names))),
    ]


def means_of(facts: list[float], names: list[str]) -> dict[str, float]:
    """What is logged of sums that `facts_of` gave, by the names of SHOWN and of the rewards; empty without completions."""
    groups, completions, tokens, reward, ended, std, zero, surprise, *of_rewards = facts
    if not completions:
        return {}
    found = {"reward": reward / completions, "ended": ended / completions, "length": tokens / completions,
             "reward_std": std / groups, "zero_groups": zero / groups, "entropy": surprise / max(1.0, tokens)}  # fmt: skip
    return found | {f"reward/{name}": total / completions for name, total in zip(names, of_rewards, strict=True)}


# --------------------------------------------------------------------------------------------- the rollout of a step


class Rollout:
    """The rollout that a trainer trains on, as a component of a checkpoint."""

    def __init__(
        self,
        ctx: RunContext,
        timed: Callable[[str], Any],
        generator: Generator,
        rewards: list[Reward],
        add_reference: Callable[[list[Group]], None] | None,
    ):
        """`add_reference` has completions keep their log probabilities by the reference, where one is needed."""
        self.ctx, self.timed, self.generator, self.rewards = ctx, timed, generator, rewards
        self.add_reference, self.method = add_reference, ctx.settings.method
        self.names = [reward.name for reward in rewards]
        self.check_stop = ctx.stop.check if processes.world_size() == 1 else _go_on  # others would wait for this process
        self.number, self.groups = -1, []
        self.tokens = self.completions = 0
        """Of the step in all processes: what its loss is a mean over."""
        self.idle = 0
        """Rollouts in a row in which no group had variance."""
        self.facts = facts_of([], self.names)
        """Since the last log line."""
        self.tried = False
        """Whether the rewards of this session were seen to give the same value again."""

    def settle(self, step: int, entries: list[dict[str, Any]]) -> None:
        """Have the rollout that the step after `step` trains on: the one before, or a new one of the prompts `entries`.

        Raises Interrupted where the run has to stop, RewardFault where a reward fails, and Refusal if the first one shows
        that there is nothing to learn.
        """
        number = step // self.method.num_iterations
        if number == self.number:
            return
        with self.timed("rollouts"):
            keys = keys_of(self.ctx.settings, number, entries)
            prompts = [entry["input_ids"] for entry in entries]
            completions = self.generator.complete(prompts, self.check_stop, keys) if prompts else []
            groups = score(entries, completions, self.generator, self.rewards)
            self._try_rewards(entries[:1], completions[:1], groups[:1])
            self._compare(groups)
            if step == 0:
                self._judge_first(groups)
            if self.add_reference:
                self.add_reference(groups)
        self.number, self.groups = number, groups
        self.facts = [a + b for a, b in zip(self.facts, facts_of(groups, self.names), strict=True)]
        lines = [line_of(group, step + 1, self.names, self.generator.tokenizer.decode(group.prompt_ids)) for group in groups]
        for line in (line for some in processes.gathered(lines) for line in some):
            if processes.is_first():
                append_jsonl(self.ctx.folder / "rollouts.jsonl", line)
        self.ctx.recorder.tracking.log_rollouts(lines)

    def greedy(self, entries: list[dict[str, Any]]) -> list[Group]:
        """A group of one completion for each of some rows of the data: the likeliest tokens, with their rewards."""
        completions = self.generator.complete([entry["input_ids"] for entry in entries], self.check_stop) if entries else []
        return score(entries, completions, self.generator, self.rewards)

    def take_facts(self) -> list[float]:
        """`facts_of` the rollouts since the last call."""
        found, self.facts = self.facts, facts_of([], self.names)
        return found

    def _try_rewards(self, entries: list[dict], completions: list, groups: list[Group]) -> None:
        """Score the first group of a session twice: a resumed run would differ by a reward that depends on when it is asked."""
        if self.tried or not entries:
            return
        self.tried = True
        again = score(entries, completions, self.generator, self.rewards)
        for one, other in zip(groups[0].completions, again[0].completions, strict=True):
            for name, first, second in zip(self.names, one.rewards, other.rewards, strict=True):
                if first != second:
                    raise RewardFault(f"reward {name} gave {first:g} and then {second:g} for the same completion")

    def _compare(self, groups: list[Group]) -> None:
        """Set the advantages, and count what the loss of the step is a mean over, in all processes."""
        mine = [(one.reward, len(one.ids), one.ended) for group in groups for one in group.completions]
        found = processes.gathered((mine, sum(1 for group in groups if group.std)))
        everyone, varied = [one for some, _ in found for one in some], sum(count for _, count in found)
        compare(groups, self.method, [reward for reward, *_ in everyone])
        self.completions = len(everyone)
        self.tokens = sum(n for _, n, ended in everyone if ended or not self.method.mask_truncated_completions)
        self.idle = 0 if varied else self.idle + 1
        if self.idle >= self.method.max_idle_steps:
            stop = self.ctx.stop
            stop.failure = stop.failure or (
                f"in {self.idle} steps in a row all completions of a prompt had the same reward: there is nothing to learn "
                f"(method.max_idle_steps={self.method.max_idle_steps})"
            )

    def _judge_first(self, groups: list[Group]) -> None:
        """Say what the first rollout shows, or further prompts where it shows nothing. Raises Refusal if there is nothing."""
        data, rank = self.ctx.prepared.train, processes.rank()
        more = [data[i] for i in range(min(len(data), JUDGED))][rank :: processes.world_size()]
        if any(processes.gathered(any(group.std for group in groups))):
            more = []
        prompts, keys = [entry["input_ids"] for entry in more], keys_of(self.ctx.settings, -1, more)
        completions = self.generator.complete(prompts, self.check_stop, keys) if more else []
        judged = [*groups, *score(more, completions, self.generator, self.rewards)]
        facts = processes.gathered(facts_of(judged, self.names))
        count, completions, _, reward, ended, _, zero, *_ = (sum(parts) for parts in zip(*facts, strict=True))
        mean, limit = reward / completions, self.method.max_completion_length
        log.info(
            "Rollout  mean reward %.3f; %d of %d prompts have completions of different rewards; %.0f %% of the completions "
            "ended by themselves", mean, count - zero, count, 100 * ended / completions,
        )  # fmt: skip
        if zero < count:
            return
        if ended:
            log.warning(
                "No prompt of the first rollout has completions of different rewards: such a step teaches nothing. "
                "hint: a reward that some completions get, or lora.start_from=<an SFT run>"
            )
            return
        if not processes.is_first():
            watchdog.wait_for_end()  # all found the same; the first process refuses for all
        why = (
            f"The first rollout has nothing to learn from: all {completions:.0f} completions of {count:.0f} prompts were cut "
            f"at {limit} tokens, and those of each prompt have the same reward (mean {mean:.3f}). Nothing was trained."
        )
        fix = f"method.max_completion_length={4 * limit}\nlora.start_from=<an SFT run>   or other rewards"
        raise refuse(f"method.max_completion_length={limit}", why, fix)

    def state_dict(self) -> dict[str, Any]:
        """The rollout, if more updates follow by it, and what is counted; of every process."""
        groups = [asdict(group) for group in self.groups] if self.method.num_iterations > 1 else []
        mine = {"groups": groups, "facts": self.facts}
        counts = {"number": self.number if groups else -1, "tokens": self.tokens, "completions": self.completions}
        return {**counts, "idle": self.idle, "processes": processes.gathered(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rollout of a checkpoint."""
        self.number, self.tokens, self.completions = state["number"], state["tokens"], state["completions"]
        self.idle, mine = state["idle"], state["processes"][processes.rank()]
        self.groups = [
            Group(one["row"], one["prompt_ids"], [Scored(**some) for some in one["completions"]]) for one in mine["groups"]
        ]
        self.facts = mine["facts"]


def _go_on() -> None:
    """A rollout is made to its end."""
