"""Is an export still the model that was trained? Each is loaded afresh and compared on the same rows and prompts.

Two kinds of limits. A lossless format (adapter, merged 16-bit, GGUF f16) holds the trained weights up to the rounding of
16 bits: its loss may differ by LOSSLESS, its greedy completions and their rewards are the same, but for ties, and the margins
of pairs keep their signs. A quantised format changes the weights on purpose: its loss may rise by `export.max_loss_increase`
and its mean reward fall by REWARD_FALL, and how many completions stay the same and margins keep their sign is reported, not
judged. What ends a completion, what pads, the chat template and the tokens of a prompt survive in every format.
"""

from dataclasses import dataclass, field
from typing import Any

from sft.export import measure
from sft.export.measure import EvalResult, HeldOutRow

LOSSLESS = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2, "fp8": 2e-2}
"""Largest difference in loss, in nats a token, by the type that the model computes in.

Rounding SmolLM2's merged weights to float16 moved the loss by 6e-4 (docs/export.md); an 8B model's to bfloat16 by 4e-3.
"""

TIE = {"float32": 0.05, "bfloat16": 0.25, "float16": 0.25, "fp8": 0.5}
"""Two tokens whose log probabilities are closer than this are a tie: rounding may choose either."""

ROUNDED_LOSS, ROUNDED_TIE = 1e-2, 0.5
"""LOSSLESS and TIE of a rewarded run's exports, whatever type it computes in: its own completions have a few hundred tokens, on
which the rounding of weights to 16 bits does not average out.

SmolLM2 after 12 and after 40 steps of sums: the loss moved by 4e-3 and 1e-3, and 4 of 64 completions diverged, at gaps of up to
0.29 nats. Without its adapter the loss was 0.23 and 0.46 higher, and more than half diverged at gaps above 0.5.
"""

REWARD_FALL = 0.25
"""By how much of what can be earned the mean reward of a quantised export may be lower: that of two in eight completions."""


@dataclass
class Check:
    """One thing that was compared."""

    name: str
    ok: bool
    expected: str
    found: str


@dataclass
class Tokens:
    """How an artifact reads prompts and ends completions: what has to survive an export."""

    eos_token: str | None
    pad_token: str | None
    ends: list[int]
    """Ids that end a completion, sorted."""
    chat_template: str | None
    prompts: list[list[int]]
    """The ids of each prompt's text, as the artifact's own tokenizer reads it."""
    chats: list[str] = field(default_factory=list)
    """Each question in the artifact's own chat template."""


def read_tokens(tokenizer: Any, ends: Any, texts: list[str], questions: list[str]) -> Tokens:
    """The tokens of a model folder; `ends` is its generation config's `eos_token_id`."""
    ends = sorted(ends if isinstance(ends, list) else [ends]) if ends is not None else []
    chats = []
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": question}] for question in questions]
        chats = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
    return Tokens(tokenizer.eos_token, tokenizer.pad_token, ends, tokenizer.chat_template, prompts, chats)


def compare_tokens(trained: Tokens, found: Tokens, bos: int | None) -> list[Check]:
    """The special tokens, the chat template and the prompts of an artifact against those of the training."""
    doubled = sum(bos is not None and ids[:2] == [bos, bos] for ids in found.prompts)
    changed = sum(a != b for a, b in zip(trained.prompts, found.prompts, strict=True))
    prompts = f"{changed} of {len(trained.prompts)} read differently" + (f", BOS twice in {doubled}" if doubled else "")
    template = "as trained" if trained.chat_template else "none"
    checks = [
        Check("eos_token", found.eos_token == trained.eos_token, str(trained.eos_token), str(found.eos_token)),
        Check("stop_tokens", found.ends == trained.ends, str(trained.ends), str(found.ends)),
        Check("pad_token", found.pad_token == trained.pad_token, str(trained.pad_token), _pad(found)),
        Check("chat_template", _same_template(trained, found), template, "as trained" if _same_template(trained, found)
              else "another" if found.chat_template else "none"),
        Check("prompt_tokens", not changed, "as trained, BOS at most once", prompts if changed else "as trained"),
    ]  # fmt: skip
    return checks


def compare_configs(trained: dict[str, str], found: dict[str, str]) -> Check:
    """What a config says of how a model computes, by key: a cap or a scale that is lost there may move the loss of the compared
    rows by little, and that of others by much."""
    changed = [key for key in trained.keys() | found.keys() if trained.get(key) != found.get(key)]
    text = ", ".join(f"{key}={found.get(key, 'none')}" for key in sorted(changed))
    expected = ", ".join(f"{key}={trained.get(key, 'none')}" for key in sorted(changed))
    return Check("config", not changed, expected or "as trained", text or "as trained")


def lossless_limits(dtype: str, rewarded: bool) -> tuple[float, float]:
    """(LOSSLESS, TIE) of an export by the type that the model computes in, and whether the run was rewarded."""
    limits = LOSSLESS[dtype], TIE[dtype]
    return (max(limits[0], ROUNDED_LOSS), max(limits[1], ROUNDED_TIE)) if rewarded else limits


