"""Pages: which ones nobody uses, and how many nodes use each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rollfuse.kernels import checks


class OutOfPages(RuntimeError):
    """There are fewer free pages than an operation needs; it has changed nothing."""


class PagePool:
    """`n_pages` numbered pages with a reference count each."""

    def __init__(self, n_pages: int) -> None:
        checks.need(n_pages >= 1, "n_pages", "a count >= 1", n_pages)
        self.n_pages = n_pages
        self._references = np.zeros(n_pages, dtype=np.int32)
        # Those from here on were never used: a long text's pages follow each other, and a pool
        # costs no more than is used of it.
        self._unused = 0
        self._free: list[int] = []  # the others that are free

    @property
    def n_free(self) -> int:
        return self.n_pages - self._unused + len(self._free)

    def take(self, n: int) -> list[int]:
        """`n` free pages, of which there must be so many."""
        pages = [self._free.pop() for _ in range(min(n, len(self._free)))]
        n_new = n - len(pages)
        pages.extend(range(self._unused, self._unused + n_new))
        self._unused += n_new
        self._references[pages] = 1
        return pages

    def share(self, page: int) -> None:
        self._references[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One user less of each; those without any are free."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def check(self, held: Sequence[int]) -> None:
        """Raise RuntimeError unless these are all the uses there are, a page once for each."""
        references = np.bincount(np.array(held, dtype=np.int64), minlength=self.n_pages)
        wrong = np.flatnonzero(references != self._references)
        if len(wrong):
            page = int(wrong[0])
            raise RuntimeError(
                f"page {page}: need {references[page]} references, got {self._references[page]}"
            )
        free = sorted(self._free) + list(range(self._unused, self.n_pages))
        if free != np.flatnonzero(references == 0).tolist():
            raise RuntimeError("free pages: need those without references, got others")
