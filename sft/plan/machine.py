"""The machine that a run is planned for: this one, or one with the GPU that `preflight.gpu` names."""

from dataclasses import dataclass

from sft.config.hardware import CAPACITY, CONTEXT, within_limit
from sft.config.schema import Gpu, Settings
from sft.environment import importing


@dataclass(frozen=True)
class Machine:
    """What a plan has to know of it."""

    name: str = "this machine"
    """The GPU's name, or a value of `preflight.gpu`."""
    gpu: bool = False
    """Whether a GPU trains."""
    free_gib: float | None = None
    """Memory of the GPU that the run may take now, CUDA's own included; None without one."""
    total_gib: float | None = None
    """The same of an empty GPU."""
    bfloat16: bool = False
    """Whether the GPU computes in bfloat16 by itself."""
    varlen: bool = True
    """Whether attention takes rows of various lengths: everywhere but on GPUs below compute capability 8.0."""
    fp8: bool = False
    """Whether the GPU multiplies FP8 numbers: from compute capability 8.9 on."""


def look(settings: Settings) -> Machine:
    """The machine that `settings` train on; imports torch."""
    with importing():
        import torch

    if planned := settings.preflight.gpu:
        gib, modern = within_limit(settings, CAPACITY[planned]), planned != Gpu.t4
        return Machine(planned.value, True, gib, gib, modern, modern, planned in (Gpu.l4, Gpu.h100, Gpu.h200))
    if not torch.cuda.is_available():
        return Machine()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    # What other processes hold is not there for us; what an earlier job of ours holds is.
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return Machine(
        name=torch.cuda.get_device_name(),
        gpu=True,
        free_gib=round(within_limit(settings, free / 2**30 + CONTEXT), 2),
        total_gib=within_limit(settings, total),
        bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        varlen=torch.cuda.get_device_capability() >= (8, 0),
        fp8=torch.cuda.get_device_capability() >= (8, 9),
    )
