"""The weights that a run keeps: which ones, and their folder."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.schema import Settings
from sft.errors import SaveFailed, first_line
from sft.model import adapters
from sft.storage import atomic

log = logging.getLogger(__name__)


def note_kept(trainer: Any, recorder: Any) -> None:
    """Note which weights are kept: the best evaluation's where they were loaded back, else the last."""
    state, final = trainer.state, recorder.final
    if state.best_metric is not None:
        name = trainer.args.metric_for_best_model
        final[f"best_{name}"], final["best_step"] = state.best_metric, state.best_global_step
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
            final[name] = state.best_metric
            final["kept_step"] = state.best_global_step
            return
    final["kept_step"] = state.global_step
    if recorder.eval_step != state.global_step:  # stopped between evaluations: the last one was of other weights
        final.pop(trainer.args.metric_for_best_model, None)


def say_idle_experts(model: Any) -> None:
    """Warn of experts whose adapter is all 0 at the end, as it began: no token of the training was sent to them."""
    found: dict[str, int] = {}
    total = 0
    for name, module in model.named_modules():
        experts = getattr(module, "num_experts", 1)
        if experts > 1 and "default" in getattr(module, "lora_B", ()):  # PEFT's, on a parameter of all experts
            weight = module.lora_B["default"].weight.detach()
            block = name.removesuffix(".base_layer")
            total += experts if block not in found else 0
            found[block] = int((~weight.reshape(len(weight), -1, experts).any(1).any(0)).sum())
    if idle := sum(found.values()):
        log.warning("%d of %d experts were sent no token in training: their adapter is as it began.", idle, total)


def save_weights(model: Any, tokenizer: Any, settings: Settings, folder: Path, weights: dict[str, Any] | None = None) -> str:
    """Save the adapter to adapter/ (the whole model to model/ without one), complete or not at all; returns the name.

    `weights` are those of the whole model, where this process has only a share of them.
    """
    name = "adapter" if settings.lora.enabled else "model"
    with _plain_failure(name), atomic.new_folder(folder / name, manifest=False) as work:
        if settings.lora.enabled:
            adapters.save_adapter(model, work, weights)
        else:
            model.save_pretrained(str(work), **({"state_dict": weights} if weights is not None else {}))
        tokenizer.save_pretrained(work)
        (work / "README.md").unlink(missing_ok=True)  # PEFT's model card, with nothing of this run in it
    return name


@contextlib.contextmanager
def _plain_failure(what: str) -> Iterator[None]:
    """Turn whatever a library raises when it cannot write into one plain sentence."""
    try:
        yield
    except Exception as error:
        raise SaveFailed(f"{what}/ could not be written: {first_line(error)}") from error
