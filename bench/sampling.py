"""`python -m rollfuse.bench sampling`: a token a row from hidden states and head, against torch's.

Everyone starts from hidden states and the head's weight and ends with a token, its log-prob and the
entropy of each row; rivals make the logits, as they have to. The floor is the head's GEMM into
memory that is there already. `verify` is about drafts: how many of their tokens stay, and what
follows, against making all logits.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollfuse.bench import entrant, measure, report
from rollfuse.bench.choice import Unavailable, Wrong
from rollfuse.bench.entrant import Entrant, Plan
from rollfuse.bench.sampling_cases import Case, Inputs, make_inputs
from rollfuse.bench.verification import accept_verdicts, verification_entrants
from rollfuse.kernels.linear_sampling import linear_sample
from rollfuse.kernels.sampling import Sampled, sample_tokens


def sampling_entrants(x: Inputs) -> list[Entrant]:
    space = x.hidden.new_empty(x.case.rows, x.case.vocab)

    def logits() -> Tensor:
        return torch.mm(x.hidden, x.weight.T, out=space)

    def ours() -> Sampled:
        return linear_sample(x.hidden, x.weight, x.streams, x.positions, x.case.sampling)

    def ours_on_logits() -> Sampled:
        return sample_tokens(logits(), x.streams, x.positions, x.case.sampling)

    return [
        Entrant("rollfuse", lambda: {"linear_sample": ours}, ours=True),
        Entrant("rollfuse, logits made", lambda: {"sample_tokens": ours_on_logits}, ours=True),
        Entrant("torch", lambda: _torch_steps(x.case, logits)),
        Entrant("FlashInfer", lambda: _flashinfer_steps(x.case, logits)),
    ]


def _torch_steps(case: Case, logits: Callable[[], Tensor]) -> Mapping[str, Callable[[], Sampled]]:
    """What trainers that sample with torch do: softmax, then multinomial or an exponential race."""

    def finished(z: Tensor, draw: Callable[[Tensor], Tensor]) -> Sampled:
        logp = z.float().log_softmax(1)
        p = logp.exp()
        ids = draw(p)
        entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(1)
        return Sampled(ids, logp.gather(1, ids.unsqueeze(1)).squeeze(1), entropy, entropy)

    def multinomial(p: Tensor) -> Tensor:
        return torch.multinomial(p, 1).squeeze(1)

    def race(p: Tensor) -> Tensor:
        return (p / torch.empty_like(p).exponential_(1.0)).argmax(1)

    return {
        "multinomial": lambda: finished(_cut(logits(), case), multinomial),
        "exponential race": lambda: finished(_cut(logits(), case), race),
    }


def _cut(z: Tensor, case: Case) -> Tensor:
    """Logits with -inf outside the top k and top p, as transformers' warpers do it."""
    if case.top_k is not None:
        z = z.masked_fill(z < z.topk(case.top_k).values[:, -1:], -torch.inf)
    if case.top_p is not None:
        ordered, index = z.sort(descending=False)
        out = ordered.softmax(1).cumsum(1) <= 1.0 - case.top_p
        out[:, -1] = False
        z = z.masked_fill(out.scatter(1, index, out), -torch.inf)
    return z


def _flashinfer_steps(
    case: Case, logits: Callable[[], Tensor]
) -> Mapping[str, Callable[[], Sampled]]:
    if importlib.util.find_spec("flashinfer") is None:
        raise Unavailable("not installed")
    if not torch.cuda.is_available():
        raise Unavailable("runs on NVIDIA GPUs alone")
    sampling: Any = importlib.import_module("flashinfer.sampling")

    def step() -> Sampled:
        z = logits()
        logp = z.float().log_softmax(1)
        p = logp.exp()
        if case.top_k is None and case.top_p is None:
            ids = sampling.sampling_from_probs(p)
        else:
            ids = sampling.top_k_top_p_sampling_from_probs(
                p, case.top_k or case.vocab, case.top_p or 1.0
            )
        ids = ids.long()
        entropy = -(p * logp).sum(1)
        return Sampled(ids, logp.gather(1, ids.unsqueeze(1)).squeeze(1), entropy, entropy)

    return {"of probabilities": step}


