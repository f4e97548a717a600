"""The directory a run leaves behind, and how it survives an interruption.

    config.json        every hyper-parameter
    metrics.jsonl      one line a step
    samples.jsonl      responses to read
    tensorboard/       the same metrics
    checkpoints/       step-000050/: a directory transformers loads, the optimiser, the counters,
                       with --reuse what is remembered of earlier rollouts
    report.html        curves and samples, one file without network

A checkpoint is written beside its final name and renamed when it is on the disk, so a directory
called `step-...` is always whole. Lines written after it by a run that died are cut on resuming.
What a checkpoint costs, and what is lost without one, is said in rollfuse.loop.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollfuse.config import Config
from rollfuse.kernels import checks

if TYPE_CHECKING:
    from rollfuse.policy import Policy
    from rollfuse.reuse import Reuse

_DRAFTS = "drafts.safetensors"


@dataclass(slots=True)
class Progress:
    """The counters a run goes on from; with weights and optimiser they are its whole state."""

    step: int = 0  # steps done
    prompts_seen: int = 0  # the data position: prompts drawn from the training problems
    streams_drawn: int = 0  # noise streams of the seed already used
    updates: int = 0  # optimiser updates, which are also the policy's version


class RunDirectory:
    """A run's files. Make one with `create` or `reopen`."""

    def __init__(self, path: Path, config: Config, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.config = path, config
        # purge_step hides what a killed run wrote after its last checkpoint.
        self._board = SummaryWriter(str(path / "tensorboard"), purge_step=first_step)

    @classmethod
    def create(cls, path: str | Path, config: Config) -> RunDirectory:
        """Make a new directory with the config in it.

        Raises:
            ValueError: something is there already.
        """
        path = Path(path)
        need_free(path)
        path.mkdir(parents=True, exist_ok=True)
        _replace_text(path / "config.json", config.to_json() + "\n")
        return cls(path, config, first_step=0)

    @classmethod
    def reopen(cls, path: str | Path, config: Config) -> RunDirectory:
        """The directory of an earlier run, its records cut back to the last checkpoint.

        Args:
            config: what the run goes on with; replaces the one in the directory.
        """
        path = Path(path)
        _, latest = last_state(path)
        step = int(latest.name.removeprefix("step-"))
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_until(path / name, step)
        _replace_text(path / "config.json", config.to_json() + "\n")
        return cls(path, config, first_step=step + 1)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append the metrics of step `metrics["step"]`."""
        _append(self.path / "metrics.jsonl", [metrics])
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, int(metrics["step"]))

    def log_samples(self, samples: Sequence[Mapping[str, object]]) -> None:
        """Append responses to read, each with its step."""
        _append(self.path / "samples.jsonl", samples)

    def records(self, name: str) -> list[dict[str, Any]]:
        """The lines of `metrics` or `samples`."""
        return read_records(self.path / f"{name}.jsonl")

    def save(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        drafts: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write a checkpoint, whole or not at all, and drop those older than the last few.

        Args:
            drafts: what is remembered of earlier rollouts, if it is.
        """
        from safetensors.torch import save_file

        folder = self.path / "checkpoints"
        final = folder / f"step-{progress.step:06d}"
        if final.exists():
            return final
        partial = folder / f".partial-{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        policy.save(partial)
        tensors, scalars = _flat_optimizer(optimizer)
        save_file(tensors, partial / "optimizer.safetensors")
        if drafts is not None:
            save_file(dict(drafts), partial / _DRAFTS)
        rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        state = {"progress": asdict(progress), "optimizer": scalars, "torch_rng": rng}
        (partial / "state.json").write_text(json.dumps(state), "utf-8")
        for file in partial.rglob("*"):
            _sync(file)
        _sync(partial)
        partial.rename(final)
        _sync(folder)
        for old in checkpoints(self.path)[: -self.config.keep_checkpoints]:
            _drop(old)
        return final

    def close(self) -> None:
        self._board.close()


def need_free(path: str | Path) -> None:
    """Raise ValueError if a new run cannot be made at `path`, or would mix with what is there."""
    path = Path(path)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    checks.need(_can_write(there), "--out", "a path that can be written", str(path))
    below = there == path or there.is_dir()
    checks.need(below, "--out", "a path below a directory", f"{path}, where {there} is a file")
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    need = "a path where nothing is yet, or --resume to go on with the run there"
    checks.need(free, "--out", need, str(path))


def _can_write(there: Path) -> bool:
    """Whether a file can be made in a directory, or a file be written; found by trying."""
    if not there.is_dir():
        return os.access(there, os.W_OK)
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def checkpoints(path: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = (path / "checkpoints").glob("step-*")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def last_checkpoint(path: Path) -> Path | None:
    found = checkpoints(path)
    return found[-1] if found else None


def last_state(path: str | Path) -> tuple[Config, Path]:
    """Config and last checkpoint of the run in `path`; changes nothing there.

    Raises:
        ValueError: it holds no run, or no checkpoint to go on from.
    """
    path = Path(path)
    good = (path / "config.json").is_file()
    checks.need(good, "--resume", "a run directory with a config.json", str(path))
    config = Config.from_json(path / "config.json")
    latest = last_checkpoint(path)
    if latest is None:
        raise ValueError(f"--resume: need a checkpoint in {path}, got none; start it anew")
    return config, latest


def restore(
    checkpoint: Path, optimizer: torch.optim.Optimizer, reuse: Reuse | None = None
) -> Progress:
    """Put a checkpoint's optimiser, random state and memory back; returns its counters.

    The weights are read by `load_policy(checkpoint)`.

    Raises:
        ValueError: a file of the checkpoint is damaged.
    """
    from safetensors import SafetensorError

    try:
        return _restore(checkpoint, optimizer, reuse)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        need = "a checkpoint as this version writes it"
        raise ValueError(f"{checkpoint}: need {need}, got one with {error!r}") from error


def _restore(checkpoint: Path, optimizer: torch.optim.Optimizer, reuse: Reuse | None) -> Progress:
    from safetensors.torch import load_file

    state = json.loads((checkpoint / "state.json").read_text("utf-8"))
    tensors = load_file(checkpoint / "optimizer.safetensors")
    parameters: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        parameters.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": parameters, "param_groups": state["optimizer"]})
    rng = bytearray(base64.b64decode(state["torch_rng"]))
    # A run that reuses from here on begins with nothing.
    if reuse is not None and (checkpoint / _DRAFTS).is_file():
        reuse.load(load_file(checkpoint / _DRAFTS))
    torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8))
    return Progress(**state["progress"])


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP as KeyboardInterrupt, but not between `hold` and `release`.

    A step may be abandoned at any point where it has changed nothing yet; updating the weights,
    counting and writing belong together. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            # Windows has no SIGHUP, which a closed terminal sends.
            hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
            for number in {signal.SIGINT, signal.SIGTERM, hangup}:
                # What nohup or a shell's `&` has switched off stays off.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._pending = True
        else:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From here on a signal waits for `release`."""
        self._holding = True

    def release(self) -> None:
        """Signals count again; one that has been waiting is raised now."""
        self._holding = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


@contextmanager
def objects_set_aside() -> Iterator[None]:
    """What is there now is left out of garbage collections: modules and libraries last as long as
    the run, and a step makes so many small objects that all would be looked through every time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[Any]]:
    """({"<parameter>.<key>": tensor}, param_groups) of the optimiser's state."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous().clone()
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    return tensors, state["param_groups"]


def _append(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that are whole; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: str) -> dict[str, Any] | None:
    """The record of a line, or None for one that a dying process left half written."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    good = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if good else None


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_records(path) if record["step"] <= step]
    _replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill in between leaves the old one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint; a kill in between leaves nothing that looks like one."""
    dying = checkpoint.with_name(f".partial-{checkpoint.name}")
    shutil.rmtree(dying, ignore_errors=True)
    checkpoint.rename(dying)
    shutil.rmtree(dying)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
