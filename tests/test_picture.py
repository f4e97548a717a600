"""The picture of a tree: what is drawn is the merged texts, and it stands alone."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch

from rollfuse import Rollout, group_picture, tree_picture

SVG = "{http://www.w3.org/2000/svg}"
Texts = list[list[str]]


def parsed(picture: str) -> Element:
    return ElementTree.fromstring(picture)


def groups(svg: Element, kind: str) -> list[Element]:
    return [g for g in svg.iter(f"{SVG}g") if g.get("class") == kind]


def cells(svg: Element) -> list[Element]:
    return [rect for edge in groups(svg, "edge") for rect in edge.iter(f"{SVG}rect")]


def flat(texts: Texts, nats: float = 0.5) -> list[list[float]]:
    return [[nats] * len(text) for text in texts]


def titles(svg: Element) -> list[str]:
    return [rect.find(f"{SVG}title").text for rect in cells(svg)]


def random_texts(seed: int) -> Texts:
    """Texts that share beginnings; some twice, some the beginning of another one, one empty."""
    rng = random.Random(seed)
    texts: Texts = [[]]
    for _ in range(rng.randrange(1, 60)):
        start = rng.choice(texts)
        kept = start[: rng.randint(0, len(start))]
        texts.append(kept + [rng.choice("abc") for _ in range(rng.randrange(0, 9))])
    rng.shuffle(texts)
    return texts


def number_of_edges(texts: Texts) -> int:
    """Of the tree of distinct texts, each with an end of its own, runs without a fork drawn as one;
    the first one counts even if it is empty."""
    ended = {(*text, "end") for text in texts}
    following = defaultdict(set)
    for text in ended:
        for i in range(len(text)):
            following[text[:i]].add(text[i])
    forks = [beginning for beginning, tokens in following.items() if len(tokens) > 1]
    return 1 + sum(len(following[fork]) for fork in forks)


@pytest.mark.parametrize("seed", range(20))
def test_beginnings_are_drawn_once(seed: int):
    texts = random_texts(seed)
    svg = parsed(tree_picture(texts, flat(texts), [0.0] * len(texts)))
    beginnings = {tuple(text[: i + 1]) for text in texts for i in range(len(text))}
    assert len(cells(svg)) == len(beginnings)
    assert len(groups(svg, "leaf")) == len({tuple(text) for text in texts})
    assert len(groups(svg, "edge")) == number_of_edges(texts)
    assert len(list(svg.iter(f"{SVG}path"))) == number_of_edges(texts) - 1


def places(svg: Element) -> dict[tuple[float, float], str]:
    """Texts of cells by (left edge, top edge)."""
    return {
        (float(rect.get("x")), float(rect.get("y"))): rect.find(f"{SVG}title").text.split("  ")[0]
        for rect in cells(svg)
    }


def test_a_tree_of_three():
    texts = [["a", "b", "c"], ["a", "b", "d"], ["a", "e"]]
    entropy = [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0]]
    svg = parsed(tree_picture(texts, entropy, [1.0, 0.0, 0.25], "ask"))
    found = {token: place for place, token in places(svg).items()}
    # a -> b -> (c, d), a -> e: columns from left to right, rows c, d, e; forks in the middle.
    assert found["a"][0] < found["b"][0] == found["e"][0] < found["c"][0] == found["d"][0]
    assert found["c"][1] < found["d"][1] < found["e"][1]
    assert found["b"][1] == pytest.approx((found["c"][1] + found["d"][1]) / 2, abs=0.1)
    assert found["a"][1] == pytest.approx((found["b"][1] + found["e"][1]) / 2, abs=0.1)
    shown = [text.text for edge in groups(svg, "edge") for text in edge.iter(f"{SVG}text")]
    assert sorted(shown) == ["a", "b", "c", "d", "e"]
    rewards = [leaf.find(f"{SVG}text") for leaf in groups(svg, "leaf")]
    assert [reward.text for reward in rewards] == ["1", "0", "0.25"]
    assert [reward.get("class") for reward in rewards] == ["good", "bad", "good"]
    heights = [float(reward.get("y")) for reward in rewards]
    assert heights == sorted(heights) and heights[0] > found["c"][1]
    assert "ask" in list(svg.itertext())


@pytest.mark.parametrize("seed", range(5))
def test_no_two_tokens_cover_each_other(seed: int):
    texts = random_texts(seed)
    svg = parsed(tree_picture(texts, flat(texts), [0.0] * len(texts)))
    width, height = map(float, svg.get("viewBox").split()[2:])
    by_column = defaultdict(list)
    for rect in cells(svg):
        x, y, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
        by_column[x].append((y, y + h, x + w))
    for column in by_column.values():
        column.sort()
        assert all(one[1] <= two[0] + 0.11 for one, two in zip(column, column[1:], strict=False))
    borders = sorted(by_column)
    for left, right in zip(borders, borders[1:], strict=False):
        assert by_column[left][0][2] <= right


def test_colour_is_entropy():
    texts = [["a", "b", "c"]]
    svg = parsed(tree_picture(texts, [[0.0, 1.5, 3.0]], [0.0]))
    low, middle, high = (float(rect.get("fill-opacity")) for rect in cells(svg))
    assert low < 0.2 and high > 0.7
    assert middle == pytest.approx((low + high) / 2, abs=0.01)
    (legend,) = groups(svg, "legend")
    swatches = [float(rect.get("fill-opacity")) for rect in legend.iter(f"{SVG}rect")]
    assert swatches == sorted(swatches) and (swatches[0], swatches[-1]) == (low, high)
    assert legend.find(f"{SVG}text").text == "entropy 0 to 3 nats"
    assert titles(svg) == ["a  0 nats", "b  1.5 nats", "c  3 nats"]


def test_certain_tokens_alone_are_faint():
    svg = parsed(tree_picture([["a"]], [[0.0]], [0.0]))
    assert float(cells(svg)[0].get("fill-opacity")) < 0.2


def test_equal_responses_are_one_with_their_mean():
    texts = [["a"], ["b"], ["a"], ["a"]]
    svg = parsed(tree_picture(texts, flat(texts), [1.0, 0.0, 0.0, 0.5]))
    first, second = groups(svg, "leaf")
    assert first.find(f"{SVG}text").text == "0.5 \u00d73"
    assert first.find(f"{SVG}circle/{SVG}title").text == "reward 1, 0, 0.5"
    assert second.find(f"{SVG}text").text == "0"


def test_a_text_that_another_one_continues_has_a_leaf_of_its_own():
    texts = [["a", "b"], ["a"]]
    svg = parsed(tree_picture(texts, flat(texts), [1.0, 0.0]))
    longer, shorter = (leaf.find(f"{SVG}circle") for leaf in groups(svg, "leaf"))
    assert float(longer.get("cx")) > float(shorter.get("cx"))
    assert longer.get("cy") != shorter.get("cy")


def test_tokens_are_told_apart_by_their_ids():
    texts = [["\ufffd", "x"], ["\ufffd", "x"]]
    by_text = parsed(tree_picture(texts, flat(texts), [0.0, 0.0]))
    by_id = parsed(tree_picture(texts, flat(texts), [0.0, 0.0], ids=[[7, 1], [8, 1]]))
    assert (len(cells(by_text)), len(cells(by_id))) == (2, 4)


NASTY = ['</text><script>alert("1")</script>', "&amp;", "\x00\x1b", "\ud800", "]]>", " \n\t", "'\""]


def test_texts_cannot_inject_and_are_well_formed():
    picture = tree_picture([NASTY], flat([NASTY]), [1.0], "<title>&\x00\n</svg>")
    svg = parsed(picture)
    assert "<script" not in picture and "\x00" not in picture
    picture.encode()
    assert {element.tag.removeprefix(SVG) for element in svg.iter()} == {
        "svg", "style", "g", "rect", "title", "text", "circle",
    }  # fmt: skip
    shown = [title.removesuffix("  0.5 nats") for title in titles(svg)]
    assert shown == [
        '</text><script>alert("1")</script>', "&amp;", "\ufffd\ufffd", "\ufffd", "]]>",
        "\u2423\u21b5\u21e5", "'\"",
    ]  # fmt: skip
    assert "<title>&\ufffd\u21b5</svg>" in list(svg.itertext())


def test_it_stands_alone():
    texts = random_texts(3)
    picture = tree_picture(texts, flat(texts), [0.0] * len(texts), "a question")
    svg = parsed(picture)
    assert picture.count("http") == 1  # the namespace
    for foreign in ("url(", "@import", "href", "src=", "<script", "var("):
        assert foreign not in picture
    style = svg.find(f"{SVG}style").text
    assert "prefers-color-scheme:dark" in style
    # In a page it colours nothing but itself.
    rules = style.replace("@media(prefers-color-scheme:dark){", "").replace("}}", "}").split("}")
    assert all(rule.startswith(".tree ") for rule in rules if rule)


def test_it_is_a_function_of_its_arguments():
    texts = random_texts(4)
    rewards = [float(i % 2) for i in range(len(texts))]
    assert len({tree_picture(texts, flat(texts), rewards, "p") for _ in range(3)}) == 1


def test_hundreds_of_long_branches_stay_small():
    texts = [["word"] * (i % 7) + [f"{i} {j}" for j in range(80)] for i in range(400)]
    picture = tree_picture(texts, flat(texts), [0.0] * 400)
    svg = parsed(picture)
    width, height = map(float, svg.get("viewBox").split()[2:])
    assert width <= 1160 and height <= 2000
    assert len(groups(svg, "leaf")) == 400
    # No text where it would not be readable; pointing at a token shows it.
    assert not [text for edge in groups(svg, "edge") for text in edge.iter(f"{SVG}text")]
    assert titles(svg)[-1] == "399\u242379  0.5 nats"
    assert len(picture) < 250 * len(cells(svg))


def test_low_rows_have_no_text():
    texts = [["a", f"{i}"] for i in range(300)]
    svg = parsed(tree_picture(texts, flat(texts), [0.0] * 300))
    assert not [text for kind in ("edge", "leaf") for g in groups(svg, kind)
                for text in g.iter(f"{SVG}text")]  # fmt: skip


def test_a_token_is_written_where_it_has_room():
    texts = [["w" * 30, "a", *"bcdefghijk"]]
    svg = parsed(tree_picture(texts, flat(texts), [0.0], width=400))
    shown = [text.text for edge in groups(svg, "edge") for text in edge.iter(f"{SVG}text")]
    assert shown == list("abcdefghijk")
    svg = parsed(tree_picture(texts, flat(texts), [0.0], width=150))
    assert not [text for edge in groups(svg, "edge") for text in edge.iter(f"{SVG}text")]


def test_a_long_prompt_shows_its_end():
    svg = parsed(tree_picture([["a"]], [[0.0]], [0.0], "x" * 5000 + " the end"))
    (shown,) = [t for t in svg.iter(f"{SVG}text") if "prompt" in t.get("class", "")]
    text = "".join(shown.itertext()).removeprefix(shown.find(f"{SVG}title").text)
    assert text.startswith("\u2026x") and text.endswith(" the end") and len(text) < 80


class Words:
    """Token 7 is `<7>`, and so is token 17."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(f"<{i % 10}>" for i in token_ids)


