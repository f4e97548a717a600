"""The report page and its charts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rollfuse.chart import line_chart, running_mean, short, ticks
from rollfuse.config import Config
from rollfuse.report import CURVES, write_report
from rollfuse.rollout.picture import tree_picture

SAMPLE = {
    "step": 5,
    "prompt": "<b>21></b>",
    "answer": "12",
    "reward": 1.0,
    "tokens": ["1", "2", "<eos>"],
    "logp": [-0.1, -2.3, 0.0],
}


class Tags(HTMLParser):
    """Collects tags, and fails on one that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def metrics(n: int) -> list[dict[str, float]]:
    records = [{"step": 0.0, "heldout_accuracy": 0.4}]
    for step in range(1, n + 1):
        curves = {name: 0.1 * step for name, *_ in CURVES if name != "heldout_accuracy"}
        records.append({"step": step, "seconds": 0.5, "tokens": 100.0, **curves})
    return [*records, {"step": n, "heldout_accuracy": 0.93}]


def page(tmp_path: Path, n: int, samples: list[dict[str, object]]) -> str:
    write_report(tmp_path / "report.html", Config(), metrics(n), samples)
    return (tmp_path / "report.html").read_text()


def test_every_promised_curve_is_drawn(tmp_path: Path) -> None:
    text = page(tmp_path, 100, [SAMPLE])
    assert {name for name, *_ in CURVES} == {
        "reward",
        "heldout_accuracy",
        "entropy",
        "kl",
        "length",
        "clip_fraction",
        "sampler_trainer_diff",
        "tokens_per_second",
    }
    assert text.count("<svg") == len(CURVES)
    assert "0.400 &rarr; 0.930" in text
    assert "0 min 50 s" in text


def test_the_page_stands_alone(tmp_path: Path) -> None:
    tags = Tags()
    tags.feed(page(tmp_path, 10, [SAMPLE]))
    assert not tags.open
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe"}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in tags.seen)
    text = (tmp_path / "report.html").read_text()
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_samples_can_be_read_and_cannot_inject(tmp_path: Path) -> None:
    text = page(tmp_path, 10, [SAMPLE, {**SAMPLE, "step": 9, "reward": 0.0}])
    assert "&lt;b&gt;21&gt;&lt;/b&gt;" in text and "<b>21>" not in text
    assert "&lt;eos&gt;" in text and "3 tok" in text
    assert text.index("<summary>step 9") < text.index("<summary>step 5")
    shades = [float(p) for p in re.findall(r"--p:(\d+)%", text)[:3]]
    assert shades[1] > shades[0] > shades[2] == 0


TREE_SAMPLE = {**SAMPLE, "ids": [4, 5, 0], "entropy": [0.2, 1.0, 0.0]}


def test_one_group_of_the_last_samples_is_drawn(tmp_path: Path) -> None:
    def sample(**changes: object) -> dict[str, object]:
        return {**TREE_SAMPLE, **changes}

    old = [sample(tokens=["9", "9", "9"], reward=0.0), sample()]
    same = [sample(step=9, prompt="same>", reward=0.5)] * 2
    group = [sample(step=9, reward=0.0), sample(step=9, ids=[4, 6, 0], tokens=["1", "3", "<eos>"])]
    text = page(tmp_path, 10, [*old, *same, *group])
    picture = tree_picture(
        [["1", "2", "<eos>"], ["1", "3", "<eos>"]], [[0.2, 1.0, 0.0]] * 2, [0.0, 1.0], "<b>21></b>"
    )
    assert text.count('class="tree"') == 1
    assert picture.replace(' xmlns="http://www.w3.org/2000/svg"', "") in text
    assert "http" not in text
    tags = Tags()
    tags.feed(text)
    assert not tags.open


def test_tokens_of_one_text_are_told_apart(tmp_path: Path) -> None:
    other = {**TREE_SAMPLE, "ids": [9, 5, 0]}
    assert page(tmp_path, 3, [TREE_SAMPLE] * 2).count('class="leaf"') == 1
    assert page(tmp_path, 3, [TREE_SAMPLE, other]).count('class="leaf"') == 2


