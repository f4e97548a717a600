"""MIGRATION.md: its code runs; names, defaults and denominators are those of the libraries."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_qwen3
from torch import Tensor

import rollfuse
from rollfuse import (
    Head,
    TokenBatch,
    constant_length,
    grpo,
    grpo_advantages,
    gspo,
    k3,
    linear_policy_loss,
    nll,
    sequence_mean,
    sequence_sum,
    token_mean,
)

TEXT = (Path(__file__).resolve().parent.parent / "MIGRATION.md").read_text()
B, PROMPT, COMPLETION, WIDTH, VOCABULARY = 4, 3, 6, 16, 40


def test_the_code_gives_a_loss():
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    model, names = tiny_qwen3(), {name: getattr(rollfuse, name) for name in rollfuse.__all__}
    ids, mask = torch.randint(48, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    names |= {"model": model, "ids": ids, "mask": mask, "step_tokens": mask.sum()}
    names |= {"advantages": torch.tensor([1.0, -1.0]), "temperature": 0.9}
    names |= {name: torch.full((2, 5), -3.0) for name in ("logp_old", "logp_ref")}
    names["hidden"] = model.get_decoder()(input_ids=ids).last_hidden_state
    exec(compile(block, "MIGRATION.md", "exec"), names)
    names["loss"].backward()
    assert names["loss"].isfinite() and model.lm_head.weight.grad.any()


# -- Liger ------------------------------------------------------------------------------------


@pytest.fixture
def liger():
    module = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="needs liger-kernel: the extra [rivals]"
    )
    return module.LigerFusedLinearGRPOLoss


class Case:
    """Hidden states, head and tokens of both, in float32."""

    def __init__(self) -> None:
        self.hidden = torch.randn(B, PROMPT + COMPLETION, WIDTH, requires_grad=True)
        self.weight = (0.3 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
        self.ids = torch.randint(VOCABULARY, (B, PROMPT + COMPLETION))
        lengths = torch.tensor([6, 1, 4, 3])
        self.mask = torch.arange(COMPLETION) < lengths[:, None]
        self.advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
        log_p = (self.hidden @ self.weight.T).detach().log_softmax(-1)[:, PROMPT - 1 : -1]
        logp = log_p.gather(2, self.ids[:, PROMPT:, None]).squeeze(2)
        self.old, self.ref = (logp + 0.3 * torch.randn_like(logp) for _ in range(2))

    def batch(self, reduction, denominator, **changes) -> TokenBatch:
        def aligned(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (PROMPT, 0))

        return TokenBatch.from_padded(
            self.ids,
            aligned(self.mask),
            reduction=reduction,
            denominator=denominator,
            advantages=self.advantages,
            logp_old=aligned(self.old),
            logp_ref=aligned(self.ref),
            **changes,
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


@pytest.mark.parametrize(
    ("keywords", "objective", "reduction", "denominator"),
    [
        ({"loss_type": "grpo"}, grpo(), sequence_mean, B),
        ({"loss_type": "bnpo"}, grpo(), token_mean, 14),
        ({"loss_type": "dr_grpo", "max_completion_length": 9}, grpo(), constant_length, 9 * B),
        ({"loss_type": "dapo"}, grpo(), token_mean, 33),
        ({"epsilon_low": 0.1, "epsilon_high": 0.3}, grpo(0.1, 0.3), token_mean, 33),
        ({"delta": 1.3}, grpo(dual_clip=1.3), token_mean, 33),
        ({"beta": 0.1, "use_ref_model": True}, grpo(kl=k3, kl_coef=0.1), token_mean, 33),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1},
            gspo(0.1, 0.2),
            sequence_mean,
            B,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_ligers_loss_under_our_names(liger, keywords, objective, reduction, denominator):
    case = Case()
    theirs = liger(
        **{"beta": 0.0, "compiled": False, "use_ref_model": False, "temperature": 0.7, **keywords}
    )
    loss, _ = theirs(
        case.hidden[:, PROMPT - 1 : -1],
        case.weight,
        case.ids[:, PROMPT:],
        case.mask.float(),
        case.advantages,
        old_per_token_logps=case.old,
        ref_per_token_logps=case.ref,
        num_items_in_batch=33,
    )
    batch = case.batch(reduction, denominator, temperature=0.7)
    ours = linear_policy_loss(case.hidden, Head(case.weight), batch, objective).loss
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, other in zip(case.gradients(ours), case.gradients(loss), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_ligers_cross_entropy_under_our_names():
    module = pytest.importorskip(
        "liger_kernel.transformers", reason="needs liger-kernel: the extra [rivals]"
    )
    assert module.LigerFusedLinearCrossEntropyLoss().ignore_index == -100
    case = Case()
    labels = case.ids.masked_fill(~torch.nn.functional.pad(case.mask, (PROMPT, 0)), -100)
    batch = TokenBatch.from_labels(labels, reduction=token_mean)
    ours = linear_policy_loss(case.hidden, case.weight, batch, nll()).loss
    logits = (case.hidden @ case.weight.T)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)


def test_ligers_defaults(liger):
    defaults = {n: p.default for n, p in inspect.signature(liger).parameters.items()}
    told = {"loss_type": "dapo", "beta": 0.04, "temperature": 1.0, "delta": None}
    told |= {"epsilon_low": 0.2, "epsilon_high": 0.2, "use_bias_correction_kl": False}
    assert {name: defaults[name] for name in told} == told


def test_trls_defaults_and_names():
    trl = pytest.importorskip("trl", reason="needs trl: the extra [rivals]")
    found = {field.name: field.default for field in fields(trl.GRPOConfig)}
    told = {"loss_type": "dapo", "beta": 0.0, "temperature": 1.0, "delta": None}
    told |= {"epsilon": 0.2, "epsilon_high": None, "use_bias_correction_kl": True}
    told |= {"entropy_coef": 0.0, "scale_rewards": "group", "importance_sampling_level": "token"}
    told |= {"vllm_importance_sampling_mode": "sequence_mask"}
    told |= {"vllm_importance_sampling_clip_max": 3.0}
    assert {name: found[name] for name in told} == told


# -- verl, whose formulas are written out ------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "denominator", "aggregate"),
    [
        (token_mean, None, lambda x, m: (x * m).sum() / m.sum()),
        (sequence_sum, None, lambda x, m: (x * m).sum(1).sum() / m.any(1).sum()),
        (
            sequence_mean,
            None,
            lambda x, m: ((x * m).sum(1) / (m.sum(1) + 1e-8)).sum() / m.any(1).sum(),
        ),
        (constant_length, 6, lambda x, m: (x * m).sum(1).sum() / m.shape[1]),
    ],
    ids=["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"],
)
def test_verls_aggregation(reduction, denominator, aggregate):
    case = Case()
    case.mask[1] = False
    values = torch.randn(B, COMPLETION)
    batch = case.batch(reduction, denominator)
    ours = (batch.weights * values[case.mask]).sum()
    torch.testing.assert_close(ours, aggregate(values, case.mask))


@pytest.mark.parametrize("eps", [1e-4, 1e-6], ids=["TRL", "verl"])
def test_advantages_within_a_group(eps):
    rewards, groups = torch.tensor([1.0, 0.0, 0.2, 0.7]), torch.tensor([0, 0, 0, 1])
    found = grpo_advantages(rewards, groups, eps=eps, singleton_baseline=0.0)
    group = rewards[:3].double()
    expected = (group - group.mean()) / (group.std() + eps)
    torch.testing.assert_close(found[:3].double(), expected, rtol=1e-6, atol=0.0)
    assert found[3].item() == pytest.approx(0.7)
