"""`bench`: steps in a process of their own."""

from __future__ import annotations

import math
import os
from functools import partial

import pytest
import torch

from rollfuse.bench import measure
from rollfuse.bench.apart import Apart, Elsewhere

# Functions that every process can import.
STEPS = {"pid": os.getpid, "root": math.sqrt, "end": os._exit, "threads": torch.get_num_threads}


@pytest.fixture
def apart():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)  # not what a process starts with
    made = Apart(partial(dict, **STEPS))
    yield made
    made.close()
    torch.set_num_threads(before)


def test_steps_run_in_one_other_process_with_as_many_threads(apart):
    assert apart("pid") == apart("pid") != os.getpid()
    assert apart("root", 9.0) == 3.0
    assert apart("threads") == torch.get_num_threads()


def test_an_error_costs_a_call_and_not_the_process(apart):
    pid = apart("pid")
    with pytest.raises(RuntimeError, match="math domain error|nonnegative"):
        apart("root", -1.0)
    assert apart("pid") == pid


def test_a_process_that_ends_is_noticed(apart):
    with pytest.raises(RuntimeError, match="the process has ended"):
        apart("end", 3)


def test_steps_that_cannot_be_made_fail_when_called():
    failing = Apart(partial(math.sqrt, -1.0))
    with pytest.raises(RuntimeError, match="math domain error|nonnegative"):
        failing("root", 9.0)
    failing.close()


def test_closing_ends_the_process(apart):
    pid = apart("pid")
    apart.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_was_timed_elsewhere_keeps_its_seconds():
    cpu = torch.device("cpu")
    assert measure.timed(lambda: Elsewhere("made", 7.0), cpu) == ("made", 7.0)
    assert measure.interleave({"a": lambda: Elsewhere("made", 7.0)}, 2, cpu) == {"a": [7.0, 7.0]}
    assert measure.timed(lambda: "made", cpu)[1] < 7.0
