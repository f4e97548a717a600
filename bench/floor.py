"""Floors: the bare GEMMs of a step of `bench head`, and the bare reading of bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rollfuse.bench.cases import Case
from rollfuse.kernels import gemm


def floor_steps(case: Case, device: torch.device) -> dict[str, Callable[[], None]]:
    """The bare GEMMs of the step into preallocated outputs: whole, by rows and by columns.

    No loss can be computed with less GEMM work, so the fastest of these is the floor. By rows, the
    logits lie once densely and once in rows an odd multiple of 64 bytes long, as ours do.
    """
    dtype = case.torch_dtype
    hidden = torch.randn(case.tokens, case.hidden, device=device).to(dtype)
    weight = torch.randn(case.vocab, case.hidden, device=device).to(dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    space = torch.randn(_workspace_elements(case), device=device).to(dtype)

    def by_rows(size: int, stride: int) -> Callable[[], None]:
        def step() -> None:
            for start in range(0, case.tokens, size):
                h = hidden[start : start + size]
                logits = space[: len(h) * stride].view(len(h), stride)[:, : case.vocab]
                torch.mm(h, weight.T, out=logits)
                torch.mm(logits, weight, out=dhidden[start : start + size])
                if not case.frozen_head:
                    # beta 0 ignores what the output held, so the first chunk needs no zeros.
                    dweight.addmm_(logits.T, h, beta=0.0 if start == 0 else 1.0)

        return step

    def by_columns(size: int) -> Callable[[], None]:
        def step() -> None:
            for start in range(0, case.vocab, size):
                w = weight[start : start + size]
                logits = space[: case.tokens * len(w)].view(case.tokens, len(w))
                torch.mm(hidden, w.T, out=logits)
                dhidden.addmm_(logits, w, beta=0.0 if start == 0 else 1.0)
                if not case.frozen_head:
                    torch.mm(logits.T, hidden, out=dweight[start : start + size])

        return step

    steps: dict[str, Callable[[], None]] = {}
    padded = gemm.row_stride(case.vocab, torch.device("cpu"))
    for size in (256, 1024, case.tokens):
        if size <= case.tokens and size * padded <= len(space):
            steps[f"{size} rows"] = by_rows(size, case.vocab)
            steps[f"{size} padded rows"] = by_rows(size, padded)
    for size in (4096, 16384):
        if size < case.vocab and size * case.tokens <= len(space):
            steps[f"{size} columns"] = by_columns(size)
    return steps


def reading_steps(n_bytes: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """So many bytes through the memory and nothing else: added up, or half of them copied.

    Nothing that reads each of them once can be faster than the faster of these.
    """
    n = max(2, n_bytes // 4)
    source = torch.ones(n, device=device)
    target = torch.empty(n // 2, device=device)

    def copy() -> None:
        target.copy_(source[: n // 2])

    return {"read": source.sum, "copy": copy}


def product_step(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A GEMM of the best shape there is, and its FLOPs: what no product outruns."""
    n = 1024
    operand = torch.randn(n, n, device=device).to(dtype)
    product = torch.empty_like(operand)
    return lambda: torch.mm(operand, operand, out=product), 2 * n**3


def _workspace_elements(case: Case) -> int:
    """Elements of the floor's workspace: all logits, or 2 GiB of them where that is less."""
    most = (2 << 30) // case.torch_dtype.itemsize
    stride = gemm.row_stride(case.vocab, torch.device("cpu"))
    return max(min(case.tokens * stride, most), stride * min(256, case.tokens))
