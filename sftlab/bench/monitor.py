"""How busy a machine and a program are: samples of processor, memory and GPUs, and their summary: `sftlab metrics`.

A sample is a plain dict, and a line of DIR/metrics.jsonl, written at once and in one piece, so that whatever ends the
monitor leaves what was measured until then. summary.json beside it is written at the end, and by `--summary`.

    time      seconds since the epoch
    since     seconds since the sample before it, over which processor use was counted; None for a first one
    machine   cpu_percent (100: all cores at work), memory_bytes (in use, without caches)
    process   cpu_percent (100: one core), memory_bytes, processes: of the watched process and all below it
    gpus      a list: index, use_percent, memory_bytes, power_watts, celsius (`machine.read_gpus`)

What could not be read is None. A process's memory is what is resident; pages that several processes share count in each.

    python -c "from sftlab.bench import monitor as m; a = m.take_sample(); print(m.summarise([a, m.take_sample(before=a)]))"
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlab import files
from sftlab import machine as lab_machine
from sftlab.bench.results import format_table
from sftlab.config.configs import MetricsConfig
from sftlab.errors import UserError, place_error

BUSY = 90  # percent: from here on a device counts as busy
STEP = 0.05  # seconds between checks whether what is watched has ended
AVERAGES = ("mean", "median", "peak")
MEASURES = {  # field of a sample: label, unit, its size
    "cpu_percent": ("processor", "%", 1),
    "use_percent": ("use", "%", 1),
    "memory_bytes": ("memory", "GB", 1e9),
    "power_watts": ("power", "W", 1),
    "celsius": ("temperature", "°C", 1),
}
FIELDS = ("time", "since", "machine", "process", "gpus")


def take_sample(pid: int | None = None, before: dict | None = None) -> dict:
    """Take a sample of the machine and, with `pid`, of that process and all below it.

    Processor use is counted since the sample `before`; without one it is None. The caller's own work is left out.
    """
    import psutil

    clock, percent, memory = time.monotonic(), psutil.cpu_percent(), psutil.virtual_memory()
    since = clock - before["clock"] if before else None
    found = {
        "time": time.time(),
        "clock": clock,
        "since": since,
        "machine": {"cpu_percent": percent if before else None, "memory_bytes": memory.total - memory.available},
        "process": None,
        "gpus": lab_machine.read_gpus(),
    }
    if pid is not None:
        seconds, resident, processes = count_processes(pid)
        earlier = before.get("process_seconds") if before else None
        known = since and earlier is not None and seconds is not None
        # Processes that another parent took over leave the count: their time is lost, but never counts as negative.
        percent = round(100 * max(0, seconds - earlier) / since, 1) if known else None
        memory_bytes = resident if processes else None
        found["process"] = {"cpu_percent": percent, "memory_bytes": memory_bytes, "processes": processes}
        found["process_seconds"] = seconds
    return found


def count_processes(pid: int) -> tuple[float | None, int, int]:
    """Return (processor seconds, resident bytes, processes) of a process and all below it, without the caller's own.

    The time of a process that has ended is in its parent's count of its children, so that nothing is lost between two
    samples (on Linux; a Mac has no such count).
    """
    import psutil

    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None, 0, 0
    seconds, resident, processes = 0.0, 0, 0
    for member in members:
        try:
            with member.oneshot():
                spent, memory = member.cpu_times(), member.memory_info().rss
        except psutil.Error:  # it has just ended, or is another user's
            continue
        seconds += spent.children_user + spent.children_system
        if member.pid != os.getpid():
            seconds, resident, processes = seconds + spent.user + spent.system, resident + memory, processes + 1
    return seconds, resident, processes


def write_sample(path: Path, sample: dict) -> None:
    """Append a sample as a line of JSON, in one piece, without what only the next sample needs."""
    line = json.dumps({name: sample[name] for name in FIELDS})
    with open(path, "ab", buffering=0) as sink:
        sink.write(line.encode() + b"\n")


def read_samples(path: Path) -> list[dict]:
    """Read the samples of a metrics.jsonl, without lines that are none: a killed monitor may leave half a line."""
    samples = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            content = json.loads(line)
            samples.append({name: content[name] for name in FIELDS})
    return samples


def name_parts(found: dict) -> dict[str, dict]:
    """Return the parts of a sample or of a summary by name: machine, watched, and GPU 0, GPU 1, …"""
    gpus = {f"GPU {gpu['index']}": gpu for gpu in found["gpus"]}
    return {"machine": found["machine"], "watched": found["process"] or {}} | gpus


def make_frame(samples: list[dict]):
    """Make a pandas.DataFrame over seconds with a column for each (part, field), NaN where it wasn't known."""
    from pandas import DataFrame

    rows = []
    for one in samples:
        parts = name_parts(one)
        rows.append({(part, name): parts[part][name] for part in parts for name in MEASURES if name in parts[part]})
    return DataFrame(rows, [one["time"] - samples[0]["time"] for one in samples], dtype=float)


