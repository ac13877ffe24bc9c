"""An export compared with what was trained: losses, tokens and completions of the same held-out rows."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft import environment
from sft.config.lora_rules import changes_base
from sft.config.schema import Bias, ExportSettings, MethodName, Settings
from sft.errors import Refusal, first_line
from sft.export import gguf, measure, merge, verify
from sft.export.rewarding import Rewarding
from sft.storage.jsonio import read_lines

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """The trained run, as an export needs it."""

    folder: Path
    settings: Settings
    record: dict[str, Any]
    weights: Path
    """adapter/, model/ or a checkpoint."""
    rows: list[measure.HeldOutRow]
    tokenizer: Any
    stop_ids: list[int]
    texts: list[str]
    """The text of each compared prompt, without the BOS that a tokenizer adds by itself."""
    tokens: verify.Tokens
    dtype: str
    """Type the model computes in: float32, bfloat16 or float16."""
    rewarding: Rewarding | None = None
    """What rewards completions, of a run with rewards."""
    why_not_rewarded: str = ""
    config: dict[str, str] = field(default_factory=dict)
    """`merge.config_of` the trained model."""

    @property
    def noise(self) -> str:
        """Whose rounding the trained model has, as verify.LOSSLESS names it: FP8 products', else that of `dtype`."""
        return "fp8" if self.settings.model.load_in_fp8 else self.dtype

    @property
    def rewarded(self) -> bool:
        """Whether it was trained on rewards of its own completions."""
        return self.settings.method.name == MethodName.grpo

    @property
    def new_tokens(self) -> int:
        """Tokens that completions have at most."""
        return self.settings.method.max_completion_length if self.rewarded else self.settings.samples.max_new_tokens

    @property
    def reward_weights(self) -> list[float]:
        """Those of `method.reward_funcs`."""
        return self.settings.method.reward_weights or [1.0] * len(self.settings.method.reward_funcs)


def attempt(report: dict, name: str, action: Callable[[], None]) -> bool:
    """Do one step of an artifact; what keeps it from being made is its status, and the others go on."""
    try:
        action()
    except Exception as error:  # safetensors, bitsandbytes and transformers each raise their own
        why = error.problems[0].why if isinstance(error, Refusal) else first_line(error)
        log.error("%s could not be made: %s", name, why)
        report["artifacts"][name] = {"status": "error", "error": why, "checks": [], "failed": ["made"]}
        return False
    return True


# ------------------------------------------------------------------------------------------------ the proof


def measure_weights(model: Any, trained: Trained, wanted: ExportSettings) -> measure.EvalResult:
    new, pad = trained.new_tokens, trained.tokenizer.pad_token_id
    found = measure.measure_torch(model, trained.rows, wanted.num_prompts, new, trained.stop_ids, pad)
    return _rewarded(trained, found)


def _rewarded(trained: Trained, found: measure.EvalResult) -> measure.EvalResult:
    """What a model does, with the rewards of its completions where these are known."""
    return replace(found, rewards=trained.rewarding(found)) if trained.rewarding else found


def base_loss(model: Any, trained: Trained) -> float | None:
    """The loss of the model without its adapter, to tell how much of the training's gain an export keeps; None without one.

    Trained bias terms are written into the base itself, so that it cannot be had back.
    """
    if not hasattr(model, "disable_adapter") or trained.settings.lora.bias != Bias.none:
        return None
    if isinstance(model.peft_config["default"].init_lora_weights, str) and changes_base(trained.settings.lora):
        return None  # a checkpoint's base is less the adapter's start
    with model.disable_adapter():
        return measure.row_losses(model, trained.rows)[0]


def reference_facts(trained: Trained, reference: measure.EvalResult, base_loss: float | None) -> dict[str, Any]:
    return {
        "loss": round(reference.loss, 6),
        "base_loss": base_loss and round(base_loss, 6),
        "rows": len(trained.rows),
        "prompts": len(reference.completions),
        "source": trained.rows[0].source,
        "eos_share": round(reference.eos_share, 4),
        "trained_loss": (trained.record.get("metrics") or {}).get("proof_loss"),
        "weights": os.path.relpath(trained.weights, trained.folder),
        **({"reward": round(verify.mean_reward(reference.rewards, trained.reward_weights), 6)} if reference.rewards else {}),
        **({"rewards_not_compared": trained.why_not_rewarded} if trained.why_not_rewarded else {}),
    }


