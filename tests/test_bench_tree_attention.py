"""`bench tree attention`: who sees what, and who is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rollfuse.bench import attention_rivals, tree, tree_attention

CPU = torch.device("cpu")
GROUP = tree_attention.Case(3, prompt=37, tail=5, heads=4, kv_heads=2, width=16, layers=2)


def rows_by_name(result):
    return {row["provider"]: row for row in result["rows"]}


def test_bytes_and_flops_by_hand():
    assert GROUP.kv_bytes == 2 * 2 * 16 * 4
    assert GROUP.tree_tokens == 37 + 15 and GROUP.text_tokens == 3 * 42
    assert GROUP.bytes() == 2 * (52 * 256 + 2 * 3 * 4 * 16 * 4)
    assert GROUP.flops() == 2 * 4 * 4 * 16 * 126


def test_attention_is_checked_and_read_once():
    result = tree_attention.measure_case(GROUP, CPU, 2, ["rollfuse", *attention_rivals.NAMES[::2]])
    rows = rows_by_name(result)
    for name in ("rollfuse", "SDPA per sequence"):
        assert rows[name]["status"] == "ok" and rows[name]["facts"]["out"] < 1e-6
        assert rows[name]["ratio"] is not None
    assert rows["FlashInfer cascade"]["status"] == "skipped: FlashInfer needs a CUDA device"
    read = result["kv_read"]
    assert read["tree"] == 2 * 52 * 256 and read["per_sequence"] == 2 * 126 * 256
    assert read["tree"] <= read["ours"] < read["per_sequence"]


@pytest.mark.parametrize("tail", [1, 2, 17])
def test_the_tree_is_what_every_row_reads(tail):
    inputs = tree_attention.make_inputs(replace(GROUP, tail=tail), CPU)
    assert inputs.slots.shape == (3, 37 + tail)
    assert len(inputs.tree_slots.unique()) == 37 + 3 * tail
    assert inputs.plan.positions.tolist() == [36 + tail] * 3
    true = tree_attention.truth(inputs)
    for step in tree_attention.ours(inputs).steps().values():
        assert torch.cat(step()).view_as(true).sub(true).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore")  # that flex_attention is slow uncompiled
def test_flex_sees_the_tree():
    inputs = tree_attention.make_inputs(GROUP, CPU)
    true = tree_attention.truth(inputs)
    steps = attention_rivals.flex_steps(inputs, compiled=False)
    assert len(steps) == 2
    for step in steps.values():
        got = torch.cat([out.reshape(-1, GROUP.width) for out in step()])
        assert (got - true).abs().max() < 1e-6


class Cascade:
    """FlashInfer's wrapper, as far as it is used, in plain PyTorch."""

    def __init__(self, n_levels, workspace, layout):
        assert n_levels == 2 and workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(self, *given, q_data_type):
        assert given[4:] == (4, 2, 16, 16) and q_data_type == torch.bfloat16
        self.levels = list(zip(*given[:4], strict=True))
        assert all(x.dtype == torch.int32 for level in self.levels for x in level)

    def run(self, q, paged):
        rows = []
        for i, row in enumerate(q.double()):
            found = []
            for slab in paged:
                parts = []
                for queries, pages, indices, last in self.levels:
                    j = int((queries <= i).sum()) - 1
                    held = slab[indices[pages[j] : pages[j + 1]].long()].flatten(0, 1)
                    parts.append(held[: len(held) - slab.shape[1] + int(last[j])])
                found.append(torch.cat(parts).double().transpose(0, 1))
            keys, values = found
            packed = row.view(keys.shape[0], -1, keys.shape[2])
            weights = (packed @ keys.transpose(1, 2) * keys.shape[2] ** -0.5).softmax(-1)
            rows.append((weights @ values).flatten(0, 1))
        return torch.stack(rows)


@pytest.mark.parametrize(("prompt", "tail"), [(37, 5), (32, 16), (16, 17)])
def test_flashinfer_gets_the_tree(prompt, tail):
    case = replace(GROUP, prompt=prompt, tail=tail, dtype="bfloat16")
    inputs = tree_attention.make_inputs(case, CPU)
    fake = SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade)
    got = torch.cat(attention_rivals.cascade_step(inputs, fake)()).flatten(0, 1)
    assert torch.allclose(got, tree_attention.truth(inputs), atol=1e-12)


def test_wrong_attention_gets_no_numbers(monkeypatch, capsys):
    right = tree_attention.tree_decode_attention
    monkeypatch.setattr(
        tree_attention, "tree_decode_attention", lambda *given: 0.97 * right(*given)
    )
    command = "attention --branches 2 --prompt 20 --tail 3 --heads 2 --kv-heads 1 --width 8"
    assert tree.main([*command.split(), "--repeats", "1", "--providers", "rollfuse"]) == 1
    assert "wrong: out is off by 3.0e-02" in capsys.readouterr().out
