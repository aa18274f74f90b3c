"""How busy a machine and a program are: samples of processor, memory and GPUs, and their summary: `sftlab metrics`.

A sample is a plain dict, and a line of DIR/metrics.jsonl, written at once and in one piece, so that whatever ends the
monitor leaves what was measured until then. summary.json beside it is written at the end.

    time      seconds since the epoch
    since     seconds since the sample before it, over which processor use was counted; None for the first one
    machine   cpu_percent (100: all cores at work), memory_bytes (in use, without caches)
    process   cpu_percent (100: one core), memory_bytes, processes: of the command and all below it
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
        # Processes that another parent took over leave the count: their time is lost, but never counts as negative.
        percent = round(100 * max(0, seconds - before["process_seconds"]) / since, 1) if before else None
        found["process"] = {"cpu_percent": percent, "memory_bytes": resident or None, "processes": processes}
        found["process_seconds"] = seconds
    return found


def count_processes(pid: int) -> tuple[float, int, int]:
    """Return (processor seconds, resident bytes, processes) of a process and all below it, without the caller's own.

    The time of a process that has ended is in its parent's count of its children, so that nothing is lost between two
    samples (on Linux; a Mac has no such count).
    """
    import psutil

    root = psutil.Process(pid)
    seconds, resident, processes = 0.0, 0, 0
    for member in (root, *root.children(recursive=True)):
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
    return {
        f"{part}: {label}": None if values[name] is None else values[name] / size
        for part, values in parts.items()
        for name, (label, size) in MEASURES.items()
        if name in values
    }


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
    busy = f"{'GPU' if gpus else 'CPU'} at {BUSY} % or more: {share}"
    table = frame.agg(["mean", "median", "max"]).T.rename(columns={"max": "peak"})
    return table, [f"{len(samples)} samples over {frame.index[-1]:.0f} s", busy]


def format_values(table):
    """Format the table of `summarise` as texts."""
    return table.map("{:,.4g}".format).replace("nan", "unknown")


def watch(config: MetricsConfig, command: list[str]) -> int:
    """Watch the machine, and the command if there is one; return its exit code or 128 + its signal. Raises UserError."""
    path = Path(config.output_dir) / "metrics.jsonl"
    if path.exists() and not config.overwrite:
        raise place_error(path, "exists", "Add --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    child = start(command) if command else None
    with contextlib.redirect_stdout(sys.stderr if command else sys.stdout):  # a command's standard output is its own
        print(f"{path}: a line each {config.every:g} s" + ("" if command else ", until Ctrl-C"))
        if lab_machine.find_gpus()[1]:
            print(f"no GPU values: {lab_machine.find_gpus()[1]}")
        if not child:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            path.unlink(missing_ok=True)
            record(path, config.every, child)
        except KeyboardInterrupt:
            pass
        except OSError as error:
            if not child:
                raise UserError(f"{path}: {error.strerror}. What was written before is whole.") from error
            print(f"sftlab: {path}: {error.strerror}; the command continues, unwatched")
        code = child.wait() if child else 0
        if path.exists() and (samples := read_samples(path)):
            save_summary(path.with_name("summary.json"), samples)
    return code if code >= 0 else 128 - code


def start(command: list[str]) -> subprocess.Popen:
    """Start a command that gets Ctrl-C from the terminal itself, and SIGTERM from this process."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:  # no such program, or a script without its first line
        fix = "After -- write a command as you would type it."
        raise UserError(f"{command[0]}: can't be run: {error.strerror}. {fix}") from error
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child


def record(path: Path, every: float, child: subprocess.Popen | None) -> None:
    """Write samples until the command has ended; without one show each in a terminal. Raises OSError where one can't be written."""
    # From this process down, itself left out: the time of a command that has ended is in its parent's count.
    pid = os.getpid() if child else None
    before, count, over = take_sample(pid), 1, False
    write_sample(path, before)
    due = before["clock"]
    while not over:
        due = max(due + every, time.monotonic())  # a machine that slept isn't sampled in a burst
        left = max(0, due - time.monotonic())
        if child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(left)
            over = child.returncode is not None
        else:
            time.sleep(left)
        found = take_sample(pid, before)
        if over and count > 1 and found["since"] < every / 2:
            break  # over so short a time the counts of processor use are too coarse
        write_sample(path, found)
        if not child and sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            words = " | ".join(f"{name} {value:.4g}" for name, value in list_values(found).items() if value is not None)
            print(f"\r{words[:width]:{width}}", end="", file=sys.stderr, flush=True)
        before, count = found, count + 1


def save_summary(path: Path, samples: list[dict]) -> None:
    table, facts = summarise(samples)
    print("\n".join([format_values(table).to_string(), *facts]))
    content = json.loads(table.to_json(orient="index"))  # null for what was never known
    try:
        files.write_json(path, {"values": content, "facts": facts})
    except OSError as error:  # the exit code is the command's
        print(f"sftlab: {path}: {error.strerror}")
