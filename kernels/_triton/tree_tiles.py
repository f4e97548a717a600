"""What the programs of a tree attention do: lists of tiles, made on the host once per plan."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from rollfuse.kernels.tree_plan import Ints32, TreePlan


class Work(NamedTuple):
    """What the programs do for a plan, on a device."""

    tiles: list[tuple[int, torch.Tensor]]  # BLOCK_M and (tiles, 2) int32: item, first packed row
    split: torch.Tensor  # int32, the rows with more than one partial result


# By the plan's `partials` on a device, which the plans of later steps (`TreePlan.advanced`) share:
# the rows of an item stay the same, and so do its tiles. By group and heights of tiles.
_WORK: MutableMapping[torch.Tensor, dict[tuple[int, tuple[int, ...]], Work]]
_WORK = WeakTensorKeyDictionary()


def work_of(plan: TreePlan, device: torch.device, group: int, heights: tuple[int, ...]) -> Work:
    known = _WORK.setdefault(plan.on(device).partials, {})
    if (group, heights) not in known:
        lists = tile_lists(plan, group, heights)
        split = np.flatnonzero(np.diff(plan.partials) > 1).astype(np.int32)
        known[group, heights] = Work(
            [(height, _sent(tiles, device)) for height, tiles in lists.items() if len(tiles)],
            _sent(split, device),
        )
    return known[group, heights]


def _sent(array: Ints32, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def tile_lists(plan: TreePlan, group: int, heights: tuple[int, ...]) -> dict[int, Ints32]:
    """(tiles, 2) of each height: item and first packed row, those of most keys first."""
    q_begin, q_count, _, kv_len, kv_begin, _ = plan.items.astype(np.int64).T
    packed = q_count * group
    per_item = -(-packed // heights[-1])
    item = np.arange(len(packed)).repeat(per_item)
    first = np.arange(len(item)) - (per_item.cumsum() - per_item).repeat(per_item)
    first *= heights[-1]
    left = np.minimum(packed[item] - first, heights[-1])
    # The last row of a tile stands for all: what is before it counts.
    position = plan.positions[q_begin[item] + (first + left - 1) // group]
    n_keys = np.minimum(kv_len[item], position - kv_begin[item] + 1)
    order = np.argsort(-n_keys, kind="stable")
    tiles = np.stack([item, first], axis=1).astype(np.int32)[order]
    height = np.searchsorted(heights, left[order])
    return {heights[i]: tiles[height == i] for i in range(len(heights))}
