"""A picture of texts that share their beginnings: a tree from left to right, as one SVG.

A cell is a token, the stronger its colour, the less certain the policy was when it drew it. Texts
part where their tokens first differ; at a text's end stands its reward. The SVG needs no script and
nothing of its surroundings, and fits light and dark pages.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from unicodedata import category, east_asian_width

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.rollout.record import Rollout, Tokenizer

NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'
# The run report takes its colours from here as well.
LIGHT = {
    "paper": "#fbfaf8", "card": "#fff", "ink": "#1d1d1f", "soft": "#6b6b70", "rule": "#e4e2dd",
    "line": "#2f6fde", "good": "#17803d", "bad": "#b42318", "mark": "#f5a524",
}  # fmt: skip
DARK = {
    "paper": "#141416", "card": "#1d1d20", "ink": "#ececee", "soft": "#9a9aa2", "rule": "#333338",
    "line": "#7fb0ff", "good": "#5fd08a", "bad": "#ff8b80", "mark": "#b9770e",
}  # fmt: skip

# Pixels: of a character of a token, around a token, of the margins, and where the tree begins.
_CHARACTER, _PADDING = 6.7, 6.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 78, 46, 10
_CELL = (3.0, 96.0)  # the narrowest and the widest
_ROW = (4.0, 20.0)
_TREE_HEIGHT = 1600  # that many branches are drawn in before rows get lower
_TEXT_ROW = 13.0  # the lowest row that has room for text
_SWATCHES = 5
# Opacity of a token that was certain, and of the least certain one.
_FAINT, _STRONG = 0.1, 0.8


@dataclass(slots=True)
class _Edge:
    """The tokens between two forks, or between a fork and the end of a text."""

    parent: int  # its place in the list of edges, -1 for none
    start: int  # of its first token in the texts
    end: int
    members: list[int]  # the texts that run through it
    is_leaf: bool = False
    row: float = 0.0


def tree_picture(
    responses: Sequence[Sequence[str]],
    entropy: Sequence[Sequence[float]],
    rewards: Sequence[float],
    prompt: str = "",
    *,
    ids: Sequence[Sequence[Hashable]] | None = None,
    width: int = 1160,
) -> str:
    """An SVG of responses to one prompt; equal beginnings are drawn once, equal responses as one.

    Args:
        responses: the token texts of each, at least one response.
        entropy: nats, of the distribution each token was drawn from; shaped as `responses`. The
            first of several responses speaks for the tokens they share.
        rewards: one a response; green above 0. Equal responses show their mean.
        prompt: text above the tree.
        ids: what tells tokens apart, shaped as `responses`; None: their texts.
        width: pixels to fit the picture in; very long responses take more. A token's text is
            written where it has room, and shown with its entropy when pointed at.

    Raises:
        ValueError: no responses, shapes that differ, or an entropy that is not finite.
    """
    keys = responses if ids is None else ids
    _check(responses, entropy, rewards, keys)
    edges = _edges(keys)
    _set_rows(edges)
    top = max((max(part, default=0.0) for part in entropy), default=0.0)
    scale = _Scale.of(edges, responses, top, width)
    body = [_line(scale, edges, edge) for edge in edges if edge.parent >= 0]
    body += [_edge(scale, edge, responses, entropy) for edge in edges]
    body += [_leaf(scale, edge, rewards) for edge in edges if edge.is_leaf]
    wide = scale.x(max(edge.end for edge in edges)) + _RIGHT
    high = scale.y(sum(edge.is_leaf for edge in edges)) + _BOTTOM
    return (
        f'<svg{NAMESPACE} class="tree" viewBox="0 0 {wide:.0f} {high:.0f}" role="img" '
        f'style="max-width:{wide:.0f}px" aria-label="tree of {len(responses)} responses">'
        f"<style>{_STYLE}</style>{_head(prompt, scale, wide)}{''.join(body)}</svg>"
    )


def group_picture(
    rollout: Rollout, prompt_index: int, rewards: Tensor, tokenizer: Tokenizer
) -> str:
    """`tree_picture` of the group of prompt `prompt_index`.

    Args:
        rewards: (B,), one a sequence of the rollout.
        tokenizer: makes the texts, token by token, special ones too.

    Raises:
        ValueError: there is no such prompt, it has no responses, or rewards of another shape.
    """
    n_prompts = len(rollout.prompts)
    is_there = 0 <= prompt_index < n_prompts
    checks.need(is_there, "prompt_index", f"a number in [0, {n_prompts})", prompt_index)
    checks.need_shape(rewards, (len(rollout),), "rewards", "one a sequence")
    chosen = rollout.prompt_index == prompt_index
    group = rollout.select(chosen)
    ids = [response.tolist() for response in group.responses()]
    entropy = [part.tolist() for part in torch.split(group.entropy, group.lengths.tolist())]
    texts = [[tokenizer.decode([i], skip_special_tokens=False) for i in part] for part in ids]
    prompt = rollout.prompts[prompt_index].tolist()
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    return tree_picture(texts, entropy, rewards[chosen].tolist(), text, ids=ids)


# -- the tree ---------------------------------------------------------------------------------


def _edges(keys: Sequence[Sequence[Hashable]]) -> list[_Edge]:
    """Depth first, in the order in which the texts come. The first one starts at 0, perhaps empty.

    A text that ends where others go on has an empty edge of its own, so that each distinct text
    has one leaf.
    """
    edges: list[_Edge] = []
    todo = [(-1, 0, list(range(len(keys))))]
    while todo:
        parent, start, members = todo.pop()
        first = keys[members[0]]
        end = start
        while all(len(keys[m]) > end and keys[m][end] == first[end] for m in members):
            end += 1
        parts: dict[tuple[Hashable, ...], list[int]] = {}  # by the next token, () for none
        for m in members:
            parts.setdefault(tuple(keys[m][end : end + 1]), []).append(m)
        place = len(edges)
        edges.append(_Edge(parent, start, end, members, is_leaf=list(parts) == [()]))
        if not edges[place].is_leaf:
            todo += [(place, end, part) for part in reversed(parts.values())]
    return edges


def _set_rows(edges: list[_Edge]) -> None:
    """Leaves in rows of their own, an edge in the middle of those it leads to."""
    for row, leaf in enumerate(edge for edge in edges if edge.is_leaf):
        leaf.row = float(row)
    span = [(float("inf"), -1.0)] * len(edges)  # of the children's rows
    for place in range(len(edges) - 1, 0, -1):
        edge = edges[place]
        edge.row = edge.row if edge.is_leaf else sum(span[place]) / 2
        low, high = span[edge.parent]
        span[edge.parent] = min(low, edge.row), max(high, edge.row)
    edges[0].row = 0.0 if edges[0].is_leaf else sum(span[0]) / 2


# -- the drawing ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scale:
    cell: float  # width of a token
    row: float  # height of a row
    top: float  # the highest entropy

    @classmethod
    def of(
        cls, edges: list[_Edge], responses: Sequence[Sequence[str]], top: float, width: int
    ) -> _Scale:
        n_columns = max(1, max(edge.end for edge in edges))
        n_rows = sum(edge.is_leaf for edge in edges)
        widest = max((_wide(_visible(token)) for part in responses for token in part), default=0.0)
        cell = min((width - _LEFT - _RIGHT) / n_columns, widest, _CELL[1])
        row = min(_TREE_HEIGHT / n_rows, _ROW[1])
        return cls(max(cell, _CELL[0]), max(row, _ROW[0]), top)

    def x(self, column: int) -> float:
        return _LEFT + self.cell * column

    def y(self, row: float) -> float:
        return _TOP + self.row * row

    def opacity(self, entropy: float) -> float:
        share = max(entropy, 0.0) / self.top if self.top > 0 else 0.0
        return _FAINT + (_STRONG - _FAINT) * share


def _line(scale: _Scale, edges: list[_Edge], edge: _Edge) -> str:
    """From the middle of the parent's row down or up to the edge's."""
    x = scale.x(edge.start)
    start, end = scale.y(edges[edge.parent].row + 0.5), scale.y(edge.row + 0.5)
    return f'<path class="line" d="M{x:.1f} {start:.1f}V{end:.1f}"/>'


def _edge(
    scale: _Scale,
    edge: _Edge,
    responses: Sequence[Sequence[str]],
    entropy: Sequence[Sequence[float]],
) -> str:
    first, cells = edge.members[0], []
    y, high = scale.y(edge.row + 0.05), 0.9 * scale.row
    for column in range(edge.start, edge.end):
        token, nats = responses[first][column], entropy[first][column]
        x, shown = scale.x(column), _visible(token)
        title = f"<title>{escape(shown)}  {nats:.3g} nats</title>"
        cells.append(
            f'<rect class="token" x="{x + 0.5:.1f}" y="{y:.1f}" width="{scale.cell - 1:.1f}" '
            f'height="{high:.1f}" fill-opacity="{scale.opacity(nats):.2f}">{title}</rect>'
        )
        if scale.row >= _TEXT_ROW and _wide(shown) <= scale.cell + 0.01:
            place = f'x="{x + scale.cell / 2:.1f}" y="{scale.y(edge.row + 0.5) + 4:.1f}"'
            cells.append(f'<text class="text" {place}>{escape(shown)}</text>')
    return f'<g class="edge">{"".join(cells)}</g>'


def _leaf(scale: _Scale, edge: _Edge, rewards: Sequence[float]) -> str:
    found = [rewards[m] for m in edge.members]
    mean = sum(found) / len(found)
    times = f" \u00d7{len(found)}" if len(found) > 1 else ""
    kind = "good" if mean > 0 else "bad"
    x, y = scale.x(edge.end) + 7, scale.y(edge.row + 0.5)
    title = f"<title>reward {', '.join(f'{reward:.4g}' for reward in found)}</title>"
    radius = min(3.5, 0.4 * scale.row)
    label = f'<text class="{kind}" x="{x + 7:.1f}" y="{y + 4:.1f}">{mean:.3g}{times}</text>'
    label = label if scale.row >= _TEXT_ROW else ""
    circle = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">{title}</circle>'
    return f'<g class="leaf">{circle}{label}</g>'


def _head(prompt: str, scale: _Scale, wide: float) -> str:
    """The prompt's end, as much as has room, and what the colours mean."""
    whole = _visible(prompt).replace(_SIGNS[" "], " ")
    room = int((max(wide, 240) - 2 * _LEFT) / _CHARACTER) - 1
    shown = whole if len(whole) <= room else f"\u2026{whole[-room:]}"
    parts = [
        f'<text class="text prompt" x="{_LEFT}" y="16"><title>{escape(whole)}</title>'
        f'{escape(shown)}</text><g class="legend">'
    ]
    for swatch in range(_SWATCHES):
        opacity = scale.opacity(scale.top * swatch / (_SWATCHES - 1))
        place = f'x="{_LEFT + 14 * swatch}" y="25" width="13" height="10"'
        parts.append(f'<rect class="token" {place} fill-opacity="{opacity:.2f}"/>')
    x = _LEFT + 14 * _SWATCHES + 6
    return f'{"".join(parts)}<text x="{x}" y="34">entropy 0 to {scale.top:.2g} nats</text></g>'


