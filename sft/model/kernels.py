"""Kernels in Triton for what PyTorch has no single one for: rounding to FP8, FP8 products of few rows, and rotary positions.

To be imported on a GPU: it imports triton. What is compiled by torch does without them.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

FEW = 64
"""Rows of a product that `multiply` takes: a tile of the tensor cores has as many, however few there are."""


def round_rows(x: Any, largest: float, least: float) -> tuple[Any, Any]:
    """As `fp8.round_rows`, for contiguous `x` on a GPU: PyTorch's own functions take seven kernels."""
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


def multiply(x: Any, scales: Any, weight: Any, of_weight: Any, dtype: Any, low: Any = None, up: Any = None) -> Any:
    """At most `FEW` rows `x` [rows, columns] times the transposed `weight` [outputs, columns], both e4m3 with scales [rows, 1]
    and [outputs, 1], plus `low` [rows, rank] @ `up` [rank, outputs]: what a LoRA layer computes, as one kernel. All contiguous.

    Each weight is read once, in 1.3 to 2 times the time that the memory of an H200 needs for it; cuBLAS takes 1.5 to 4.3 times,
    because its blocks leave most of the GPU idle. Here there is about one block of outputs for each multiprocessor, with the
    widths of an 8B model.
    """
    (rows, columns), outputs = x.shape, len(weight)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    rank = low.shape[1] if low is not None else 0
    places, memory = _of_device(x.device)
    wide = next((wide for wide in (32, 64) if wide * places >= outputs), 128)
    deep = 128 if wide == 128 else 256
    stages = max(2, min(6 if deep == 256 else 4, memory // ((FEW + wide) * deep)))
    _few_rows[(triton.cdiv(outputs, wide),)](
        x, scales, weight, of_weight, low, up, out, rows, columns, outputs, rank,
        ROWS=FEW, WIDE=wide, DEEP=deep, RANK=max(16, triton.next_power_of_2(rank)) if rank else 0,
        num_stages=stages, num_warps=4,
    )  # fmt: skip
    return out


@functools.cache
def _of_device(device: Any) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may take."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin - 4096


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x, scales, weight, of_weight, low, up, out, rows, columns, outputs, rank,
    ROWS: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, DEEP)
    output = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    there, wanted = (row < rows)[:, None], (output < outputs)[None, :]
    of_x = x + row[:, None] * columns + column[None, :]
    of_w = weight + output[None, :].to(tl.int64) * columns + column[:, None]
    total = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for begin in range(0, columns, DEEP):
        left = column < columns - begin
        a = tl.load(of_x + begin, mask=there & left[None, :], other=0.0)
        b = tl.load(of_w + begin, mask=wanted & left[:, None], other=0.0)
        total = tl.dot(a, b, total)
    total *= tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    total *= tl.load(of_weight + output, mask=output < outputs, other=0.0)[None, :]
    if RANK:
        r = tl.arange(0, RANK)
        a = tl.load(low + row[:, None] * rank + r[None, :], mask=there & (r < rank)[None, :], other=0.0)
        b = tl.load(up + r[:, None] * outputs + output[None, :], mask=(r < rank)[:, None] & wanted, other=0.0)
        total = tl.dot(a, b, total)
    tl.store(out + row[:, None] * outputs + output[None, :], total.to(out.dtype.element_ty), mask=there & wanted)


def rotate(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """Rotary positions of one token a row, as transformers' `apply_rotary_pos_emb` has them, in one kernel and not ten.

    q, k: [rows, heads, 1, width], of any strides but the last; cos, sin: [rows, 1, width], or of one row for all.
    """
    rows, heads, _, width = q.shape
    shared = k.shape[1]
    out = torch.empty(rows, heads + shared, 1, width, dtype=q.dtype, device=q.device)
    step = cos.stride(0) if len(cos) > 1 else 0
    _rotate[(rows, heads + shared)](
        q, k, cos, sin, out, heads, width // 2, q.stride(0), q.stride(1), k.stride(0), k.stride(1), step,
        HALF=triton.next_power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    return out[:, :heads], out[:, heads:]


@triton.jit
def _rotate(q, k, cos, sin, out, heads, half, q_row, q_head, k_row, k_head, of_row, HALF: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, HALF)
    there = place < half
    if head < heads:  # noqa: SIM108  (Triton knows no other form)
        x = q + row * q_row + head * q_head
    else:
        x = k + row * k_row + (head - heads) * k_head
    first = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x + half + place, mask=there, other=0.0).to(tl.float32)
    at = row * of_row + place
    cos_1 = tl.load(cos + at, mask=there, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + at + half, mask=there, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + at, mask=there, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + at + half, mask=there, other=0.0).to(tl.float32)
    to = out + (row * tl.num_programs(1) + head) * half * 2 + place
    tl.store(to, (first * cos_1 - second * sin_1).to(out.dtype.element_ty), mask=there)
    tl.store(to + half, (second * cos_2 + first * sin_2).to(out.dtype.element_ty), mask=there)
