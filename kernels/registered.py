"""The ops as torch.compile sees them: registered, each with its backward, opaque inside.

Under torch.compile a policy loss is log-probs and entropies from a registered op, the objective
traced as ordinary PyTorch, and a second registered op that makes the gradients from the
objective's derivatives. No callable crosses an op's border, sizes stay symbolic, and one graph
serves any number of tokens. The gradients are those of plan `recompute`: nothing but the inputs is
kept from one op to the other.

Which rows are computed is worked out on the host, so no op can be captured in a CUDA graph. They
say so: torch.compile leaves them out of its graphs, and a capture by hand is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rollfuse.kernels.arguments import describe, make_inputs, need_targets_below
from rollfuse.kernels.head import Head
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.logits_pass import gradient_of_logits, score_logits, view_of_logits
from rollfuse.kernels.plan import Plan, choose
from rollfuse.kernels.rows import compute_dtype
from rollfuse.kernels.two_phase import TwoPhase, gradients_anew, scores

# Stand in for the values of pairs that are not computed: finite, because the objective is traced
# over all pairs, and 0 times infinity would spoil the gradients of the others.
PLACEHOLDER_LOGP, PLACEHOLDER_ENTROPY = -1.0, 1.0

_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("rollfuse::linear_scores", mutates_args=(), tags=_TAGS)
def linear_scores(  # noqa: PLR0913  (an op takes tensors and numbers, not records)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
    scale: float,
    softcap: float | None,
    operand: torch.dtype,
    budget_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """(logp (P,), entropy (P,)) as `linear_logp_entropy`; placeholders where not `selected`.

    temperature and selected: (P,); operand: the dtype the products' operands are rounded to.
    """
    head = Head(weight, bias, scale, softcap)
    needs = (False, False, False)
    call = _planned(
        hidden, head, targets, rows, temperature, selected, operand, budget_bytes, needs
    )
    logp, entropy = scores(call)
    n_pairs = targets.shape[0]
    layout = call.inputs.layout
    return (
        layout.spread(logp, n_pairs, PLACEHOLDER_LOGP),
        layout.spread(entropy, n_pairs, PLACEHOLDER_ENTROPY),
    )


@linear_scores.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
    operand: torch.dtype = rest[-2]
    shape, dtype = targets.shape, compute_dtype(operand)
    return hidden.new_empty(shape, dtype=dtype), hidden.new_empty(shape, dtype=dtype)


@torch.library.custom_op("rollfuse::linear_scores_backward", mutates_args=(), tags=_TAGS)
def linear_scores_backward(  # noqa: PLR0913
    dlogp: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
    scale: float,
    softcap: float | None,
    operand: torch.dtype,
    budget_bytes: int | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden (R, D), dweight (V, D), dbias (V,)) in their dtypes; empty where not needed."""
    selected = _with_derivative(dlogp, dentropy, selected)
    head = Head(weight, bias, scale, softcap)
    needs = (needs_hidden, needs_weight, needs_bias)
    call = _planned(
        hidden, head, targets, rows, temperature, selected, operand, budget_bytes, needs
    )
    pick = call.inputs.layout.pick
    dx, dw, db = gradients_anew(call, pick(dlogp), pick(dentropy))
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(0) if dx is None else dx.to(hidden.dtype),
        weight.new_empty(0) if dw is None else dw.to(weight.dtype),
        weight.new_empty(0, dtype=bias_dtype) if db is None else db.to(bias_dtype),
    )


@linear_scores_backward.register_fake
def _(
    dlogp: Tensor, dentropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Any:
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if needs_weight
        else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, bias, targets, rows, temperature, selected, *options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, rows, temperature, selected)
    ctx.options = options


def _linear_backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> Any:
    needs = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors
    found = torch.ops.rollfuse.linear_scores_backward(dlogp, dentropy, *saved, *ctx.options, *needs)
    gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
    return (*gradients, *(None,) * (len(saved) + len(ctx.options) - 3))


linear_scores.register_autograd(_linear_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("rollfuse::logit_scores", mutates_args=(), tags=_TAGS)
def logit_scores(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(logp (P,), entropy (P,)) as `logp_entropy`; placeholders where not `selected`."""
    layout = _layout(logits, targets, rows, temperature, selected, logits.shape[1])
    if not layout.unique_rows:
        assert layout.rows is not None
        logits, layout = logits[layout.rows], layout.with_a_row_each()
    found = score_logits(view_of_logits(logits, layout, targets, temperature))
    n_pairs = targets.shape[0]
    return (
        layout.spread(found.logp, n_pairs, PLACEHOLDER_LOGP),
        layout.spread(found.entropy, n_pairs, PLACEHOLDER_ENTROPY),
    )


@logit_scores.register_fake
def _(logits: Tensor, targets: Tensor, *rest: Any) -> Any:
    shape, dtype = targets.shape, compute_dtype(logits.dtype)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=dtype)


@torch.library.custom_op("rollfuse::logit_scores_backward", mutates_args=(), tags=_TAGS)
def logit_scores_backward(  # noqa: PLR0913
    dlogp: Tensor,
    dentropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
) -> Tensor:
    """(R, V) gradient of the logits; reads them twice."""
    selected = _with_derivative(dlogp, dentropy, selected)
    layout = _layout(logits, targets, rows, temperature, selected, logits.shape[1])
    of_logp, of_entropy = layout.pick(dlogp), layout.pick(dentropy)
    if layout.unique_rows:
        view = view_of_logits(logits, layout, targets, temperature)
        return gradient_of_logits(view, score_logits(view), of_logp, of_entropy, overwrite=False)
    assert layout.rows is not None
    copies, a_row_each = logits[layout.rows], layout.with_a_row_each()
    view = view_of_logits(copies, a_row_each, targets, temperature)
    out = gradient_of_logits(view, score_logits(view), of_logp, of_entropy, overwrite=True)
    whole = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    return whole.index_add_(0, layout.rows, out)


@logit_scores_backward.register_fake
def _(dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep_logits(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _logits_backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> Any:
    found = torch.ops.rollfuse.logit_scores_backward(dlogp, dentropy, *ctx.saved_tensors)
    return found, None, None, None, None


logit_scores.register_autograd(_logits_backward, setup_context=_keep_logits)


def _with_derivative(dlogp: Tensor, dentropy: Tensor, selected: Tensor | None) -> Tensor:
    """(P,) bool: the selected pairs whose derivatives are not both 0."""
    wanted = (dlogp != 0) | (dentropy != 0)
    return wanted if selected is None else wanted & selected


def _planned(  # noqa: PLR0913
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
    operand: torch.dtype,
    budget_bytes: int | None,
    needs: tuple[bool, bool, bool],
) -> TwoPhase:
    layout = _layout(hidden, targets, rows, temperature, selected, head.vocabulary)
    problem = replace(
        describe(hidden, head, layout, targets.shape[0], operand),
        needs_hidden=needs[0],
        needs_weight=needs[1] or needs[2],
    )
    report = choose(problem, Plan("recompute", budget_bytes))
    inputs = make_inputs(hidden, head, layout, targets, temperature, operand)
    return TwoPhase(inputs, report, needs)


def _layout(
    rows_of: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
    vocabulary: int,
) -> Layout:
    need_targets_below(targets, vocabulary)
    if rows_of.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "CUDA graph capture: need ops that leave the host out, got one of rollfuse, which "
            "works out its rows there; leave it out of the captured region"
        )
    request = Request(targets.shape[0], rows_of.shape[0], rows, temperature, selected)
    return build_layout(request, rows_of.device)