def _visible(text: str) -> str:
    """`text` as it can be written in XML and seen: blanks, breaks and control characters, too."""
    # Control characters, halves of surrogate pairs and what Unicode has left out.
    bad = ("Cc", "Cs", "Cn")
    return "".join(_SIGNS.get(c) or ("\ufffd" if category(c) in bad else c) for c in text)


_SIGNS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


def _wide(text: str) -> float:
    """Pixels of a token's cell that shows `text`."""
    return _CHARACTER * sum(1 + (east_asian_width(c) in "WF") for c in text) + _PADDING


def _check(
    responses: Sequence[Sequence[str]],
    entropy: Sequence[Sequence[float]],
    rewards: Sequence[float],
    keys: Sequence[Sequence[Hashable]],
) -> None:
    lengths = [len(response) for response in responses]
    checks.need(bool(lengths), "responses", "at least one", "none")
    for name, value in (("entropy", entropy), ("ids", keys)):
        found = [len(part) for part in value]
        checks.need(found == lengths, name, f"lengths {lengths}", found)
    checks.need(len(rewards) == len(lengths), "rewards", f"{len(lengths)} values", len(rewards))
    good = all(isfinite(nats) for part in entropy for nats in part)
    checks.need(good, "entropy", "finite values", "another value")


def _rules(colours: dict[str, str]) -> str:
    """Colours by name instead of by variable: not every viewer of SVG knows variables."""
    fills = {".token": "mark", "text": "soft", ".text": "ink", ".good": "good", ".bad": "bad"}
    rules = [f".tree {selector}{{fill:{colours[name]}}}" for selector, name in fills.items()]
    return f"{''.join(rules)}.tree .line{{stroke:{colours['soft']}}}"


_STYLE = (
    ".tree text{font:12px system-ui,sans-serif;font-variant-numeric:tabular-nums}"
    ".tree .text{font:11px ui-monospace,monospace;text-anchor:middle}"
    ".tree .prompt{text-anchor:start}.tree .line{fill:none;stroke-width:1}"
    f"{_rules(LIGHT)}@media(prefers-color-scheme:dark){{{_rules(DARK)}}}"
)
