"""What plan `hold` keeps of a row's logits until their gradient is asked for.

Operands in float32 keep the logits themselves. Under half operands two bytes a logit suffice, if
they are those of the exponential: bfloat16 rounds exp(z - m) by 2^-9 of itself, where the rounded
logit would be off by up to 2^-9 |z| nats. m is the maximum of a block of columns, which a kernel
knows when it passes the block; the PyTorch path takes the whole row as one block.

A nearly flat row is the exception: its entropy's gradient is a difference of almost equal terms,
and the rounding is most of what is left. Such rows are recomputed where an entropy has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.dispatch import backend, triton_serves
from rollfuse.kernels.gemm import row_stride
from rollfuse.kernels.rows import RowStatistics, compute_dtype
from rollfuse.kernels.statistics import Exponentials, row_entropy

if backend.name != "cpu":
    from rollfuse.kernels._triton.rows import launch_parameters

# A row is flat if its mass lies near its maximum, in nats on average, on more than a token or two:
# logits of deviation s lie about s sqrt(2 log V) below it, and at s = 1 the error is 0.25 %.
_NEAR_NATS, _SPREAD_NATS = 2.0, 0.5


class Held(NamedTuple):
    """The first H slots of a pass."""

    values: Tensor  # (H, V) logits, or bfloat16 exp(z - z of the block's maximum)
    tops: Tensor | None  # (H, blocks) float32, largest pre(g) of each block; None: logits

    def exponentials(self, start: int, stop: int) -> Exponentials | None:
        """Those of the slots [start, stop), or None where logits are held."""
        if self.tops is None:
            return None
        return Exponentials(self.values[start:stop], self.tops[start:stop])


def holds_logits(operand: torch.dtype) -> bool:
    """Whether rows are held as logits; the alternative is exponentials in bfloat16."""
    return operand == compute_dtype(operand)


def n_held_blocks(vocabulary: int, device: torch.device) -> int:
    """Blocks of columns with a maximum of their own, in held exponentials."""
    if not triton_serves(device):
        return 1
    return -(-vocabulary // launch_parameters(vocabulary)[0])


def new_held(n_slots: int, vocabulary: int, operand: torch.dtype, device: torch.device) -> Held:
    """Room for `n_slots` rows, not yet written."""
    if holds_logits(operand):
        stride = row_stride(vocabulary, device)
        space = torch.empty((n_slots, stride), dtype=operand, device=device)
        return Held(space[:, :vocabulary], None)
    blocks = n_held_blocks(vocabulary, device)
    return Held(
        torch.empty((n_slots, vocabulary), dtype=torch.bfloat16, device=device),
        torch.empty((n_slots, blocks), dtype=torch.float32, device=device),
    )


def too_flat(stats: RowStatistics) -> Tensor:
    """(S,) bool: rows whose held exponentials do not serve the gradient of an entropy."""
    near = stats.spread / (1.0 + stats.rest) < _NEAR_NATS
    return near & (row_entropy(stats) > _SPREAD_NATS)
