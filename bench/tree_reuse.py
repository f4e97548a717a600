"""A rollout that takes over what still holds of an earlier one, against drawing all of it anew.

A random Qwen3 has responded to P prompts, G times each. Its weights have moved since, as by a few
updates, and it responds again, so many sequences at a time as an engine has room for: with nothing
to go by, with the earlier responses under `coupled`, and under SPEC-RL's biased rule. The more
the policy has moved, the less is kept. The floor is a rollout of which every token is known and
only checked. Legend: S standard deviations of a weight, by which each has moved.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rollfuse.bench import entrant, measure, tree_engine
from rollfuse.bench.choice import Wrong
from rollfuse.bench.entrant import Entrant, Plan
from rollfuse.kernels.rejection import lenient
from rollfuse.kernels.sampling import Sampling
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.past_rollouts import PastRollouts
from rollfuse.rollout.record import Rollout, Source

PLAIN, COUPLED, LENIENT = "rollfuse, all drawn", "rollfuse, coupled", "rollfuse, lenient"
FLOOR = "floor (all known, checked)"
# SPEC-RL's own setting.
LENIENCE = math.exp(0.5)


@dataclass(frozen=True, slots=True)
class Case:
    """One model, its prompts, and how far it moves."""

    prompts: int = 16
    branches: int = 8
    batch: int = 16  # sequences at a time
    prompt: int = 64
    response: int = 64
    temperature: float = 0.3
    moves: tuple[float, ...] = (0.003, 0.01)
    hidden: int = 384
    layers: int = 8
    vocabulary: int = 8192


@dataclass(slots=True)
class Setting:
    """The model, what it has said, and what it is asked."""

    engine: Engine
    prompts: list[list[int]]
    n: int
    sampling: Sampling
    seed: int = 1
    drafters: dict[str, PastRollouts] = field(default_factory=dict)

    def respond(self, drafter: PastRollouts | None = None) -> Rollout:
        return self.engine.generate(
            self.prompts, self.n, self.sampling, seed=self.seed, drafter=drafter
        )


def make_setting(case: Case, device: torch.device) -> Setting:
    """A model and its first responses, known to both rules."""
    shape = tree_engine.Case(
        prompt=case.prompt, response=case.response, hidden=case.hidden, layers=case.layers,
        intermediate=3 * case.hidden, vocabulary=case.vocabulary,
    )  # fmt: skip
    model = tree_engine.make_model(shape, device, seed=0)
    engine = Engine(
        model,
        max_new_tokens=case.response,
        stop_tokens=[],
        max_batch=max(case.batch, case.branches),
    )
    generator = torch.Generator().manual_seed(1)
    size = (case.prompts, case.prompt)
    prompts = torch.randint(case.vocabulary, size, generator=generator).tolist()
    setting = Setting(engine, prompts, case.branches, Sampling(case.temperature))
    first = setting.respond()
    for name, rule in ((COUPLED, None), (LENIENT, lenient(LENIENCE))):
        setting.drafters[name] = PastRollouts() if rule is None else PastRollouts(rule)
        setting.drafters[name].record(first)
    setting.seed = 2
    return setting


@contextmanager
def moved(model: torch.nn.Module, size: float) -> Iterator[None]:
    """The model with every weight moved by `size` standard deviations of its tensor; as it was
    afterwards."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            step = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(size * weight.std(correction=0) * step)
    try:
        yield
    finally:
        model.load_state_dict(before)


