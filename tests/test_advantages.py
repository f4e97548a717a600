"""Advantages: hand-worked groups, the named rules, invariances, ragged groups in any order."""

import math

import pytest
import torch

from rollfuse.losses.advantages import grpo_advantages, rloo_advantages

BOTH = (grpo_advantages, rloo_advantages)


def _close(got, expected, rtol=1e-6):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected), rtol=rtol, atol=1e-7)


def test_grpo_by_hand():
    rewards, groups = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([7, 7, 7])
    # mean 3; squares 4 + 1 + 9 = 14
    sample, population = math.sqrt(7), math.sqrt(14 / 3)
    _close(grpo_advantages(rewards, groups, eps=0.0), [-2 / sample, -1 / sample, 3 / sample])
    _close(
        grpo_advantages(rewards, groups, ddof=0, eps=0.5),
        [-2 / (population + 0.5), -1 / (population + 0.5), 3 / (population + 0.5)],
    )
    _close(grpo_advantages(rewards, groups, scale_by_std=False), [-2.0, -1.0, 3.0])


def test_rloo_by_hand():
    rewards, groups = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 0])
    _close(rloo_advantages(rewards, groups), [1 - 4.0, 2 - 3.5, 6 - 1.5])


def test_a_pair_shows_the_conventions():
    rewards, groups = torch.tensor([0.25, 0.75]), torch.tensor([0, 0])
    _close(grpo_advantages(rewards, groups, ddof=0, eps=0.0), [-1.0, 1.0])
    root = math.sqrt(0.5)
    _close(grpo_advantages(rewards, groups, ddof=1, eps=0.0), [-root, root])
    _close(grpo_advantages(rewards, groups, scale_by_std=False), [-0.25, 0.25])
    _close(rloo_advantages(rewards, groups), [-0.5, 0.5])


def test_the_default_is_the_sample_std_with_a_small_eps():
    rewards, groups = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64)
    _close(grpo_advantages(rewards, groups), [-0.5, -0.5, -0.5, 1.5], rtol=1e-5)
    assert grpo_advantages(rewards, groups)[3] < 1.5


def _by_loop(rewards, groups, one_group):
    """The definition, group by group, in Python floats."""
    out = [0.0] * len(rewards)
    for g in set(groups.tolist()):
        members = [i for i, h in enumerate(groups.tolist()) if h == g]
        for i, value in zip(members, one_group([rewards[i].item() for i in members]), strict=True):
            out[i] = value
    return out


def _grpo_loop(r):
    mean = sum(r) / len(r)
    if len(r) == 1:
        return [0.0]
    std = math.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - 1))
    return [(x - mean) / (std + 1e-6) for x in r]


def _rloo_loop(r):
    if len(r) == 1:
        return [0.0]
    return [x - (sum(r) - x) / (len(r) - 1) for x in r]


@pytest.mark.parametrize(
    ("function", "loop"), [(grpo_advantages, _grpo_loop), (rloo_advantages, _rloo_loop)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ragged_groups_of_any_ids_in_any_order(function, loop, dtype):
    generator = torch.Generator().manual_seed(11)
    ids = torch.tensor([2**31 - 1, -(2**31), 0, 5, -3, 17], dtype=dtype)
    sizes = torch.tensor([1, 2, 3, 5, 8, 21])
    groups = ids.repeat_interleave(sizes)[torch.randperm(40, generator=generator)]
    rewards = torch.randn(40, generator=generator)
    _close(function(rewards, groups), _by_loop(rewards, groups, loop), rtol=2e-6)


def test_ids_at_the_ends_of_int64():
    groups = torch.tensor([2**63 - 1, -(2**63), 2**63 - 1, -(2**63)])
    got = rloo_advantages(torch.tensor([1.0, 5.0, 3.0, 4.0]), groups)
    _close(got, [-2.0, 1.0, 2.0, -1.0])


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1e-30, 3e8 + 32.0, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(function, value, size, dtype):
    # In float64 the mean of 0.1 three times is not 0.1.
    rewards = torch.full((size + 2,), value, dtype=dtype)
    rewards[-1] = value + 1e9
    groups = torch.tensor([4] * size + [9, 9])
    advantages = function(rewards, groups)
    assert not advantages[:size].any()
    assert advantages[size:].all()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("ddof", [0, 1])
def test_no_spread_is_zero_and_not_nan_whatever_eps(eps, ddof):
    rewards, groups = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0, 0, 1])
    assert torch.equal(grpo_advantages(rewards, groups, eps=eps, ddof=ddof), torch.zeros(3))


@pytest.mark.parametrize("function", BOTH)
def test_a_group_of_one(function):
    rewards, groups = torch.tensor([0.75, 0.2, 0.4]), torch.tensor([1, 0, 0])
    assert function(rewards, groups)[0] == 0.0
    with_baseline = function(rewards, groups, singleton_baseline=0.5)
    assert with_baseline[0] == 0.25
    assert torch.equal(with_baseline[1:], function(rewards, groups)[1:])


