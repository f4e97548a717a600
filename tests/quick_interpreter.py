"""Triton's interpreter without two things it does at every step of a kernel for nothing.

Both are two thirds of its time. What a kernel computes, and what is noticed of it, is the same.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

from rollfuse.kernels.dispatch import backend


def quicken() -> None:
    """Change the interpreter of this process, if it is in use."""
    if backend.name != "interpret":
        return
    # Here, because triton looks when it is imported whether it is to interpret.
    from triton.runtime import interpreter

    _patch_the_language_once_a_launch(interpreter)
    options = interpreter.interpreter_builder.options
    # Sums and products are worked out again in 64 bits, for an assertion made in debug mode alone.
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)


def _patch_the_language_once_a_launch(interpreter: ModuleType) -> None:
    """At a module's first function, as a launch unpatches at its end; not at every call of one."""
    function = interpreter.InterpretedFunction
    launch, call = function.run, function.__call__
    patched: set[str] = set()

    def launch_unpatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    function.run, function.__call__ = launch_unpatched, call_patched
