"""The checks of tree attention on a device, here on the CPU: they pass and notice what is wrong."""

import pytest
import torch

from rollfuse.bench import tree_card
from rollfuse.kernels.tree_attention import tree_decode_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", tree_card.OPTIONS, ids=lambda options: options.name)
def test_right_attention_passes(options):
    assert tree_card.check_attention(CPU, "float32", 64, 4, options).problem is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("change", [{"scale": 0.97 / 8}, {"window": 69}, {"softcap": 4.8}])
def test_wrong_attention_is_noticed(dtype, change, monkeypatch):
    def wrong(*arguments, **options):
        return tree_decode_attention(*arguments, **{**options, **change})

    monkeypatch.setattr(tree_card, "tree_decode_attention", wrong)
    options = tree_card.OPTIONS[-1]
    assert "off by" in tree_card.check_attention(CPU, dtype, 64, 4, options).problem
