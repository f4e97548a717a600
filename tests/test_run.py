"""The run directory: what is written is whole, and comes back."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from rollfuse.config import Config
from rollfuse.policy import Policy, SmallModel, load_policy, small_policy
from rollfuse.rollout.tasks import sort_task
from rollfuse.run import (
    Interrupts,
    Progress,
    RunDirectory,
    checkpoints,
    last_checkpoint,
    last_state,
    objects_set_aside,
    restore,
)

TINY = SmallModel(layers=1, hidden=16, intermediate=32, heads=2, kv_heads=1)


def trained() -> tuple[Policy, torch.optim.AdamW]:
    policy = small_policy(sort_task(), TINY, seed=0)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    for _ in range(2):
        policy.model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
        optimizer.step()
    return policy, optimizer


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    policy, optimizer = trained()
    run = RunDirectory.create(tmp_path / "run", Config())
    torch.manual_seed(11)
    progress = Progress(step=7, prompts_seen=448, streams_drawn=3584, updates=14)
    folder = run.save(policy, optimizer, progress)
    expected = torch.rand(3)

    again = load_policy(folder)
    fresh = torch.optim.AdamW(again.model.parameters(), lr=0.5)
    assert restore(folder, fresh) == progress
    assert torch.equal(torch.rand(3), expected)
    for (name, one), two in zip(
        policy.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, fresh.state[two][key]), (name, key)
    assert fresh.param_groups[0]["lr"] == 1e-2


def test_a_half_written_checkpoint_is_never_taken(tmp_path: Path) -> None:
    policy, optimizer = trained()
    run = RunDirectory.create(tmp_path / "run", Config())
    run.save(policy, optimizer, Progress(step=1))

    def dies(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "save", lambda self, folder: dies(folder))
        with pytest.raises(OSError, match="disk full"):
            run.save(policy, optimizer, Progress(step=2))
    assert last_checkpoint(run.path) == run.path / "checkpoints" / "step-000001"
    # What the failure left does not disturb the next attempt.
    run.save(policy, optimizer, Progress(step=2))
    assert load_policy(run.path / "checkpoints" / "step-000002")


def test_a_half_removed_checkpoint_is_never_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, optimizer = trained()
    run = RunDirectory.create(tmp_path / "run", Config(keep_checkpoints=1))
    run.save(policy, optimizer, Progress(step=1))
    remove = shutil.rmtree

    def dies(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / "state.json").unlink()
            raise KeyboardInterrupt
        remove(path, ignore_errors=True)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            run.save(policy, optimizer, Progress(step=2))
    assert [c.name for c in checkpoints(run.path)] == ["step-000002"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    policy, optimizer = trained()
    run = RunDirectory.create(tmp_path / "run", Config())
    folder = run.save(policy, optimizer, Progress(step=1))
    for name in ("state.json", "optimizer.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:20])
        with pytest.raises(ValueError, match="step-000001: need a checkpoint"):
            restore(folder, optimizer)
        (folder / name).write_bytes(whole)
    assert restore(folder, optimizer) == Progress(step=1)


def test_only_the_last_checkpoints_stay(tmp_path: Path) -> None:
    policy, optimizer = trained()
    run = RunDirectory.create(tmp_path / "run", Config(keep_checkpoints=2))
    for step in (1, 2, 3, 10):
        run.save(policy, optimizer, Progress(step=step))
    assert [c.name for c in checkpoints(run.path)] == ["step-000003", "step-000010"]
    assert not list((run.path / "checkpoints").glob(".partial*"))


def test_reopening_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    policy, optimizer = trained()
    run = RunDirectory.create(tmp_path / "run", Config(steps=9))
    for step in range(1, 6):
        run.log({"step": step, "reward": 0.1 * step})
        run.log_samples([{"step": step, "prompt": "p"}])
    run.save(policy, optimizer, Progress(step=3))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # the process died while writing
    run.close()

    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    config, checkpoint = last_state(run.path)
    assert (config, checkpoint.name) == (Config(steps=9), "step-000003")
    assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    again = RunDirectory.reopen(run.path, Config(steps=12))
    assert Config.from_json(run.path / "config.json") == again.config == Config(steps=12)
    assert [m["step"] for m in again.records("metrics")] == [1, 2, 3]
    assert [s["step"] for s in again.records("samples")] == [1, 2, 3]
    again.log({"step": 4, "reward": 0.4})
    assert [m["step"] for m in again.records("metrics")] == [1, 2, 3, 4]
    again.close()


def test_metrics_are_in_tensorboard_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDirectory.create(tmp_path / "run", Config())
    for step in (1, 2):
        run.log({"step": step, "reward": 0.25 * step})
    run.close()
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("reward")] == [(1, 0.25), (2, 0.5)]


def test_existing_directories_are_respected(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="--out: need a path where nothing is yet"):
        RunDirectory.create(tmp_path, Config())
    with pytest.raises(ValueError, match="--resume: need a run directory"):
        last_state(tmp_path)
    RunDirectory.create(tmp_path / "run", Config()).close()
    with pytest.raises(ValueError, match="need a checkpoint"):
        last_state(tmp_path / "run")


def test_the_config_survives_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    config = Config(lr=1e-5, kl_coef=0.1, data="q.jsonl", model="m", threads=2, loss="dapo")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert Config.from_json(path) == config
    path.write_text(json.dumps({"learning": 1}))
    with pytest.raises(ValueError, match="need a config of rollfuse"):
        Config.from_json(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 1}, "--group-size: need at least 2"),
        ({"lr": -1.0}, r"--lr: need a number in \[0, 1\)"),
        ({"lr": float("nan")}, "--lr: need a finite number"),
        ({"temperature": 0.0}, "--temperature: need a number > 0"),
        ({"loss": "ppo"}, "--loss: need one of grpo, dr_grpo, dapo, rloo, got 'ppo'"),
        ({"data": "q.jsonl"}, "--data: need --model"),
        ({"minibatches": 65}, "--minibatches: need at most --prompts-per-step = 64"),
        ({"kl_coef": 0.1, "reference": False}, "--reference: need a reference policy"),
        ({"steps": 0}, "--steps: need at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens: need at least 1"),
        ({"decode_sequences": 4}, "--decode-sequences: need at least --group-size = 8"),
    ],
)
def test_bad_hyper_parameters_are_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(**changes)


@pytest.mark.parametrize("changes", [{"steps": 1.5}, {"steps": True}, {"lr": "1"}, {"task": None}])
def test_wrong_types_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="--.*: need"):
        Config(**changes)


@pytest.fixture
def live_signals():
    """SIGINT and SIGTERM as a terminal leaves them; a job in the background may ignore them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_while_held(number: signal.Signals, live_signals: None) -> None:
    reached = False
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            raise AssertionError("not interrupted")
        interrupts.hold()
        os.kill(os.getpid(), number)
        reached = True
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
        interrupts.hold()
        interrupts.release()  # the signal counted once
    assert reached
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(live_signals: None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as nohup does with SIGHUP
    with Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_what_lasts_as_long_as_a_run_is_set_aside_and_comes_back():
    with pytest.raises(KeyError), objects_set_aside():
        assert gc.get_freeze_count() > 1000
        raise KeyError
    assert gc.get_freeze_count() == 0