def accept_samples(x: Inputs, drawn: Sampled) -> dict[str, Any]:
    """Errors against float64; raises Wrong unless tokens are ids and log-probs theirs."""
    z = x.hidden.double() @ x.weight.double().T
    if x.case.top_k is not None or x.case.top_p is not None:
        z = _cut(z, x.case)
    logp = z.log_softmax(1)
    if not bool(((drawn.ids >= 0) & (drawn.ids < x.case.vocab)).all()):
        raise Wrong(f"need ids in [0, {x.case.vocab}), got others")
    expected = logp.gather(1, drawn.ids.unsqueeze(1)).squeeze(1)
    if x.case.top_k is not None or x.case.top_p is not None:
        # Tokens on the border may fall on the other side in float32.
        known = expected > -torch.inf
        if float(known.double().mean()) < 0.99:
            raise Wrong("need tokens of the cut distribution, got others")
        error = float((drawn.logp.double() - expected)[known].abs().median())
    else:
        error = float((drawn.logp.double() - expected).abs().max())
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(1)
    bound = 1e-3 if x.case.dtype == "float32" else 5e-2
    if error > bound:
        raise Wrong(f"need log-probs within {bound} nats of float64's, got {error:.2g} off")
    return {"logp_error": error, "entropy_error": float((drawn.entropy - entropy).abs().max())}


def measure_case(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Check and time all; what the result file gets."""
    x = make_inputs(case, device)
    space = x.hidden.new_empty(case.rows, case.vocab)
    floor: dict[str, measure.Step] = {"floor": lambda: torch.mm(x.hidden, x.weight.T, out=space)}
    if case.drafts:
        entrants, accept = verification_entrants(x), partial(accept_verdicts, x)
    else:
        entrants, accept = sampling_entrants(x), partial(accept_samples, x)
    found = entrant.measure_all(entrants, accept, Plan(device, repeats, extra=floor))
    for entry in found.entries:
        if entry.seconds is not None:
            times = found.times[entry.provider]
            entry.ratio = measure.paired_ratio(times, found.times["floor"])
    seconds = measure.spread(found.times["floor"])
    return {
        "case": asdict(case),
        "floor": asdict(seconds),
        "rows": entrant.result_of(found.entries),
    }


def table(result: Mapping[str, Any]) -> str:
    """A stored result as text."""
    texts = []
    for one in result["cases"]:
        case, seconds = Case(**one["case"]), one["floor"]["median"]
        rate = case.flops() / seconds / 1e12
        title = f"{case.name}: floor {seconds * 1e3:.2f} ms, {rate:.3g} TFLOP/s"
        columns = {
            "ms": entrant.milliseconds,
            "x floor": entrant.ratio,
            "20..80 %": entrant.ratio_range,
            "logp error": entrant.fact("logp_error", "{:.1e}"),
            "accepted": entrant.fact("accepted", "{:.2f}"),
        }
        texts.append(entrant.table(title, one["rows"], columns))
    return "\n".join(texts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench sampling", description=__doc__)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[16, 256], metavar="N")
    add("--hidden", type=int, default=1024, metavar="D")
    add("--vocab", type=int, default=151936, metavar="V")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--verify", type=int, default=0, metavar="B", help="verify B drafts that have all the rows")
    add("--repeats", type=int, default=9, help="interleaved (a figure needs 9)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--json", type=Path, help="write the result here")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the cases; 1 if our own result failed its check, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    if min(*options.rows, options.hidden, options.vocab, options.repeats) < 1:
        parser.error("--rows, --hidden, --vocab, --repeats: need at least 1")
    for rows in options.rows:
        if options.verify < 0 or (options.verify and rows % options.verify):
            parser.error(f"--verify: need a number that divides {rows} rows")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = f"python -m rollfuse.bench sampling {shlex.join(argv)}".strip()
    result: dict[str, Any] = {**measure.provenance(command, device), "cases": []}
    print(report.heading(result), flush=True)
    for rows in options.rows:
        case = Case(
            rows, options.hidden, options.vocab, options.dtype, options.top_k, options.top_p,
            options.verify,
        )  # fmt: skip
        result["cases"].append(measure_case(case, device, options.repeats))
        print(table({"cases": result["cases"][-1:]}), flush=True)
    if options.json is not None:
        measure.write_json(options.json, json.loads(json.dumps(result)))
    return int(any(entrant.is_wrong(one["rows"]) for one in result["cases"]))