def compare_numbers(
    trained: EvalResult, found: EvalResult, dtype: str, limit: float | None, rewarded: bool = False
) -> tuple[list[Check], dict[str, Any]]:
    """(checks, facts) of the loss and the completions; `limit` None means lossless: only then the completions are judged."""
    increase = found.loss - trained.loss
    allowed, tie = lossless_limits(dtype, rewarded)
    if limit is None:
        checks = [Check("loss", abs(increase) <= allowed, f"{trained.loss:.4f} ± {allowed:g}", f"{found.loss:.4f}")]
    else:
        allowed = limit
        checks = [Check("loss", increase <= allowed, f"at most {trained.loss + allowed:.4f}", f"{found.loss:.4f}")]
    judged, completions = compare_completions("answers", trained, found, tie)
    compared = completions["answers"]
    if limit is None:
        checks.append(judged)
    if any(trained.finished[:compared]):
        expected = f"{sum(trained.finished[:compared])} of {compared} end by themselves"
        checks.append(Check("ends_answers", any(found.finished), expected, f"{sum(found.finished)} of {compared}"))
    facts = {
        "loss": round(found.loss, 6),
        "loss_increase": round(increase, 6),
        "limit": allowed,
        **completions,
        "eos_share": round(found.eos_share, 4),
    }
    return checks, facts


def compare_margins(
    rows: list[HeldOutRow], trained: list[list[float]], found: EvalResult, dtype: str, judged: bool
) -> tuple[list[Check], dict[str, Any]]:
    """(checks, facts) of pairs: each margin has the sign it has by the `trained` log probabilities. Nothing where these, or
    those of the reference, are not known.

    A margin that LOSSLESS a token could turn is noise: it is counted and not compared.
    """
    wanted, margins = (measure.margins(rows, one) for one in (trained, measure.log_probs_of(rows, found)))
    if not wanted or not margins:
        return [], {}
    noise = [LOSSLESS[dtype] * sum(row.targets) for row in rows]
    clear = [(a, b) for a, b, least in zip(wanted, margins, noise, strict=True) if abs(a) > least]
    kept = sum(a * b > 0 for a, b in clear)
    check = Check("margins", kept == len(clear), f"{len(clear)} keep their sign", f"{kept} keep their sign")
    facts = {"margins": len(clear), "margins_kept": kept, "margins_in_noise": len(wanted) - len(clear)}
    return [check] if judged else [], facts


def compare_rewards(
    trained: list[list[float]], found: list[list[float]], weights: list[float], ties: set[int], exact: bool
) -> tuple[list[Check], dict[str, Any]]:
    """(checks, facts) of the rewards of greedy completions: `exact` means that each is equal, but for those of `ties`; else the
    mean may fall by REWARD_FALL. Nothing where rewards are not known.
    """
    if not trained or not found:
        return [], {}
    pairs = list(zip(trained, found, strict=False))
    equal = {i for i, (a, b) in enumerate(pairs) if all(abs(x - y) <= 1e-6 for x, y in zip(a, b, strict=True))}
    wrong = len(pairs) - len(equal | ties)
    before, after = (mean_reward([pair[side] for pair in pairs], weights) for side in (0, 1))
    facts = {"reward": round(after, 6), "reward_change": round(after - before, 6)}
    facts |= {"rewards": len(pairs), "rewards_equal": len(equal)}
    if exact:
        text = f"{len(pairs)} equal, ties aside (mean {before:.4f})"
        return [Check("rewards", not wrong, text, f"{len(equal)} equal, {wrong} others (mean {after:.4f})")], facts
    least = before - REWARD_FALL * max(sum(map(abs, weights)), abs(before))
    return [Check("rewards", after >= least, f"a mean of at least {least:.4f}", f"{after:.4f}")], facts


def ties_of(divergences: list[dict[str, Any]], tie: float) -> set[int]:
    """The prompts whose completions diverge at a tie."""
    return {one["prompt"] for one in divergences if one["gap"] is not None and one["gap"] <= tie}


def mean_reward(rewards: list[list[float]], weights: list[float]) -> float:
    """The mean over completions of the weighted sum of their rewards."""
    return sum(w * value for one in rewards for w, value in zip(weights, one, strict=True)) / len(rewards)


def compare_completions(name: str, reference: EvalResult, found: EvalResult, tie: float) -> tuple[Check, dict[str, Any]]:
    """(check, facts) of greedy completions: the same, or they diverge at a tie, two tokens that the reference finds alike."""
    compared = min(len(reference.completions), len(found.completions))
    divergences = find_divergences(reference, found)
    ties = [one["gap"] for one in divergences if one["gap"] is not None and one["gap"] <= tie]
    equal, wrong = compared - len(divergences), len(divergences) - len(ties)
    after = f", {len(ties)} after a tie (at most {max(ties):.4f} nats apart)" if ties else ""
    text = f"{equal} the same{after}" + (f", {wrong} others" if wrong else "")
    facts = {"answers": compared, "answers_equal": equal, "near_ties": len(ties), "partings": divergences}
    facts |= {"widest_tie": max(ties)} if ties else {}
    return Check(name, not wrong, f"{compared} the same, ties aside", text), facts


def find_divergences(reference: EvalResult, found: EvalResult) -> list[dict[str, Any]]:
    """Where completions diverge: the number of the prompt, that of the first other token, and the gap there.

    The gap is how much likelier, in nats, the reference found its own token than the other one. None where one is the
    beginning of the other (an end mark was lost, or came too early), and where the other token was not among the likeliest.
    """
    divergences = []
    for i, (a, b) in enumerate(zip(reference.completions, found.completions, strict=False)):
        if a != b:
            at = next((k for k, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
            scores = reference.tops[i][at] if at < min(len(a), len(b), len(reference.tops[i])) else {}
            gap = round(scores[a[at]] - scores[b[at]], 6) if scores and b[at] in scores else None
            divergences.append({"prompt": i, "token": at, "gap": gap})
    return divergences


def _pad(tokens: Tokens) -> str:
    return f"{tokens.pad_token}" + (" (the end mark)" if tokens.pad_token == tokens.eos_token else "")


def _same_template(trained: Tokens, found: Tokens) -> bool:
    # Of one turn they may render the same, and of a conversation, of tools or with thinking off not.
    return trained.chats == found.chats and (trained.chat_template or "") == (found.chat_template or "")
