"""Launch configurations planted for test_portability.py: one good kernel, the others each wrong."""

import triton
import triton.language as tl

from rollfuse.kernels._triton.compile import CompileCase


@triton.jit
def double(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, 2.0 * tl.load(X + at, mask=at < n), mask=at < n)


@triton.jit
def does_not_compile(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y, tl.load(X) @ n)


@triton.jit
def square_product(X, Y, n, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(X + at)
    tl.store(Y + at, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def transposed(X, Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(Y + at, tl.trans(tl.load(X + at)))


@triton.jit
def pipelined_product(X, Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(n):
        x = tl.load(X + at + i * BLOCK * BLOCK)
        y = tl.load(X + at + (i + n) * BLOCK * BLOCK)
        total += tl.dot(x, y, input_precision="ieee")
    tl.store(Y + at, total)


def _case(kernel, num_warps: int, *, covering: bool = True, **constexprs) -> CompileCase:
    types = {"X": "*fp32", "Y": "*fp32", "n": "i32"}
    return CompileCase(kernel.__name__, kernel, types, constexprs, num_warps, 1, covering)


def compile_cases() -> list[CompileCase]:
    return [
        _case(double, 4, BLOCK=1024),
        _case(double, 8, covering=False, BLOCK=2048),
        _case(does_not_compile, 4, BLOCK=1024),
        _case(transposed, 1, BLOCK=128)._replace(name="spills_32_lanes"),
        _case(transposed, 2, BLOCK=256)._replace(name="spills_128_lanes"),
        _case(pipelined_product, 8, BLOCK=128)._replace(name="shared", num_stages=4),
        _case(square_product, 4, BLOCK=32, PRECISION="tf32")._replace(name="tf32"),
        _case(square_product, 4, BLOCK=32, PRECISION="ieee")._replace(name="ieee"),
    ]
