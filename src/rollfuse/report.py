"""The report of a run: one HTML file with curves and responses to read, light and dark.

It asks nothing of the network and runs no script, so it can be mailed, archived or attached.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rollfuse.chart import line_chart, short
from rollfuse.config import Config
from rollfuse.rollout.picture import DARK, LIGHT, NAMESPACE, tree_picture
from rollfuse.rollout.record import Source

Record = Mapping[str, Any]

# metric, heading, unit or explanation, where the y axis starts
CURVES: tuple[tuple[str, str, str, float | None], ...] = (
    ("heldout_accuracy", "Held-out accuracy", "share of problems, greedily", 0.0),
    ("reward", "Reward", "mean of the step's responses", 0.0),
    ("entropy", "Entropy", "nats per sampled token", 0.0),
    ("kl", "KL to the start", "nats per token, k3 estimate", 0.0),
    ("length", "Response length", "tokens, end token included", 0.0),
    ("clip_fraction", "Clip fraction", "share of trained tokens clipped", 0.0),
    ("sampler_trainer_diff", "Sampler - trainer", "mean |log-prob difference|, nats", 0.0),
    ("tokens_per_second", "Throughput", "sampled tokens per second of a step", 0.0),
)

# Only of runs with --reuse.
REUSE_CURVES: tuple[tuple[str, str, str, float | None], ...] = (
    ("reused", "Reused tokens", "share that was guessed and stayed", 0.0),
    ("accepted", "Accepted guesses", "share of the guessed tokens that stayed", 0.0),
    ("accepted_run", "Accepted run", "tokens taken over from an older response", 0.0),
    ("run_most", "Accepted run, most", "the same if each token stays at 1 - TV", 0.0),
    ("run_least", "Accepted run, least", "and at (1 - TV) / (1 + TV)", 0.0),
    ("match_rate", "Match rate", "chance that an older token stays", None),
    ("match_most", "Match rate, most", "1 - TV: what any exact rule can reach", None),
    ("match_least", "Match rate, least", "(1 - TV) / (1 + TV): what coupling is sure of", None),
)


def write_report(
    path: Path, config: Config, metrics: Sequence[Record], samples: Sequence[Record]
) -> None:
    """Write the page to `path`, replacing an older one.

    Args:
        metrics: one record a step, as in metrics.jsonl.
        samples: responses, as in samples.jsonl: step, prompt, answer, reward, tokens
            (texts), logp (nats), and for the tree ids and entropy (nats).
    """
    title = f"rollfuse - {Path(config.data).stem if config.data else config.task}"
    body = "".join(
        (
            f"<h1>{escape(title)}</h1>",
            _summary(metrics),
            '<section class="charts">',
            *(_chart(metrics, *curve) for curve in _curves(metrics)),
            '</section><p class="hint">Across: GRPO steps. The faint line is every step, the '
            "strong one its running mean; the number is the last one measured.</p>",
            "<h2>A group as a tree</h2>",
            '<p class="hint">Responses to one prompt of the last step recorded, and their rewards. '
            "The stronger a token is marked, the less certain the policy was.</p>",
            _tree(samples),
            "<h2>Responses</h2>",
            '<p class="hint">Reward, length, text. The stronger a token is marked, the less likely '
            "the policy thought it; point at it for its probability. Underlined tokens were reused."
            "</p>",
            _samples(samples),
            "<h2>Configuration</h2>",
            _config(config),
        )
    )
    partial = path.with_suffix(".partial")
    partial.write_text(_PAGE.format(title=escape(title), style=_STYLE, body=body), "utf-8")
    partial.replace(path)


def _curves(metrics: Sequence[Record]) -> tuple[tuple[str, str, str, float | None], ...]:
    known = {name for record in metrics for name in record}
    return (*CURVES, *(curve for curve in REUSE_CURVES if curve[0] in known))


def _summary(metrics: Sequence[Record]) -> str:
    if not metrics:
        return "<p>No step has been finished yet.</p>"
    accuracy = [m["heldout_accuracy"] for m in metrics if "heldout_accuracy" in m]
    seconds = sum(m.get("seconds", 0.0) for m in metrics)
    tiles = [
        ("held-out accuracy", f"{accuracy[0]:.3f} &rarr; {accuracy[-1]:.3f}" if accuracy else "-"),
        ("steps", short(metrics[-1]["step"])),
        ("time in steps", f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"),
        ("tokens sampled", short(sum(m.get("tokens", 0.0) for m in metrics))),
    ]
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
        + "</dl>"
    )


def _chart(
    metrics: Sequence[Record], name: str, title: str, unit: str, bottom: float | None
) -> str:
    points = [(float(m["step"]), float(m[name])) for m in metrics if name in m]
    until = float(metrics[-1]["step"]) if metrics else 0.0
    last = next((short(y) for _, y in reversed(points) if math.isfinite(y)), "")
    return (
        f"<figure><figcaption><b>{title}</b><span>{last}</span><small>{unit}</small></figcaption>"
        f"{line_chart(points, label=title, bottom=bottom, until=until)}</figure>"
    )


def _tree(samples: Sequence[Record]) -> str:
    """Of the last recorded step's groups the one whose rewards differ most, the first of equals."""
    # Runs of older versions have not recorded the entropies.
    known = [sample for sample in samples if "entropy" in sample]
    groups: dict[tuple[str, str], list[Record]] = {}
    for sample in known:
        if sample["step"] == known[-1]["step"]:
            groups.setdefault((sample["prompt"], sample["answer"]), []).append(sample)
    if not groups:
        return "<p>None recorded yet.</p>"
    group = max(groups.values(), key=_spread)
    picture = tree_picture(
        [sample["tokens"] for sample in group],
        [sample["entropy"] for sample in group],
        [sample["reward"] for sample in group],
        group[0]["prompt"],
        ids=[sample["ids"] for sample in group],
    )
    # A page of HTML implies it.
    return f"<article>{picture.replace(NAMESPACE, '', 1)}</article>"


