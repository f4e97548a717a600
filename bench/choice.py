"""A provider's fastest correct configuration on a case, and the errors it has there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch._dynamo.utils import counters

from rollfuse.bench import check, measure
from rollfuse.bench.cases import Case, Inputs, Outcome, over_fp32_gemm, truth
from rollfuse.bench.rivals import Provider, Step

Result = TypeVar("Result")
Found = TypeVar("Found")


class Choice(NamedTuple):
    """The configuration that counts."""

    configuration: str
    step: Step
    errors: check.Errors
    over_gemm: check.Errors  # as multiples of those of `cases.over_fp32_gemm`
    dropped: str  # which others failed or are wrong, and how


class Judge:
    """What the results of one case are compared with, made when first asked for."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        # By whether the objective has an entropy term.
        self._truths: dict[bool, Outcome] = {}
        self._gemm_errors: dict[bool, check.Errors] = {}

    def truth(self, provider: Provider) -> Outcome:
        key = provider.entropy_gradient
        if key not in self._truths:
            self._truths[key] = truth(self.inputs, provider.objective(self.inputs))
        return self._truths[key]

    def gemm_errors(self, provider: Provider) -> check.Errors:
        """Errors of a float64 softmax over fp32 GEMMs."""
        key = provider.entropy_gradient
        if key not in self._gemm_errors:
            reference = over_fp32_gemm(self.inputs, provider.objective(self.inputs))
            self._gemm_errors[key] = check.errors(reference, self.truth(provider))
        return self._gemm_errors[key]


def why_not(provider: Provider, case: Case, device: torch.device) -> str | None:
    """Why the provider cannot run the case here, or None."""
    reason = provider.why_not(case, device)
    free = measure.available_bytes(device)
    if reason is not None or free is None:
        return reason
    # The float64 truth stays beside the step: two copies of weight and gradient.
    held = case.vocab * case.hidden * 16 + case.tokens * case.hidden * 8
    need = provider.needs_bytes(case) + held
    if need <= 0.9 * free:
        return None
    return f"skipped: needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} free"


def choose(provider: Provider, judge: Judge, device: torch.device) -> Choice | str:
    """The fastest configuration that passes its check; text: why there is none.

    Raises:
        Exception: whatever our own op raises. A rival's failure costs it the configuration.
    """
    # Made outside of what is caught: these are not the provider's to fail.
    judge.truth(provider), judge.gemm_errors(provider)

    def accept(outcome: Outcome) -> tuple[check.Errors, check.Errors]:
        errors = check.errors(outcome, judge.truth(provider))
        over_gemm = check.in_units_of(errors, judge.gemm_errors(provider))
        complaint = check.complaint(errors, provider.limits(judge.inputs.case), over_gemm)
        if complaint is not None:
            raise Wrong(complaint)
        return errors, over_gemm

    found = fastest_right(lambda: provider.steps(judge.inputs), accept, device, ours=provider.ours)
    if isinstance(found, str):
        return found
    return Choice(found.configuration, found.step, *found.verdict, found.dropped)


class Wrong(Exception):
    """A result is beyond its limits."""


class Unavailable(Exception):
    """A provider cannot run here."""


@dataclass(frozen=True, slots=True)
class Fastest(Generic[Result, Found]):
    """The fastest of the right configurations."""

    configuration: str
    step: Callable[[], Result]
    verdict: Found  # on its first result
    dropped: str  # which others failed or are wrong, and how


def fastest_right(
    prepare: Callable[[], Mapping[str, Callable[[], Result]]],
    accept: Callable[[Result], Found],
    device: torch.device,
    *,
    ours: bool,
) -> Fastest[Result, Found] | str:
    """The fastest of a provider's configurations whose result is accepted; text: why there is none.

    Args:
        prepare: the steps by configuration; raises `Unavailable`.
        accept: what there is to say of a result; raises `Wrong`.
        ours: whether an error is ours, and so raised. A rival's costs it the configuration.
    """
    try:
        steps = prepare()
    except Exception as error:  # foreign code raises what it likes; its row says what
        return _reason(error, ours=ours)
    verdicts: dict[str, Found] = {}
    first: dict[str, float] = {}
    dropped: list[str] = []
    for name, step in steps.items():
        try:
            result, seconds = _first_run(step, device)
            verdicts[name] = accept(result)
            first[name] = seconds
        except Exception as error:  # as above
            where = f" [{name}]" if name else ""
            dropped.append(_reason(error, ours=ours) + where)
    if not verdicts:
        return "; ".join(dropped)
    best = measure.fastest({name: steps[name] for name in verdicts}, first, device)
    return Fastest(best, steps[best], verdicts[best], "; ".join(dropped))


def _first_run(step: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Its result and seconds; a slow step that compiled is timed again."""
    compiled = counters["stats"]["unique_graphs"]
    result, seconds = measure.timed(step, device)
    if seconds >= measure.SLOW and counters["stats"]["unique_graphs"] != compiled:
        result, seconds = measure.timed(step, device)
    return result, seconds


def _reason(error: Exception, *, ours: bool) -> str:
    """What a row says of an error; our own are not survived."""
    if isinstance(error, Wrong):
        return f"wrong: {error}"
    if isinstance(error, Unavailable):
        return f"skipped: {error}"
    if ours:
        raise error
    return f"failed: {first_line(error)}"


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120]
