"""The kernel that writes new keys and values to their slots: a program owns a row."""

import torch
import triton
import triton.language as tl

from rollfuse.kernels._triton.compile import CompileCase
from rollfuse.kernels._triton.rows import on_device_of


# One model has one set of widths and strides, and whether they are multiples of 16 decides if
# memory is reached in vectors: they stay specialised.
@triton.jit
def _write_kernel(
    new_keys, new_values, slots,  # inputs
    keys, values,  # outputs
    width, key_row, key_head, value_row, value_head,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        head = (at // D).to(tl.int64)
        d = at % D
        k = tl.load(new_keys + row * key_row + head * key_head + d, inside)
        v = tl.load(new_values + row * value_row + head * value_head + d, inside)
        tl.store(keys + slot * width + at, k, inside)
        tl.store(values + slot * width + at, v, inside)


def _launch(width: int) -> tuple[int, int]:
    """BLOCK and warps for `width` elements a slot."""
    block = min(1024, max(16, triton.next_power_of_2(width)))
    return block, max(1, block // 256)


def write(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Row n of the new (N, Hkv, D) goes to slot slots[n]; last strides are 1."""
    n_rows, n_kv_heads, width = new_keys.shape
    if n_rows == 0:
        return
    block, num_warps = _launch(n_kv_heads * width)
    with on_device_of(keys):
        _write_kernel[(n_rows,)](
            new_keys, new_values, slots.contiguous(),
            keys, values,
            n_kv_heads * width, *new_keys.stride()[:2], *new_values.stride()[:2],
            D=width, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Every dtype."""
    return [_case(dtype) for dtype in ("bf16", "fp16", "fp32")]


def _case(dtype: str) -> CompileCase:
    block, num_warps = _launch(1024)
    signature = {
        "new_keys": f"*{dtype}", "new_values": f"*{dtype}", "slots": "*i64",
        "keys": f"*{dtype}", "values": f"*{dtype}", "width": "i32",
        "key_row": "i32", "key_head": "i32", "value_row": "i32", "value_head": "i32",
    }  # fmt: skip
    constexprs: dict[str, object] = {"D": 128, "BLOCK": block}
    return CompileCase(f"tree write {dtype}", _write_kernel, signature, constexprs, num_warps, 1)
