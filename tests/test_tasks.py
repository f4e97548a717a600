"""The built-in tasks and the reader of questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollfuse.rollout.tasks import (
    Problem,
    arithmetic_task,
    built_in_task,
    grade_exact,
    grade_math,
    questions_task,
    read_questions,
    sort_task,
    split_heldout,
)

TWENTY = Path(__file__).parent / "data" / "gsm8k_twenty.jsonl"


def line(question: str = "How many?", answer: str = "Two.\n#### 2") -> str:
    return json.dumps({"question": question, "answer": answer})


@pytest.mark.parametrize(("name", "n"), [("sort", 100_000), ("arithmetic", 16_200)])
def test_heldout_problems_are_never_trained_on(name: str, n: int) -> None:
    task = built_in_task(name)
    train = {problem.prompt for problem in task.train}
    held = {problem.prompt for problem in task.heldout}
    assert len(held) == 512
    assert len(train) == n - 512  # all different
    assert not train & held


def test_the_split_is_the_same_every_time_and_not_the_first_problems() -> None:
    assert sort_task().heldout == sort_task().heldout
    assert sort_task().train[:3] == sort_task().train[:3]
    problems = [Problem(str(i), "") for i in range(1000)]
    _, held = split_heldout(problems, 100)
    assert 300 < sum(int(p.prompt) for p in held) / 100 < 700


def test_sort_answers_are_the_digits_in_order() -> None:
    task = sort_task()
    assert all(p.answer == "".join(sorted(p.prompt[:-1])) for p in task.heldout)
    assert {len(p.answer) for p in task.train} == {5}
    assert task.max_new_tokens == 6  # five digits and the end token


def test_arithmetic_answers_are_right_and_some_negative() -> None:
    task = arithmetic_task()
    everything = [*task.train, *task.heldout]
    for problem in everything:
        expression = problem.prompt.removesuffix("=")
        left, sign, right = expression[:2], expression[2], expression[3:]
        assert 10 <= int(left) <= 99 and 10 <= int(right) <= 99
        expected = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert int(problem.answer) == expected
    assert any(problem.answer.startswith("-") for problem in everything)
    assert max(len(problem.answer) for problem in everything) + 1 <= task.max_new_tokens


@pytest.mark.parametrize("task", [sort_task(), arithmetic_task()])
def test_the_alphabet_covers_prompts_and_answers(task: object) -> None:
    used = {c for p in [*task.train, *task.heldout] for c in p.prompt + p.answer}
    assert used == set(task.alphabet)


def test_exact_grading_wants_the_end_token_and_nothing_more() -> None:
    problem = Problem("21>", "12")
    assert grade_exact(problem, "12", True) == 1.0
    assert grade_exact(problem, "12", False) == 0.0
    assert grade_exact(problem, "123", True) == 0.0
    assert grade_exact(problem, " 12", True) == 0.0


def test_an_unfinished_response_counts_only_with_a_marked_answer() -> None:
    problem = Problem("How many?", "42")
    assert grade_math(problem, "First there are 42", True) == 1.0
    assert grade_math(problem, "First there are 42", False) == 0.0
    assert grade_math(problem, "#### 42\nand on it", False) == 1.0


def test_the_twenty_problems_are_read() -> None:
    problems = read_questions(TWENTY)
    assert len(problems) == 20
    assert problems[0].answer == "18"
    assert problems[0].prompt.startswith("Janet")
    assert problems[2].answer == "70000"


def test_questions_are_split_and_repeated_ones_dropped(tmp_path: Path) -> None:
    lines = [line(f"Question {i}?", f"#### {i}") for i in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join([*lines, *lines, ""]))
    task = questions_task(tmp_path / "q.jsonl")
    assert (len(task.train), len(task.heldout)) == (27, 3)
    assert not {p.prompt for p in task.train} & {p.prompt for p in task.heldout}
    assert task.is_chat and task.alphabet is None
    assert questions_task(tmp_path / "q.jsonl", heldout=2).heldout == task.heldout[:2]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('{"question": "1?", "answer": ' + "9" * 5000 + "}", "JSON"),
        ('{"question": "\\ud800?", "answer": "#### 3"}', "half of a surrogate pair"),
        ('{"question": "a', "JSON object"),
        ("[1, 2]", "JSON object"),
        ('{"question": "a"}', "string 'answer'"),
        ('{"answer": "#### 1"}', "string 'question'"),
        ('{"question": 7, "answer": "#### 1"}', "string 'question', got 7"),
        ('{"question": "  ", "answer": "#### 1"}', "string 'question'"),
        (line(answer="two"), "'####'"),
        (line(answer="two ####  "), "got '' (0 characters, not 1 to 100)"),
        (line(answer="#### " + "9" * 101), "(101 characters, not 1 to 100)"),
        (b'{"question": "\xff", "answer": "#### 1"}', "JSON object"),
        (line(answer="#### 5!"), "that can be graded, got '5!' (a factorial)"),
        (line(answer=r"#### 1 + \infty"), r"got '1 + \\infty' (the LaTeX command \infty)"),
        (line(answer="#### 10^9999"), "got '10^9999' (a power that may be too large)"),
        (line(answer="#### 2**2**2"), "got '2**2**2' (a power that may be too large)"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: str | bytes, said: str) -> None:
    raw = broken if isinstance(broken, bytes) else broken.encode()
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\n".join([line().encode(), b"", raw, line().encode()]))
    with pytest.raises(ValueError, match="q.jsonl, line 3: need") as caught:
        read_questions(path)
    assert said in str(caught.value)


def test_an_empty_file_and_a_single_question_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="at least one question"):
        read_questions(path)
    path.write_text("\n".join([line(), line()]))
    with pytest.raises(ValueError, match="at least 2 different questions, got 1"):
        questions_task(path)


def test_unknown_tasks_and_too_many_heldout_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="one of sort, arithmetic, got 'chess'"):
        built_in_task("chess")
    with pytest.raises(ValueError, match=r"heldout: need a number in \[1, 16200\), got 16200"):
        arithmetic_task(heldout=16_200)
