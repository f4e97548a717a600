"""Steps in a process of their own: their threads are in nobody's way, and nobody's in theirs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

Steps = Mapping[str, Callable[..., Any]]

_PATIENCE = 30.0  # seconds that a process gets to end by itself


class Elsewhere(NamedTuple):
    """What a step returns that ran in another process, which timed it."""

    result: Any
    seconds: float


class _Failure(NamedTuple):
    text: str


class Apart:
    """A process that makes its steps once and runs one of them a call; between calls it sleeps.

    Args:
        make: the steps by name. It, their arguments and their results are pickled.

    Raises:
        RuntimeError: a step, or making them, raised; the process has ended.
    """

    def __init__(self, make: Callable[[], Steps]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        given = (theirs, make, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((name, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the process has ended") from error
        if isinstance(answer, _Failure):
            raise RuntimeError(answer.text)
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, make: Callable[[], Steps], threads: int) -> None:
    """What the process does until the other end of the pipe is closed."""
    torch.set_num_threads(threads)
    steps: Steps | None = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            steps = steps or make()
            answer = steps[name](*arguments)
        except Exception as error:  # foreign code raises what it likes; the other end says what
            answer = _Failure(str(error) or type(error).__name__)
        pipe.send(answer)
