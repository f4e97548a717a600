"""The kernels of prefix-shared tree attention: partial results per item of a plan, and their merge.

A program owns a tile: up to BLOCK_M query vectors that read the same keys, which are the rows of
one item times the query heads of one key-value head ("packed" rows: row * GROUP + head). Scores and
log-sum-exps are in units of log 2.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from triton import knobs

from rollfuse.kernels._triton.compile import CompileCase
from rollfuse.kernels._triton.rows import on_device_of, tanh
from rollfuse.kernels._triton.tree_tiles import work_of
from rollfuse.kernels.tree_plan import Item, TreePlan

LOG2E = tl.constexpr(math.log2(math.e))
N_FIELDS = tl.constexpr(len(Item))
Q_BEGIN, Q_COUNT, SLOT_BEGIN, KV_LEN, KV_BEGIN, ORDINAL = (tl.constexpr(int(i)) for i in Item)
# NVIDIA copies a block ahead into a second buffer, AMD into registers, having little shared memory.
NUM_STAGES: dict[Literal["cuda", "hip"], int] = {"cuda": 3, "hip": 2}
MERGED_HEADS = 4  # by one program
# The interpreter keeps bfloat16 as integers, and its dots multiply those.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _rows_of(base, offsets, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of D elements, 0 from there to BLOCK_D, from the 64-bit offsets of their starts."""
    d = tl.arange(0, BLOCK_D)[None, :]
    at = base + offsets[:, None] + d
    return tl.load(at) if D == BLOCK_D else tl.load(at, d < D, other=0.0)


