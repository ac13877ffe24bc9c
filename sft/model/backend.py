"""The backend that loads the model, imported in time, and the GPU memory that it may take."""

from typing import Any

from sft.config.hardware import CONTEXT
from sft.config.schema import Settings
from sft.environment import importing, quiet_libraries, seed_everything


def _import_backend(backend: str) -> None:
    """Import Unsloth before anything else touches transformers or TRL: it patches both."""
    if backend == "unsloth":
        import unsloth  # noqa: F401


@importing()
def prepare_libraries(backend: str, seed: int) -> None:
    """Import and seed what a run computes with."""
    _import_backend(backend)
    quiet_libraries()
    seed_everything(seed)


def limit_memory(settings: Settings) -> None:
    """Let torch take no more of this process's GPU than `trainer.max_memory_gib`, what CUDA itself takes included."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        limit = settings.trainer.max_memory_gib
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - CONTEXT) / total) if limit else 1.0)


def torch_dtype(name: str) -> Any:
    """The torch type of this name."""
    import torch

    return getattr(torch, name)


def unsloth_checkpointing(wanted: bool) -> str | bool:
    """Recomputed activations by Unsloth's own kind, which also moves them to the CPU's memory while they wait."""
    return "unsloth" if wanted else False
