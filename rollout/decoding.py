"""Decoding: texts that grow on a TreeCache, and the sequences that follow each of them.

A row is one distinct text; sequences that agree so far share it. Rows join when the pool has room
for what they may become, end when no sequence follows them, and are dropped to their tokens, to be
computed again later, when the pool runs out. What a drafter has guessed of a text is appended to
it, beginnings that guesses share once: one pass answers all of it.

Legend: R rows, s sequences that go on, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rollfuse.rollout.branch import Branch
from rollfuse.rollout.drafter import Chunk, Drafter, need_chunks
from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.tree_model import TreeModel
from rollfuse.rollout.twigs import twigs_of

Ints = npt.NDArray[np.int64]

# Tokens of new texts that one pass takes up, beyond which the next text waits for the next pass.
_PREFILL = 8192
_NOTHING = np.empty(0, dtype=np.int64)


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

    def start(self) -> None:
        """The first texts join."""
        self.advance(_NOTHING, _NOTHING, _NOTHING.astype(bool))

    def answers(self, *, as_hidden: bool) -> Tensor:
        """What follows each row's text and each beginning of its guess.

        Returns:
            (sum of appended + 1, V) logits row by row, or (.., D) hidden states.
        """
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

        Those that do not go on leave, and waiting texts join.
        """
        total = self.made + stay + 1
        self._finished[0] += int((~goes_on).sum())
        self._finished[1] += int(total[~goes_on].sum())
        row, stay = self.row[goes_on], stay[goes_on]
        self.sequence, self.made = self.sequence[goes_on], total[goes_on]
        self.row = self._cut(row, stay) if self.appended.any() else self._followed(row)
        ids = ids[goes_on]
        while len(ids) or self.waiting:
            ids = np.append(ids, self._admit())
            self.chunks = self._guesses()
            if not self._go_on(ids):
                # Guesses are the first to go; a token of each can be checked all the same.
                self.chunks = {s: chunk.within(1) for s, chunk in self.chunks.items()}
                self._go_on(ids)
            if self.branches:
                break
            ids = _NOTHING  # the only text was dropped, to start again with all room there is

    def _followed(self, row: Ints) -> Ints:
        """End the branches that no sequence follows; the new row of each sequence of `row`."""
        is_followed = np.bincount(row, minlength=len(self.branches)) > 0
        if is_followed.all():
            return row
        both = list(zip(self.branches, is_followed.tolist(), strict=True))
        for branch, stays in both:
            if not stays:
                branch.prune()
        self.branches = [branch for branch, stays in both if stays]
        return (is_followed.cumsum() - 1)[row]

    def _cut(self, row: Ints, stay: Ints) -> Ints:
        """Cut off the guessed tokens that do not stay. A row whose sequences keep different numbers
        of them parts, and rows that are left with the same text become one. The new row of each
        sequence of `row`."""
        most = int(self.appended.max()) + 1
        pairs, pair = np.unique(row * most + stay, return_inverse=True)
        rows, kept = np.divmod(pairs, most)
        uncut = np.array([len(branch) for branch in self.branches]) - self.appended
        found: list[Branch] = []
        place: dict[int, int] = {}  # in `found`, by the node that a text ends in
        new_row = np.empty_like(rows)
        for i, (r, at) in enumerate(zip(rows.tolist(), (uncut[rows] + kept).tolist(), strict=True)):
            branch = self.branches[r]
            if i + 1 < len(rows) and rows[i + 1] == r:
                branch = branch.fork(at=at)[0]
            else:  # the longest
                branch.truncate(at)
            new_row[i] = place.setdefault(branch.node.number, len(found))
            if new_row[i] == len(found):
                found.append(branch)
            else:
                branch.prune()
        for r in set(range(len(self.branches))) - set(rows.tolist()):
            self.branches[r].prune()
        self.branches = found
        followed: Ints = new_row[pair]
        return followed

    def _guesses(self) -> dict[int, Chunk]:
        """By sequence, what is guessed of it, as far as its response may go."""
        if self.drafter is None or not len(self.sequence):
            return {}
        sequences = self.sequence.tolist()
        chunks = self.drafter.propose(sequences)
        need_chunks(chunks, sequences, self.model.vocabulary)
        return {
            s: chunk.within(self.longest - m)
            for s, m, chunk in zip(sequences, self.made.tolist(), chunks, strict=True)
            if chunk is not None
        }

    def _go_on(self, ids: Ints) -> bool:
        """Each sequence's text gets its token of `ids` and what is guessed to come then: a row for
        each text there is now. False, with nothing done, if there is no room for the guesses."""
        guess, guesses = self._distinct_guesses()
        # Sequences that still agree are neighbours, and so are guesses that begin alike.
        order = np.lexsort((guess, ids, self.row))
        parent, ids, guess = self.row[order], ids[order], guess[order]
        differs = np.ones(len(ids), dtype=bool)
        differs[1:] = (np.diff(parent) != 0) | (np.diff(ids) != 0) | (np.diff(guess) != 0)
        row, (parent, ids, guess) = differs.cumsum() - 1, (x[differs] for x in (parent, ids, guess))
        planted: list[Branch] = []
        if len(guesses) > 1:
            parts = [np.append(i, guesses[g]) for i, g in zip(ids, guess.tolist(), strict=True)]
            try:
                planted = self.model.cache.plant(self.branches, twigs_of(parent.tolist(), parts))
            except OutOfPages:
                return False
        self.sequence, self.made, self.row = self.sequence[order], self.made[order], row
        if planted:
            self.branches = planted
            self.appended = np.array([len(part) - 1 for part in parts])
        else:
            self._append(parent, ids)
        return True

    def _distinct_guesses(self) -> tuple[Ints, list[Ints]]:
        """(s,) the number of what is to be computed of each sequence's guess, and all there are:
        nothing is 0, and those that begin alike follow each other."""
        if not self.chunks:
            return np.zeros_like(self.sequence), [_NOTHING]
        nothing = _NOTHING.tobytes()
        keys = [
            self.chunks[s].computed.tobytes() if s in self.chunks else nothing
            for s in self.sequence.tolist()
        ]
        number = {key: i for i, key in enumerate(sorted({nothing, *keys}))}
        guesses = [np.frombuffer(key, dtype=np.int64) for key in number]
        return np.array([number[key] for key in keys]), guesses

    def _append(self, parent: Ints, ids: Ints) -> None:
        """One row for each token of `ids`, which follows the text of row `parent`."""
        if len(parent) != len(self.branches):
            self.branches = _forked(self.branches, parent)
        self.appended = np.zeros_like(ids)
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
        self.appended = np.delete(self.appended, victim)
        return np.delete(ids, victim)

    def _admit(self) -> Ints:
        """Start waiting texts while batch and pool have room; one at least if none is decoded.

        Returns:
            The last token of each sequence's text, which is not in its branch yet.
        """
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
            branch = cache.match(text.tokens[:-1]) or cache.root()
            rest = text.tokens[len(branch) : -1]
            try:
                if len(rest):
                    cache.append([branch], [rest])
            except OutOfPages:
                branch.prune()
                assert self.branches, "the pool was measured for the longest single text"
                break
            todo += len(rest) + 1
            self.branches.append(branch)
            new.append(self.waiting.popleft())
        counts = [len(text.sequences) for text in new]
        first = len(self.branches) - len(new)
        self.row = np.append(self.row, np.arange(first, len(self.branches)).repeat(counts))
        self.sequence = np.concatenate([self.sequence, *(text.sequences for text in new)])
        made = np.array([text.made for text in new], dtype=np.int64)
        self.made = np.append(self.made, made.repeat(counts))
        return np.array([text.tokens[-1] for text in new], dtype=np.int64).repeat(counts)

    def _pages(self, made: Ints) -> int:
        """What responses with so many tokens are expected to take yet, in pages of their own."""
        # The mean of what has ended so far; before anything has, the longest there can be.
        n, tokens = self._finished
        expected = min(self.longest, -(-tokens // n)) if n else self.longest
        left = np.maximum(expected - made, 1)
        return int((-(-left // self.model.cache.tree.page_size)).sum())


def _forked(branches: list[Branch], parent: Ints) -> list[Branch]:
    """A branch for each entry of `parent`, which is sorted and names each of `branches`: that one
    first, then forks of it."""
    found: list[Branch] = []
    for branch, count in zip(branches, np.bincount(parent).tolist(), strict=True):
        found.append(branch)
        if count > 1:
            found.extend(branch.fork(count - 1))
    return found