def _spread(group: Sequence[Record]) -> float:
    rewards = [float(sample["reward"]) for sample in group]
    return max(rewards) - min(rewards)


def _samples(samples: Sequence[Record]) -> str:
    """A fold per step, the newest first and open; inside, responses under their prompt."""
    by_step = sorted(samples, key=lambda s: -int(s["step"]))
    folds: list[str] = []
    for step, of_step in groupby(by_step, key=lambda s: int(s["step"])):
        inside = []
        by_prompt = groupby(of_step, key=lambda s: (s["prompt"], s["answer"]))
        for (prompt, answer), responses in by_prompt:
            rows = "".join(_response(sample) for sample in responses)
            inside.append(
                f'<article><p class="prompt">{escape(prompt)}</p><p class="answer">answer: '
                f"<b>{escape(answer)}</b></p><table>{rows}</table></article>"
            )
        is_open = "" if folds else " open"
        folds.append(f"<details{is_open}><summary>step {step}</summary>{''.join(inside)}</details>")
    return "".join(folds) or "<p>None recorded yet.</p>"


def _response(sample: Record) -> str:
    reward = float(sample["reward"])
    # Runs of older versions have not recorded where a token came from.
    sources = sample.get("source", [Source.SAMPLED] * len(sample["tokens"]))
    tokens = "".join(
        f'<span title="{math.exp(logp):.3f}" style="--p:{_shade(logp):.0f}%"'
        f"{' class=r' if source in _REUSED else ''}>{escape(token)}</span>"
        for token, logp, source in zip(sample["tokens"], sample["logp"], sources, strict=True)
    )
    kind = "good" if reward > 0 else "bad"
    return (
        f'<tr><td><b class="{kind}">{short(reward)}</b></td>'
        f'<td class="n">{len(sample["tokens"])} tok</td><td class="text">{tokens}</td></tr>'
    )


_REUSED = (Source.VERIFIED, Source.LENIENT)


def _shade(logp: float) -> float:
    """Percent of the marker's colour: 0 for a certain token, 60 for one of probability 0."""
    return 60.0 * (1.0 - math.exp(min(logp, 0.0)))


def _config(config: Config) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in dataclasses.asdict(config).items()
    )
    return f'<details><summary>every value</summary><table class="config">{rows}</table></details>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>{body}</main></body></html>
"""


def _variables(colours: Mapping[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}:{value};" for name, value in colours.items()) + " }"


_STYLE = f"""
:root {{ color-scheme: light dark }}
{_variables(LIGHT)}
@media (prefers-color-scheme: dark) {{ {_variables(DARK)} }}
"""
_STYLE += """
* { box-sizing: border-box }
body { margin:0; background:var(--paper); color:var(--ink); font:15px/1.5 system-ui, sans-serif }
main { max-width:1240px; margin:0 auto; padding:32px 20px 64px }
h1 { font-size:26px; margin:0 0 16px } h2 { font-size:19px; margin:40px 0 8px }
.tiles { display:flex; flex-wrap:wrap; gap:12px; margin:0 0 20px }
.tiles div, figure, article { background:var(--card); border:1px solid var(--rule);
  border-radius:10px }
.tiles div { padding:10px 18px; min-width:150px } dt { color:var(--soft); font-size:13px }
dd { margin:0; font-size:22px; font-variant-numeric:tabular-nums }
.charts { display:grid; grid-template-columns:repeat(auto-fill, minmax(264px, 1fr)); gap:12px }
figure { margin:0; padding:12px 12px 6px; display:flex; flex-direction:column;
  justify-content:space-between }
figcaption { display:grid; grid-template-columns:1fr auto; padding:0 4px 4px }
figcaption span { font-variant-numeric:tabular-nums; color:var(--line); font-weight:600 }
figcaption small { grid-column:1 / -1 }
figcaption small, .hint, .answer, .n, .none { color:var(--soft) }
svg { width:100%; height:auto; display:block }
svg text { fill:var(--soft); font:12px system-ui, sans-serif; font-variant-numeric:tabular-nums }
svg .y { text-anchor:end } svg .x { text-anchor:middle } .grid { stroke:var(--rule) }
.curve, .raw { fill:none; stroke:var(--line); stroke-width:2; stroke-linejoin:round }
.raw { stroke-width:1; opacity:.3 } .dot, .last { fill:var(--line) } .none { padding:24px 4px }
details { margin:10px 0 } summary { cursor:pointer; font-weight:600; padding:4px 0 }
article { padding:12px 16px; margin:8px 0; overflow-x:auto }
.prompt { margin:0; white-space:pre-wrap; font:14px/1.5 ui-monospace, monospace }
.answer { margin:0 0 6px; font-size:13px } td { padding:2px 10px 2px 0; vertical-align:top }
.text { white-space:pre-wrap; font:14px/1.6 ui-monospace, monospace }
.text span { background:color-mix(in srgb, var(--mark) var(--p), transparent); border-radius:3px }
.text .r { text-decoration:underline; text-underline-offset:3px }
.good { color:var(--good) } .bad { color:var(--bad) } .n { white-space:nowrap; font-size:13px }
.config th { text-align:left; font-weight:500; padding:2px 24px 2px 0; color:var(--soft) }
"""
