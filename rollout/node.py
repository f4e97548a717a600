"""Node: a span of tokens in a tree of texts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Node:
    """A span of tokens. What changes with every token is in the tree's columns, at `number`."""

    number: int
    parent: Node | None
    start: int  # position of its first token
    version: int  # of the policy that writes it
    offset: int = 0  # slot of its first token in its first page
    pages: list[int] = field(default_factory=list)
    children: dict[int, Node] = field(default_factory=dict)  # by number
    handles: int = 0
    pins: int = 0
    is_retained: bool = False
    last_use: int = 0

    @property
    def is_held(self) -> bool:
        return bool(self.children or self.handles or self.pins or self.is_retained)

    @property
    def is_open(self) -> bool:
        """Whether nobody but one handle sees its end."""
        return self.handles == 1 and not (self.children or self.pins or self.is_retained)


def path(node: Node) -> list[Node]:
    """The nodes from the root to `node`."""
    found = [node]
    while found[-1].parent is not None:
        found.append(found[-1].parent)
    return found[::-1]
