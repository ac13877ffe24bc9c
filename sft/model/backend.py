"""Which backend loads the model, in which type, with how much of the GPU's memory."""

from dataclasses import replace
from typing import Any

from sft.config.eligibility import why_padded
from sft.config.hardware import CAPACITY, CONTEXT, resolve_backend, within_limit
from sft.config.schema import Backend, Dtype, Gpu, ModelSettings, Settings
from sft.model.hub import read_config

FLAT_KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose rows were laid end to end in tests/integration/test_padding_free.py."""

ROOM = 0.45
"""Share of a GPU's memory that the weights may take."""

TRAINED = 18.0
"""Bytes of a weight where all are trained: itself, its gradient and two moments in float32, and a copy to compute with."""


def import_backend(settings: Settings) -> str:
    """Import the backend before anything else touches transformers or TRL (Unsloth patches both), and name it."""
    backend = resolve_backend(settings)
    if backend == "unsloth":
        import unsloth  # noqa: F401
    return backend


def settle_backend(settings: Settings) -> Settings:
    """The settings with a backend's name in place of `model.backend=auto`; imports torch.

    On a GPU with Unsloth installed the choice is between it and transformers with rows end to end, which is several times
    faster (docs/benchmarks.md) but keeps more in memory: transformers where the model is of a kind that was tried and leaves
    room.
    """
    backend = resolve_backend(settings)
    if settings.model.backend == Backend.auto and backend == "unsloth" and _has_room(settings):
        backend = "transformers"
    return replace(settings, model=replace(settings.model, backend=Backend(backend)))


def has_kernel(settings: Settings) -> bool:
    """Whether the GPU that is trained on has attention for rows of various lengths: compute capability 8.0 or higher."""
    if settings.preflight.gpu:
        return settings.preflight.gpu != Gpu.t4
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _has_room(settings: Settings) -> bool:
    """Whether rows can lie end to end, and the weights leave enough of the GPU for them."""
    if why_padded(settings, "transformers") or settings.trainer.gradient_checkpointing or not has_kernel(settings):
        return False
    config = read_config(settings.model)
    if config.get("model_type") not in FLAT_KINDS:
        return False
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    wide = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * wide * (heads + config.get("num_key_value_heads", heads))
    layers = config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])
    ends = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    each = 2.0 if settings.lora.enabled else TRAINED
    packed = 0.57 if settings.model.load_in_4bit else 1.0 if settings.model.load_in_8bit else each
    if settings.preflight.gpu:
        capacity = CAPACITY[settings.preflight.gpu]
    else:
        import torch

        capacity = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return layers * packed + ends * each <= ROOM * within_limit(settings, capacity) * 2**30


def limit_memory(settings: Settings) -> None:
    """Let torch take no more of this process's GPU than `trainer.max_memory_gib`, what CUDA itself takes included."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        limit = settings.trainer.max_memory_gib
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - CONTEXT) / total) if limit else 1.0)


def uses_checkpointing(settings: Settings) -> bool:
    """Whether activations are recomputed: as set, or only where a GPU's memory is the limit."""
    import torch

    wanted = settings.trainer.gradient_checkpointing
    return torch.cuda.is_available() if wanted is None else wanted


def unsloth_checkpointing(settings: Settings) -> str | bool:
    """The same for Unsloth, whose own kind also moves activations to the CPU's memory while they wait."""
    return "unsloth" if uses_checkpointing(settings) else False


def torch_dtype(model: ModelSettings) -> Any:
    """The torch type that `model.dtype` comes to on this machine."""
    import torch

    if model.dtype != Dtype.auto:
        return getattr(torch, model.dtype.value)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
