"""Peak memory of a step in a process of its own.

`python -m rollfuse.bench.peak THREADS` reads what makes the step, pickled, and prints JSON.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from rollfuse.bench.cases import Case, Outcome, make_inputs
from rollfuse.bench.measure import Peak, exact_memory_environment, peak_memory
from rollfuse.bench.rivals import PROVIDERS, Step

Quiet = Callable[[], tuple[torch.Tensor | None, ...]]  # returns what is not to be counted


def peak_in_own_process(case: Case, provider: str, configuration: str) -> Peak | str:
    """`peak_of` a step of `bench head`."""
    return peak_of(partial(_head_step, case, provider, configuration))


def peak_of(make: Callable[[], Quiet]) -> Peak | str:
    """The measured peak on a CPU, or the last line the process said before it failed.

    Args:
        make: makes the step in that process; is pickled.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rollfuse.bench.peak", str(torch.get_num_threads())],
        input=pickle.dumps(make),
        env=exact_memory_environment(),
        capture_output=True,
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {done.returncode}"
    return Peak(**json.loads(done.stdout.decode().strip().splitlines()[-1]))


def gradients_of(step: Step) -> tuple[torch.Tensor | None, ...]:
    """Run a step and keep what a trainer keeps: its gradients."""
    outcome: Outcome = step()
    return (outcome.dhidden, outcome.dweight)


def _head_step(case: Case, name: str, configuration: str) -> Quiet:
    inputs = make_inputs(case, torch.device("cpu"))
    provider = next(p for p in PROVIDERS if p.name == name)
    return partial(gradients_of, provider.steps(inputs)[configuration])


def main(argv: list[str]) -> int:
    torch.set_num_threads(int(argv[0]))
    make: Callable[[], Quiet] = pickle.loads(sys.stdin.buffer.read())
    print(json.dumps(asdict(peak_memory(make(), torch.device("cpu")))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