def compare_with_training(trained: Trained, reference: measure.EvalResult) -> tuple[list[verify.Check], dict[str, Any]]:
    """The saved weights, loaded afresh, against what the training itself measured with the model in its memory.

    A checkpoint has no such measurement, unless it is the one that was kept: its row says so.
    """
    in_memory = (trained.record.get("metrics") or {}).get("proof_loss")
    if trained.weights.parent != trained.folder or in_memory is None:
        return [], {
            "loss": round(reference.loss, 6),
            "eos_share": round(reference.eos_share, 4),
            "note": "not measured in training",
        }
    # Unsloth's kernels and transformers' round bfloat16 differently; in float32 they agree.
    allowed = 2 * verify.LOSSLESS[trained.noise]
    checks = [
        verify.Check(
            "loss", abs(reference.loss - in_memory) <= allowed, f"{in_memory:.4f} ± {allowed:g}", f"{reference.loss:.4f}"
        )
    ]
    sampled = measure.EvalResult(in_memory, [], _last_samples(trained), [])
    if trained.rewarded:
        kept = [row for row in trained.rows[: len(reference.completions)] if row.labels]
        sampled = replace(sampled, completions=[measure.completion_of(row) for row in kept])
        sampled.rewards = [row.rewards for row in kept if row.rewards]
    # Several prompts were completed at once, in other batches: what rounding makes of a tie is no difference.
    judged, completions = verify.compare_completions("answers", reference, sampled, verify.TIE[trained.noise])
    if sampled.completions and trained.dtype == "float32":
        checks.append(judged)
    ties = verify.ties_of(completions["partings"], verify.TIE[trained.noise])
    rewarded, of_rewards = verify.compare_rewards(
        sampled.rewards, reference.rewards, trained.reward_weights, ties, exact=trained.dtype == "float32"
    )
    checks += rewarded
    in_memory_pairs = [row.trained_log_probs for row in trained.rows]
    signs, of_pairs = verify.compare_margins(trained.rows, in_memory_pairs, reference, trained.noise, judged=True)
    checks += signs
    facts = {
        "loss": round(reference.loss, 6),
        "loss_increase": round(reference.loss - in_memory, 6),
        "limit": allowed,
        **completions,
        **of_rewards,
        **of_pairs,
        "eos_share": round(reference.eos_share, 4),
    }
    return checks, facts


def _last_samples(trained: Trained) -> list[list[int]]:
    """The completions of the first held-out rows that the kept weights made at the end of the training, as token ids; none
    where the run was stopped before.
    """
    metrics, status = trained.record.get("metrics") or {}, trained.record.get("status")
    if status in ("stopped", "failed") and metrics.get("kept_step") != metrics.get("steps"):
        return []  # the completions of its last step are those of other weights
    lines = [line for line in read_lines(trained.folder / "samples.jsonl") if line.get("source") != "config"]
    last = {line.get("index"): line.get("completion_ids") for line in lines if line.get("step") == metrics.get("steps")}
    found = [last.get(index) for index in range(len(last))]
    return found if None not in found else []


def prove_folder(
    trained, report, reference, name: str, place: Path, limit: float | None, begun: float
) -> measure.EvalResult | None:
    """Load a model folder afresh, compare it, and note the result; returns what it does, None if it could not be measured."""
    measured = []

    def prove() -> None:
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trained.settings.model.trust_remote_code)
        ends = GenerationConfig.from_pretrained(place).eos_token_id
        questions = [row.question for row in trained.rows[: trained.settings.export.num_prompts]]
        checks = verify.compare_tokens(
            trained.tokens, verify.read_tokens(tokenizer, ends, trained.texts, questions), trained.tokenizer.bos_token_id
        )
        model = merge.load_merged(place, _torch_dtype(trained))
        checks.append(verify.compare_configs(trained.config, merge.config_of(model)))
        ids = model.generation_config.eos_token_id
        found = measure.measure_torch(
            model, trained.rows, trained.settings.export.num_prompts, trained.new_tokens,
            ids if isinstance(ids, list) else [ids] if ids is not None else [], tokenizer.pad_token_id,
        )  # fmt: skip
        facts = {"peak_memory_gib": environment.peak_memory_gib()}
        found = _rewarded(trained, found)
        measured.append(found)
        del model
        environment.release_memory()
        numbers, compared = _compare(trained, reference, found, trained.dtype, limit)
        note_result(trained, report, name, place, [*checks, *numbers], facts | compared, begun)

    attempt(report, name, prove)
    return measured[0] if measured else None


def completions_of(trained: Trained, merged: Path) -> measure.EvalResult | None:
    """What the merged 16-bit weights generate in transformers; None, with a warning, where it cannot load them."""
    rows, new = trained.rows[: trained.settings.export.num_prompts], trained.new_tokens
    try:
        model = merge.load_merged(merged, _torch_dtype(trained))
    except Exception as error:  # such as a model that needs code of its own
        log.warning("GGUF completions are not compared with the merged weights, which did not load: %s", first_line(error))
        return None
    measured = measure.measure_torch(model, rows, len(rows), new, trained.stop_ids, trained.tokenizer.pad_token_id)
    del model
    environment.release_memory()
    return measured


