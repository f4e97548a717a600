"""linear_sample and linear_score: from hidden states and the head, chunk by chunk of rows.

The (N, V) logits need not exist: a chunk of rows is projected into a workspace and drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.arguments import OfPairs, describe, make_inputs
from rollfuse.kernels.drawing import (
    Noise,
    Outcome,
    draw_rows,
    log_probs_of_rows,
    score_rows,
    scratch_bytes,
    settled,
)
from rollfuse.kernels.head import Head, as_head, flatten_hidden, operand_dtype
from rollfuse.kernels.head_pass import HeadPass, new_workspace
from rollfuse.kernels.layout import Layout
from rollfuse.kernels.plan import Plan, choose, need_plan
from rollfuse.kernels.rows import Transform, compute_dtype
from rollfuse.kernels.sampling import (
    PLAIN,
    Sampled,
    Sampling,
    Scored,
    cuts_of_rows,
    need_rows,
    need_targets,
    noise_of_rows,
    temperature_of_rows,
)
from rollfuse.kernels.sink import Needs
from rollfuse.kernels.truncation import Cuts


def linear_sample(  # noqa: PLR0913
    hidden: Tensor,
    head: Head | Tensor,
    streams: Tensor,
    positions: Tensor,
    sampling: Sampling = PLAIN,
    *,
    plan: Plan = Plan(),
) -> Sampled:
    """`sample_tokens` of softcap(scale * (hidden W' + b)), without the logits in memory.

    Args:
        hidden: (N, D) or (B, L, D), any of float32, bfloat16, float16, float64; N is B * L.
        head: the LM head, or its (V, D) weight. Split over a group it serves any temperature, but
            no cuts; every rank gets the same tokens, ids of the whole vocabulary.
        streams, positions, sampling: as in `sample_tokens`.
        plan: a byte budget for the workspace; invariant=True gives a row the same bits whatever
            else is in the batch, and the logp of `linear_logp_entropy` under such a plan.

    Returns:
        ids, logp, entropy and support, (N,), see `sample_tokens`.

    Raises:
        TypeError, ValueError: as `sample_tokens`; a wrong head, a plan of a kind, too small a
            budget, cuts under a head that is split over a group.
    """
    head, hidden, n_rows = _checked(hidden, head, sampling, plan)
    noise = noise_of_rows(sampling, streams, positions, hidden, "hidden", n_rows)
    ids = torch.zeros(n_rows, dtype=torch.int64, device=hidden.device)
    call = _planned(hidden, head, ids, sampling, plan)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        shard, pick = call.head_pass.inputs.head.shard, call.head_pass.inputs.layout.pick
        streams, positions = pick(noise.streams), pick(noise.positions)
        parts = []
        for part in call.chunks():
            drawn = Noise(streams[part.rows], positions[part.rows], noise.family)
            parts.append(draw_rows(part.logits, part.transform, part.cuts, drawn, shard))
        found = settled(_joined(parts, hidden, n_rows), "hidden and head")
    return Sampled(*found[:4])


def linear_score(
    hidden: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    sampling: Sampling = PLAIN,
    *,
    plan: Plan = Plan(),
) -> Scored:
    """`score_tokens` of softcap(scale * (hidden W' + b)), without the logits in memory.

    Args:
        hidden, head, sampling, plan: as in `linear_sample`.
        targets: (N,), int64 or int32, in [0, V).

    Returns:
        logp, entropy and support, (N,), see `score_tokens`.

    Raises:
        TypeError, ValueError: as `linear_sample`; a CPU target outside [0, V).
    """
    head, hidden, n_rows = _checked(hidden, head, sampling, plan)
    need_targets(targets, hidden, "hidden", n_rows, head.vocabulary)
    call = _planned(hidden, head, targets, sampling, plan)
    inputs = call.head_pass.inputs
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        parts = [
            score_rows(
                part.logits,
                part.transform,
                part.cuts,
                inputs.targets[part.rows],
                inputs.head.shard,
            )
            for part in call.chunks()
        ]
        found = _joined(parts, hidden, n_rows)
        is_wrong = found.ids != targets  # moved into the vocabulary
        found = settled(found._replace(bad=found.bad | is_wrong), "hidden and head")
    return Scored(*found[1:4])


def linear_log_probs(
    hidden: Tensor, head: Head | Tensor, sampling: Sampling = PLAIN, *, plan: Plan = Plan()
) -> Tensor:
    """(N, V) log-probs of all tokens, in nats, for what `linear_score` says of single ones.

    Raises:
        TypeError, ValueError: as `linear_score`; a head that is split over a group.
    """
    head, hidden, n_rows = _checked(hidden, head, sampling, plan)
    checks.need(head.group is None, "head", "no group where a rule needs whole rows", "a group")
    ids = torch.zeros(n_rows, dtype=torch.int64, device=hidden.device)
    call = _planned(hidden, head, ids, sampling, plan)
    dtype = compute_dtype(operand_dtype(hidden, head))
    found = hidden.new_empty((n_rows, head.vocabulary), dtype=dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for part in call.chunks():
            values = log_probs_of_rows(part.logits, part.transform, part.cuts)
            within = found[part.rows]  # the last chunk may be filled up with rows of nobody
            within.copy_(values[: within.shape[0]])
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """A chunk's logits, in the workspace, and what they are taken as."""

    rows: slice  # of the call's
    logits: Tensor  # (c, V)
    transform: Transform
    cuts: Cuts


@dataclass(frozen=True, slots=True)
class _Call:
    """A pass as it is planned."""

    head_pass: HeadPass
    chunk_rows: int
    cuts: Cuts

    def chunks(self) -> Iterator[_Part]:
        for chunk in self.head_pass.inputs.layout.chunks(self.chunk_rows):
            logits = self.head_pass.project(self.head_pass.hidden_rows(chunk))
            transform = self.head_pass.transform(chunk)
            rows = slice(chunk.start, chunk.stop)
            yield _Part(rows, logits, transform, self.cuts.rows(chunk.start, chunk.stop))


def _checked(
    hidden: Tensor, head: Head | Tensor, sampling: Sampling, plan: Plan
) -> tuple[Head, Tensor, int]:
    """(the head, hidden rows (N, D), N)."""
    need_plan(plan)
    if plan.kind is not None:
        raise ValueError(f"plan: need no kind (nothing is kept for a backward), got {plan.kind!r}")
    head = as_head(head)
    hidden = flatten_hidden(hidden, head)
    n_rows = head.n_rows(hidden)
    need_rows(sampling, hidden, "hidden", n_rows)
    cut = [name for name in ("top_k", "top_p", "min_p") if getattr(sampling, name) is not None]
    if cut and head.group is not None:
        raise ValueError(
            f"sampling: need no cuts under a head that is split over a group, got {', '.join(cut)};"
            " gather the logits and call sample_tokens"
        )
    return head, hidden, n_rows


def _planned(hidden: Tensor, head: Head, targets: Tensor, sampling: Sampling, plan: Plan) -> _Call:
    n_rows, dtype = targets.shape[0], compute_dtype(operand_dtype(hidden, head))
    # Nothing is worked out on the host: a CUDA graph may capture all of it.
    numbers = torch.arange(n_rows, device=hidden.device)
    layout = Layout(n_rows, n_rows, None, True, None, numbers, None)
    problem = describe(hidden, head, layout, n_rows, needs=Needs())
    cuts = cuts_of_rows(sampling, hidden, n_rows, dtype)
    room = scratch_bytes(problem.n_slots, problem.vocabulary, sum(cut is not None for cut in cuts))
    report = choose(replace(problem, scratch_bytes=room), plan)
    temperature = temperature_of_rows(sampling, hidden, n_rows, dtype)
    inputs = make_inputs(
        hidden,
        head,
        layout,
        OfPairs(targets, temperature),
        slot_multiple=report.slot_multiple,
    )
    pick = inputs.layout.pick
    cuts = Cuts(*(None if cut is None else pick(cut) for cut in cuts))
    return _Call(
        HeadPass(inputs, new_workspace(inputs, report.chunk_rows)), report.chunk_rows, cuts
    )


def _joined(parts: list[Outcome], hidden: Tensor, n_rows: int) -> Outcome:
    """The outcome of the first N rows from those of the chunks."""
    if not parts:
        empty = hidden.new_empty(0, dtype=compute_dtype(hidden.dtype))
        return Outcome(empty.long(), empty, empty, empty, empty.bool())
    return Outcome(*(torch.cat(fields)[:n_rows] for fields in zip(*parts, strict=True)))
