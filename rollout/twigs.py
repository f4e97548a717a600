"""Twigs: what several texts of a tree get all at once, equal beginnings once.

Legend: R twigs, each the end of a text from then on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Twigs(NamedTuple):
    """Distinct continuations of texts: each text's are sorted as lists are, token by token, so that
    those that begin alike follow each other and a beginning comes before what it begins."""

    parent: list[int]  # the text each of them continues, non-decreasing: 0, 1, ... without a gap
    tokens: list[Ints]  # none empty
    shared: list[int]  # how many of its first tokens are those of the one before, of one parent


class Segments(NamedTuple):
    """The pieces between the places where twigs part, n of them, above before below."""

    above: list[int]  # (n,) which one it follows, -1 for the text itself
    twig: list[int]  # (n,) one of those it is a piece of, the first
    begin: list[int]  # (n,) in that one's tokens
    end: list[int]  # (n,)
    last: list[int]  # (R,) the piece in which each twig ends


def twigs_of(parent: list[int], tokens: list[Ints]) -> Twigs:
    """Twigs in that order."""
    shared = [0] * len(parent)
    for i in range(1, len(parent)):
        one, two = tokens[i - 1], tokens[i]
        if parent[i - 1] == parent[i] and one[0] == two[0]:
            n = min(len(one), len(two))
            differs = one[:n] != two[:n]
            first = int(differs.argmax())
            shared[i] = first if differs[first] else n
    return Twigs(parent, tokens, shared)


def segments_of(twigs: Twigs) -> Segments:
    above: list[int] = []
    twig: list[int] = []
    begin: list[int] = []
    end: list[int] = []
    last: list[int] = []

    def new(*piece: int) -> int:
        for column, value in zip((above, twig, begin, end), piece, strict=True):
            column.append(value)
        return len(above) - 1

    way: list[int] = []  # the pieces of the twig before
    for i, (tokens, shared) in enumerate(zip(twigs.tokens, twigs.shared, strict=True)):
        while way and begin[way[-1]] >= shared:
            way.pop()
        if way and shared < end[way[-1]]:
            lower = way.pop()
            way.append(new(above[lower], twig[lower], begin[lower], shared))
            above[lower], begin[lower] = way[-1], shared
        way.append(new(way[-1] if way else -1, i, shared, len(tokens)))
        last.append(way[-1])
    order = sorted(range(len(above)), key=begin.__getitem__)
    place = [0] * len(order)
    for i, piece in enumerate(order):
        place[piece] = i
    columns = ([column[piece] for piece in order] for column in (above, twig, begin, end))
    above, twig, begin, end = columns
    above = [-1 if piece < 0 else place[piece] for piece in above]
    return Segments(above, twig, begin, end, [place[piece] for piece in last])