def summarise(samples: list[dict]) -> dict:
    """Return mean, median and peak of everything sampled, and the share of samples with a busy device.

    samples, seconds (over which was sampled, without gaps between sessions); machine, process: of each field mean, median
    and peak; gpus: the same of each GPU, with its index; busy: `of` gpu or cpu, `share` in 0..1 of known samples at 90 % use
    or more, of the GPUs that did anything, else of the processor. None for what was never known.
    """
    frame, parts = make_frame(samples), {}
    for part, name in frame:
        known = frame[part, name].dropna()
        values = dict(zip(AVERAGES, (known.mean(), known.median(), known.max()), strict=True))
        parts.setdefault(part, {})[name] = values if len(known) else None
    gpus = [name for name in parts if name.startswith("GPU")]
    used = [(name, "use_percent") for name in gpus if (parts[name]["use_percent"] or {}).get("peak")]
    known = [percent for column in used or [("machine", "cpu_percent")] for percent in frame[column].dropna()]
    share = sum(percent >= BUSY for percent in known) / len(known) if known else None
    return {
        "samples": len(samples),
        "seconds": round(sum(one["since"] or 0 for one in samples), 3),
        "machine": parts["machine"],
        "process": parts.get("watched"),
        "gpus": [{"index": int(name.split()[1])} | parts[name] for name in gpus],
        "busy": {"of": "gpu" if used else "cpu", "at_percent": BUSY, "share": share},
    }


def list_rows(found: dict) -> list[tuple[str, ...]]:
    """List the measures of a summary: the name, and mean, median and peak with the unit; or of a sample: the name, and the value."""
    parts = name_parts(found)
    rows = []
    for part, name in [(part, name) for part in parts for name in MEASURES if name in parts[part]]:
        (label, unit, size), values = MEASURES[name], parts[part][name]
        values = values.values() if isinstance(values, dict) else [values]
        cells = ["unknown"] * 3 if None in values else [f"{value / size:.4g} {unit}" for value in values]
        rows.append((f"{part}: {label}", *cells))
    return rows


def list_facts(found: dict) -> list[str]:
    """List the rest of a summary in sentences: how long, how busy."""
    busy = found["busy"]
    share = "unknown" if busy["share"] is None else f"{busy['share']:.0%} of the samples"
    about = f"{found['samples']} samples over {found['seconds']:.0f} s"
    return [about, f"{busy['of'].upper()} at {busy['at_percent']} % or more: {share}"]


def watch(config: MetricsConfig, command: list[str]) -> int:
    """Watch as configured and return the exit code: the command's, 128 + its signal, else 0. Raises UserError."""
    import psutil

    path = Path(config.output_dir) / "metrics.jsonl"
    if config.summary:
        print_summary(path)
        return 0
    if command and config.pid is not None:
        raise UserError("pid: a command after -- is watched by itself. Leave out --pid, or the command.")
    if command and shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: no such program. After -- write a command as you would type it.")
    if config.pid is not None and not psutil.pid_exists(config.pid):
        raise UserError(f"pid: no process {config.pid} runs here. `ps` lists those that do.")
    if path.exists() and not config.overwrite:
        raise place_error(path, "exists", "Add --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    with contextlib.redirect_stdout(sys.stderr if command else sys.stdout):  # a command's standard output is its own
        print(f"{path}: a line each {config.every:g} s" + ("" if command or config.pid else ", until Ctrl-C"))
        if lab_machine.find_gpus()[1]:
            print(f"no GPU values: {lab_machine.find_gpus()[1]}")
        code = watch_command(path, config, command) if command else watch_others(path, config)
        try:
            print_summary(path)
        except UserError as error:
            if not command:
                raise
            print(f"sftlab: {error}")  # the exit code is the command's
    return code


def watch_others(path: Path, config: MetricsConfig) -> int:
    """Watch a process that runs, until it ends, or the machine, until Ctrl-C or SIGTERM."""
    import psutil

    def has_ended() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return config.pid is not None and psutil.Process(config.pid).status() == psutil.STATUS_ZOMBIE
        return True

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        record(path, config, config.pid, has_ended, live=sys.stderr.isatty())
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. What was written before is whole.") from error
    return 0


def watch_command(path: Path, config: MetricsConfig, command: list[str]) -> int:
    """Run a command and watch it and all below it; if nothing can be written, it runs on."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:  # as a script without its first line
        raise UserError(f"{command[0]}: can't be run: {error.strerror}. Name a program.") from error
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the command as well
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        # From this process down, itself left out: the time of a command that has ended is in its parent's count.
        record(path, config, os.getpid(), lambda: child.poll() is not None)
    except OSError as error:
        print(f"sftlab: {path}: {error.strerror}; the command continues, unwatched")
    code = child.wait()
    return code if code >= 0 else 128 - code


def record(path: Path, config: MetricsConfig, pid: int | None, has_ended, live: bool = False) -> None:
    """Write samples until `has_ended()`; live: show each in a line of the terminal. Raises OSError where one can't be written."""
    before, count = take_sample(pid), 1
    write_sample(path, before)
    due, over = before["clock"], False
    while not over:
        due = max(due + config.every, time.monotonic())  # a machine that slept isn't sampled in a burst
        while not (over := has_ended()) and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, STEP))
        found = take_sample(pid, before)
        if over and count > 1 and found["since"] < config.every / 2:
            break  # over so short a time the counts of processor use are too coarse
        write_sample(path, found)
        if live:
            width = shutil.get_terminal_size().columns - 1
            words = " | ".join(" ".join(row) for row in list_rows(found) if "unknown" not in row)
            print(f"\r{words[:width]:{width}}", end="", file=sys.stderr, flush=True)
        before, count = found, count + 1


def print_summary(path: Path) -> None:
    """Write summary.json beside the lines and print it. Raises UserError where there are no samples."""
    try:
        samples = read_samples(path)
        if not samples:
            raise UserError(f"{path}: holds no samples. Name a folder that `sftlab metrics` wrote to.")
        found = summarise(samples)
        files.write_json(path.parent / "summary.json", found)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}. Name another --output-dir.") from error
    print("\n".join([format_table(("", *AVERAGES), list_rows(found)), *list_facts(found)]))
