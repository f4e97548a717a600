"""What the processes of test_order.py and test_segments.py do, and ranks that are imagined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from rollfuse import (
    leave_one_out_means,
    masked_quantile,
    mean_bounded_mask,
    segment_counts,
    segment_deviations,
    segment_means,
    segment_std,
    segment_sums,
    top_k_mask,
)


def each(work: Callable[..., Any], cases: list[Any]) -> list[Any]:
    """[work(group, rank, case) for each case] on a rank; a ValueError as its text."""
    found = []
    for case in cases:
        try:
            found.append(work(dist.group.WORLD, dist.get_rank(), case))
        except ValueError as error:
            found.append(str(error))
    return found


@contextmanager
def imagined_ranks(n_ranks: int) -> Iterator[dist.ProcessGroup]:
    """A group that communicates nothing: enough for tensors without values."""
    dist.init_process_group("fake", rank=0, world_size=n_ranks, store=FakeStore())
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def outsiders() -> list[str]:
    """What each op over a group of rank 0 alone says on this rank."""
    group = dist.new_group([0])
    scores, numbers = torch.arange(4.0), torch.zeros(4, dtype=torch.int64)
    mask = torch.ones(4, dtype=torch.bool)
    found = []
    for op, *arguments in (
        (masked_quantile, scores, mask, 0.5),
        (top_k_mask, scores, mask, 1),
        (mean_bounded_mask, scores, mask, 0.5),
        (segment_counts, numbers, 1),
        (segment_sums, scores, numbers, 1),
        (segment_std, scores, numbers, 1),
        (leave_one_out_means, scores, numbers, 1),
    ):
        try:
            op(*arguments, group=group)
            found.append("nothing")
        except ValueError as error:
            found.append(str(error))
    return found


def order_statistics(group, rank, case):
    """The three ops on this rank's part of the scores; on all of them without a group.

    Returns the quantiles (n,), and masks by name.
    """
    part = slice(*case["borders"][rank : rank + 2]) if group is not None else slice(None)
    scores, mask, removable = (case[name][part] for name in ("scores", "mask", "removable"))
    quantiles = torch.stack([masked_quantile(scores, mask, q, group=group) for q in case["q"]])
    masks = {f"top {k}": top_k_mask(scores, mask, k, group=group) for k in case["k"]}
    for bound in case["bound"]:
        masks[f"mean {bound}"] = mean_bounded_mask(scores, mask, bound, group=group)
        masks[f"mean {bound}, not all removable"] = mean_bounded_mask(
            scores, mask, bound, removable=removable, group=group
        )
    return quantiles, masks


def segment_statistics(group, rank, case):
    """Every statistic of this rank's part of the values, and the gradient of a sum of them all."""
    part = slice(*case["borders"][rank : rank + 2]) if group is not None else slice(None)
    values = case["values"][part].clone().requires_grad_()
    numbers, n_segments = case["numbers"][part], case["n_segments"]
    of_segments = [
        segment_sums(values, numbers, n_segments, group=group),
        segment_means(values, numbers, n_segments, group=group),
        segment_std(values, numbers, n_segments, group=group),
        segment_std(values, numbers, n_segments, ddof=0, group=group),
    ]
    of_values = [
        segment_deviations(values, numbers, n_segments, group=group),
        leave_one_out_means(values, numbers, n_segments, group=group),
    ]
    # Every rank has the segments' results: each takes a share of their loss.
    share = 1.0 if group is None else 1.0 / dist.get_world_size(group)
    loss = share * sum((case["weights"] * found).sum() for found in of_segments)
    loss = loss + sum((values.detach().sin() * found).sum() for found in of_values)
    (gradient,) = torch.autograd.grad(loss, values)
    counts = segment_counts(numbers, n_segments, group=group)
    return [counts, *(found.detach() for found in (*of_segments, *of_values)), gradient]
