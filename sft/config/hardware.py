"""What this machine has, or the GPU that is only planned for: processes, memory, and what bounds launching kernels."""

import importlib.util
import os

from sft.config.schema import Backend, Gpu, MethodName, Settings, Strategy


def processes_of(settings: Settings) -> int:
    """Processes that train together: those torchrun has started, else what the settings ask for."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    wanted = settings.distributed.num_processes
    return max(1, gpu_count()) if wanted == "auto" else int(wanted)


def one_process(settings: Settings) -> str:
    """The overrides that train in one process, whatever was typed of `distributed`."""
    fsdp = settings.distributed.strategy == Strategy.fsdp
    return "distributed.num_processes=1" + " distributed.strategy=ddp" * fsdp


def is_process_count(settings: Settings) -> bool:
    """Whether `distributed.num_processes` is one of the values it can have."""
    wanted = settings.distributed.num_processes
    return wanted == "auto" or (isinstance(wanted, int) and wanted >= 1)


def resolve_backend(settings: Settings) -> str:
    """`unsloth` or `transformers`: what `model.backend` comes to on this machine."""
    if settings.model.backend != Backend.auto:
        return settings.model.backend.value
    if settings.distributed.strategy == Strategy.fsdp or settings.method.name != MethodName.sft:
        return "transformers"
    if settings.model.load_in_fp8:
        return "transformers"
    plain = not (settings.lora.use_dora or settings.lora.extra)  # Unsloth has no more than plain LoRA
    if settings.preflight.gpu:  # on another machine, which has what is advised for it
        return "unsloth" if plain else "transformers"
    usable = gpu_present() and importlib.util.find_spec("unsloth") is not None and plain
    return "unsloth" if usable else "transformers"


def gpu_present() -> bool:
    """Whether an NVIDIA GPU can be used, asked of the driver without importing torch or starting CUDA."""
    return gpu_count() > 0


def gpu_count() -> int:
    """How many NVIDIA GPUs can be used, asked in the same way."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
        return min(count, len(visible.split(","))) if visible else count
    except Exception:  # no driver, no library, or no right to ask: every one of them means no usable GPU
        return 0


PIECE = 2**27
"""Logits held at a time: 0.5 GiB in float32."""

LAUNCH_BOUND = 9e11
"""Weights of a layer times tokens up to which the host is the slower one: launching a layer's kernels takes 4.3 ms, and an H100
makes 4 operations a weight and token at some 7e14 a second. Twice as much costs nothing but memory, so no host is too slow."""

GIB = 2**30

CAPACITY = {Gpu.t4: 14.74, Gpu.l4: 22.16, Gpu.a100_40: 39.56, Gpu.a100_80: 79.15, Gpu.h100: 79.11, Gpu.h200: 139.8}
"""GiB that torch reports as `total_memory`; a little less than the number on the box."""

CONTEXT = 0.6
"""GiB that CUDA, cuBLAS and the kernels take outside of torch's own count."""


def within_limit(settings: Settings, gib: float) -> float:
    """GiB of a GPU with `gib` that the run may take: no more than `trainer.max_memory_gib`."""
    return min(gib, settings.trainer.max_memory_gib or gib)
