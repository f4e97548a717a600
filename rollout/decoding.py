"""Decoding: texts that grow on a TreeCache, and the sequences that follow each of them.

A row is one distinct text; sequences that agree so far share it. Rows join when the pool has room
for what they may become, end when no sequence follows them, and are dropped to their tokens, to be
computed again later, when the pool runs out. What a drafter has guessed of a text is appended to
it: one pass answers all of it.

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
from rollfuse.rollout.drafter import Chunk, Drafter, need_chunks
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
    drafted: int = 0  # guessed tokens that a pass has answered
    accepted: int = 0  # those of them that stayed
    compared: int = 0  # decided on, of those whose log-prob under what drew them is known
    variation: float = 0.0  # sum over these of max(0, 1 - p / q): as many total variations


@dataclass(slots=True)
class Decoding:
    """The texts that are decoded together.

    Args:
        model: on a cache whose pool can hold the longest single text.
        drafter: who guesses; None: nobody.
        waiting: texts in the order in which they are to start.
        longest: of a response, in tokens.
        max_batch: sequences decoded at once, None: all.
    """

    model: TreeModel
    waiting: deque[Text]
    longest: int
    max_batch: int | None = None
    drafter: Drafter | None = None
    totals: Totals = field(default_factory=Totals)
    branches: list[Branch] = field(default_factory=list)  # R of them, one a row
    appended: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (R,) guessed tokens
    sequence: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (s,), by row
    row: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (s,), non-decreasing
    made: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (s,) tokens of the response
    chunks: dict[int, Chunk] = field(default_factory=dict)  # by sequence: what is guessed next
    _finished: list[int] = field(default_factory=lambda: [0, 0])  # responses, tokens

    def answers(self, *, as_hidden: bool) -> Tensor:
        """What follows each row's text and each beginning of its guess; new texts have joined.

        Returns:
            (sum of appended + 1, V) logits row by row, or (.., D) hidden states.
        """
        self._admit()
        counts = self.appended + 1 if self.appended.any() else None
        compute = self.model.hidden if as_hidden else self.model.forward
        found = compute(self.branches, counts=counts)
        plan = self.model.cache.last_plan
        self.totals.passes += 1
        self.totals.rows += plan.n_rows
        self.totals.kv_read += plan.kv_read
        self.totals.kv_apart += int(plan.positions.sum()) + plan.n_rows
        return found

    def places(self) -> tuple[Ints, Ints]:
        """Which of the answers are a sequence's: the first (s,), and how many (s,)."""
        counts = self.appended + 1
        return (counts.cumsum() - counts)[self.row], counts[self.row]

    def advance(self, stay: Ints, ids: Ints, goes_on: npt.NDArray[np.bool_]) -> None:
        """Each sequence keeps stay[i] of its guessed tokens and goes on with the token ids[i].

        Those that do not go on leave.
        """
        total = self.made + stay + 1
        self._finished[0] += int((~goes_on).sum())
        self._finished[1] += int(total[~goes_on].sum())
        sequence, row, made, ids = (x[goes_on] for x in (self.sequence, self.row, total, ids))
        row = self._parted(row, stay[goes_on])
        self.chunks = self._guesses(sequence, made)
        # Texts that will hold different guesses part now; 0 is that of no guess.
        guess = np.zeros(len(sequence), dtype=np.int64)
        numbers: dict[bytes, int] = {b"": 0}
        for i, s in enumerate(sequence.tolist() if self.chunks else ()):
            if s in self.chunks:
                computed = self.chunks[s].computed.tobytes()
                guess[i] = numbers.setdefault(computed, len(numbers))
        # Sorted by (row, token): sequences that still agree are neighbours.
        order = np.lexsort((guess, ids, row))
        self.sequence, row, self.made, ids = (x[order] for x in (sequence, row, made, ids))
        guess = guess[order]
        differs = np.ones(len(ids), dtype=bool)
        differs[1:] = (row[1:] != row[:-1]) | (ids[1:] != ids[:-1]) | (guess[1:] != guess[:-1])
        self.row = differs.cumsum() - 1
        self._go_on(row[differs], ids[differs])

    def _parted(self, row: Ints, stay: Ints) -> Ints:
        """Cut off the guessed tokens that do not stay; where a row's sequences keep different
        numbers of them it parts. The new row of each sequence of `row`."""
        if not self.appended.any():
            return row
        most = int(self.appended.max()) + 1
        pairs, parent = np.unique(row * most + stay, return_inverse=True)
        rows, kept = np.divmod(pairs, most)
        uncut = np.array([len(branch) for branch in self.branches]) - self.appended
        found: list[Branch] = []
        for i, (r, at) in enumerate(zip(rows.tolist(), (uncut[rows] + kept).tolist(), strict=True)):
            branch = self.branches[r]
            if i + 1 < len(rows) and rows[i + 1] == r:
                found.append(branch.fork(at=at)[0])
            else:  # the longest
                branch.truncate(at)
                found.append(branch)
        for r in set(range(len(self.branches))) - set(rows.tolist()):
            self.branches[r].prune()
        self.branches = found
        return np.asarray(parent, dtype=np.int64)

    def _guesses(self, sequence: Ints, made: Ints) -> dict[int, Chunk]:
        if self.drafter is None or not len(sequence):
            return {}
        chunks = self.drafter.propose(sequence.tolist())
        need_chunks(chunks, sequence.tolist())
        return {
            s: chunk.within(self.longest - m)
            for s, m, chunk in zip(sequence.tolist(), made.tolist(), chunks, strict=True)
            if chunk is not None
        }

    def _go_on(self, parent: Ints, ids: Ints) -> None:
        """One row for each token `ids`, which follows the text of row `parent`; then the guess."""
        if len(parent) != len(self.branches) or (parent != np.arange(len(parent))).any():
            self.branches = _forked(self.branches, parent)
        self.appended = np.zeros(len(parent), dtype=np.int64)
        while self.branches:
            tokens = self._with_guesses(ids)
            try:
                self.model.cache.append(self.branches, ids if tokens is None else tokens)
                return
            except OutOfPages:
                if tokens is None:
                    ids = self._drop_one(ids)
                else:  # guesses are the first to go
                    self.chunks = {s: chunk.within(1) for s, chunk in self.chunks.items()}

    def _with_guesses(self, ids: Ints) -> list[Ints] | None:
        """The token and the guess of each row, None where there are no guesses; sets `appended`."""
        self.appended = np.zeros_like(ids)
        if not self.chunks:
            return None
        tokens: list[Ints] | None = None
        for s, r in zip(self.sequence.tolist(), self.row.tolist(), strict=True):
            chunk = self.chunks.get(s)
            if chunk is not None and chunk.n_computed and not self.appended[r]:
                tokens = tokens or [ids[i : i + 1] for i in range(len(ids))]
                tokens[r] = np.append(tokens[r], chunk.computed)
                self.appended[r] = chunk.n_computed
        return tokens

    def _drop_one(self, ids: Ints) -> Ints:
        """Drop the row with the shortest response to its tokens; the others' next tokens."""
        first = np.flatnonzero(np.diff(self.row, prepend=-1))
        made = self.made[first]
        victim = len(made) - 1 - int(made[::-1].argmin())
        branch, mine = self.branches.pop(victim), self.row == victim
        for gone in self.sequence[mine].tolist():
            self.chunks.pop(gone, None)
        tokens = np.append(branch.tokens, ids[victim])
        self.waiting.appendleft(Text(tokens, self.sequence[mine], int(made[victim])))
        branch.prune()
        self.sequence, self.made = self.sequence[~mine], self.made[~mine]
        self.row = self.row[~mine] - (self.row[~mine] > victim)
        self.totals.dropped += 1
        self.appended = np.delete(self.appended, victim)
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
            # Another row's pending guess is no text: it may go, and it must not be split.
            known = cache.match(text.tokens, computed=bool(self.appended.any()))
            branch = known or cache.root()
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
            made = made.repeat(counts)
            self.made = np.concatenate([self.made, made])
            self.appended = np.append(self.appended, np.zeros(len(new), dtype=np.int64))
            chunks = self._guesses(self.sequence[-len(made) :], made)
            # The text's own tokens are not computed yet: a guess can be checked, not appended.
            self.chunks |= {s: chunk.within(1) for s, chunk in chunks.items()}

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
