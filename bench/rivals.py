"""Who is measured: our op and its rivals.

A provider turns inputs into steps. A step runs forward and backward once and returns the loss and
the gradients, freshly made. Where a library leaves something to its user, each sensible choice is
a step of its own, and the fastest one is the provider's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rollfuse import Head, Plan, linear_policy_loss
from rollfuse.bench import check
from rollfuse.bench.cases import N_SEQUENCES, TOKEN_LOCAL, Case, Inputs, Outcome, Variant
from rollfuse.kernels.objective import Objective, weighted_loss

Step = Callable[[], Outcome]

_MARGIN = 1.15  # over the measured workspaces
_TRL_COLUMNS = (4096, 32768)  # 32768 is what its trainers use


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to compute the loss.

    Args:
        name: what the table calls it.
        module: top-level module it needs, None for torch alone; package: what to install for it.
        steps: inputs -> {configuration: step}.
        workspace: about how many bytes it holds at once above operands and gradients, in the
            greediest of its configurations.
        ours: held to what we promise, where a rival is given honest rounding.
        entropy_gradient: False where it cannot give one; it then runs without the bonus, and is
            checked against the same.
        cuda_only: whether it needs a CUDA device.
        cannot: variants beyond what it can express.
        note: what a reader of its row should know.
    """

    name: str
    steps: Callable[[Inputs], dict[str, Step]]
    module: str | None = None
    package: str | None = None
    workspace: Callable[[Case], float] = lambda case: 0.0
    ours: bool = False
    entropy_gradient: bool = True
    cuda_only: bool = False
    cannot: tuple[Variant, ...] = ()
    note: str = ""

    def why_not(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot run the case here, or None."""
        if case.variant in self.cannot:
            return f"cannot compute {case.variant}"
        if self.cuda_only and device.type != "cuda":
            return "needs CUDA"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"not installed ({self.package})"
        return None

    def needs_bytes(self, case: Case) -> int:
        """About how much memory a step takes, operands included."""
        return case.operand_bytes() + int(_MARGIN * self.workspace(case))

    def limits(self, case: Case) -> check.Limits:
        """The errors it may have."""
        return (check.PROMISE if self.ours else check.ROUNDING)[case.dtype]

    def objective(self, inputs: Inputs) -> Objective:
        """The objective this provider computes, which its truth uses as well."""
        return inputs.objective if self.entropy_gradient else inputs.objective_without_entropy


def _gradients(inputs: Inputs, loss: Tensor) -> tuple[Tensor, Tensor | None]:
    grads = torch.autograd.grad(loss, inputs.leaves())
    return grads[0], None if inputs.case.frozen_head else grads[1]


def _step_of(inputs: Inputs, scores: Callable[[], tuple[Tensor, Tensor | None]]) -> Step:
    """A step from a library's scores of the active rows: logp, and entropy where it has one."""
    batch = inputs.batch.keep(inputs.active)
    unused = torch.zeros_like(batch.weights)

    def step() -> Outcome:
        logp, entropy = scores()
        if entropy is None:
            loss = weighted_loss(inputs.objective_without_entropy, logp, unused, batch)
        else:
            loss = weighted_loss(inputs.objective, logp, entropy, batch)
        dhidden, dweight = _gradients(inputs, loss)
        got = entropy.detach() if entropy is not None else None
        return Outcome(loss.detach(), logp.detach(), got, dhidden, dweight)

    return step


def _active(inputs: Inputs) -> tuple[Callable[[], Tensor], Tensor]:
    """The active rows, gathered inside the step where there are idle ones, and their targets."""
    whole = len(inputs.active) == inputs.case.tokens
    targets = inputs.batch.targets if whole else inputs.batch.targets[inputs.active]
    return (lambda: inputs.hidden if whole else inputs.hidden[inputs.active]), targets


# -- ours -----------------------------------------------------------------------------------


def _rollfuse(inputs: Inputs) -> dict[str, Step]:
    head = Head(inputs.weight)

    def step() -> Outcome:
        out = linear_policy_loss(inputs.hidden, head, inputs.batch, inputs.objective, plan=Plan())
        dhidden, dweight = _gradients(inputs, out.loss)
        rows = inputs.active
        # Rows that cannot have a gradient are skipped: NaN, and marked as not computed.
        scores = (out.logp[rows], out.entropy[rows])
        return Outcome(out.loss.detach(), *scores, dhidden, dweight, out.computed[rows])

    return {"chosen plan": step}


# -- plain PyTorch --------------------------------------------------------------------------


def scores_from_hidden(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return scores_from_logits(F.linear(hidden, weight), targets)


def scores_from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logp and entropy the way one writes them; float32 whatever the operands are."""
    log_p = torch.log_softmax(logits.float(), -1)  # (A, V)
    logp = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    return logp, -(log_p.exp() * log_p).sum(-1)


def _eager(inputs: Inputs) -> dict[str, Step]:
    rows, targets = _active(inputs)
    step = _step_of(inputs, lambda: scores_from_hidden(rows(), inputs.weight, targets))
    return {"log_softmax, active rows": step}


def _compiled(inputs: Inputs) -> dict[str, Step]:
    rows, targets = _active(inputs)
    scores = torch.compile(scores_from_hidden, dynamic=False)
    step = _step_of(inputs, lambda: scores(rows(), inputs.weight, targets))
    return {"log_softmax, active rows": step}


# -- libraries ------------------------------------------------------------------------------


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _trl(inputs: Inputs) -> dict[str, Step]:
    head = _attribute("trl.kernels", "ChunkedLogProbFunction")
    rows, targets = _active(inputs)
    wanted = ("entropy",)

    def step_with(columns: int) -> Step:
        def scores() -> tuple[Tensor, Tensor]:
            out = head.apply(rows(), inputs.weight, None, targets, 1.0, columns, None, 1.0, wanted)
            return out[0], out[1]

        return _step_of(inputs, scores)

    sizes = [c for c in _TRL_COLUMNS if c <= inputs.case.vocab] or [inputs.case.vocab]
    return {f"{c} columns": step_with(c) for c in sizes}


def _liger_scores(inputs: Inputs) -> dict[str, Step]:
    head = _attribute(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        "LigerFusedLinearScaledCrossEntropyFunction",
    )
    rows, targets = _active(inputs)

    def scores() -> tuple[Tensor, Tensor]:
        nll, entropy = head.apply(rows(), inputs.weight, targets, return_entropy=True)
        return -nll, entropy

    return {"active rows": _step_of(inputs, scores)}


# GSPO is an option of Liger's GRPO loss, whose band is 0.2 by default.
_LIGER_RATIOS: dict[str, dict[str, Any]] = {"gspo": {"importance_sampling_level": "sequence"}}


def _liger_grpo(inputs: Inputs) -> dict[str, Step]:
    loss_class = _attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    case, batch = inputs.case, inputs.batch
    shape = (N_SEQUENCES, case.sequence_length)
    assert batch.advantages is not None and batch.logp_old is not None
    targets, logp_old = batch.targets.view(shape), batch.logp_old.view(shape)
    mask = (batch.weights != 0).view(shape).to(torch.float32)
    advantages = batch.advantages.view(shape)[:, 0]

    def step_with(sequences: int, compiled: bool) -> Step:
        loss_of = loss_class(
            beta=0.0,
            compiled=compiled,
            use_ref_model=False,
            chunk_size=sequences,
            loss_type="dapo",
            **_LIGER_RATIOS.get(case.variant, {}),
        )

        def step() -> Outcome:
            hidden = inputs.hidden.view(*shape, case.hidden)
            loss, _ = loss_of(
                hidden, inputs.weight, targets, mask, advantages, old_per_token_logps=logp_old
            )
            dhidden, dweight = _gradients(inputs, loss)
            return Outcome(loss.detach(), None, None, dhidden, dweight)

        return step

    return {
        f"{sequences} sequences a chunk, {'compiled' if compiled else 'not compiled'}": step_with(
            sequences, compiled
        )
        for sequences in (8, N_SEQUENCES)
        for compiled in (False, True)
    }


def _liger_cross_entropy(inputs: Inputs) -> dict[str, Step]:
    loss_class = _attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    nll_of = loss_class(reduction="none")
    rows, targets = _active(inputs)

    def scores() -> tuple[Tensor, None]:
        return -nll_of(inputs.weight, rows(), targets), None

    return {"active rows": _step_of(inputs, scores)}


def _cut_cross_entropy(inputs: Inputs) -> dict[str, Step]:
    nll_of = _attribute("cut_cross_entropy", "linear_cross_entropy")
    on_gpu = inputs.hidden.device.type == "cuda"
    rows, targets = _active(inputs)

    def step_with(implementation: str) -> Step:
        def scores() -> tuple[Tensor, None]:
            nll = nll_of(rows(), inputs.weight, targets, reduction="none", impl=implementation)
            return -nll, None

        return _step_of(inputs, scores)

    # Its Triton kernels take half-precision operands on CUDA only.
    names = ["torch_compile"]
    if on_gpu and inputs.hidden.dtype != torch.float32:
        names.append("cce")
    return {name: step_with(name) for name in names}


def _verl(inputs: Inputs) -> dict[str, Step]:
    scores_of = _attribute("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    rows, targets = _active(inputs)

    def scores() -> tuple[Tensor, Tensor]:
        logp, entropy = scores_of(rows(), inputs.weight, targets, 1.0, "none")
        return logp, entropy

    return {"Triton": _step_of(inputs, scores)}


# -- how much memory they take, as measured on a CPU in float32 -----------------------------


def _active_logits(copies: float) -> Callable[[Case], float]:
    """So many float32 tensors of the active rows' logits."""
    return lambda case: copies * 4 * case.active_tokens * case.vocab


def _our_chunk(case: Case) -> float:
    """One chunk, of at most 4096 rows on any device, and a float32 weight gradient for halves.

    Where tokens depend on each other also what may be held: at most 4 GiB on any device.
    """
    accumulator = 0 if case.dtype == "float32" else 4 * case.vocab * case.hidden
    logits = 4.0 * case.active_tokens * case.vocab
    held = 0.0 if case.variant in TOKEN_LOCAL else min(logits, 4 << 30)
    blocks = 3 * max(2 << 20, 4 * case.vocab)
    return min(4.0 * 4096 * case.vocab, logits) + blocks + held + accumulator


def _trl_chunk(case: Case) -> float:
    return 9.3 * 4 * case.active_tokens * min(max(_TRL_COLUMNS), case.vocab)


def _liger_chunk(case: Case) -> float:
    """Chunks of 512 rows, and a second weight gradient."""
    return 4.0 * (7 * min(512, case.active_tokens) * case.vocab + case.vocab * case.hidden)


def _liger_grpo_chunk(case: Case) -> float:
    """4096 columns of all sequences, prompts included, their weights, a second weight gradient."""
    columns = min(4096, case.vocab)
    return 4.0 * (5 * case.tokens * columns + (columns + case.vocab) * case.hidden)


_NO_ENTROPY = "no entropy: run without the bonus"

OURS = Provider("rollfuse", _rollfuse, workspace=_our_chunk, ours=True)
EAGER = Provider("eager", _eager, workspace=_active_logits(4.9))
PROVIDERS = (
    OURS,
    EAGER,
    Provider("compile", _compiled, workspace=_active_logits(2.9)),
    Provider("trl", _trl, "trl", "trl", workspace=_trl_chunk),
    Provider("liger scores", _liger_scores, "liger_kernel", "liger-kernel", workspace=_liger_chunk),
    Provider(
        "liger grpo",
        _liger_grpo,
        "liger_kernel",
        "liger-kernel",
        workspace=_liger_grpo_chunk,
        entropy_gradient=False,
        cannot=("top_entropy",),
        note=_NO_ENTROPY,
    ),
    Provider(
        "liger ce",
        _liger_cross_entropy,
        "liger_kernel",
        "liger-kernel",
        workspace=_active_logits(1.0),
        entropy_gradient=False,
        cuda_only=True,
        cannot=("top_entropy",),
        note=_NO_ENTROPY,
    ),
    Provider(
        "cut-cross-entropy",
        _cut_cross_entropy,
        "cut_cross_entropy",
        "cut-cross-entropy",
        workspace=_active_logits(1.0),
        entropy_gradient=False,
        cannot=("top_entropy",),
        note=_NO_ENTROPY,
    ),
    Provider("verl", _verl, "verl", "verl", workspace=_active_logits(0.5), cuda_only=True),
)
