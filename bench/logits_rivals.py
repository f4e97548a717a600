"""Who is measured in `bench logits`.

A step runs forward and backward once and leaves the gradient in new memory, or in the logits' own
where it says "in place".
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from rollfuse import policy_loss
from rollfuse.bench import measure
from rollfuse.bench.cases import N_SEQUENCES
from rollfuse.bench.choice import Unavailable
from rollfuse.bench.entrant import Entrant
from rollfuse.bench.logits_cases import Case, Inputs, Outcome, computed, make_inputs
from rollfuse.bench.rivals import scores_from_logits
from rollfuse.kernels.objective import weighted_loss

Steps = Mapping[str, Callable[[], Outcome]]
Scores = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of logits and targets


def entrants(inputs: Inputs) -> list[Entrant]:
    """All of them."""
    return [
        Entrant(name, partial(make, inputs), ours=name in OURS, about=ABOUT.get(name, ""))
        for name, make in PROVIDERS.items()
    ]


def memory_step(case: Case, provider: str, configuration: str) -> Callable[[], tuple[()]]:
    """A step on a CPU that returns nothing, so that its gradient counts as memory it takes."""
    inputs = make_inputs(case, torch.device("cpu"))
    return without_result(PROVIDERS[provider](inputs)[configuration])


def without_result(step: Callable[[], Outcome]) -> Callable[[], tuple[()]]:
    def silent() -> tuple[()]:
        step()
        return ()

    return silent


def _ours(inputs: Inputs, *, overwrite: bool) -> Steps:
    _need_room(inputs, "rollfuse overwrite_logits" if overwrite else "rollfuse")

    def step() -> Outcome:
        out = policy_loss(inputs.logits, inputs.batch, inputs.objective, overwrite_logits=overwrite)
        (dlogits,) = torch.autograd.grad(out.loss, inputs.logits)
        return Outcome(out.loss.detach(), out.logp, out.entropy, dlogits, ours=True)

    return {"in place" if overwrite else "": step}


def _eager(inputs: Inputs) -> Steps:
    _need_room(inputs, "eager")
    return {"log_softmax": _step_of(inputs, scores_from_logits)}


def _compiled(inputs: Inputs) -> Steps:
    _need_room(inputs, "compile")
    return {"log_softmax": _step_of(inputs, torch.compile(scores_from_logits, dynamic=False))}


def _trl(inputs: Inputs) -> Steps:
    """What its GRPOTrainer calls; a Triton kernel on a GPU, plain PyTorch elsewhere."""
    _need_package("trl", "trl")
    _need_room(inputs, "TRL selective_log_softmax")
    scores_of = importlib.import_module("trl.trainer.utils").selective_log_softmax_and_entropy

    def scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # As sequences (B, L, V): elsewhere than on a GPU it goes through them one by one.
        batched = logits.view(N_SEQUENCES, -1, logits.shape[1])
        logp, entropy = scores_of(batched, targets.view(N_SEQUENCES, -1))
        return logp.flatten(), entropy.flatten()

    return {"with entropy": _step_of(inputs, scores)}


def _liger(inputs: Inputs) -> Steps:
    """Its GRPO loss from logits of sequences with a row more, which they get off the clock."""
    _need_package("liger_kernel", "liger-kernel")
    if inputs.logits.device.type != "cuda":
        raise Unavailable("Triton kernels alone: needs a GPU")
    _need_room(inputs, "Liger triton_grpo_loss")
    return {"in place": liger_step(inputs)}


def liger_step(inputs: Inputs) -> Callable[[], Outcome]:
    loss_of = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    batch, shape = inputs.batch, (N_SEQUENCES, inputs.case.tokens // N_SEQUENCES)
    assert batch.advantages is not None and batch.logp_old is not None
    given = batch.logp_old.view(shape), None, batch.targets.view(shape)
    advantages = batch.advantages.view(shape)[:, 0].contiguous()
    saved = inputs.saved.view(*shape, -1)
    logits = computed(torch.cat([saved, saved[:, :1]], dim=1))  # (B, L + 1, V)
    # The rows more get a gradient of zero, and stay that.
    inputs.others.append((logits.detach()[:, :-1], saved))

    def step() -> Outcome:
        loss, _ = loss_of(
            logits, *given, advantages, temperature=1.0, beta=0.0, eps_high=0.2, reduce=True
        )
        (dlogits,) = torch.autograd.grad(loss, logits)
        return Outcome(loss.detach(), None, None, dlogits[:, :-1])

    return step


def _step_of(inputs: Inputs, scores: Scores) -> Callable[[], Outcome]:
    """A step from a library's logp and entropy."""
    batch = inputs.batch

    def step() -> Outcome:
        logp, entropy = scores(inputs.logits, batch.targets)
        loss = weighted_loss(inputs.objective, logp, entropy, batch)
        (dlogits,) = torch.autograd.grad(loss, inputs.logits)
        return Outcome(loss.detach(), logp.detach(), entropy.detach(), dlogits)

    return step


def _need_package(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def _need_room(inputs: Inputs, provider: str) -> None:
    """Raise Unavailable without memory for the tensors that the provider holds at once."""
    need = COPIES[provider] * 4 * inputs.logits.numel()
    free = measure.available_bytes(inputs.logits.device)
    if free is not None and need > 0.9 * free:
        raise Unavailable(f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} free")


PROVIDERS: dict[str, Callable[[Inputs], Steps]] = {
    "rollfuse overwrite_logits": partial(_ours, overwrite=True),
    "rollfuse": partial(_ours, overwrite=False),
    "eager": _eager,
    "compile": _compiled,
    "TRL selective_log_softmax": _trl,
    "Liger triton_grpo_loss": _liger,
}
OURS = ("rollfuse overwrite_logits", "rollfuse")
ABOUT = {"Liger triton_grpo_loss": "no entropy: run without the bonus"}
# How many float32 tensors of the logits' size they hold at once, the gradient included.
COPIES = {
    "rollfuse overwrite_logits": 0.1,
    "rollfuse": 1.1,
    "eager": 5.1,
    "compile": 2.1,
    "TRL selective_log_softmax": 4.0,
    "Liger triton_grpo_loss": 1.1,
}
