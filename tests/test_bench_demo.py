"""bench demo: what a run tells, and when the command fails."""

import pytest

pytest.importorskip("transformers", reason="needs the extra grpo")

from rollfuse.bench import demo
from rollfuse.config import Config


def test_a_run_tells_accuracy_and_time():
    config = Config(
        steps=2, eval_every=1, heldout=16, warm_steps=2, prompts_per_step=4, group_size=2
    )
    run = demo.run_demo("tiny", config)
    assert [step for step, _ in run.accuracy] == [0, 1, 2]
    assert run.seconds > 0 and run.seconds_to_goal is None
    assert "tiny" in demo.table([run]) and "never" in demo.table([run])


@pytest.mark.parametrize("last,control,status", [(0.95, 0.4, 0), (0.85, 0.4, 1), (0.95, 0.6, 1)])
def test_status(last, control, status, monkeypatch, tmp_path):
    def fake(name, config):
        end = last if name.startswith("seed") else control
        return demo.Run(name, 1.0, [(0, 0.4), (5, end)], 1.0)

    monkeypatch.setattr(demo, "run_demo", fake)
    assert demo.main(["--json", str(tmp_path / "demo.json")]) == status
    assert (tmp_path / "demo.json").read_text().count('"name"') >= 5


def test_steps_are_checked():
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