def accept(setting: Setting, rollout: Rollout, drafter: PastRollouts | None) -> dict[str, Any]:
    """What was made; raises Wrong unless all of it was, and drawn from the policy if it has to be.

    logp + entropy is 0 on average for a policy's own samples: here as a standard score.
    """
    wanted = len(setting.prompts) * setting.n * setting.engine.max_new_tokens
    if len(rollout.tokens) != wanted:
        raise Wrong(f"need {wanted} tokens, got {len(rollout.tokens)}")
    surprise = (rollout.logp + rollout.entropy).double()
    score = float(surprise.mean() / surprise.std() * wanted**0.5)
    is_exact = drafter is None or drafter.rule is setting.drafters[COUPLED].rule
    if is_exact and not abs(score) <= tree_engine.MOST:
        raise Wrong(f"log-probs are {score:.1f} standard errors off (limit {tree_engine.MOST})")
    totals = setting.engine.totals
    found: dict[str, Any] = {
        "tokens": wanted,
        "drawn": int((rollout.source == Source.SAMPLED).sum()),
        "passes": totals.passes,
        "standard_score": score,
    }
    if drafter is not None:
        found["run"] = float(drafter.runs.mean())
        found["variation"] = totals.variation / max(1, totals.compared)
    return found


def measure_move(case: Case, setting: Setting, size: float, plan: Plan) -> dict[str, Any]:
    """All entrants under weights that have moved by `size`."""
    with moved(setting.engine.model, size):
        known = PastRollouts()
        known.record(setting.respond())
        setting.seed += 1  # the floor's noise is that of another rollout, like everybody's

        def entrant_of(name: str, drafter: PastRollouts | None) -> Entrant:
            def step() -> tuple[Rollout, PastRollouts | None]:
                return setting.respond(drafter), drafter

            return Entrant(name, lambda: {"": step}, ours=True)

        drafters: dict[str, PastRollouts | None] = {PLAIN: None, **setting.drafters, FLOOR: known}
        everyone = [entrant_of(name, drafter) for name, drafter in drafters.items()]
        found = entrant.measure_all(everyone, lambda made: accept(setting, *made), plan)
    for entry in found.entries:
        if entry.seconds is not None and PLAIN in found.times:
            entry.ratio = measure.paired_ratio(found.times[entry.provider], found.times[PLAIN])
            entry.facts["tokens_per_second"] = entry.facts["tokens"] / entry.seconds.median
    return {"moved": size, "rows": entrant.result_of(found.entries)}


def table(result: dict[str, Any]) -> str:
    """The measured case as text."""
    case = result["case"]
    columns: dict[str, Callable[[Any], str]] = {
        "tokens/s": entrant.fact("tokens_per_second", "{:.0f}"),
        "x all drawn": entrant.ratio,
        "20..80 %": entrant.ratio_range,
        "drawn": entrant.fact("drawn"),
        "of": entrant.fact("tokens"),
        "passes": entrant.fact("passes"),
        "kept run": entrant.fact("run", "{:.1f}"),
        "TV": entrant.fact("variation", "{:.4f}"),
        "sampled, in sigma": entrant.fact("standard_score", "{:+.1f}"),
    }
    return "".join(
        entrant.table(
            f"reuse: {case['prompts']} x {case['branches']} responses of {case['response']} "
            f"tokens, {case['batch']} at a time, weights moved by {move['moved']:g} S",
            move["rows"],
            columns,
        )
        for move in result["moves"]
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    known, add = Case(), parser.add_argument
    names = {"prompts": "P", "branches": "G", "batch": None, "prompt": None, "response": None}
    for name, letter in (names | {"hidden": None, "layers": None, "vocabulary": None}).items():
        add(f"--{name}", type=int, default=getattr(known, name), metavar=letter)
    add("--temperature", type=float, default=known.temperature)
    add("--moves", type=float, nargs="+", default=list(known.moves), metavar="S")


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The case that the flags describe."""
    values = {name: getattr(options, name) for name in asdict(Case())}
    case = Case(**{**values, "moves": tuple(values["moves"])})
    setting = make_setting(case, device)
    plan = Plan(device, options.repeats)
    moves = [measure_move(case, setting, size, plan) for size in case.moves]
    return {"case": asdict(case), "moves": moves, "rows": [r for m in moves for r in m["rows"]]}
