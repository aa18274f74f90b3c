"""How busy a machine and a program are: samples of processor, memory and GPUs, and their summary: `sftlab metrics`.

A sample is a plain dict, and a line of DIR/metrics.jsonl, written at once and in one piece, so that whatever ends the
monitor leaves what was measured until then. summary.json beside it is written at the end.

    time      seconds since the epoch
    since     seconds since the sample before it, over which processor use was counted; None for the first one
    machine   cpu_percent (100: all cores at work), memory_bytes (in use, without caches)
    process   cpu_percent (100: one core), memory_bytes, processes: of the watched process and all below it
    gpus      a list: index, use_percent, memory_bytes, power_watts, celsius (`machine.read_gpus`)

What could not be read is None. A process's memory is what is resident; pages that several processes share count in each.

    python -c "from sftlab.bench import monitor as m; a = m.take_sample(); print(m.summarise([a, m.take_sample(before=a)])[0])"
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
from sftlab.config.configs import MetricsConfig
from sftlab.errors import UserError, place_error

BUSY = 90  # percent: from here on a device counts as busy
STEP = 0.05  # seconds between checks whether what is watched has ended
MEASURES = {  # field of a sample: label with the unit, its size
    "cpu_percent": ("processor, %", 1),
    "use_percent": ("use, %", 1),
    "memory_bytes": ("memory, GB", 1e9),
    "power_watts": ("power, W", 1),
    "celsius": ("temperature, °C", 1),
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


def list_values(sample: dict) -> dict[str, float | None]:
    """List the numbers of a sample by name, as `machine: memory, GB`, `watched: processor, %` and `GPU 0: use, %`."""
    parts = {"machine": sample["machine"], "watched": sample["process"] or {}}
    parts |= {f"GPU {gpu['index']}": gpu for gpu in sample["gpus"]}
    found = {}
    for part, values in parts.items():
        for name in MEASURES:
            if name in values:
                label, size = MEASURES[name]
                found[f"{part}: {label}"] = None if values[name] is None else values[name] / size
    return found


def make_frame(samples: list[dict]):
    """Make a pandas.DataFrame of `list_values` over seconds, NaN where a value wasn't known."""
    from pandas import DataFrame

    return DataFrame(map(list_values, samples), [one["time"] - samples[0]["time"] for one in samples], dtype=float)


def summarise(samples: list[dict]):
    """Return (a pandas.DataFrame with mean, median and peak of all that was sampled, how long and how busy in sentences).

    Busy is the share of known samples at 90 % use or more, of the GPUs that did anything, else of the processor.
    """
    frame = make_frame(samples)
    gpus = [name for name in frame if name.endswith(": use, %") and frame[name].max() > 0]
    known = frame[gpus or ["machine: processor, %"]].stack().dropna()
    share = f"{(known >= BUSY).mean():.0%} of the samples" if len(known) else "unknown"
    facts = [
        f"{len(samples)} samples over {frame.index[-1]:.0f} s",
        f"{'GPU' if gpus else 'CPU'} at {BUSY} % or more: {share}",
    ]
    return frame.agg(["mean", "median", "max"]).T.rename(columns={"max": "peak"}), facts


def format_values(table):
    """Format the table of `summarise` as texts."""
    return table.map("{:,.4g}".format).replace("nan", "unknown")


def watch(config: MetricsConfig, command: list[str]) -> int:
    """Watch as configured and return the exit code: the command's, 128 + its signal, else 0. Raises UserError."""
    import psutil

    path = Path(config.output_dir) / "metrics.jsonl"
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
        if samples := read_samples(path):
            table, facts = summarise(samples)
            print("\n".join([format_values(table).to_string(), *facts]))
            content = json.loads(table.to_json(orient="index"))  # null for what was never known
            try:
                files.write_json(path.parent / "summary.json", {"values": content, "facts": facts})
            except OSError as error:  # the exit code is the command's
                print(f"sftlab: {path.parent}: {error.strerror}; no summary.json")
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
            words = " | ".join(f"{name} {value:.4g}" for name, value in list_values(found).items() if value is not None)
            print(f"\r{words[:width]:{width}}", end="", file=sys.stderr, flush=True)
        before, count = found, count + 1
