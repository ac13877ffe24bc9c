"""What keeps a run from padding-free batches, compiled layers or CUDA graphs. Imports nothing heavy."""

from sft.config.schema import Backend, MethodName, Settings, Strategy, TrainerSettings
from sft.errors import Problem

OWN_LOSS = ("loss_type", "label_smoothing_factor", "use_liger_kernel", "neftune_noise_alpha", "packing", "padding_free",
            "completion_only_loss", "assistant_only_loss", "chunk_size", "group_by_length",
            "router_aux_loss_coef")  # fmt: skip
"""Options of `trainer.extra` that change the loss or what a batch is; they keep TRL's own way."""

COMPILED_FROM = 500_000
"""Tokens of training from which compiling the layers pays. Compiling takes some 15 s of an 8B shape, and saves a
third of a replayed step."""


def is_compiled(trainer: TrainerSettings, tokens: float) -> bool:
    """Whether the layers of a run of so many tokens are compiled, if it is padding-free on a GPU."""
    return trainer.torch_compile or (trainer.torch_compile is None and tokens >= COMPILED_FROM)


def why_padded(settings: Settings, backend: str) -> str:
    """What in the settings keeps a run from padding-free batches; empty if nothing does. A model may have reasons too."""
    if settings.trainer.padding_free is False:
        return "trainer.padding_free=false"
    if backend != "transformers":
        return "model.backend=unsloth has a way of its own"
    if settings.distributed.strategy == Strategy.fsdp:
        return "distributed.strategy=fsdp wraps the layers"
    own = [key for key in OWN_LOSS if settings.trainer.extra.get(key)]
    if own:
        return f"trainer.extra.{own[0]} has a loss or a batch of its own"
    if settings.model.attn_implementation.value != "auto":
        return f"model.attn_implementation={settings.model.attn_implementation.value} is set"
    return ""


def check_speed(settings: Settings, backend: str, gpu: bool) -> list[Problem]:
    """What asks for padding-free batches, compiled layers or CUDA graphs where they cannot be had."""
    backend = "transformers" if settings.model.backend == Backend.auto else backend  # which it can come to
    trainer, why, problems = settings.trainer, why_padded(settings, backend), []
    if trainer.padding_free and why:
        fix = "trainer.padding_free=null   pads where it has to"
        problems.append(Problem("trainer.padding_free=true", f"Batches cannot be padding-free: {why}.", fix))
    if not gpu:
        why = "this machine has no GPU, and only for one are kernels compiled and launched"
    if 1 <= (trainer.max_memory_gib or 0) < float("inf") and not gpu:
        why_not = "It limits a GPU's memory, and this machine has no GPU."
        problems.append(Problem(f"trainer.max_memory_gib={trainer.max_memory_gib:g}", why_not, "trainer.max_memory_gib=null"))
    if trainer.torch_compile and why:
        why_not = f"It needs padding-free batches on a GPU, but {why}."
        problems.append(Problem("trainer.torch_compile=true", why_not, "trainer.torch_compile=null"))
    why = why or why_eager(settings)
    if trainer.cuda_graphs and why:
        why_not = f"It needs padding-free batches on a GPU, each computed like the one before, but {why}."
        problems.append(Problem("trainer.cuda_graphs=true", why_not, "trainer.cuda_graphs=null"))
    return problems


def check_padded(trainer: TrainerSettings, why: str) -> list[Problem]:
    """What asks for padding-free batches, compiled layers or CUDA graphs of a model whose rows are padded because of `why`."""
    if trainer.padding_free:
        return [Problem("trainer.padding_free=true", why, "trainer.padding_free=null   pads where it has to")]
    keys = [key for key in ("torch_compile", "cuda_graphs") if getattr(trainer, key)]
    return [Problem(f"trainer.{key}=true", f"It needs rows without padding: {why}", f"trainer.{key}=null") for key in keys]


def why_eager(settings: Settings) -> str:
    """What in the settings keeps micro-batches from being captured as CUDA graphs; empty if nothing does."""
    if settings.method.name == MethodName.grpo:
        return "method=grpo has other completions in every micro-batch"
    if settings.lora.enabled and settings.lora.lora_dropout:
        return f"lora.lora_dropout={settings.lora.lora_dropout:g} draws anew in every micro-batch"
    return ""