def compare_gguf(
    trained: Trained, reference: measure.EvalResult, rounded: measure.EvalResult | None, file: Path, limit: float | None
) -> tuple[list[verify.Check], dict[str, Any]]:
    """Measure a GGUF file in llama.cpp, and compare it with the trained model.

    One without a `limit` on the loss is lossless: it holds the merged 16-bit weights, so that it is also compared with what
    these do in transformers, `rounded`. Between the two lies no rounding of weights, only llama.cpp's arithmetic.
    """
    wanted = trained.settings.export
    found = gguf.measure(file, trained.rows, wanted.num_prompts, trained.new_tokens, trained.stop_ids, trained.texts)
    measured = _rewarded(trained, found["measurement"])
    checks = verify.compare_tokens(trained.tokens, _tokens_of_gguf(trained, found), trained.tokenizer.bos_token_id)
    # llama.cpp rounds what it multiplies f16 weights with to 16 bits, so that it is as exact as a 16-bit type of torch's.
    numbers, facts = _compare(trained, reference, measured, "float16", limit)
    if limit is None and rounded is not None:
        tie = verify.TIE[trained.dtype]
        check, completions = verify.compare_completions("answers_of_merged", rounded, measured, tie)
        numbers.append(check)
        facts |= {"as_merged": completions["answers_equal"], "partings_from_merged": completions["partings"]}
    return checks + numbers, facts


def _tokens_of_gguf(trained: Trained, found: dict[str, Any]) -> verify.Tokens:
    """The special tokens, the chat template and the tokens of texts in what llama.cpp `found` in a file. It renders no chats:
    these are the trained model's where the template is the same."""
    metadata = found["metadata"]
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "padding")]
    names = [None if token is None else trained.tokenizer.convert_ids_to_tokens(int(token)) for token in ids]
    template = metadata.get("tokenizer.chat_template")
    held = verify.Tokens(*names, sorted(found["ends"]), template, found["tokens"])
    held.chats = trained.tokens.chats if template == trained.tokens.chat_template else [template or ""]
    return held


def _compare(trained, reference, found, dtype: str, limit: float | None) -> tuple[list[verify.Check], dict[str, Any]]:
    """What an export does against what the trained model does: loss and completions, rewards of completions, and margins of
    pairs. Rewards are equal, and margins judged, where the format is lossless, which is one without a `limit` on the loss.
    """
    numbers, facts = verify.compare_numbers(reference, found, dtype, limit, trained.rewarded)
    lossless, tie = limit is None, verify.lossless_limits(dtype, trained.rewarded)[1]
    ties = verify.ties_of(verify.find_divergences(reference, found), tie)
    rewarded, of_rewards = verify.compare_rewards(
        reference.rewards, found.rewards, trained.reward_weights, ties, exact=lossless
    )
    expected = measure.log_probs_of(trained.rows, reference)
    signs, of_pairs = verify.compare_margins(trained.rows, expected, found, dtype, judged=lossless)
    return numbers + rewarded + signs, facts | of_rewards | of_pairs


def note_result(
    trained: Trained, report: dict, name: str, place: Path, checks: list[verify.Check], facts: dict, begun: float
) -> None:
    """Add one artifact's result to the report and say it in a line."""
    failed = [check.name for check in checks if not check.ok]
    size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) if place.is_dir() else place.stat().st_size
    report["artifacts"][name] = {
        "status": "failed" if failed else "ok",
        "path": os.path.relpath(place, trained.folder),
        **facts,
        "size_bytes": size,
        "seconds": round(time.monotonic() - begun, 2),
        **_gain_kept(report, name, facts),
        "checks": [asdict(check) for check in checks],
        "failed": failed,
    }
    increase = f" ({facts['loss_increase']:+.4f})" if "loss_increase" in facts else ""
    same = f", {facts['answers_equal']} of {facts['answers']} completions the same" if facts.get("answers") else ""
    same += f", {facts['margins_kept']} of {facts['margins']} margins keep their sign" if facts.get("margins") else ""
    same += f", reward {facts['reward']:.4f} ({facts['reward_change']:+.4f})" if "reward" in facts else ""
    loss = f"  loss {facts['loss']:.4f}" if "loss" in facts else ""
    log.info("       %-13s %s%s%s%s", name, "FAILED" if failed else "ok    ", loss, increase, same)
    for check in checks:
        if not check.ok:
            log.error("%s %s: expected %s, found %s", name, check.name, check.expected, check.found)


def _gain_kept(report: dict, name: str, facts: dict) -> dict[str, float]:
    """How much of the fall in loss that the training brought is left in an export; says so where it is little.

    A small update can be lost in the rounding to 4 bits while the loss stays within `export.max_loss_increase`.
    """
    reference = report["reference"]
    gain = (reference.get("base_loss") or 0.0) - reference["loss"]
    if gain <= 0 or "loss_increase" not in facts:
        return {}
    kept = round(1 - facts["loss_increase"] / gain, 4)
    if kept < 0.5 and name != "adapter":
        log.warning("%s keeps %.0f %% of what the training brought: loss %.4f before it, %.4f after.", name, 100 * kept,
                    reference["base_loss"], reference["loss"])  # fmt: skip
    return {"gain_kept": kept}


def _torch_dtype(trained: Trained) -> Any:
    import torch

    return getattr(torch, trained.dtype)