def test_samples_of_older_versions_have_no_tree(tmp_path: Path) -> None:
    text = page(tmp_path, 3, [SAMPLE])
    assert 'class="tree"' not in text and "<p>None recorded yet.</p>" in text
    assert 'class="tree"' in page(tmp_path, 3, [SAMPLE, TREE_SAMPLE])


def test_page_and_picture_have_the_same_colours(tmp_path: Path) -> None:
    text = page(tmp_path, 3, [TREE_SAMPLE])
    for name, light, dark in (("mark", "#f5a524", "#b9770e"), ("good", "#17803d", "#5fd08a")):
        assert text.index(f"--{name}:{light}") < text.index(f"--{name}:{dark}")
        for colour in (light, dark):
            assert re.search(rf"\.tree \.\w+{{fill:{colour}}}", text)


def test_the_config_is_all_there(tmp_path: Path) -> None:
    text = page(tmp_path, 3, [])
    for name in ("prompts_per_step", "kl_coef", "lr", "seed"):
        assert f"<th>{name}</th>" in text


def test_a_run_without_steps_has_a_report(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", Config(), [], [])
    text = (tmp_path / "r.html").read_text()
    assert "No step has been finished" in text and "not measured" in text


def test_points_land_where_they_belong() -> None:
    svg = ElementTree.fromstring(line_chart([(0, 0.0), (5, 0.5), (10, 1.0)], label="a & b"))
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")][:3]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y2  # up is more
    labels = {t.text: float(t.attrib["y"]) for t in svg.iter("text") if t.attrib["class"] == "y"}
    assert labels["0"] == pytest.approx(y0 + 4, abs=0.1)
    assert labels["1"] == pytest.approx(y2 + 4, abs=0.1)


def test_many_points_are_smoothed_and_gaps_left_out() -> None:
    svg = line_chart([(i, float(i % 2)) for i in range(200)], label="x")
    assert 'class="raw"' in svg and "dot" not in svg
    smooth = running_mean([(i, float(i % 2)) for i in range(200)])
    assert all(abs(y - 0.5) < 0.1 for _, y in smooth[10:-10])
    assert "nan" not in line_chart([(0, 1.0), (1, float("nan")), (2, 2.0)], label="x")


def labels(svg: str, axis: str) -> list[str | None]:
    texts = ElementTree.fromstring(svg).iter("text")
    return [text.text for text in texts if text.attrib["class"] == axis]


def test_a_curve_at_its_bottom_shows_nothing_below() -> None:
    flat = line_chart([(0, 0.0), (5, 0.0), (10, 0.0)], label="x", bottom=0.0)
    assert labels(flat, "y")[0] == "0" and not any("-" in text for text in labels(flat, "y"))


def test_charts_of_a_run_share_their_steps(tmp_path: Path) -> None:
    short_one = line_chart([(1, 0.1), (41, 0.2)], label="x", until=60.0)
    long_one = line_chart([(1, 0.1), (60, 0.2)], label="x", until=60.0)
    assert labels(short_one, "x") == labels(long_one, "x") == ["0", "20", "40", "60"]
    records = [{"step": step, "reward": 0.1} for step in range(1, 61)]
    records[0]["kl"] = 0.0
    records[40]["kl"] = 0.2
    write_report(tmp_path / "r.html", Config(), records, [])
    charts = re.findall(r"<svg.*?</svg>", (tmp_path / "r.html").read_text())
    assert len(charts) == 2
    assert labels(charts[0], "x") == labels(charts[1], "x")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.013, 0.94), (-3, 7), (5, 5), (0, 0), (1e-8, 3e-8), (0, 12345)]
)
def test_ticks_enclose_and_are_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 7
    assert found == sorted(set(found))


def test_numbers_are_short() -> None:
    assert [short(x) for x in (0, 0.91234, 3.14e-7, 12400.4)] == ["0", "0.912", "3.1e-07", "12,400"]
