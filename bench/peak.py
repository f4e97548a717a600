"""Peak memory of one provider on one case, in a process of its own.

`python -m rollfuse.bench.peak CASE PROVIDER CONFIGURATION THREADS` (CASE as JSON) prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from rollfuse.bench.cases import Case, Outcome, make_inputs
from rollfuse.bench.measure import Peak, exact_memory_environment, peak_memory
from rollfuse.bench.rivals import PROVIDERS, Step


def peak_in_own_process(case: Case, provider: str, configuration: str) -> Peak | str:
    """The measured peak, or the last line the process said before it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "rollfuse.bench.peak", json.dumps(asdict(case)), provider]
        + [configuration, str(torch.get_num_threads())],
        env=exact_memory_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {done.returncode}"
    return Peak(**json.loads(done.stdout.strip().splitlines()[-1]))


def gradients_of(step: Step) -> tuple[torch.Tensor | None, ...]:
    """Run a step and keep what a trainer keeps: its gradients."""
    outcome: Outcome = step()
    return (outcome.dhidden, outcome.dweight)


def main(argv: list[str]) -> int:
    described, name, configuration, threads = argv
    torch.set_num_threads(int(threads))
    device = torch.device("cpu")
    inputs = make_inputs(Case(**json.loads(described)), device)
    provider = next(p for p in PROVIDERS if p.name == name)
    step = provider.steps(inputs)[configuration]
    print(json.dumps(asdict(peak_memory(lambda: gradients_of(step), device))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
