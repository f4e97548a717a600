"""Decoding: texts that grow on a TreeCache, and the sequences that follow each of them.

A row is one distinct text; sequences that agree so far share it. Rows join when the pool has room
for what they may become, end when no sequence follows them, and are dropped to their tokens, to be
computed again later, when the pool runs out.

Legend: R rows, s sequences that go on, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rollfuse.rollout.branch import Branch
from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.tree_model import TreeModel

Ints = npt.NDArray[np.int64]

# Tokens of new texts that one pass takes up, beyond which the next text waits for the next pass.
_PREFILL = 8192


@dataclass(frozen=True, slots=True)
class Text:
    """A text that waits to be decoded, and who follows it."""

    tokens: Ints
    sequences: Ints
    made: int  # how many of its tokens are a response's


@dataclass(slots=True)
class Totals:
    """What a decoding has done so far."""

    passes: int = 0
    rows: int = 0  # computed, sum over passes
    dropped: int = 0  # texts that were given up for want of pages
    kv_read: int = 0  # keys read, and as many values, sum over passes
    kv_apart: int = 0  # what reading each row's own would have been


@dataclass(slots=True)
class Decoding:
    """The texts that are decoded together.

    Args:
        model: on a cache whose pool can hold the longest single text.
        waiting: texts in the order in which they are to start.
        longest: of a response, in tokens.
        max_batch: sequences decoded at once, None: all.
    """

    model: TreeModel
    waiting: deque[Text]
    longest: int
    max_batch: int | None = None
    totals: Totals = field(default_factory=Totals)
    branches: list[Branch] = field(default_factory=list)  # R of them, one a row
    sequence: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (s,), by row
    row: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (s,), non-decreasing
    made: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (s,) tokens of the response
    _finished: list[int] = field(default_factory=lambda: [0, 0])  # responses, tokens

    def logits(self) -> Tensor:
        """(R, V), what follows each row's text; new texts have joined before."""
        self._admit()
        logits = self.model.forward(self.branches)
        plan = self.model.cache.last_plan
        self.totals.passes += 1
        self.totals.rows += plan.n_rows
        self.totals.kv_read += plan.kv_read
        self.totals.kv_apart += int(plan.positions.sum()) + plan.n_rows
        return logits

    def advance(self, ids: Ints, goes_on: npt.NDArray[np.bool_]) -> None:
        """Append to each sequence's text its token ids[i]; those that do not go on leave."""
        self._finished[0] += int((~goes_on).sum())
        self._finished[1] += int(self.made[~goes_on].sum()) + int((~goes_on).sum())
        sequence, row, made, ids = (x[goes_on] for x in (self.sequence, self.row, self.made, ids))
        # Sorted by (row, token): sequences that still agree are neighbours.
        order = np.lexsort((ids, row))
        self.sequence, row, self.made, ids = (x[order] for x in (sequence, row, made + 1, ids))
        differs = np.ones(len(ids), dtype=bool)
        differs[1:] = (row[1:] != row[:-1]) | (ids[1:] != ids[:-1])
        self.row = differs.cumsum() - 1
        self._go_on(row[differs], ids[differs])

    def _go_on(self, parent: Ints, ids: Ints) -> None:
        """One row for each token `ids`, which follows the text of row `parent`."""
        if len(parent) != len(self.branches) or (parent != np.arange(len(parent))).any():
            self.branches = _forked(self.branches, parent)
        while self.branches:
            try:
                self.model.cache.append(self.branches, ids)
                return
            except OutOfPages:
                ids = self._drop_one(ids)

    def _drop_one(self, ids: Ints) -> Ints:
        """Drop the row with the shortest response to its tokens; the others' next tokens."""
        first = np.flatnonzero(np.diff(self.row, prepend=-1))
        made = self.made[first]
        victim = len(made) - 1 - int(made[::-1].argmin())
        branch, mine = self.branches.pop(victim), self.row == victim
        tokens = np.append(branch.tokens, ids[victim])
        self.waiting.appendleft(Text(tokens, self.sequence[mine], int(made[victim])))
        branch.prune()
        self.sequence, self.made = self.sequence[~mine], self.made[~mine]
        self.row = self.row[~mine] - (self.row[~mine] > victim)
        self.totals.dropped += 1
        return np.delete(ids, victim)

    def _admit(self) -> None:
        """Start waiting texts while batch and pool have room; one at least if none is decoded."""
        cache, new, todo = self.model.cache, [], 0
        n_sequences, n_pages = len(self.sequence), self._pages(self.made)
        while self.waiting and (todo < _PREFILL or not self.branches):
            text = self.waiting[0]
            n_sequences += len(text.sequences)
            prompt = -(-len(text.tokens) // cache.tree.page_size)
            n_pages += (self._pages(np.array([text.made])) + 1) * len(text.sequences)
            is_full = self.max_batch is not None and n_sequences > self.max_batch
            if self.branches and (is_full or n_pages + prompt > cache.tree.pool.n_free):
                break
            branch = cache.match(text.tokens) or cache.root()
            rest = text.tokens[len(branch) :]
            try:
                if len(rest):
                    cache.append([branch], [rest])
            except OutOfPages:
                branch.prune()
                assert self.branches, "the pool was measured for the longest single text"
                break
            todo += len(rest)
            self.branches.append(branch)
            new.append(self.waiting.popleft())
        if new:
            counts = [len(text.sequences) for text in new]
            rows = np.arange(len(self.branches) - len(new), len(self.branches))
            self.row = np.concatenate([self.row, rows.repeat(counts)])
            self.sequence = np.concatenate([self.sequence, *(text.sequences for text in new)])
            made = np.array([text.made for text in new])
            self.made = np.concatenate([self.made, made.repeat(counts)])

    def _pages(self, made: Ints) -> int:
        """What responses with so many tokens are expected to take yet, in pages of their own."""
        # The mean of what has ended so far; before anything has, the longest there can be.
        n, tokens = self._finished
        expected = min(self.longest, -(-tokens // n)) if n else self.longest
        left = np.maximum(expected - made, 1)
        return int((-(-left // self.model.cache.tree.page_size)).sum())


def _forked(branches: Sequence[Branch], parent: Ints) -> list[Branch]:
    """A branch for each row of `parent`, which is sorted: forks of those parents, or the parent
    itself where it has one row; parents without a row are pruned."""
    counts = np.bincount(parent, minlength=len(branches))
    found: list[Branch] = []
    for branch, count in zip(branches, counts.tolist(), strict=True):
        if count:
            found.append(branch)
            if count > 1:
                found.extend(branch.fork(count - 1))
        else:
            branch.prune()
    return found