@triton.jit
def _product(a, b, c):
    """a b + c in float32, nothing rounded on the way."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


# One model has one set of strides, and whether they are multiples of 16 decides if loads are
# vectorised: they stay specialised.
@triton.jit(do_not_specialize=["n_kv_heads", "window", "scale", "cap"])
def _attend_kernel(
    q, keys, values, sinks, tiles, items, slots, positions, partials,  # inputs
    out, parts, lse,  # outputs, the last two only under HAS_PARTS
    n_kv_heads, stride_row, stride_head, scale, cap, window,
    D: tl.constexpr, GROUP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The heads of a tile are neighbours: they run together and read neighbouring memory.
    tile = tiles + 2 * (tl.program_id(0) // n_kv_heads)
    kv_head = tl.program_id(0) % n_kv_heads
    item = items + tl.load(tile).to(tl.int64) * N_FIELDS
    packed = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    here = packed < tl.load(item + Q_COUNT) * GROUP
    row = tl.load(item + Q_BEGIN) + tl.where(here, packed // GROUP, 0)
    head = kv_head * GROUP + packed % GROUP
    slots += tl.load(item + SLOT_BEGIN)
    kv_len = tl.load(item + KV_LEN)
    # Keys first..last of the item count for a row, keys low..high - 1 for any row of the tile.
    last = (tl.load(positions + row) - tl.load(item + KV_BEGIN)).to(tl.int32)
    first = tl.where(here, last - window + 1, kv_len) if HAS_WINDOW else last * 0
    last = tl.where(here, tl.minimum(last, kv_len - 1), -1)
    low = tl.maximum(-tl.max(-first, 0), 0)
    high = tl.max(last, 0) + 1
    high = tl.where(low < high, high, 0)  # no key of the item is inside any row's window
    x = _rows_of(q, row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head, D, BLOCK_D)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Outside low..high - 1 the nearest key inside stands in: a key that counts for nobody may lie
    # in memory that nobody has written, and 0 times NaN is NaN. Slots are read a block ahead, so
    # that the addresses of keys are known when the pipeline wants them.
    cols = low // BLOCK_N * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + tl.minimum(tl.maximum(cols, low), tl.maximum(high - 1, 0)))
    for _ in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
        at = (slot.to(tl.int64) * n_kv_heads + kv_head) * D
        k = _rows_of(keys, at, D, BLOCK_D)
        v = _rows_of(values, at, D, BLOCK_D)
        slot = tl.load(slots + tl.minimum(cols + BLOCK_N, high - 1))
        s = _product(x, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        if HAS_SOFTCAP:
            s = tanh(s) * cap
        s = tl.where(cols[None, :] <= last[:, None], s, -float("inf"))
        if HAS_WINDOW:
            s = tl.where(cols[None, :] >= first[:, None], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # no key has counted yet
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(m - base)
        total = total * fade + tl.sum(p, 1)
        y = _product(p.to(v.dtype), v, y * fade[:, None])
        m = top
        cols += BLOCK_N
    d = tl.arange(0, BLOCK_D)[None, :]
    n_heads = n_kv_heads * GROUP
    alone = here
    some = tl.where(total == 0.0, 1.0, total)  # a row without a key here has the weight 0
    if HAS_PARTS:
        place = tl.load(partials + row)
        alone &= tl.load(partials + row + 1) - place == 1
        place = (place + tl.load(item + ORDINAL)).to(tl.int64) * n_heads + head
        kept = here & ~alone
        tl.store(lse + place, m + tl.log2(some), kept)
    if HAS_SINKS:
        some += tl.where(alone, tl.exp2(tl.load(sinks + head) * LOG2E - m), 0.0)
    y *= (1.0 / some)[:, None]
    at = (row.to(tl.int64) * n_heads + head)[:, None] * D + d
    tl.store(out + at, y, alone[:, None] & (d < D))
    if HAS_PARTS:
        tl.store(parts + place[:, None] * D + d, y, kept[:, None] & (d < D))


@triton.jit(do_not_specialize=["n_heads"])
def _merge_kernel(
    parts, lse, sinks, rows, partials,  # inputs
    out,  # output
    n_heads,
    D: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_heads, BLOCK_H)
    row = tl.load(rows + tl.program_id(0) // n_blocks).to(tl.int64)
    head = tl.program_id(0) % n_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    here = head < n_heads
    begin = tl.load(partials + row)
    end = tl.load(partials + row + 1)
    place = begin.to(tl.int64) * n_heads + head
    m = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    for _ in range(begin, end):
        m = tl.maximum(m, tl.load(lse + place, here, other=0.0))
        place += n_heads
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = here[:, None] & (d < D)
    total = tl.zeros((BLOCK_H,), tl.float32)
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head, here, other=0.0) * LOG2E - m)
    y = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    place = begin.to(tl.int64) * n_heads + head
    for _ in range(begin, end):
        weight = tl.exp2(tl.load(lse + place, here, other=0.0) - m)
        total += weight
        y += weight[:, None] * tl.load(parts + place[:, None] * D + d, inside, other=0.0)
        place += n_heads
    tl.store(out + (row * n_heads + head)[:, None] * D + d, y / total[:, None], inside)


def _launches(width: int, itemsize: int) -> dict[int, tuple[int, int]]:
    """BLOCK_N and warps by BLOCK_M, for heads of `width` elements of `itemsize` bytes.

    Blocks of keys and values lie in shared memory, a tile's queries and results in registers: on
    sm_80 a taller tile at a width of 256 and a longer block beside 128 rows of 128 spill.
    """
    if width > 128:
        block = 32 if itemsize == 2 else 16
        return {16: (block, 4), 32: (block, 8)}
    if itemsize == 4:
        return {16: (32, 4), 64: (32, 8)}
    if width > 64:
        return {16: (64, 4), 64: (32, 8), 128: (32, 8)}
    return {16: (64, 4), 64: (64, 4), 128: (64, 8)}


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Of the scores, before and after the softcap: the last one brings them to units of log 2."""
    if softcap is None:
        return scale * LOG2E.value, 0.0
    return scale / softcap, softcap * LOG2E.value


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: TreePlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(N, Hq, D), contiguous. The last stride of `q` is 1, the slabs are contiguous."""
    n_rows, n_heads, width = q.shape
    out = q.new_empty((n_rows, n_heads, width))
    if n_rows == 0:
        return out
    launches = _launches(width, q.element_size())
    work = work_of(plan, q.device, n_heads // keys.shape[1], tuple(launches))
    parts = lse = None
    if len(work.split):
        parts = q.new_empty((plan.n_partials, n_heads, width), dtype=torch.float32)
        lse = q.new_empty((plan.n_partials, n_heads), dtype=torch.float32)
    options = {
        "D": width, "GROUP": n_heads // keys.shape[1], "BLOCK_D": _padded(width),
        "HAS_WINDOW": window is not None, "HAS_SOFTCAP": softcap is not None,
        "HAS_SINKS": sinks is not None, "HAS_PARTS": parts is not None,
        "num_stages": NUM_STAGES["cuda" if torch.version.hip is None else "hip"],
    }  # fmt: skip
    with on_device_of(q):
        for block_m, tiles in work.tiles:
            block_n, num_warps = launches[block_m]
            _attend_kernel[(len(tiles) * keys.shape[1],)](
                q, keys, values, sinks, tiles, *plan.on(q.device), out, parts, lse,
                keys.shape[1], q.stride(0), q.stride(1), *_factors(scale, softcap), window or 0,
                **options, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
            )  # fmt: skip
        if parts is not None:
            _merge(parts, lse, sinks, work.split, plan.on(q.device).partials, out)
    return out


def _merge(parts, lse, sinks, rows, partials, out) -> None:
    n_heads, width = out.shape[1:]
    _merge_kernel[(len(rows) * triton.cdiv(n_heads, MERGED_HEADS),)](
        parts, lse, sinks, rows, partials,
        out,
        n_heads,
        D=width, HAS_SINKS=sinks is not None, BLOCK_D=_padded(width), BLOCK_H=MERGED_HEADS,
        num_warps=1, num_stages=1,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Every dtype, width, height of tile and option; the default check takes plain and full."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (64, 128, 256):
            for block_m in _launches(width, 4 if dtype == "fp32" else 2):
                for options in range(16):
                    flags = [bool(options & bit) for bit in (1, 2, 4, 8)]
                    covering = options == 15 and (dtype != "fp16" or width == 128)
                    covering |= options == 0 and dtype == "bf16" and width == 128
                    for backend in NUM_STAGES:
                        case = _attend_case(dtype, width, block_m, flags, backend)
                        cases.append(case._replace(covering=covering))
        cases.append(_merge_case(dtype))
    return cases


def _attend_case(
    dtype: str, width: int, block_m: int, flags: list[bool], backend: Literal["cuda", "hip"]
) -> CompileCase:
    has_window, has_softcap, has_sinks, has_parts = flags
    block_n, num_warps = _launches(width, 4 if dtype == "fp32" else 2)[block_m]
    signature = {
        "q": f"*{dtype}", "keys": f"*{dtype}", "values": f"*{dtype}", "sinks": "*fp32",
        "tiles": "*i32", "items": "*i32", "slots": "*i32", "positions": "*i64",
        "partials": "*i32", "out": f"*{dtype}", "parts": "*fp32", "lse": "*fp32",
        "n_kv_heads": "i32", "stride_row": "i32", "stride_head": "i32",
        "scale": "fp32", "cap": "fp32", "window": "i32",
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "D": width, "GROUP": 4, "HAS_WINDOW": has_window, "HAS_SOFTCAP": has_softcap,
        "HAS_SINKS": has_sinks, "HAS_PARTS": has_parts,
        "BLOCK_D": _padded(width), "BLOCK_M": block_m, "BLOCK_N": block_n,
    }  # fmt: skip
    name = (
        f"tree attention {dtype} width {width} block {block_m}x{block_n} window {has_window} "
        f"softcap {has_softcap} sinks {has_sinks} parts {has_parts}"
    )
    stages = NUM_STAGES[backend]
    return CompileCase(
        name, _attend_kernel, signature, constexprs, num_warps, stages, backend=backend
    )


def _merge_case(dtype: str) -> CompileCase:
    signature = {
        "parts": "*fp32", "lse": "*fp32", "sinks": "*fp32", "rows": "*i32", "partials": "*i32",
        "out": f"*{dtype}", "n_heads": "i32",
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "D": 256, "HAS_SINKS": True, "BLOCK_D": 256, "BLOCK_H": MERGED_HEADS,
    }  # fmt: skip
    return CompileCase(f"tree merge {dtype}", _merge_kernel, signature, constexprs, 1, 1)
