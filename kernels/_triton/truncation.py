"""The kernel of `rollfuse.kernels.truncation`: a program owns a row and finds where it is cut.

Distances from the maximum are not negative, so their bits, read as integers, have their order. The
last one kept is found three bits at a time, each time by one pass over the row, which stays in the
L2 cache, that sums what lies before eight borders.
"""

import torch
import triton
import triton.language as tl

from rollfuse.kernels._triton.compile import CompileCase
from rollfuse.kernels._triton.rows import NUM_STAGES, launch_parameters, on_device_of, prepare
from rollfuse.kernels.rows import Transform

# (largest BLOCK, warps): eight sums an element leave room for fewer elements a thread.
LAUNCH = ((256, 4), (1024, 16))

# The bits of infinity.
INFINITY = tl.constexpr(0x7F800000)
# 31 bits, three at a time: from 28 down to 1, and once more the last.
PASSES = tl.constexpr(11)


@triton.jit
def _distance(
    logits, bias, m, start, lanes, n_cols, stride_col, pre_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """How far a block of pre(g) is below m; +inf outside the row."""
    cols = start + lanes
    inside = cols < n_cols
    g = tl.load(logits + cols.to(tl.int64) * stride_col, inside, other=-float("inf"))
    return m - prepare(g, cols, inside, bias, pre_scale, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def _mass(distance, f, last, IS_COUNT: tl.constexpr):
    """What each of a block counts for: 1, or exp(z - z_top) up to the bits of the last one."""
    if IS_COUNT:
        return tl.full(distance.shape, 1.0, tl.float32)
    within = distance.to(tl.uint32, bitcast=True) <= last
    return tl.where(within, tl.exp(-distance * f), 0.0)


@triton.jit
def _last_kept(
    logits, bias, m, f, share, last, lanes, n_cols, stride_col, pre_scale,
    IS_COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bits of the largest distance before which there is less than `share`."""
    found = tl.full((), 0, tl.uint32)
    steps = tl.arange(0, 8).to(tl.uint32)
    for i in range(PASSES):
        shift = tl.maximum(28 - 3 * i, 0).to(tl.uint32)
        borders = found + (steps << shift)
        sums = tl.zeros((8, BLOCK), tl.float32)
        for start in range(0, n_cols, BLOCK):
            distance = _distance(
                logits, bias, m, start, lanes, n_cols, stride_col, pre_scale, HAS_BIAS, HAS_SOFTCAP
            )
            mass = _mass(distance, f, last, IS_COUNT)
            bits = distance.to(tl.uint32, bitcast=True)
            sums += tl.where(bits[None, :] < borders[:, None], mass[None, :], 0.0)
        # The sums rise with the borders, and nothing lies before the first.
        below = tl.sum((tl.sum(sums, 1) < share).to(tl.int32), 0)
        found += tl.maximum(below - 1, 0).to(tl.uint32) << shift
    return tl.minimum(found, INFINITY)


@triton.jit
def _top(
    logits, bias, lanes, n_cols, stride_col, pre_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's largest pre(g), 0 where all of it is -inf."""
    m = tl.full((), -float("inf"), tl.float32)
    for start in range(0, n_cols, BLOCK):
        # pre(g) itself: its distance from 0, turned round.
        minus = _distance(
            logits, bias, 0.0, start, lanes, n_cols, stride_col, pre_scale, HAS_BIAS, HAS_SOFTCAP
        )
        m = tl.maximum(m, tl.max(-minus, 0))
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit(do_not_specialize=["pre_scale"])
def _centre_kernel(
    logits, factor, bias, reach, support,  # inputs
    centred,  # output
    n_cols, stride_row, stride_col, pre_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    f = tl.load(factor + row)
    lanes = tl.arange(0, BLOCK)
    m = _top(logits, bias, lanes, n_cols, stride_col, pre_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK)
    border = tl.load(reach + row)
    kept = tl.zeros((BLOCK,), tl.float32)
    first = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, n_cols, BLOCK):
        distance = _distance(
            logits, bias, m, start, lanes, n_cols, stride_col, pre_scale, HAS_BIAS, HAS_SOFTCAP
        )
        is_out = distance > border
        kept = tl.maximum(kept, tl.where(is_out, 0.0, distance))
        first = tl.minimum(first, tl.where(is_out, distance, float("inf")))
    beyond = tl.min(first, 0)
    middle = 0.5 * (tl.max(kept, 0) + beyond) * f
    # Where nothing is cut that has a probability there is no border; NaN stays what it is.
    nothing = tl.load(support + row) + float("inf")
    tl.store(centred + row, tl.where(beyond < float("inf"), middle, nothing))


@triton.jit(do_not_specialize=["pre_scale"])
def _cut_kernel(
    logits, factor, bias, top_k, top_p,  # inputs
    support,  # output
    n_cols, stride_row, stride_col, pre_scale,
    HAS_K: tl.constexpr, HAS_P: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    f = tl.load(factor + row)
    lanes = tl.arange(0, BLOCK)
    m = _top(logits, bias, lanes, n_cols, stride_col, pre_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK)
    last = tl.full((), INFINITY, tl.uint32)
    if HAS_K:
        k = tl.load(top_k + row)
        of_k = _last_kept(
            logits, bias, m, f, k.to(tl.float32), last, lanes, n_cols, stride_col, pre_scale,
            True, HAS_BIAS, HAS_SOFTCAP, BLOCK,
        )  # fmt: skip
        last = tl.where(k >= n_cols, last, of_k)
    if HAS_P:
        p = tl.load(top_p + row)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_cols, BLOCK):
            distance = _distance(
                logits, bias, m, start, lanes, n_cols, stride_col, pre_scale, HAS_BIAS, HAS_SOFTCAP
            )
            total += _mass(distance, f, last, False)
        of_p = _last_kept(
            logits, bias, m, f, p * tl.sum(total), last, lanes, n_cols, stride_col, pre_scale,
            False, HAS_BIAS, HAS_SOFTCAP, BLOCK,
        )  # fmt: skip
        last = tl.where(p < 1.0, tl.minimum(of_p, last), last)
    tl.store(support + row, last.to(tl.float32, bitcast=True) * f)


def cut_rows(
    logits: torch.Tensor,
    transform: Transform,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> torch.Tensor:
    """(S,) nats that top-k (S,) int64 and top-p (S,) float32 leave."""
    n_rows, n_cols = logits.shape
    support = torch.empty_like(transform.factor)
    if n_rows == 0:
        return support
    block, num_warps = launch_parameters(n_cols, LAUNCH)
    with on_device_of(logits):
        _cut_kernel[(n_rows,)](
            logits, transform.factor, transform.bias, top_k, top_p, support,
            n_cols, logits.stride(0), logits.stride(1), transform.pre_scale or 0.0,
            HAS_K=top_k is not None, HAS_P=top_p is not None,
            HAS_BIAS=transform.bias is not None, HAS_SOFTCAP=transform.pre_scale is not None,
            BLOCK=block, num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return support


def centre_rows(
    logits: torch.Tensor, transform: Transform, reach: torch.Tensor, support: torch.Tensor
) -> torch.Tensor:
    """(S,) nats in the middle between the last token kept and the first one cut.

    reach: (S,) how far pre(g) may be below the maximum; support: (S,) what stays where none is cut.
    """
    n_rows, n_cols = logits.shape
    centred = torch.empty_like(support)
    if n_rows == 0:
        return centred
    block, num_warps = launch_parameters(n_cols, LAUNCH)
    with on_device_of(logits):
        _centre_kernel[(n_rows,)](
            logits, transform.factor, transform.bias, reach, support, centred,
            n_cols, logits.stride(0), logits.stride(1), transform.pre_scale or 0.0,
            HAS_BIAS=transform.bias is not None, HAS_SOFTCAP=transform.pre_scale is not None,
            BLOCK=block, num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return centred


def compile_cases() -> list[CompileCase]:
    """Every dtype, block and combination of options; both cuts, and all at the largest block."""
    cases = [
        _centre_case(dtype, *launch) for dtype in ("fp32", "bf16", "fp16") for launch in LAUNCH
    ]
    for dtype in ("fp32", "bf16", "fp16"):
        for block, num_warps in LAUNCH:
            for options in range(16):
                has_k, has_p, *of_head = (bool(options & bit) for bit in (1, 2, 4, 8))
                if not (has_k or has_p) or (dtype != "fp32" and any(of_head)):
                    continue  # a head's logits are a float32 workspace
                covering = options == 3 or (dtype == "fp32" and options == 15)
                flags = [has_k, has_p, *of_head]
                cases.append(_case(dtype, block, num_warps, flags, covering))
    return cases


def _case(dtype: str, block: int, num_warps: int, flags: list[bool], covering: bool) -> CompileCase:
    has_k, has_p, has_bias, has_softcap = flags
    signature = {
        "logits": f"*{dtype}", "factor": "*fp32", "bias": "*fp32", "top_k": "*i64",
        "top_p": "*fp32", "support": "*fp32",
        "n_cols": "i32", "stride_row": "i32", "pre_scale": "fp32",
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "stride_col": 1, "HAS_K": has_k, "HAS_P": has_p, "HAS_BIAS": has_bias,
        "HAS_SOFTCAP": has_softcap, "BLOCK": block,
    }  # fmt: skip
    name = f"cut {dtype} block {block} k {has_k} p {has_p} bias {has_bias} softcap {has_softcap}"
    return CompileCase(name, _cut_kernel, signature, constexprs, num_warps, NUM_STAGES, covering)


def _centre_case(dtype: str, block: int, num_warps: int) -> CompileCase:
    is_workspace = dtype == "fp32"  # with a head's bias and softcap
    signature = {
        "logits": f"*{dtype}", "factor": "*fp32", "bias": "*fp32", "reach": "*fp32",
        "support": "*fp32", "centred": "*fp32",
        "n_cols": "i32", "stride_row": "i32", "pre_scale": "fp32",
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "stride_col": 1, "HAS_BIAS": is_workspace, "HAS_SOFTCAP": is_workspace, "BLOCK": block,
    }  # fmt: skip
    name = f"centre {dtype} block {block}"
    covering = (block, num_warps) == LAUNCH[-1]
    return CompileCase(name, _centre_kernel, signature, constexprs, num_warps, NUM_STAGES, covering)
