"""What the ops ask of the other ranks of a process group; without a group, nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rollfuse.kernels import checks


def need_member(group: object) -> None:
    """Raise ValueError unless `group` is a process group with this process in it.

    Elsewhere torch hands out a number in its place, and passes over the collectives on it.
    """
    outside = group == dist.GroupMember.NON_GROUP_MEMBER
    got = "one that it is not in" if outside else type(group).__name__
    good = isinstance(group, dist.ProcessGroup)
    checks.need(good, "group", "a process group that this process is in", got)


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`tensor` summed over the ranks of `group`, equal on all of them; differentiable.

    The gradient is that of the sum of all ranks' losses: the backward communicates as well, so
    either all ranks run it or none does.
    """
    if group is None:
        return tensor
    need_member(group)
    apply = cast(Callable[..., Tensor], _SumOver.apply)
    return apply(tensor, group)


def least_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The elementwise least of `tensor` over the ranks of `group`; a constant."""
    least = tensor.detach()
    if group is not None:
        need_member(group)
        least = least.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return least


def sum_of_lower_ranks(count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """() the sum of `count` () over the ranks of `group` below this one."""
    if group is None:
        return torch.zeros_like(count)
    need_member(group)
    rank = dist.get_rank(group)
    counts = count.new_zeros(dist.get_world_size(group))
    counts[rank] = count
    return sum_over(counts, group)[:rank].sum()


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> Any:
        return sum_over(dtotal, ctx.group), None
