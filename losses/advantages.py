"""Advantages of sequences compared within their group: rewards and group ids in, (B,) out.

A group is the responses to one prompt: any size, any order, any integer as id. What papers disagree
on is named in the keywords. All rewards of a group equal gives advantages of exactly 0, which lets
the ops skip its tokens: statistics are in float64 about the group's least reward, so 0.1 three
times has no spread. Nothing here reads a tensor on a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.segments import (
    leave_one_out_deviations,
    number_groups,
    segment_counts,
    segment_deviations,
    segment_std,
)


def grpo_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    scale_by_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
    singleton_baseline: float | None = None,
) -> Tensor:
    """A = (r - mean) / (std + eps) within each group; without the division for Dr. GRPO.

    std = sqrt(sum (r - mean)^2 / (n - ddof)). A group without spread gets exactly 0.

    Args:
        rewards: (B,) float, one a sequence.
        groups: (B,) int64 or int32, equal for sequences of one group.
        scale_by_std: False leaves out the division (and then ddof and eps say nothing).
        ddof: 1 for the sample's standard deviation, 0 for the population's.
        eps: added to the standard deviation, >= 0.
        singleton_baseline: a group of one has nothing to be compared with: None gives it 0, a
            number gives it r - singleton_baseline, not divided.

    Returns:
        (B,) float32, constants.

    Raises:
        TypeError, ValueError: a shape, dtype, device or keyword is wrong, or (on the CPU) a reward
            is not finite. On a device TokenBatch reports it.

    Source: Shao et al., DeepSeekMath (GRPO), arXiv 2402.03300, section 4.1.2; without the division
    Liu et al., Dr. GRPO, arXiv 2503.20783.
    """
    checks.need(ddof in (0, 1), "ddof", "0 or 1", ddof)
    checks.need(0.0 <= eps < math.inf, "eps", "a finite value >= 0", eps)
    _check(rewards, groups, singleton_baseline)
    values, numbers = rewards.detach().double(), number_groups(groups)
    advantages = segment_deviations(values, numbers, len(values))
    if scale_by_std:
        std = segment_std(values, numbers, len(values), ddof=ddof)[numbers]
        # Without spread the numerator is 0: any divisor but 0 will do.
        advantages = advantages / torch.where(std > 0, std + eps, 1.0)
    return _finish(advantages, values, numbers, singleton_baseline)


def rloo_advantages(
    rewards: Tensor, groups: Tensor, *, singleton_baseline: float | None = None
) -> Tensor:
    """Leave-one-out: A_i = r_i - mean of the group's other rewards = n / (n - 1) (r_i - mean).

    Args:
        rewards: (B,) float, one a sequence.
        groups: (B,) int64 or int32, equal for sequences of one group.
        singleton_baseline: a group of one has nothing to be compared with: None gives it 0, a
            number gives it r - singleton_baseline.

    Returns:
        (B,) float32, constants.

    Raises:
        TypeError, ValueError: a shape, dtype, device or keyword is wrong, or (on the CPU) a reward
            is not finite. On a device TokenBatch reports it.

    Source: Ahmadian et al., Back to basics (RLOO), arXiv 2402.14740.
    """
    _check(rewards, groups, singleton_baseline)
    values, numbers = rewards.detach().double(), number_groups(groups)
    advantages = leave_one_out_deviations(values, numbers, len(values))
    return _finish(advantages, values, numbers, singleton_baseline)


def _finish(
    advantages: Tensor, values: Tensor, numbers: Tensor, singleton_baseline: float | None
) -> Tensor:
    if singleton_baseline is not None:
        is_alone = segment_counts(numbers, len(values))[numbers] == 1
        advantages = torch.where(is_alone, values - singleton_baseline, advantages)
    return advantages.float()


def _check(rewards: Tensor, groups: Tensor, singleton_baseline: float | None) -> None:
    checks.need_float(rewards, "rewards")
    checks.need(rewards.dim() == 1, "rewards", "shape (B,)", tuple(rewards.shape))
    checks.need_int(groups, "groups")
    checks.need_shape(groups, tuple(rewards.shape), "groups", "one group id a reward")
    checks.need_same_device(groups, rewards, "groups", "rewards")
    if singleton_baseline is not None:
        good = math.isfinite(singleton_baseline)
        checks.need(good, "singleton_baseline", "a finite value or None", singleton_baseline)
    if checks.may_read(rewards):
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        checks.need(not bad, "rewards", "finite values", f"others at {bad[:8]}")
