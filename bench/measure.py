"""Measurement: interleaved times, peak memory, and where a number came from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from rollfuse.bench.apart import Elsewhere

Step = Callable[[], object]
Result = TypeVar("Result")

SLOW = 10.0  # seconds: a step that is not run more often than need be
_NEAR = 1.2  # times the best: worth a second look
_FLUSH_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), cuts[0], cuts[3])


def seconds(step: Step, device: torch.device) -> float:
    """Wall time of one call, the device's work included; its result is dropped afterwards."""
    return timed(step, device)[1]


def timed(step: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Result and wall time of one call, the device's work included; of an Elsewhere, its own."""
    if device.type == "cuda":
        # The caches start cold, as they do inside a training step.
        torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    return result if isinstance(result, Elsewhere) else (result, elapsed)


def interleave(
    steps: Mapping[str, Step],
    repeats: int,
    device: torch.device,
    *,
    finish: Callable[[Any], None] = lambda result: None,
) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times, every repeat running all of them in rotated order.

    What drifts on the machine then hits all of them alike, so ratios within a repeat are fair.
    `finish` gets each result, off the clock.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for i in range(len(names)):
            name = names[(i + repeat) % len(names)]
            result, elapsed = timed(steps[name], device)
            times[name].append(elapsed)
            finish(result)
            del result  # or it would lie beside the next one
    return times


def paired_ratio(times: list[float], floor: list[float]) -> Spread:
    """Spread of time / floor, each pair taken within one repeat."""
    return spread([t / f for t, f in zip(times, floor, strict=True)])


def fastest(steps: Mapping[str, Step], first: Mapping[str, float], device: torch.device) -> str:
    """The name of the fastest step.

    Those slower than `SLOW` are judged by their first run alone, or a large case would take hours.
    The others get a new look each, since a short first run says little; those within a fifth of
    the best get two more, and the medians decide.

    Args:
        first: seconds of an earlier run of each, compilation apart.
    """
    best = min(first.values())
    left = {name: step for name, step in steps.items() if first[name] <= max(SLOW, _NEAR * best)}
    if best >= SLOW or len(left) == 1:
        return min(first, key=lambda name: first[name])
    looks = interleave(left, 1, device)
    best = min(looks.values())[0]
    near = {name: step for name, step in left.items() if looks[name][0] <= _NEAR * best}
    more = interleave(near, 2, device) if len(near) > 1 else {name: [] for name in near}
    return min(near, key=lambda name: statistics.median(looks[name] + more[name]))


# -- memory ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes above what was live before the call, the returned tensors not counted.

    `allocated` is what torch's allocator handed out at once; `resident` is the growth of the
    process (CPU only), which adds what the BLAS keeps outside the allocator.
    """

    allocated: int
    resident: int | None


def peak_memory(step: Callable[[], tuple[torch.Tensor | None, ...]], device: torch.device) -> Peak:
    """Peak of one call after a first one that fills caches and compiles.

    On a CPU run it in a process of its own, started with `exact_memory_environment()`.
    """
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = _bytes_of(step())
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before - returned, None)
    resident = _peak_resident(step)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        result = step()
        returned = _bytes_of(result)
    return Peak(_peak_of_trace(profile) - returned, resident)


def exact_memory_environment() -> dict[str, str]:
    """Environment in which resident memory follows allocations.

    By default glibc keeps freed blocks of up to 32 MiB in its heap; with a fixed threshold each
    tensor is a mapping of its own that goes back to the system when it is freed.
    """
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _bytes_of(tensors: tuple[torch.Tensor | None, ...]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def _peak_resident(step: Callable[[], tuple[torch.Tensor | None, ...]]) -> int | None:
    """Growth of the resident set, by the kernel's own high-water mark (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return None
    clear.write_text("5")  # the mark falls back to the present size
    before = _status_bytes("VmRSS")
    returned = _bytes_of(step())
    return _status_bytes("VmHWM") - before - returned


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: need {name}, got no such line")


def _peak_of_trace(profile: torch.profiler.profile) -> int:
    """Highest sum of allocations less frees in the profiler's records."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda event: event["ts"]):
        live += record["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def available_bytes(device: torch.device) -> int | None:
    """Memory one may still take, None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    for line in info.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


# -- provenance -----------------------------------------------------------------------------
_RESULTS = ":(top,exclude)bench/results"
_RIVALS = ("trl", "liger-kernel", "cut-cross-entropy", "flashinfer-python")
_PACKAGES = ("torch", "triton", "numpy", "transformers", *_RIVALS)


def provenance(command: str, device: torch.device) -> dict[str, object]:
    """Device, versions, commit and command of a run, for its JSON."""
    return {
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": _device_facts(device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_facts(device: torch.device) -> dict[str, object]:
    facts: dict[str, object] = {
        "type": device.type,
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["name"] = properties.name
        facts["memory_bytes"] = properties.total_memory
        capability = f"sm_{properties.major}{properties.minor}"
        facts["arch"] = getattr(properties, "gcnArchName", capability)
        facts["toolkit"] = torch.version.hip or torch.version.cuda
    else:
        facts["name"] = facts["cpu"]
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout this file lies in, with `+` when files differ from it."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", *words), cwd=folder, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed, not checked out
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    # Results are not what was measured.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", _RESULTS)
    return commit + ("+" if changed else "")


def write_json(path: Path, data: Mapping[str, object]) -> None:
    """Write `data` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, sort_keys=True, default=plain) + "\n")
    part.replace(path)


def plain(value: object) -> object:
    """What JSON shall hold of it, as `json.dumps` asks."""
    if isinstance(value, Spread | Peak):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in a result file")
