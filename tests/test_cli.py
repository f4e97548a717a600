"""The command line: what a user types and what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_qwen3

import rollfuse
from rollfuse import info as info_module
from rollfuse import loop
from rollfuse.__main__ import main
from rollfuse.policy import Policy, character_tokenizer

TWENTY = Path(__file__).parent / "data" / "gsm8k_twenty.jsonl"
SMALL = (
    "--layers 1 --hidden 16 --intermediate 32 --heads 2 --kv-heads 1 --heldout 8 --warm-steps 2 "
    "--steps 2 --prompts-per-step 2 --group-size 2 --threads 1"
).split()


def test_info_says_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"backend    {rollfuse.backend.name}: {rollfuse.backend.reason}" in text
    assert f"torch {torch.__version__}" in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == {"name": rollfuse.backend.name, "reason": rollfuse.backend.reason}
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] >= 1
    assert "training (rollfuse grpo)" in found["abilities"]


def test_info_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = info_module.version
    gone = {"rich", "transformers", "matplotlib"}
    monkeypatch.setattr(info_module, "version", lambda n: None if n in gone else real(n))
    found = info_module.info()
    assert {"transformers", "rich"} <= set(found["missing"]["grpo"])
    assert "matplotlib" in found["missing"]["bench"]
    text = info_module.as_text(found)
    assert "missing    transformers, rich: pip install rollfuse[grpo]" in text
    assert found["abilities"]["training (rollfuse grpo)"] == "no, needs transformers, rich"


def test_a_run_from_the_command_line_and_its_continuation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["grpo", *SMALL, "--out", out]) == 0
    said = capsys.readouterr().out
    assert "held-out accuracy" in said and "reward" in said and "tok/s" in said
    assert "\x1b" not in said  # no terminal, plain lines
    assert main(["grpo", "--resume", out, "--steps", "3"]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    assert checkpoint.is_dir()
    message = said_error(["grpo", "--resume", out, "--steps", "2"], capsys)
    assert "--steps: need at least the 3 steps done, got 2" in message
    message = said_error(["grpo", "--resume", out, "--out", "elsewhere"], capsys)
    assert "need no option beside it but --steps, got ['out']" in message
    (checkpoint / "model.safetensors").write_bytes(b"half")
    broken = ["grpo", "--model", str(checkpoint), "--data", str(TWENTY)]
    message = said_error([*broken, "--out", str(tmp_path / "other")], capsys)
    assert "need a causal LM with its tokenizer" in message
    assert not (tmp_path / "other").exists()


def said_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rollfuse: error: ") and error.count("\n") == 1
    return error


def test_wrong_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    broken = tmp_path / "broken.jsonl"
    broken.write_text(TWENTY.read_text().splitlines()[0] + "\n{oops\n")
    cases = [
        (["--task", "chess"], "task: need one of sort, arithmetic, got 'chess'"),
        (["--model", "nowhere"], "model: need a directory with a config.json, got nowhere"),
        (["--lr", "-1"], "--lr: need a number in [0, 1), got -1"),
        (["--group-size", "1"], "--group-size: need at least 2"),
        (["--data", str(TWENTY)], "--data: need --model"),
        (["--model", "nowhere", "--data", str(broken)], "broken.jsonl, line 2: need a JSON object"),
        (
            ["--model", "nowhere", "--data", "missing.jsonl"],
            "--data: need a JSON-lines file, got missing.jsonl (No such file or directory)",
        ),
        (
            ["--model", "nowhere", "--data", str(tmp_path)],
            f"--data: need a JSON-lines file, got {tmp_path} (Is a directory)",
        ),
        (["--device", "abacus"], "--device: need"),
        (["--hidden", "18"], "hidden: need a multiple of"),
        (["--model", str(tmp_path)], "model: need a directory with a config.json"),
        (["--max-new-tokens", "255"], "need 1 to 1 tokens (the model's 256 pos"),
        (["--heldout", "100000"], "heldout: need a number in [1, 100000)"),
        (["--warm-lr", "2"], "warm_lr: need a number in [0, 1)"),
    ]
    for options, message in cases:
        given = ["grpo", *SMALL, *options, "--out", str(out)]
        assert message in said_error(given, capsys), options
        assert not out.exists(), options


def test_options_that_do_not_parse_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["grpo", *options])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        assert error.startswith("rollfuse: error: ") and message in error


def test_a_model_without_room_for_a_question_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, whose standard error shows what transformers has to say too."""
    tokenizer = character_tokenizer("".join(sorted(set(TWENTY.read_text()) | set("\n:"))))
    tokenizer.model_max_length = 64
    model = tiny_qwen3(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    Policy(model, tokenizer).save(tmp_path / "model")
    options = f"--model {tmp_path}/model --data {TWENTY} --max-new-tokens 8 --out {tmp_path}/run"
    done = run_without("nothing", f"grpo {options}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("rollfuse: error: prompt '")
    assert "need 1 to 120 tokens (the model's 128 positions less --max-new" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_in_mid_training_shows_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(error: Exception) -> None:
        def grade(*_: object) -> None:
            raise error

        monkeypatch.setattr(loop, "_grade", grade)

    for kind in (ValueError, TypeError, OSError, ImportError):
        fails(kind("from the middle"))
        with pytest.raises(kind, match="from the middle"):
            main(["grpo", *SMALL, "--out", str(tmp_path / kind.__name__)])
        assert (tmp_path / kind.__name__ / "checkpoints" / "step-000000").is_dir()
    capsys.readouterr()
    fails(FloatingPointError("not finite"))
    assert main(["grpo", *SMALL, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert said.err == "rollfuse: error: not finite\n"
    assert "stopped after step 0; go on from step-000000" in said.out


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = said_error(["grpo", *SMALL, "--out", str(tmp_path)], capsys)
    assert "--out: need a path where nothing is yet, or --resume" in message
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    below = str(tmp_path / "notes.txt" / "run")
    message = said_error(["grpo", *SMALL, "--out", below], capsys)
    assert "--out: need a path below a directory" in message and "notes.txt is a file" in message
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "need a run directory" in said_error(["grpo", "--resume", str(tmp_path)], capsys)
    message = said_error(["grpo", "--resume", str(tmp_path), "--lr", "0.1"], capsys)
    assert "need no option beside it but --steps, got ['lr']" in message


def run_without(packages: str, arguments: str) -> subprocess.CompletedProcess[str]:
    """`rollfuse arguments` in a process where importing `packages` fails."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.partition(".")[0] in {packages.split()!r} else real(name, package)
importlib.util.find_spec = find_spec
from rollfuse.__main__ import main
sys.exit(main({arguments.split()!r}))
"""
    root = str(Path(rollfuse.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )


EXTRAS = "transformers safetensors rich tensorboard math_verify tokenizers triton matplotlib"


def test_info_works_with_torch_and_numpy_alone() -> None:
    done = run_without(EXTRAS, "info")
    assert done.returncode == 0, done.stderr
    assert "backend" in done.stdout


def test_training_without_the_extra_names_it() -> None:
    done = run_without(EXTRAS, "grpo --out never-made")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install rollfuse[grpo]" in done.stderr
    assert not Path("never-made").exists()


def test_grading_text_without_math_verify_is_refused_at_the_start(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_without("math_verify", f"grpo --model nowhere --data {TWENTY} --out {out}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "training needs math_verify: pip install rollfuse[grpo]" in done.stderr
    assert not out.exists()
    # The built-in tasks do without.
    done = run_without("math_verify", f"grpo {' '.join(SMALL)} --out {out}")
    assert done.returncode == 0, done.stderr


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["grpo", "--help"])
    text = capsys.readouterr().out
    for flag in ("--model", "--data", "--resume", "--kl-coef", "--shuffle-advantages", "--lr"):
        assert flag in text
