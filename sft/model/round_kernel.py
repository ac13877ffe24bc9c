"""The rounding of sft/model/fp8.py as one kernel, for what runs uncompiled on a GPU: PyTorch's own functions take seven.
To be imported on a GPU: it imports triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl


def round_rows(x: Any, largest: float, least: float) -> tuple[Any, Any]:
    """As `fp8.round_rows`, for contiguous `x` on a GPU."""
    rows, columns = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    if rows:
        _round_row[(rows,)](x, out, scales, columns, largest, least, BLOCK=block, num_warps=8 if block > 4096 else 4)
    return out, scales


@triton.jit
def _round_row(x, out, scales, columns, largest, least, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    there = places < columns
    values = tl.load(x + row * columns + places, mask=there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), least) / largest
    tl.store(scales + row, scale)
    tl.store(out + row * columns + places, (values / scale).to(tl.float8e4nv), mask=there)
