"""What a run leaves while it goes on: log.jsonl, a line for each entry of its log, and progress.json, the step it is at.

The Trainer writes its own log into checkpoints only. These two files are there from the first step, for whoever looks:
a panel in a notebook, `sftlab runs`, `tail -f`. log.jsonl holds the entries of the Trainer's `log_history` in their order,
each with `time` (seconds since the epoch), `max_steps`, `memory_bytes` and, on a GPU, `gpu_memory_bytes` beside.

    python -c "from sftlab import run_log; print(run_log.read('runs/first')[-1:])"
"""

import contextlib
import json
import os
import platform
import time
from pathlib import Path

from sftlab import files

LOG, PROGRESS = "log.jsonl", "progress.json"
BESIDE = ("time", "max_steps", "memory_bytes", "gpu_memory_bytes")  # what an entry has more than the Trainer's


def identify(pid: int | None = None) -> dict:
    """What tells a process from all others: pid, host, and when it began in seconds since this machine did.

    Process ids are taken again, and clocks are set. Raises psutil.Error where there is no such process.
    """
    import psutil

    since_boot = psutil.Process(pid).create_time() - psutil.boot_time()
    return {"pid": pid or os.getpid(), "since_boot": round(since_boot, 2), "host": platform.node()}


def measure_memory() -> dict:
    """Bytes that this process holds: resident, and what torch has taken of its GPU."""
    import psutil
    import torch

    found = {"memory_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        found["gpu_memory_bytes"] = torch.cuda.memory_reserved()
    return found


def begin(folder: Path) -> None:
    """Say that a run is about to train in a folder, and in which process."""
    files.write_json(folder / PROGRESS, {"process": identify(), "started": time.time()})


def end(folder: Path, status: str, said: str) -> None:
    """Say that this process, which lives on in a notebook, trains in a folder no more; one that trains there now is left alone.

    On a disk without room progress.json goes instead.
    """
    path = folder / PROGRESS
    progress = files.read_json(path)
    process, own = progress.get("process", {}), identify()
    if (process.get("pid"), process.get("host")) != (own["pid"], own["host"]):
        return
    with contextlib.suppress(OSError):
        try:
            files.write_json(path, progress | {"ended": time.time(), "status": status, "said": said})
        except OSError:
            path.unlink()


def keep(folder: Path, history: list[dict]) -> None:
    """Make the log of a run that goes on end where its checkpoint does: what came after is trained again.

    Entries that the log lacks, as a killed run may leave it, are taken from the checkpoint's.
    """
    entries = []
    for entry, logged in zip(history, read(folder) + [{}] * len(history), strict=False):
        same = {name: value for name, value in logged.items() if name not in BESIDE} == entry
        entries.append(logged if same else entry)
    files.write_text(folder / LOG, "".join(map(to_line, entries)))


def append(folder: Path, entry: dict) -> None:
    """Add an entry; it is in the file, whole, when this returns."""
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(to_line(entry))


def to_line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False, default=float) + "\n"


def read(folder: str | Path) -> list[dict]:
    """The entries of a run's log so far, in order; those of an older run from what its Trainer left at the end.

    A line that is being written, or was torn, is left out.
    """
    try:
        lines = (Path(folder) / LOG).read_bytes().splitlines()
    except OSError:
        return files.read_json(Path(folder) / "trainer_state.json").get("log_history", [])
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]
