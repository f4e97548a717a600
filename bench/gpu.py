"""`python -m rollfuse.bench gpu`: check every kernel on this card, then benchmark, in one go.

Nothing is measured if a check fails. The cases that matter most come first. One that does not fit
the card, or fails, costs only itself. At the time limit the case at work is cut off and the rest is
left out; all that is done is on the disk by then.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch

from rollfuse import TokenBatch, grpo, policy_loss
from rollfuse.bench import card, measure, report, sampling_card, tree_card
from rollfuse.bench.cases import Case, grid
from rollfuse.bench.choice import first_line
from rollfuse.bench.head import Settings, measure_case
from rollfuse.bench.rivals import OURS, PROVIDERS

Found = TypeVar("Found")

# Seconds that a case may take at most. Where nothing can cut a case off, none is started with less
# time left.
_RESERVE = 60.0


class OutOfTime(BaseException):
    """The time is over. Not an Exception: what guards against a rival's must let it through."""


@contextmanager
def time_limit(until: float) -> Iterator[None]:
    """Raise OutOfTime in this block once `time.monotonic()` is past `until`.

    It comes when the interpreter is next at work, so after a product or a compilation at most.
    Without SIGALRM, or off the main thread, the block is refused where the reserve is not left.
    """

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    left = until - time.monotonic()
    if not _can_interrupt():
        if left < _RESERVE:
            raise OutOfTime
        yield
        return
    if left <= 0.0:
        raise OutOfTime
    before = signal.signal(signal.SIGALRM, stop)
    # Again each second, in case it was raised where Python drops exceptions, as in a destructor.
    signal.setitimer(signal.ITIMER_REAL, left, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _can_interrupt() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and hasattr(signal, "setitimer")


def cases() -> list[Case]:
    """A model of today first, then its variants, then the grid."""
    main = (8192, 4096, 128256, "bfloat16")
    return [
        Case(*main),
        Case(*main, variant="masked"),
        Case(*main, frozen_head=True),
        Case(*main, variant="zero_advantage"),
        Case(2048, 1024, 32768),
        *(Case(c.tokens, c.hidden, c.vocab, "bfloat16") for c in grid()),
    ]


def main(argv: list[str]) -> int:
    """Check, then measure.

    Returns:
        0: checked, and measured as far as time and memory went. 1: a check failed or ran out of
        time, or in a case our op was wrong or failed. 2: there is no GPU, or torch cannot use it.
    """
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit (7.5)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="result (gpu.json)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        built = torch.version.hip or torch.version.cuda or "neither CUDA nor ROCm"
        print(
            f"bench gpu needs a GPU that torch can use; torch {torch.__version__} is built with "
            f"{built} and sees none. On a CPU use `python -m rollfuse.bench head`.",
            file=sys.stderr,
        )
        return 2
    until = time.monotonic() + 60.0 * options.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    facts = measure.provenance(f"python -m rollfuse.bench gpu {shlex.join(argv)}".strip(), device)
    print(report.heading(facts))
    result: dict[str, object] = {**facts, "checks": []}
    passed = _check(device, until, result)
    measure.write_json(options.json, result)
    if passed:
        _benchmark(device, until, result, options.json)
    print(f"wrote {options.json}")
    return 0 if passed and not result["wrong"] else 1


def _check(device: torch.device, until: float, result: dict[str, object]) -> bool:
    """Whether every check passed; `result` gets them."""
    checks: list[card.Result] = []
    every = chain(*(of.run_checks(device) for of in (card, sampling_card, tree_card)))
    ended = attempt(lambda: checks.extend(map(_shown, every)), until)
    if isinstance(ended, Unmeasured):
        checks.append(_shown(card.Result("the checks that follow", ended.reason)))
    result["checks"] = [check._asdict() for check in checks]
    failed = [check for check in checks if check.problem is not None]
    if failed:
        print(f"{len(failed)} of {len(checks)} checks failed: nothing is measured")
    return not failed


def _shown(check: card.Result) -> card.Result:
    print("ok  " if check.problem is None else "FAIL", check.name, check.problem or "", flush=True)
    return check


class Unmeasured(NamedTuple):
    """What became of a part that gave no numbers."""

    reason: str
    failed: bool  # neither time nor memory was short


def attempt(work: Callable[[], Found], until: float) -> Found | Unmeasured:
    """What `work` returns, or why it did not."""
    try:
        with time_limit(until):
            return work()
    except OutOfTime:
        return Unmeasured("out of time", failed=False)
    except torch.OutOfMemoryError as error:
        return Unmeasured(f"out of memory: {first_line(error)}", failed=False)
    except Exception as error:  # whatever it is, it must not cost the other cases; we exit with 1
        return Unmeasured(f"failed: {first_line(error)}", failed=True)


def _benchmark(device: torch.device, until: float, result: dict[str, object], path: Path) -> None:
    """Measure until the time is over; what is done is on the disk after every case.

    `result` gets the rows, what was not measured and why, and where our op was wrong or failed.
    """
    rows: list[dict[str, object]] = []
    unmeasured: dict[str, str] = {}
    wrong: list[str] = []
    result.update(rows=rows, unmeasured=unmeasured, wrong=wrong)

    def give_up(name: str, why: Unmeasured) -> None:
        print(f"\n{name}: {why.reason}", flush=True)
        unmeasured[name] = why.reason
        if why.failed:
            wrong.append(name)

    speed = attempt(partial(_from_logits, device), until)
    if isinstance(speed, Unmeasured):
        give_up("policy_loss from logits", speed)
    else:
        result["from_logits"] = speed
        print(f"policy_loss from logits: {speed}")
    settings = Settings(device, repeats=15)
    for case in cases():
        torch.cuda.empty_cache()
        found = attempt(partial(measure_case, case, PROVIDERS, settings), until)
        if isinstance(found, Unmeasured):
            give_up(case.name, found)
        else:
            print(report.table(case, found), flush=True)
            rows += [row.as_dict() for row in found]
            ours = next(row for row in found if row.provider == OURS.name)
            if ours.status.startswith("wrong"):
                wrong.append(case.name)
        measure.write_json(path, result)


class _ModelOutput(torch.autograd.Function):
    """Stands for a model whose output lies where the leaf does: a leaf cannot be overwritten."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _from_logits(
    device: torch.device, tokens: int = 8192, vocab: int = 151936
) -> dict[str, object]:
    """Loss and in-place gradient from bfloat16 logits; beside it, one pass that rewrites them."""
    logits = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    batch = TokenBatch(
        targets=torch.randint(vocab, (tokens,), device=device),
        weights=torch.full((tokens,), 1.0 / tokens, device=device),
        advantages=torch.randn(tokens, device=device),
        logp_old=torch.full((tokens,), -12.0, device=device),
    )
    objective = grpo(entropy_coef=0.01)

    def step() -> torch.Tensor:
        # Its values are those of the last gradient, of which the time takes no notice.
        output: torch.Tensor = _ModelOutput.apply(logits)  # type: ignore[no-untyped-call]
        out = policy_loss(output, batch, objective, overwrite_logits=True)
        return torch.autograd.grad(out.loss, logits)[0]

    plain = torch.empty_like(logits, requires_grad=False)
    steps: dict[str, measure.Step] = {
        "policy_loss": step,
        "read and write once": partial(plain.mul_, 1.0),
    }
    for warm in steps.values():
        warm()
    times = measure.interleave(steps, 15, device)
    found = {name: asdict(measure.spread(values)) for name, values in times.items()}
    return {"tokens": tokens, "vocab": vocab, "dtype": "bfloat16", "seconds": found}
