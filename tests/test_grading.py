"""Grading free text: what counts as the answer, and what is let near the parser."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rollfuse.rollout import grading
from rollfuse.rollout.grading import (
    grade_answer,
    has_marked_answer,
    is_safe,
    stated_answer,
    why_unsafe,
)
from rollfuse.rollout.tasks import read_questions

TWENTY = Path(__file__).parent / "data" / "gsm8k_twenty.jsonl"


@pytest.mark.parametrize(
    ("response", "stated"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 6\nno, wait\n#### 7", "7"),
        ("He has 7 left\nA: 7", "7"),
        ("The answer is 7.", "7"),
        ("**Answer:** 12", "12"),
        (r"thus \boxed{\frac{1}{2}}, done in 3 steps", r"\frac{1}{2}"),
        (r"\boxed{3} but #### 4", "4"),
        ("She sells 9 eggs for 2 dollars: 18", "18"),
        ("It costs $1,234.50 in all.", "$1,234.50"),
        ("from 5 to -3", "-3"),
        ("no number at all", None),
        ("", None),
        ("#### ", None),
        (r"\boxed{7", None),
    ],
)
def test_the_stated_answer(response: str, stated: str | None) -> None:
    assert stated_answer(response) == stated


@pytest.mark.parametrize(
    ("reference", "stated"),
    [
        ("70000", "70,000"),
        ("70,000", "70000"),
        ("18", "$18"),
        ("18", "18.0"),
        ("18", "18 dollars"),
        ("0.5", "1/2"),
        ("0.5", r"\frac{1}{2}"),
        ("-3", "-3"),
        ("1000000", "10^6"),
        ("15", "10 + 5 = 15"),
    ],
)
def test_equal_answers_are_correct(reference: str, stated: str) -> None:
    assert grade_answer(reference, f"#### {stated}")


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("18", "#### 19"),
        ("18", "18 is what I had, then I got 3 more"),
        ("18", "#### -18"),
        ("18", "#### 180"),
        ("0.5", "#### 0.51"),
        ("18", "the reference is 18\n#### I do not know"),
        ("18", ""),
    ],
)
def test_other_answers_are_wrong(reference: str, response: str) -> None:
    assert not grade_answer(reference, response)


@pytest.mark.parametrize(
    "hostile",
    [
        "9**9**9**9",
        "9^9^9",
        "9^{9}^{9}",
        "x^9^9",
        "2^{2^{2^{100}}}",
        "(10^999)^999",
        "{2^9}^9",
        "2^9 ^9",
        "99999!",
        r"\sum_{i=1}^{10} i",
        r"\int x dx",
        "10^9999",
        "x" * 101,
        "",
    ],
)
def test_what_could_explode_is_not_evaluated(hostile: str) -> None:
    assert not is_safe(hostile)
    started = time.perf_counter()
    assert not grade_answer("18", f"#### {hostile}")
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        ("x" * 101, "101 characters, not 1 to 100"),
        ("", "0 characters, not 1 to 100"),
        ("7!", "a factorial"),
        (r"\sum i", r"the LaTeX command \sum"),
        (r"\pi\&", r"the LaTeX command \&"),
        ("9^9^9", "a power that may be too large"),
    ],
)
def test_why_an_answer_is_not_evaluated(hostile: str, reason: str) -> None:
    assert why_unsafe(hostile) == reason


def test_unsafe_answers_never_reach_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(answer: str) -> None:
        raise AssertionError(answer)

    monkeypatch.setattr(grading, "_parse", refuse)
    assert not grade_answer("18", "#### 9**9**9**9")
    assert not grade_answer("9**9**9**9", "#### 18")


@pytest.mark.parametrize("fine", ["10^6", r"\frac{2^3}{4}", "x^2 + y^2", r"\$18", "2**10"])
def test_plain_answers_are_evaluated(fine: str) -> None:
    assert is_safe(fine)


def test_a_long_response_is_searched_at_its_end_only() -> None:
    assert grade_answer("7", "1 " * 1_000_000 + "#### 7")
    assert not grade_answer("7", "#### 7 " + "and so on " * 10_000)


def test_grading_in_threads_gives_what_it_gives_alone() -> None:
    pairs = [(str(i), f"so it is\n#### {i + (i % 3 == 0)}.0") for i in range(150)]
    with ThreadPoolExecutor(8) as pool:
        graded = list(pool.map(lambda pair: grade_answer(*pair), pairs))
    assert graded == [i % 3 != 0 for i in range(150)]


def test_reference_answers_grade_as_correct_against_themselves_only() -> None:
    problems = read_questions(TWENTY)
    solutions = [json.loads(text)["answer"] for text in TWENTY.read_text().splitlines()]
    for problem, solution in zip(problems, solutions, strict=True):
        assert grade_answer(problem.answer, solution)
        assert grade_answer(problem.answer, solution.replace("####", "A:"))
        assert not grade_answer(problem.answer + "1", solution)


def test_marked_answers_are_recognised() -> None:
    assert has_marked_answer("A: 5") and has_marked_answer(r"\boxed{5}")
    assert not has_marked_answer("there are 5")
