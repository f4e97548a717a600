r"""Grading free text against a reference answer with math-verify.

math-verify bounds its work with SIGALRM, which only the main thread may use. Here its timers are
off, and the work is bounded by what is let in instead: the part of the response that states the
answer is cut out first, and must be short and free of anything that could explode (power towers,
factorials, unknown LaTeX commands). A lock keeps its parsers, which share caches, to one thread.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from functools import lru_cache
from typing import Any

# Longest stated answer that is parsed; longer ones count as wrong.
MAX_ANSWER_CHARS = 100
# Only the end of a response is searched for its answer.
_MAX_SEARCHED_CHARS = 8192

_MARKER = re.compile(
    r"####|\\boxed\s*\{|^[ \t]*A:|\banswer(?:\s+is|\s*:)(?!\s*$)", re.MULTILINE | re.IGNORECASE
)
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*)?\.?\d+(?:\s*/\s*\d+)?%?")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_SAFE_COMMANDS = frozenset(
    ("frac dfrac tfrac sqrt cdot times div left right text mathrm textbf mathbf pi boxed "
     "$ % , ! ; : { } ( ) [ ]").split()
)  # fmt: skip
# A power of a digit or letter with a small number as exponent; of a power, it does not match.
_POWER = re.compile(r"(?:\d|[A-Za-z])(?:\^|\*\*)(?:\{\d{1,3}\}|\d{1,3}(?!\d))")
_lock = threading.Lock()


def grade_answer(reference: str, response: str) -> bool:
    """Whether the answer that `response` states equals `reference`, by math-verify.

    `70,000`, `$70000` and `70000.0` are equal. A response without an answer, or with one that is
    too long or unsafe to evaluate, is wrong; no response raises. Safe in threads.

    Args:
        reference: the answer alone, as after GSM8K's `####`.
        response: the whole text; see `stated_answer` for the part that counts.

    Raises:
        ImportError: math-verify is not installed.
    """
    stated = stated_answer(response)
    if stated is None or not is_safe(stated) or not is_safe(reference):
        return False
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("grading text needs math-verify: pip install rollfuse[grpo]")
    from math_verify import verify

    with _lock:
        gold, answer = _parse(reference), _parse(stated)
        return bool(gold and answer and verify(gold, answer, timeout_seconds=None))


def stated_answer(response: str) -> str | None:
    r"""The part of a response that states its answer, or None.

    What follows the last marker: `####`, `\boxed{...}`, a line that starts with `A:`, "answer is"
    or "answer:". Without a marker, the last number.
    """
    text = response[-_MAX_SEARCHED_CHARS:]
    markers = list(_MARKER.finditer(text))
    if not markers:
        numbers = _NUMBER.findall(text)
        return numbers[-1] if numbers else None
    last = markers[-1]
    rest = text[last.end() :]
    if last.group().startswith("\\"):
        return _until_closing_brace(rest)
    line = rest.strip().partition("\n")[0].strip().rstrip(".*").strip("* ")
    return line or None


def has_marked_answer(response: str) -> bool:
    """Whether the response marks its answer, instead of leaving it to be the last number."""
    return _MARKER.search(response[-_MAX_SEARCHED_CHARS:]) is not None


def is_safe(answer: str) -> bool:
    """Whether math-verify can evaluate `answer` without a timer: short, and nothing that grows."""
    return why_unsafe(answer) is None


def why_unsafe(answer: str) -> str | None:
    """What keeps `answer` from math-verify, in words, or None."""
    if not 0 < len(answer) <= MAX_ANSWER_CHARS:
        return f"{len(answer)} characters, not 1 to {MAX_ANSWER_CHARS}"
    for name in _COMMAND.findall(answer):
        if name not in _SAFE_COMMANDS:
            return f"the LaTeX command \\{name}"
    without_commands = _COMMAND.sub(" ", answer)
    n_powers = without_commands.count("^") + without_commands.count("**")
    if n_powers != len(_POWER.findall(without_commands)):
        return "a power that may be too large"
    return "a factorial" if "!" in without_commands else None


def _until_closing_brace(text: str) -> str | None:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i].strip() or None
    return None


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # It warns once that its timers are off; the module docstring says why they may be.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    # Bare LaTeX is only read inside a maths environment; plain numbers parse the same in both.
    text = f"${answer}$" if "\\" in answer and "$" not in answer else answer
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    return list(parse(text, configs, parsing_timeout=None))
