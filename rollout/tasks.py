"""Verifiable tasks: prompts whose answers a function can check.

Two are built in and made on the spot: `sort` (the demo) and `arithmetic`. Questions and answers of
your own come from a JSON-lines file in the format of GSM8K. Held-out problems are split off by a
fixed seed, so that every run of a task is measured on the same ones and none is ever trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollfuse.kernels import checks
from rollfuse.rollout.grading import grade_answer, has_marked_answer, why_unsafe

_SPLIT_SEED = 20260101
_SORT_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt in plain text and the reference answer its responses are graded against."""

    prompt: str
    answer: str


# (problem, response text without the end token, whether the response ended by itself) -> reward
Grade = Callable[[Problem, str, bool], float]


@dataclass(frozen=True, slots=True)
class Task:
    """Problems to learn from, problems to be measured on, and the judge of both.

    Attributes:
        train, heldout: disjoint.
        grade: a pure function, safe in threads, returning a reward.
        max_new_tokens: a response's limit if the caller names none.
        alphabet: the characters of all prompts and answers, for a character tokenizer; None for
            a task that needs a language model of its own.
        is_chat: whether prompts are questions to be put through a chat template.
    """

    name: str
    train: Sequence[Problem]
    heldout: Sequence[Problem]
    grade: Grade
    max_new_tokens: int
    alphabet: str | None = None
    is_chat: bool = False


def sort_task(*, heldout: int = 512) -> Task:
    """Put five digits in ascending order: "52719>" asks for "12579"; 100,000 problems."""
    numbers = (f"{i:0{_SORT_DIGITS}d}" for i in range(10**_SORT_DIGITS))
    problems = [Problem(f"{digits}>", "".join(sorted(digits))) for digits in numbers]
    train, held = split_heldout(problems, heldout)
    return Task("sort", train, held, grade_exact, _SORT_DIGITS + 1, "0123456789>")


def arithmetic_task(*, heldout: int = 512) -> Task:
    """Two-digit sums and differences: "17-58=" asks for "-41"; 16,200 problems."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    problems = [Problem(f"{a}+{b}=", str(a + b)) for a, b in pairs]
    problems += [Problem(f"{a}-{b}=", str(a - b)) for a, b in pairs]
    train, held = split_heldout(problems, heldout)
    return Task("arithmetic", train, held, grade_exact, 6, "0123456789+-=")


# What `rollfuse grpo --task` accepts.
BUILT_IN: dict[str, Callable[..., Task]] = {"sort": sort_task, "arithmetic": arithmetic_task}


def built_in_task(name: str, *, heldout: int = 512) -> Task:
    """The built-in task called `name`.

    Raises:
        ValueError: there is no such task, or more problems are held out than it has.
    """
    checks.need(name in BUILT_IN, "task", f"one of {', '.join(BUILT_IN)}", repr(name))
    return BUILT_IN[name](heldout=heldout)


def grade_exact(problem: Problem, response: str, finished: bool) -> float:
    """1.0 for the answer, nothing but the answer, and the end token after it."""
    return float(finished and response == problem.answer)


def grade_math(problem: Problem, response: str, finished: bool) -> float:
    """1.0 if the answer the response states equals the reference, by `grade_answer`.

    A response cut off at its length limit counts only where it had marked its answer: the last
    number of an unfinished sentence is nobody's answer.
    """
    if not finished and not has_marked_answer(response):
        return 0.0
    return float(grade_answer(problem.answer, response))


def questions_task(path: str | Path, *, heldout: int = 512, max_new_tokens: int = 256) -> Task:
    """The questions of a JSON-lines file in GSM8K's format, graded by math-verify.

    Of a repeated question only the first is kept: held-out questions would else be trained on.

    Args:
        heldout: how many questions to hold out, at most a tenth of the file's (but at least one).

    Raises:
        ValueError: the file has a broken line (see `read_questions`) or fewer than two questions.
    """
    first: dict[str, Problem] = {}
    for problem in read_questions(path):
        first.setdefault(problem.prompt, problem)
    problems = list(first.values())
    checks.need(len(problems) >= 2, str(path), "at least 2 different questions", len(problems))
    train, held = split_heldout(problems, min(heldout, max(1, len(problems) // 10)))
    return Task(Path(path).stem, train, held, grade_math, max_new_tokens, is_chat=True)


def split_heldout(problems: Sequence[Problem], heldout: int) -> tuple[list[Problem], list[Problem]]:
    """(train, heldout): a random split, the same on every machine and in every run."""
    good = 0 < heldout < len(problems)
    checks.need(good, "heldout", f"a number in [1, {len(problems)})", heldout)
    order = list(range(len(problems)))
    random.Random(_SPLIT_SEED).shuffle(order)
    return [problems[i] for i in order[heldout:]], [problems[i] for i in order[:heldout]]


def read_questions(path: str | Path) -> list[Problem]:
    """Problems of a file with one JSON object a line: {"question": ..., "answer": "... #### 42"}.

    The reference answer is what follows the last `####`. Blank lines are passed over. The whole
    file is read and checked before anything is returned.

    Raises:
        ValueError: naming the line: not UTF-8, not JSON, not an object, a field missing or not a
            string, no `####`, an answer that is empty, too long or unsafe to evaluate; or the file
            holds no question.
        OSError: the file cannot be read.
    """
    problems: list[Problem] = []
    for number, raw in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if raw.strip():
            problems.append(_read_line(raw, f"{path}, line {number}"))
    checks.need(bool(problems), str(path), "at least one question", "an empty file")
    return problems


def _read_line(raw: bytes, where: str) -> Problem:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise ValueError(f"{where}: need a JSON object, got {_short(raw)} ({error})") from error
    checks.need(isinstance(record, dict), where, "a JSON object", _short(raw))
    for name in ("question", "answer"):
        value = record.get(name)
        good = isinstance(value, str) and bool(value.strip())
        got = repr(value)[:60] if name in record else f"fields {sorted(record)[:8]}"
        checks.need(good, where, f"a non-empty string {name!r}", got)
        whole = not any("\ud800" <= character <= "\udfff" for character in value)
        checks.need(whole, where, f"text in {name!r}", "half of a surrogate pair")
    _, marker, answer = record["answer"].rpartition("####")
    checks.need(bool(marker), where, "an answer after '####'", _short(record["answer"].encode()))
    answer = answer.strip()
    # What is not let in is never right: every response would count as wrong.
    reason, short = why_unsafe(answer), _short(answer.encode())
    needed = "an answer after '####' that can be graded"
    checks.need(reason is None, where, needed, f"{short} ({reason})")
    return Problem(record["question"].strip(), answer)


def _short(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