@pytest.mark.parametrize("function", BOTH)
def test_adding_a_constant_changes_nothing(function):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.25])
    groups = torch.tensor([0, 1, 0, 1, 1])
    shifted = function(rewards + 1024.0, groups)  # exact in float32
    assert torch.equal(shifted, function(rewards, groups))


def test_scaling_rewards():
    rewards, groups = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0, 0, 0])
    torch.testing.assert_close(
        rloo_advantages(8 * rewards, groups), 8 * rloo_advantages(rewards, groups)
    )
    scaled = grpo_advantages(8 * rewards, groups, eps=0.0)
    torch.testing.assert_close(scaled, grpo_advantages(rewards, groups, eps=0.0))


@pytest.mark.parametrize("function", BOTH)
def test_permuting_sequences_permutes_advantages(function):
    generator = torch.Generator().manual_seed(2)
    rewards = torch.rand(30, generator=generator)
    groups = torch.randint(0, 6, (30,), generator=generator)
    order = torch.randperm(30, generator=generator)
    torch.testing.assert_close(
        function(rewards[order], groups[order]), function(rewards, groups)[order], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("function", BOTH)
def test_groups_do_not_see_each_other_and_sum_to_zero(function):
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(24, generator=generator)
    groups = torch.arange(24) % 5
    together = function(rewards, groups)
    for g in range(5):
        alone = function(rewards[groups == g], groups[groups == g])
        torch.testing.assert_close(together[groups == g], alone, rtol=1e-6, atol=0)
        assert abs(alone.sum()) < 1e-6 < alone.abs().min()


def test_rloo_is_the_mean_baseline_times_n_over_n_minus_1():
    rewards, groups = torch.tensor([0.3, 0.9, 0.1, 0.2]), torch.tensor([3, 3, 3, 3])
    centred = grpo_advantages(rewards, groups, scale_by_std=False)
    torch.testing.assert_close(rloo_advantages(rewards, groups), centred * 4 / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", BOTH)
def test_an_empty_batch(function):
    got = function(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert got.shape == (0,) and got.dtype == torch.float32


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_in_float32_out(function, dtype):
    rewards, groups = torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0, 0, 0])
    assert torch.equal(function(rewards.to(dtype), groups), function(rewards, groups))


@pytest.mark.parametrize("function", BOTH)
def test_advantages_are_constants(function):
    rewards = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    groups = torch.tensor([0, 0, 1])
    assert not function(rewards, groups, singleton_baseline=0.0).requires_grad


@pytest.mark.parametrize("function", BOTH)
def test_no_tensor_on_a_device_is_read(function):
    # A meta tensor has no values: reading one, as a host sync would, raises.
    rewards = torch.zeros(5, device="meta")
    groups = torch.zeros(5, dtype=torch.int64, device="meta")
    assert function(rewards, groups, singleton_baseline=0.0).shape == (5,)


R, G = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    ("rewards", "groups", "error", "message"),
    [
        (R.long(), G, TypeError, "rewards: need float32"),
        (R[None], G, ValueError, "rewards: need shape"),
        ([0.0, 1.0], G, TypeError, "rewards: need a torch.Tensor"),
        (R, G.float(), TypeError, "groups: need int64"),
        (R, G[:1], ValueError, "groups: need shape"),
        (R, G.to("meta"), ValueError, "groups: need the device"),
        (torch.tensor([0.0, math.nan]), G, ValueError, r"rewards: need finite values.*\[1\]"),
        (torch.tensor([math.inf, 0.0]), G, ValueError, r"rewards: need finite values.*\[0\]"),
    ],
)
def test_bad_rewards_and_groups(function, rewards, groups, error, message):
    with pytest.raises(error, match=message):
        function(rewards, groups)


@pytest.mark.parametrize(
    ("function", "keywords", "message"),
    [
        (grpo_advantages, {"ddof": 2}, "ddof: need 0 or 1, got 2"),
        (grpo_advantages, {"eps": -1e-6}, "eps: need a finite value >= 0"),
        (grpo_advantages, {"eps": math.nan}, "eps: need a finite value >= 0"),
        (grpo_advantages, {"singleton_baseline": math.nan}, "singleton_baseline: need a finite"),
        (rloo_advantages, {"singleton_baseline": math.inf}, "singleton_baseline: need a finite"),
    ],
)
def test_bad_keywords(function, keywords, message):
    with pytest.raises(ValueError, match=message):
        function(R, G, **keywords)


@pytest.mark.parametrize("function", BOTH)
def test_one_graph_gives_the_same(function):
    """A graph has no place for a value of a tensor: there a reward cannot be refused."""
    torch._dynamo.reset()
    compiled = torch.compile(
        function, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=True
    )
    rewards, groups = torch.rand(9), torch.arange(9) % 4
    assert torch.equal(compiled(rewards, groups), function(rewards, groups))
