"""examples/lightning_module.py against a plain loop that sees each step's batches at once."""

from __future__ import annotations

import copy

import pytest
import torch
from gradient_checks import Tensors, assert_models_no_worse, exact, moved, weights
from tiny_models import tiny_qwen3
from two_ranks import run_two_ranks

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")
lightning = pytest.importorskip("lightning", reason="needs lightning: the extra [examples]")

from lightning_module import FusedPolicy, InSteps, recorded  # noqa: E402

RATE, ACCUMULATE = 0.5, 3


class Descent(FusedPolicy):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=RATE)


@pytest.fixture
def batches():
    """Five: a step of three and one of two. The ratios are spread about the clip's bounds."""
    found = recorded(tiny_qwen3(vocab_size=64), 5)
    for batch in found:
        batch["logp_old"] = batch["logp_old"] + 0.3 * torch.randn_like(batch["logp_old"])
    return found


def fitted(model, batches, precision="32-true", **keywords) -> Tensors:
    """How far Lightning moves the weights in two steps."""
    model = copy.deepcopy(model)
    before = weights(model)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **keywords,
    )
    trainer.fit(Descent(model), InSteps(batches, ACCUMULATE))
    assert trainer.global_step == 2
    return moved(weights(model), before)


def descended(model, steps, dtype=None) -> Tensors:
    model = copy.deepcopy(model)
    before = weights(model)
    for step in steps:
        whole = {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits = model(whole["ids"], attention_mask=whole["attention"]).logits[:, :-1]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        logp = log_p.gather(2, whole["ids"][:, 1:, None]).squeeze(2)
        ratio = (logp - whole["logp_old"][:, 1:]).exp()
        advantages = whole["advantages"][:, None]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        loss = loss + 0.01 * (log_p.exp() * log_p).sum(-1)
        mask = whole["mask"][:, 1:]
        ((loss * mask).sum() / mask.sum()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    return moved(weights(model), before)


def test_fit_equals_a_plain_loop(batches):
    model = tiny_qwen3(vocab_size=64)
    steps = batches[:ACCUMULATE], batches[ACCUMULATE:]
    ours, plain = fitted(model, batches), descended(model, steps)
    assert_models_no_worse(ours, plain, descended(exact(model), steps))


def test_autocast_is_no_worse_than_a_plain_loops(batches):
    model = tiny_qwen3(vocab_size=64)
    steps = batches[:ACCUMULATE], batches[ACCUMULATE:]
    ours = fitted(model, batches, "bf16-mixed")
    plain = descended(model, steps, torch.bfloat16)
    assert_models_no_worse(ours, plain, descended(exact(model), steps))


RANK = """
import os, sys
from test_lightning_module import fitted
from tiny_models import tiny_qwen3

folder, rank = sys.argv[1], int(os.environ["RANK"])
batches = torch.load(f"{folder}/in.pt")[rank]
moved = fitted(tiny_qwen3(vocab_size=64), batches, devices=2, strategy="ddp")
torch.save(moved, f"{folder}/out{rank}.pt")
"""


def test_two_ranks_take_the_steps_of_one(batches, tmp_path):
    """Four micro-batches a rank, of different lengths: steps of three and of one."""
    torch.save((batches[:4], [*batches[4:], *batches[:3]]), tmp_path / "in.pt")
    run_two_ranks(RANK, tmp_path)
    steps = [*batches[:3], batches[4], *batches[:2]], [batches[3], batches[2]]
    model = tiny_qwen3(vocab_size=64)
    plain, truth = descended(model, steps), descended(exact(model), steps)
    for rank in range(2):
        assert_models_no_worse(torch.load(tmp_path / f"out{rank}.pt"), plain, truth)
