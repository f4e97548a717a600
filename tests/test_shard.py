"""A vocabulary split over gloo processes against one process; data-parallel wrappers beside it."""

import pytest
import shard_cases
import torch
from check import relative_error
from ranks import on_ranks
from shard_cases import SPLITS, run

from rollfuse.kernels.rows import RowStatistics, Transform
from rollfuse.kernels.shard import joined
from rollfuse.kernels.statistics import row_entropy, row_statistics, target_logp, target_shift

pytestmark = pytest.mark.kernels

CASES = [
    {"kind": "fused"},
    {"kind": "fused", "n_pairs": 40, "softcap": 9.0, "lora": True},
    {"kind": "fused", "sharpness": 30.0},
    {"kind": "fused", "dead": True},
    {"kind": "fused", "confident": True},
    {"kind": "fused", "sequence_parallel": True},
    {"kind": "hold", "lora": True, "sequence_parallel": True},
    {"kind": "hold", "dtype": torch.bfloat16},
    {"kind": "hold", "dtype": torch.bfloat16, "sharpness": 0.05},
    {"kind": "recompute", "n_pairs": 40, "bias": False},
    {"kind": "recompute", "dtype": torch.float64},
    {"kind": "unit", "sequence_parallel": True},
    {"kind": "fused", "budget_bytes": 1 << 17},
    {"kind": "hold", "n_rows": 0, "sequence_parallel": True},
]


def whole(name, parts, case):
    """A gradient of the whole head from the ranks' parts of it."""
    if name in ("weight", "bias", "lora_b") or (name == "hidden" and "sequence_parallel" in case):
        return torch.cat([part[name] for part in parts])
    for part in parts[1:]:  # everybody has it, to the bit
        assert torch.equal(part[name].nan_to_num(), parts[0][name].nan_to_num()), name
    return parts[0][name]


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_a_split_vocabulary_equals_a_whole_one(n_ranks, tmp_path):
    found = on_ranks(shard_cases.run_all, n_ranks, tmp_path, CASES * 2)
    for i, case in enumerate(CASES):
        alone = run(case, split=False)
        half = case.get("dtype") == torch.bfloat16
        # One ulp of a logit of 100 is 1e-5 nats.
        exact = 3e-5 if "sharpness" in case else 3e-6
        bound = 8e-3 if half else 1e-12 if case.get("dtype") == torch.float64 else exact
        for name, want in alone.items():
            ours = whole(name, [rank[i] for rank in found], case)
            again = whole(name, [rank[i + len(CASES)] for rank in found], case)
            assert torch.equal(ours.nan_to_num(), again.nan_to_num())
            assert torch.equal(ours.isnan(), want.isnan())
            error = relative_error(ours.nan_to_num(), want.nan_to_num())
            is_value = name in ("logp", "entropy", "loss")
            assert error < (exact if is_value and half else bound), (case, name, error)


def test_statistics_of_two_sets_of_columns():
    z = torch.randn(10, 40) * 5
    z[1, :15] = -torch.inf
    z[2, 15:] = -torch.inf
    z[3] = -torch.inf
    z[4, 30] = z[4, 3] = 99.0  # a tie goes to the lower column
    z[5] -= 200.0
    z[6, 20] = z[7, 3] = torch.nan  # of the one or the other set,
    z[8, 20:] = z[9, :15] = torch.nan  # all of it, or beside nothing
    z[8, :20] = z[9, 15:] = -torch.inf
    factor = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    transform = Transform(factor)
    want = row_statistics(z, transform)
    low = row_statistics(z[:, :15].contiguous(), transform)
    high = row_statistics(z[:, 15:].contiguous(), transform)
    high = RowStatistics(high.top, high.top_column + 15, high.rest, high.spread)
    got = joined(low, high, factor)
    live = torch.tensor([0, 1, 2, 4, 5])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[live], b[live], rtol=2e-6, atol=1e-6)
    assert got.top[3] == -torch.inf
    assert got.rest[3] == want.rest[3] == 0
    assert row_entropy(got)[6:].isnan().all()
    for column in (3, 20):  # a target that is forbidden, the NaN itself, or neither
        pre, slot, target = z[:, column], torch.arange(10), torch.full((10,), column)
        shifted = target_shift(pre, got, transform, slot)
        logp = target_logp(got, shifted, slot, target)
        assert logp[6:].isnan().all()
        assert not logp[:6].isnan().any()


def test_ranks_with_different_shares_plan_alike(tmp_path):
    """They gather what each chunk found: one chunk more on a rank, and all wait for ever."""
    found = on_ranks(shard_cases.chunks_of_a_plan, 4, tmp_path)
    assert max(n_chunks for _, _, n_chunks in found[0]) > 1
    assert found[1:] == found[:1] * 3


def test_ranks_that_do_not_fit_are_told_so(tmp_path):
    first, second = on_ranks(shard_cases.messages, 2, tmp_path)
    for width, scale, _, targets, rows in (first, second):
        assert rows == "hidden: need as many rows on every rank, got [1, 2]"
        assert width == "group: need heads of one width on all ranks, got [4.0, 5.0]"
        assert scale == "group: need heads of one scale on all ranks, got [1.0, 2.0]"
        assert targets == "targets: need token ids in [0, 11), got 11 to 11"
    assert "a process group that this process is in" in second[2]


def test_data_parallel_accumulation_equals_one_process(tmp_path):
    want = shard_cases.one_process()
    for found in on_ranks(shard_cases.data_parallel, 2, tmp_path):
        assert found.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_weights_split_by_fsdp_are_refused_or_gathered(tmp_path):
    want = shard_cases.of_first_batch()
    for refused, gradient in on_ranks(shard_cases.fully_sharded, 2, tmp_path):
        assert "DTensor" in refused
        assert "full_tensor(" in refused
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-7)


def test_distributed_tensors_are_refused_by_name(tmp_path):
    (found,) = on_ranks(shard_cases.refusals_of_distributed_tensors, 1, tmp_path)
    names = ["hidden", "hidden", "logits", "logits", "logits", "targets", "advantages"]
    need = "need a plain tensor, got a DTensor; pass its to_local() where"
    for name, message in zip([*names, "scores", "values"], found, strict=True):
        assert message.startswith(f"{name}: {need}")


def test_splits_cover_the_vocabulary():
    assert {sum(sizes) for sizes in SPLITS.values()} == {301}