def rollout() -> Rollout:
    """Prompts [1, 2] and [3]; responses 5 6, 5 7 and, of the second one, 9."""
    return Rollout(
        prompts=(torch.tensor([1, 2]), torch.tensor([3])),
        prompt_index=torch.tensor([0, 1, 0]),
        tokens=torch.tensor([5, 6, 9, 5, 7]),
        cu_seqlens=torch.tensor([0, 2, 3, 5]),
        logp=torch.zeros(5),
        entropy=torch.tensor([0.5, 1.0, 4.0, 0.5, 1.5]),
        version=torch.zeros(5, dtype=torch.int64),
        source=torch.zeros(5, dtype=torch.uint8),
        streams=torch.arange(3),
        finish=torch.zeros(3, dtype=torch.uint8),
    )


def test_a_group_of_a_rollout():
    rewards = torch.tensor([1.0, 2.0, 3.0])
    picture = group_picture(rollout(), 0, rewards, Words())
    expected = tree_picture(
        [["<5>", "<6>"], ["<5>", "<7>"]], [[0.5, 1.0], [0.5, 1.5]], [1.0, 3.0], "<1><2>"
    )
    assert picture == expected
    assert "<title>&lt;9&gt;  4 nats" in group_picture(rollout(), 1, rewards, Words())
    alike = replace(rollout(), tokens=torch.tensor([5, 6, 9, 5, 16]))
    assert group_picture(alike, 0, rewards, Words()).count('class="leaf"') == 2
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=r"prompt_index: need a number in \[0, 2\), got"):
            group_picture(rollout(), wrong, rewards, Words())
    with pytest.raises(ValueError, match="rewards: need"):
        group_picture(rollout(), 0, rewards[:2], Words())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "responses: need at least one, got none"),
        (([["a"]], [[]], [0.0]), r"entropy: need lengths \[1\], got \[0\]"),
        (([["a"]], [[0.0]], []), "rewards: need 1 values, got 0"),
        (([["a"]], [[float("nan")]], [0.0]), "entropy: need finite values"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tree_picture(*arguments)


def test_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"ids: need lengths \[1\], got \[2\]"):
        tree_picture([["a"]], [[0.0]], [0.0], ids=[[1, 2]])
