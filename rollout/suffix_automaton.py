"""SuffixAutomaton: which tokens have followed a context, in texts that grow side by side.

The smallest automaton that knows every substring of the texts: a state stands for the contexts that
end at the same places, its link for the next shorter ones. A text grows by a token in amortised
constant time, and what its present end has in common with earlier text is one link away.

Source: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985); several
texts as in Mohri, Moreno, Weinstein, "General suffix automaton construction algorithm" (2009).
Differs: how often a context has occurred is counted for at most `_COUNTED` of the contexts that end
with a token, the longest first, so that a text of one repeated token does not cost its square.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

ROOT = 0
_COUNTED = 32


class SuffixAutomaton:
    """Begin a text at a state (`ROOT`, or where another text stands) and `extend` it."""

    def __init__(self) -> None:
        self._length = [0]
        self._link = [-1]
        self._next: list[dict[int, int]] = [{}]
        self._count = [0]

    def __len__(self) -> int:
        """States there are: at most two a token."""
        return len(self._length)

    def extend(self, state: int, token: int) -> int:
        """The state of a text that stood at `state` and has got `token`."""
        found = self._step(state, token)
        at, left = found, _COUNTED
        while at > ROOT and left:
            self._count[at] += 1
            at, left = self._link[at], left - 1
        return found

    def continuation(self, state: int, longest: int, least_match: int, least: float) -> list[int]:
        """What may follow a text that stands at `state`, by what followed its end elsewhere.

        Args:
            longest: tokens at most.
            least_match: how many tokens of the text's end must have occurred before, at least.
            least: the continuation ends before the chance that it stays, by the counts, falls
                below this.
        """
        tokens: list[int] = []
        chance, at = 1.0, state
        while len(tokens) < longest:
            # Other texts may have been here and gone on; if not, the next shorter context.
            while at > ROOT and not self._next[at]:
                at = self._link[at]
            if at <= ROOT or self._length[at] < least_match:
                break
            after = self._next[at]
            token, following = max(after.items(), key=lambda item: self._count[item[1]])
            chance *= self._count[following] / sum(self._count[s] for s in after.values())
            if chance < least:
                break
            tokens.append(token)
            at = following
        return tokens

    def _step(self, last: int, token: int) -> int:
        known = self._next[last].get(token)
        if known is not None:
            return self._exact(last, token, known)
        new = self._new(self._length[last] + 1, {})
        at = last
        while at >= 0 and token not in self._next[at]:
            self._next[at][token] = new
            at = self._link[at]
        self._link[new] = ROOT if at < 0 else self._exact(at, token, self._next[at][token])
        return new

    def _exact(self, at: int, token: int, to: int) -> int:
        """The state of exactly the contexts of `at` and `token`; `to` holds longer ones too."""
        if self._length[to] == self._length[at] + 1:
            return to
        copy = self._new(self._length[at] + 1, dict(self._next[to]))
        self._link[copy], self._count[copy] = self._link[to], self._count[to]
        self._link[to] = copy
        while at >= 0 and self._next[at].get(token) == to:
            self._next[at][token] = copy
            at = self._link[at]
        return copy

    def _new(self, length: int, following: dict[int, int]) -> int:
        self._length.append(length)
        self._link.append(ROOT)
        self._next.append(following)
        self._count.append(0)
        return len(self._length) - 1
