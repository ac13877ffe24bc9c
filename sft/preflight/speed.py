"""Training speeds that were measured, to estimate how long a run may take. No figure is made up for what was not measured."""

import re
from dataclasses import dataclass

from sft.plan.memory import LoadPlan


@dataclass(frozen=True)
class Speed:
    """One measurement."""

    device: str
    """A value of `preflight.gpu`, or `cpu`."""
    parameters: float
    backend: str
    bits: int
    checkpointing: bool
    rows: int
    """Rows in one micro-batch."""
    tokens_per_second: float
    """Non-padding tokens a second of training steps."""
    padding_free: bool = False
    """Whether it was padding-free."""
    compiled: bool = False
    fp8: bool = False
    """Whether the frozen layers were in FP8."""


SOURCE = {
    "h100": "rows of 190 tokens, Llama 3 8B, r 16, one H100 80 GB with a slow host",
    "h200": "rows of 190 tokens, Llama 3 8B's shape, r 16, one H200",
    "cpu": "2 rows of 256 tokens, SmolLM2-135M, r 16, two busy cores of an AMD EPYC",
}
"""How the figures of a device were measured."""

MEASURED = [
    Speed("h100", 8e9, "unsloth", 4, True, 2, 606),
    Speed("h100", 8e9, "unsloth", 4, True, 8, 1590),
    Speed("h100", 8e9, "unsloth", 4, False, 8, 2240),
    Speed("h100", 8e9, "unsloth", 16, True, 2, 836),
    Speed("h100", 8e9, "unsloth", 16, False, 2, 1010),
    Speed("h100", 8e9, "unsloth", 16, False, 8, 2510),
    Speed("h100", 8e9, "unsloth", 16, False, 32, 5050),
    Speed("h100", 8e9, "unsloth", 16, False, 64, 5340),
    Speed("h100", 8e9, "transformers", 4, True, 2, 351),
    Speed("h100", 8e9, "transformers", 16, False, 8, 2300),
    Speed("h100", 8e9, "transformers", 16, False, 8, 8160, padding_free=True),
    Speed("h100", 8e9, "transformers", 4, False, 8, 8470, padding_free=True),
    Speed("h100", 8e9, "transformers", 16, False, 8, 11900, padding_free=True, compiled=True),
    Speed("h100", 8e9, "transformers", 16, False, 32, 14750, padding_free=True, compiled=True),
    Speed("h100", 8e9, "transformers", 4, False, 8, 10770, padding_free=True, compiled=True),
    Speed("h100", 8e9, "transformers", 4, False, 32, 14380, padding_free=True, compiled=True),
    Speed("h200", 8e9, "transformers", 16, False, 8, 13810, padding_free=True, compiled=True),
    Speed("h200", 8e9, "transformers", 16, False, 32, 16030, padding_free=True, compiled=True),
    Speed("h200", 8e9, "transformers", 16, False, 8, 18360, padding_free=True, compiled=True, fp8=True),
    Speed("h200", 8e9, "transformers", 16, False, 32, 21260, padding_free=True, compiled=True, fp8=True),
    Speed("cpu", 134.5e6, "transformers", 32, False, 2, 153),
]


def measured_speed(device: str | None, parameters: int, load: LoadPlan, rows: int) -> float | None:
    """Tokens a second of the nearest measurement on the same device, with as many parameters within a quarter, loaded the same
    way; None where there is none. More rows than were measured are no faster than those."""
    alike = [
        m
        for m in MEASURED
        if m.device == device
        and abs(parameters / m.parameters - 1) < 0.25
        and (m.backend, m.bits, m.checkpointing) == (load.backend, load.bits, load.checkpointing)
        and (load.every_n_layers == 1 or not load.checkpointing)
        and (m.padding_free, m.compiled, m.fp8) == (load.padding_free, load.compiled, load.fp8 > 0)
        and m.rows <= 2 * rows
    ]
    return max(alike, key=lambda m: (min(m.rows, rows), -m.rows)).tokens_per_second if alike else None


def device_of(name: str) -> str | None:
    """The value of `preflight.gpu` for a GPU's own name, as `NVIDIA H100 80GB HBM3`; None for another kind."""
    words = re.findall(r"[A-Z]+\d+", name.upper())
    for kind in ("h200", "h100", "a100", "l4", "t4"):
        if kind.upper() in words:
            return kind if kind != "a100" else "a100_40" if "40GB" in name.upper() else "a100_80"
    return None
