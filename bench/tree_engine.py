"""Tokens per second of a group: our engine, transformers' `generate` and continuous batching, TRL.

One random Qwen3, a prompt, G responses without an end token, so that all are of full length.
Every provider must make G times that many tokens, in texts that differ, and draw them from the
model's own distribution: the sum of log-probs and entropies under a plain forward must be zero but
for chance. The floor is the model's forward over as many tokens without any context.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from rollfuse.bench import entrant, generation, generation_rivals, measure, tree_planning
from rollfuse.bench.choice import Wrong
from rollfuse.bench.entrant import Entrant, Entry, Plan
from rollfuse.bench.generation import FLOOR, Generated, Setting

DTYPES = ("float32", "bfloat16", "float16")
# Standard errors between the mean log-prob and minus the entropy; chance stays far below.
MOST = 6.0


@dataclass(frozen=True, slots=True)
class Case:
    """One model and one group."""

    branches: int = 16
    prompt: int = 512
    response: int = 128
    hidden: int = 384
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    width: int = 48
    intermediate: int = 1152
    vocabulary: int = 8192
    dtype: str = "float32"


def make_setting(case: Case, device: torch.device, *, seed: int = 0) -> Setting:
    """A random model, and the sizes of a group."""
    recipe = partial(make_model, case, device, seed)
    return Setting(recipe, case.prompt, case.branches, case.response)


def make_model(case: Case, device: torch.device, seed: int) -> Any:
    """A random model with tied embeddings, the same one in every process."""
    transformers = importlib.import_module("transformers")
    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    config = transformers.Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.width,
        max_position_embeddings=case.prompt + case.response + 8,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(config)
    return model.to(device, getattr(torch, case.dtype)).eval()


def accept(setting: Setting, made: Generated) -> dict[str, Any]:
    """Counts of what was made; raises Wrong unless it is a group of samples."""
    lengths = [len(response) for response in made.responses]
    if lengths != [setting.response] * setting.n:
        raise Wrong(f"need {setting.n} x {setting.response} tokens, got {sorted(lengths)}")
    if len({tuple(response) for response in made.responses}) != setting.n:
        raise Wrong(f"need {setting.n} different responses, got equal ones")
    score = _standard_score(setting, made)
    if not abs(score) <= MOST:
        raise Wrong(f"log-probs are {score:.1f} standard errors off their mean (limit {MOST})")
    return {"tokens": sum(lengths), "kv_bytes": made.kv_bytes, "standard_score": score}


@torch.no_grad()
def _standard_score(setting: Setting, made: Generated) -> float:
    """Of the sum of logp + entropy over all tokens, whose mean is 0 for the model's own samples."""
    total = variance = 0.0
    first = len(made.prompt) - 1
    for response in made.responses:
        ids = torch.tensor([[*made.prompt, *response]], device=setting.model.device)
        logits = setting.model(ids, use_cache=False).logits[0, first:-1].double()
        logp = logits.log_softmax(-1)
        mean = (logp.exp() * logp).sum(-1)
        total += float((logp.gather(1, ids[0, first + 1 :, None])[:, 0] - mean).sum())
        variance += float(((logp.exp() * logp.square()).sum(-1) - mean.square()).sum())
    return total / variance**0.5 if variance > 0.0 else float("nan")


def measure_case(
    case: Case, device: torch.device, repeats: int, providers: Sequence[str] | None = None
) -> dict[str, Any]:
    """Check and time all; what the result file gets."""
    setting = make_setting(case, device)
    everyone = generation_rivals.entrants(setting)
    wanted = [e for e in everyone if providers is None or e.name in providers]
    try:
        entries = _measure(setting, wanted, device, repeats) if wanted else []
    finally:
        setting.stop()
    parameters = sum(p.numel() for p in setting.model.parameters())
    return {"case": asdict(case), "parameters": parameters, "rows": entrant.result_of(entries)}


def _measure(
    setting: Setting, wanted: Sequence[Entrant], device: torch.device, repeats: int
) -> list[Entry]:
    """The floor's entry, and those of the wanted."""
    floor = generation.floor_step(setting)
    floor()
    found = entrant.measure_all(
        wanted, lambda made: accept(setting, made), Plan(device, repeats, {FLOOR: floor})
    )
    alone = Entry(FLOOR, configuration="no context", note="timed: forward passes, no sampling")
    alone.seconds = measure.spread(found.times[FLOOR])
    alone.facts["tokens"] = setting.n * setting.response
    entries = [alone, *found.entries]
    for entry in entries:
        if entry.seconds is None:
            continue
        times = found.times[entry.provider]
        step = floor if entry is alone else found.steps[entry.provider]
        with generation.counting(setting.model) as here:
            made = measure.timed(step, device)[0]
        entry.facts |= asdict(made.counted if made is not None and made.counted else here)
        entry.facts["tokens_per_second"] = entry.facts["tokens"] / entry.seconds.median
        entry.facts["over_floor"] = asdict(measure.paired_ratio(times, found.times[FLOOR]))
        if "rollfuse" in found.times:
            entry.ratio = measure.paired_ratio(times, found.times["rollfuse"])
    return entries


def table(result: dict[str, Any]) -> str:
    """The measured case as text."""
    case = Case(**result["case"])
    title = (
        f"engine: {case.branches} responses of {case.response} tokens to a prompt of "
        f"{case.prompt}, Qwen3 of {result['parameters'] / 1e6:.1f}M parameters, {case.dtype}"
    )
    columns = {
        "tokens/s": entrant.fact("tokens_per_second", "{:.0f}"),
        "x floor": entrant.fact("over_floor", "{0[median]:.2f}"),
        "x our time": entrant.ratio,
        "20..80 %": entrant.ratio_range,
        "KV MiB": entrant.fact("kv_bytes", "{:.1f}", 2.0**-20),
        "passes": entrant.fact("passes"),
        "tokens in": entrant.fact("pushed"),
        "sampled, in sigma": entrant.fact("standard_score", "{:+.1f}"),
    }
    text = entrant.table(title, result["rows"], columns) if result["rows"] else ""
    shares = result.get("planning")
    return text + ("\n" + tree_planning.table(shares) if shares else "")


def add_flags(parser: argparse.ArgumentParser) -> None:
    known, add = Case(), parser.add_argument
    add("--branches", type=int, default=known.branches, metavar="G")
    add("--prompt", type=int, default=known.prompt, metavar="P")
    add("--response", type=int, default=known.response, metavar="L")
    for name in ("hidden", "layers", "heads", "kv_heads", "width", "intermediate", "vocabulary"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(known, name))
    add("--dtype", choices=DTYPES, default=known.dtype)
    add("--providers", nargs="+", choices=generation_rivals.NAMES, metavar="NAME")
    add("--planning", type=int, nargs="+", metavar="G", default=[16, 256], help="branches (16 256)")
    add("--planning-only", action="store_true", help="no rivals, no tokens per second")


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The case that the flags describe."""
    case = Case(**{name: getattr(options, name) for name in asdict(Case())})
    providers = [] if options.planning_only else options.providers
    result = measure_case(case, device, options.repeats, providers)
    result["planning"] = tree_planning.measure_shares(
        make_setting(case, device).model,
        options.planning,
        case.prompt,
        case.response,
        min(3, options.repeats),
    )
    return result
