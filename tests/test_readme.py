"""What the README says is run, and its file map is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rollfuse import Source

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MAPPED = ("src/rollfuse", "kernels", "kernels/_triton", "losses", "rollout", "bench", "examples")


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """The blocks run in order in one namespace, as a reader would type them."""
    pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")
    namespace: dict[str, object] = {}
    for number, block in enumerate(CODE, 1):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    return namespace


def test_the_blocks_give_a_loss_and_gradients(names):
    assert len(CODE) == 7
    assert names["out"].loss.isfinite()
    for tensor in (names["hidden"], names["weight"]):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


def test_the_blocks_select_tokens(names):
    n_tokens = len(names["out"].entropy)
    assert 0 < names["uncertain"].sum() < n_tokens
    assert names["four"].sum() == 4
    assert names["trusted"].shape == (n_tokens,)
    assert names["baseline"].tolist() == [0.5, 1.0, 1.0, 0.5]


def test_the_blocks_grow_a_tree(names):
    assert names["logits"].shape == (4, 100)
    lengths = [len(text) for text in names["texts"]]
    assert lengths == [10, 10, 10, 10, 7, 7]
    assert names["held"].n_tokens == 4 + 4 * 6
    names["cache"].check()
    assert names["cache"].statistics().n_pages_used == 0


def test_the_blocks_draw_and_verify(names):
    assert names["old"].support.isfinite().all()
    assert 0 <= int(names["verdict"].n_accepted) <= 5
    assert int(names["verdict"].next_token) >= 0
    assert torch.equal(names["second"].tokens, names["first"].tokens)  # nothing was trained
    assert set(names["second"].source.tolist()) == {Source.VERIFIED}
    assert torch.equal(names["same"].tokens, names["first"].tokens)


def test_the_blocks_are_as_short_as_promised():
    blocks = [re.sub(r"^(import|from) .*\n", "", block, flags=re.M) for block in CODE]
    lines = [len([line for line in block.splitlines() if line.strip()]) for block in blocks]
    assert lines[0] <= 10
    assert lines[1] <= 5
    assert lines[2] <= 5
    assert lines[4] <= 15


def test_every_file_has_its_line_in_the_map_and_every_line_its_file():
    mapped = re.findall(r"^    (\S+\.py) {2,}\S", README, re.MULTILINE)
    present = [
        f"{folder}/{path.name}" for folder in MAPPED for path in (ROOT / folder).glob("*.py")
    ]
    assert sorted(mapped) == sorted(present)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
