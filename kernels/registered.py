"""The ops as torch.compile sees them: registered, each with its backward, opaque inside.

Under torch.compile a policy loss is log-probs and entropies from a registered op, the objective
traced as ordinary PyTorch, and a second registered op that makes the gradients from the
objective's derivatives. No callable crosses an op's border, sizes stay symbolic, and one graph
serves any number of tokens. The gradients are those of plan `recompute`: nothing but the inputs is
kept from one op to the other.

Which rows are computed is worked out on the host, so no op can be captured in a CUDA graph. They
say so to torch.compile, which leaves them out of its graphs; `build_layout` refuses a capture by
hand, theirs and that of the ops outside of torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rollfuse.kernels.arguments import OfPairs, describe, make_inputs, need_targets_below
from rollfuse.kernels.head import Head, Lora
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.logits_pass import gradient_of_logits, score_logits, view_of_logits
from rollfuse.kernels.plan import Plan, choose
from rollfuse.kernels.rows import compute_dtype
from rollfuse.kernels.sink import Needs
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
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
    scale: float,
    softcap: float | None,
    lora_scale: float,
    vocab: int | None,
    operand: torch.dtype,
    budget_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """(logp (P,), entropy (P,)) as `linear_logp_entropy`; placeholders where not `selected`.

    temperature and selected: (P,); operand: the dtype the products' operands are rounded to.
    """
    head = _head(weight, bias, lora_a, lora_b, scale, softcap, lora_scale, vocab)
    call = _planned(
        hidden, head, targets, rows, temperature, selected, operand, budget_bytes, Needs()
    )
    logp, entropy = scores(call)
    n_pairs = targets.shape[0]
    layout = call.inputs.layout
    return (
        layout.spread(logp, n_pairs, PLACEHOLDER_LOGP),
        layout.spread(entropy, n_pairs, PLACEHOLDER_ENTROPY),
    )


@linear_scores.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, lora_a: Any, lora_b: Any, *rest: Any) -> Any:
    targets: Tensor = rest[0]
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
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    selected: Tensor | None,
    scale: float,
    softcap: float | None,
    lora_scale: float,
    vocab: int | None,
    operand: torch.dtype,
    budget_bytes: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden (R, D), weight (V, D), bias (V,), lora_a (r, D) and lora_b (V, r).

    In their dtypes; empty where not needed.
    """
    selected = _with_derivative(dlogp, dentropy, selected)
    head = _head(weight, bias, lora_a, lora_b, scale, softcap, lora_scale, vocab)
    call = _planned(
        hidden, head, targets, rows, temperature, selected, operand, budget_bytes, Needs(*needs)
    )
    pick = call.inputs.layout.pick
    found = gradients_anew(call, pick(dlogp), pick(dentropy))
    parameters = (hidden, weight, bias, lora_a, lora_b)
    dx, dw, db, da, dlb = (
        weight.new_empty(0, dtype=_dtype(t, weight)) if g is None else g.to(_dtype(t, weight))
        for g, t in zip(found, parameters, strict=True)
    )
    return dx, dw, db, da, dlb


@linear_scores_backward.register_fake
def _(
    dlogp: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *rest: Any,
) -> Any:
    needs = rest[-1]
    parameters = (hidden, weight, bias, lora_a, lora_b)
    return tuple(
        weight.new_empty(t.shape if need and t is not None else (0,), dtype=_dtype(t, weight))
        for t, need in zip(parameters, needs, strict=True)
    )


def _dtype(tensor: Tensor | None, weight: Tensor) -> torch.dtype:
    return weight.dtype if tensor is None else tensor.dtype


def _head(  # noqa: PLR0913
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    softcap: float | None,
    lora_scale: float,
    vocab: int | None,
) -> Head:
    lora = None
    if lora_a is not None and lora_b is not None:
        lora = Lora(lora_a, lora_b, lora_scale)
    return Head(weight, bias, scale, softcap, vocab, lora)


# hidden, weight, bias, lora_a, lora_b; then targets, rows, temperature, selected.
_N_PARAMETERS, _N_TENSORS = 5, 9


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS])
    ctx.options = inputs[_N_TENSORS:]


def _linear_backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> Any:
    needs = list(ctx.needs_input_grad[:_N_PARAMETERS])
    saved = ctx.saved_tensors
    found = torch.ops.rollfuse.linear_scores_backward(dlogp, dentropy, *saved, *ctx.options, needs)
    gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
    return (*gradients, *(None,) * (_N_TENSORS + len(ctx.options) - _N_PARAMETERS))


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
    found = score_logits(view_of_logits(logits, layout, OfPairs(targets, temperature)))
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
        view = view_of_logits(logits, layout, OfPairs(targets, temperature))
        return gradient_of_logits(view, score_logits(view), of_logp, of_entropy, overwrite=False)
    assert layout.rows is not None
    copies, a_row_each = logits[layout.rows], layout.with_a_row_each()
    view = view_of_logits(copies, a_row_each, OfPairs(targets, temperature))
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
    needs: Needs,
) -> TwoPhase:
    layout = _layout(hidden, targets, rows, temperature, selected, head.vocabulary)
    problem = describe(hidden, head, layout, targets.shape[0], operand, needs)
    report = choose(problem, Plan("recompute", budget_bytes))
    inputs = make_inputs(hidden, head, layout, OfPairs(targets, temperature), operand)
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
    request = Request(targets.shape[0], rows_of.shape[0], rows, temperature, selected)
    return build_layout(request, rows_of.device)
