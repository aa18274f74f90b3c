"""The file of samples that `sftlab metrics` writes, DIR/metrics.jsonl: claimed, filled line by line, summed up.

Each line is written at once and in one piece, so that whatever ends the writer leaves what was seen until then.

    python -c "from sftlab import metrics_file; help(metrics_file.record)"
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from sftlab import files, metrics
from sftlab.config import MetricsConfig
from sftlab.options import UserError, place_error

STEP = 0.05  # seconds between looks whether what is watched has ended


def claim_file(path: Path, config: MetricsConfig) -> None:
    """Make the file, or the room for more lines in it; one that is there is refused unasked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.overwrite or not path.exists():
        path.write_bytes(b"")
    elif not config.append:
        raise place_error(path, "exists", "Add --append to go on in it, or --overwrite")
    else:
        with open(path, "rb") as source:
            whole = source.seek(0, os.SEEK_END) == 0 or source.seek(-1, os.SEEK_END) and source.read(1) == b"\n"
        if not whole:  # a killed watcher's last line
            write_line(path, "")


def write_line(path: Path, line: str) -> None:
    """Append a line in one piece."""
    with open(path, "ab", buffering=0) as sink:
        sink.write(line.encode() + b"\n")


def record(path: Path, config: MetricsConfig, pid: int | None, watched: str, ended, live: bool = False) -> None:
    """Write samples until `ended()`. Raises OSError where they can't be written."""
    write_line(path, json.dumps(metrics.describe(config.every, watched)))
    before, count = metrics.sample(pid), 1
    write_line(path, metrics.to_line(before))
    due = before["clock"]
    while True:
        due = max(due + config.every, time.monotonic())  # a machine that slept isn't sampled in a burst
        while not (over := ended()) and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, STEP))
        found = metrics.sample(pid, before)
        if over and count > 1 and found["since"] < config.every / 2:
            break  # over so short a time the counts of processor use are too coarse
        write_line(path, metrics.to_line(found))
        if live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{show(found)[:width]:{width}}", end="", file=sys.stderr, flush=True)
        if over:
            break
        before, count = found, count + 1
    if live:
        print(file=sys.stderr)


def show(found: dict) -> str:
    """A sample as one line for a terminal."""

    def percent(value) -> str:
        return "?" if value is None else f"{value:.0f} %"

    parts = [f"CPU {percent(found['machine']['cpu_percent'])}, {found['machine']['memory_bytes'] / 1e9:.2f} GB"]
    if found["process"]:
        parts.append(
            f"watched {percent(found['process']['cpu_percent'])}, {(found['process']['memory_bytes'] or 0) / 1e9:.2f} GB"
        )
    parts += [
        f"GPU {gpu['index']} {percent(gpu['use_percent'])}, {(gpu['memory_bytes'] or 0) / 1e9:.2f} GB"
        for gpu in found["gpus"]
    ]
    return time.strftime("%H:%M:%S") + "  " + "  |  ".join(parts)


def write_summary(path: Path) -> dict:
    """Write summary.json beside the lines and return it. Raises UserError where there are none."""
    try:
        samples, broken = metrics.read(path)
        if not samples:
            raise UserError(f"{path}: holds no samples.")
        found = metrics.summarise(samples) | {"broken_lines": broken}
        files.write_json(path.parent / "summary.json", found)
    except OSError as error:
        raise UserError(f"{error.filename or path.parent / 'summary.json'}: {error.strerror}.") from error
    return found
