"""examples/bare_loop.py: one update against plain PyTorch on the whole batch at once."""

from __future__ import annotations

import copy

import pytest
import torch
from gradient_checks import assert_models_no_worse, exact, gradients, weights
from torch import Tensor, nn
from two_ranks import run_two_ranks

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")

import bare_loop
from bare_loop import Learner, Samples, sample, update


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return bare_loop.tiny_model()


@pytest.fixture
def samples(model: nn.Module) -> Samples:
    """Sixteen responses of different lengths, one of a single token."""
    found, _ = sample(model)
    mask = found.mask.clone()
    for row, length in enumerate([1, 2, 3, 4, 5, 6, 7, 8] * 2):
        mask[row, 3 + length :] = False
    attention = torch.cat([torch.ones_like(mask[:, :3]), mask[:, 3:]], 1).long()
    return Samples(found.ids, attention, mask, torch.randn(len(mask)))


def updated(
    model: nn.Module, samples: Samples, dtype=None, max_norm=torch.inf
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the example's update."""
    learner = Learner(copy.deepcopy(model))
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    loss = update(learner, optimizer, scaler, samples, dtype, max_norm)
    return loss, gradients(learner.model)


def plain(model: nn.Module, samples: Samples, dtype=None) -> tuple[float, dict[str, Tensor]]:
    """The same from the logits of the whole batch, by autograd."""
    model = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logits = model(samples.ids, attention_mask=samples.attention).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = logits[:, :-1].to(wide).log_softmax(-1)
    logp = logp.gather(2, samples.ids[:, 1:, None]).squeeze(2)
    surrogate = -samples.advantages[:, None] * (logp - logp.detach()).exp()
    mask = samples.mask[:, 1:]
    loss = (surrogate * mask).sum() / mask.sum()
    # float16 would lose small gradients on their way through the model.
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    (loss * scale).backward()
    return loss.item(), {name: g / scale for name, g in gradients(model).items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_update_equals_one_plain_step(model, samples, dtype):
    loss, ours = updated(model, samples, dtype)
    expected, ref = plain(model, samples, dtype)
    true_loss, truth = plain(exact(model), samples)
    assert loss == pytest.approx(true_loss, rel=1e-5, abs=1e-6)
    assert expected == pytest.approx(true_loss, rel=1e-5, abs=1e-6)
    assert_models_no_worse(ours, ref, truth)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_it_is_the_unscaled_gradient_that_is_clipped(model, samples, dtype):
    _, found = updated(model, samples, dtype, max_norm=1e-3)
    norm = torch.cat([grad.flatten() for grad in found.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=0.01)


def test_an_overflow_skips_the_step_and_lowers_the_scale(model, samples):
    learner = Learner(model)
    before = weights(model)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    update(learner, optimizer, scaler, samples, torch.float16)
    assert scaler.get_scale() == 2.0**59
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name


RANK = """
import sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from bare_loop import Learner, Samples, tiny_model, update

folder = sys.argv[1]
dist.init_process_group("gloo")
state, samples = torch.load(f"{folder}/in.pt")
model = tiny_model()
model.load_state_dict(state)
# Six responses here, ten there.
part = Samples(*(t[:6] if dist.get_rank() == 0 else t[6:] for t in samples))
learner = DistributedDataParallel(Learner(model))
optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
scaler = torch.amp.GradScaler("cpu", enabled=False)
loss = update(learner, optimizer, scaler, part, None, max_norm=torch.inf)
grads = {name: p.grad for name, p in model.named_parameters()}
torch.save((loss, grads), f"{folder}/out{dist.get_rank()}.pt")
"""


def test_two_ranks_make_the_gradients_of_one(model, samples, tmp_path):
    torch.save((model.state_dict(), tuple(samples)), tmp_path / "in.pt")
    run_two_ranks(RANK, tmp_path)
    (loss0, first), (loss1, second) = (torch.load(tmp_path / f"out{r}.pt") for r in range(2))
    loss, alone = updated(model, samples)
    # The ranks' average is the mean over all tokens.
    assert (loss0 + loss1) / 2 == pytest.approx(loss, rel=1e-5)
    _, truth = plain(exact(model), samples)
    assert_models_no_worse(first, alone, truth)
    for name in first:
        assert torch.equal(first[name], second[name]), name
