"""How busy a machine and a program are: samples of processor, memory and GPUs, and what many of them come to.

A sample is a plain dict:

    time      seconds since the epoch
    since     seconds since the sample before it, over which processor use was counted; None for a first one
    machine   cpu_percent (100: all cores at work), memory_bytes (in use, caches apart)
    process   cpu_percent (100: one core), memory_bytes, processes: of the watched process and all below it
    gpus      a list: index, use_percent, memory_bytes, power_watts, celsius (`machine.read_gpus`)

What could not be read is None. A process's memory is what is resident; pages that several processes share count in each.
`sftlab metrics` (bench/monitor.py) writes samples into a file; a program takes its own:

    python -c "from sftlab.bench import monitor; a = monitor.sample(); b = monitor.sample(before=a); print(monitor.summarise([a, b]))"
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from sftlab import files
from sftlab import machine as lab_machine
from sftlab.config.configs import MetricsConfig
from sftlab.errors import UserError, place_error

BUSY = 90  # percent: from here on a device counts as busy
AVERAGES = ("mean", "median", "peak")
GPU_MEASURES = (("use", "use_percent", "%"), ("memory", "memory_bytes", "GB"), ("power", "power_watts", "W"),
                ("temperature", "celsius", "°C"))  # fmt: skip
FIELDS = ("time", "since", "machine", "process", "gpus")


def sample(pid: int | None = None, before: dict | None = None) -> dict:
    """A sample of the machine and, with `pid`, of that process and all below it.

    Processor use is counted since the sample `before`; without one it is None. The caller's own work is left out.
    """
    import psutil

    busy, total = count_machine_seconds()
    found = {"time": time.time(), "clock": time.monotonic(), "machine_seconds": (busy, total)}
    since = found["clock"] - before["clock"] if before else None
    ran = total - before["machine_seconds"][1] if before else 0
    memory = psutil.virtual_memory()
    machine = {"cpu_percent": round(100 * (busy - before["machine_seconds"][0]) / ran, 1) if ran > 0 else None,
               "memory_bytes": memory.total - memory.available}  # fmt: skip
    found |= {"since": since, "machine": machine, "process": None, "gpus": lab_machine.read_gpus()}
    if pid is not None:
        seconds, held, processes = _tree(pid)
        found["process_seconds"] = seconds
        earlier = before.get("process_seconds") if before else None
        known = since and earlier is not None and seconds is not None
        # Processes that another parent took over leave the count: their time is lost, but never counts as negative.
        percent = round(100 * max(0, seconds - earlier) / since, 1) if known else None
        found["process"] = {"cpu_percent": percent, "memory_bytes": held if processes else None, "processes": processes}
    return found


def to_line(found: dict) -> str:
    """A sample as a line of JSON, without what only the next sample needs."""
    return json.dumps(
        {name: round(found[name], 3) if isinstance(found[name], float) else found[name] for name in FIELDS}
    )


def read(path: str | Path) -> tuple[list[dict], int]:
    """(the samples in a metrics.jsonl, how many lines are no samples): a killed writer may leave half a line.

    The lines that describe a session (`describe`) are neither. Raises OSError.
    """
    samples, broken = [], 0
    for line in Path(path).read_bytes().splitlines():
        try:
            content = json.loads(line)
            if "started" not in content:
                samples.append({name: content[name] for name in FIELDS})
        except (ValueError, TypeError, KeyError):
            broken += 1
    return samples, broken


def describe(every: float, watched: str) -> dict:
    """What stands before the samples of a session: when it began, on what machine, what was watched."""
    import psutil

    return {"started": time.time(), "every": every, "watched": watched, "cores": psutil.cpu_count(),
            "memory_total_bytes": psutil.virtual_memory().total, "gpus": lab_machine.describe_gpus()}  # fmt: skip


def summarise(samples: list[dict]) -> dict:
    """Mean, median and peak of everything sampled, the share of samples with a busy device, and the energy.

    samples, seconds (over which was sampled, gaps between sessions left out); machine, process: of each field mean, median
    and peak; gpus: the same of each GPU, with `busy_share` and `energy_joules` (power x time, added up); busy: `of` gpu or
    cpu, `share` in 0..1 of samples at 90 % use or more, the mean over the GPUs that did anything, else of the processor;
    energy_joules of all GPUs. None for what was never known.
    """
    spans = [one["since"] or 0 for one in samples]
    found = {"samples": len(samples), "seconds": round(sum(spans), 3)}
    for part in ("machine", "process"):
        taken = [one[part] for one in samples if one[part]]
        found[part] = {name: _spread([one[name] for one in taken]) for name in taken[0]} if taken else None
    found["gpus"] = []
    for index in range(max((len(one["gpus"]) for one in samples), default=0)):
        pairs = [
            (span, one["gpus"][index]) for span, one in zip(spans, samples, strict=True) if len(one["gpus"]) > index
        ]
        names = [name for name in pairs[0][1] if name != "index"]
        watts = [(span, one["power_watts"]) for span, one in pairs if one["power_watts"] is not None]
        about = {name: _spread([one[name] for _, one in pairs]) for name in names}
        about["busy_share"] = _busy_share([one["use_percent"] for _, one in pairs])
        about["energy_joules"] = round(sum(span * power for span, power in watts), 1) if watts else None
        found["gpus"].append({"index": index, **about})
    used = [gpu["busy_share"] for gpu in found["gpus"] if (gpu["use_percent"] or {}).get("peak")]
    share = statistics.mean(used) if used else _busy_share([one["machine"]["cpu_percent"] for one in samples])
    found["busy"] = {"of": "gpu" if used else "cpu", "at_percent": BUSY, "share": share}
    known = [gpu["energy_joules"] for gpu in found["gpus"] if gpu["energy_joules"] is not None]
    return found | {"energy_joules": sum(known) if known else None}


def list_rows(found: dict) -> list[tuple[str, ...]]:
    """A summary's measures: what, and its mean, median and peak with the unit."""
    measures = []
    for part, title in (("machine", "machine"), ("process", "watched")):
        if found[part]:
            measures += [
                (f"{title}: processor", found[part]["cpu_percent"], "%"),
                (f"{title}: memory", found[part]["memory_bytes"], "GB"),
            ]
    for gpu in found["gpus"]:
        measures += [(f"GPU {gpu['index']}: {name}", gpu[key], unit) for name, key, unit in GPU_MEASURES]
    rows = []
    for label, spread, unit in measures:
        values = [spread[name] / (1e9 if unit == "GB" else 1) for name in AVERAGES] if spread else []
        cells = [f"{value:.{2 if unit == 'GB' else 1}f} {unit}" for value in values]
        rows.append((label, *(cells or ["unknown"] * len(AVERAGES))))
    return rows


def list_facts(found: dict) -> list[str]:
    """The rest of a summary in sentences: how long, how busy, how much energy."""
    busy = found["busy"]
    share = "unknown" if busy["share"] is None else f"{busy['share']:.0%} of the samples"
    lines = [f"{found['samples']} samples over {found['seconds']:.0f} s",
             f"{busy['of'].upper()} at {busy['at_percent']} % or more: {share}"]  # fmt: skip
    if found["energy_joules"] is not None:
        lines.append(f"energy of the GPUs: {found['energy_joules'] / 3600:.1f} Wh")
    return lines


def tell(found: dict) -> list[str]:
    """A summary in lines for a terminal."""
    rows = [("", *AVERAGES), *list_rows(found)]
    first, *others = list_facts(found)
    return [first, *(f"{label:22}" + "".join(f"{cell:>14}" for cell in cells) for label, *cells in rows), *others]


def _spread(values: list) -> dict | None:
    """Mean, median and peak of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.mean(known), "median": statistics.median(known), "peak": max(known)}


def _busy_share(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return sum(value >= BUSY for value in known) / len(known) if known else None


def count_machine_seconds() -> tuple[float, float]:
    """(seconds in which a core worked, seconds of all cores) since the machine was started."""
    import psutil

    spent = psutil.cpu_times()._asdict()
    total = sum(spent.values()) - spent.get("guest", 0) - spent.get("guest_nice", 0)  # user and nice hold these
    return total - spent["idle"] - spent.get("iowait", 0), total


def _tree(pid: int) -> tuple[float | None, int, int]:
    """(processor seconds, resident bytes, processes) of a process and all below it, the caller's own left out.

    What a process has used when it ends goes to its parent's count of its children, so that nothing is lost between two
    looks (on Linux; a Mac doesn't tell that count).
    """
    import psutil

    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None, 0, 0
    seconds, held, processes = 0.0, 0, 0
    for member in members:
        try:
            with member.oneshot():
                spent, memory = member.cpu_times(), member.memory_info().rss
        except psutil.Error:  # it has just ended, or is another user's
            continue
        seconds += spent.children_user + spent.children_system
        if member.pid != os.getpid():
            seconds, held, processes = seconds + spent.user + spent.system, held + memory, processes + 1
    return seconds, held, processes


# The file of samples that `sftlab metrics` writes, DIR/metrics.jsonl: claimed, filled line by line, summed up.
#
# Each line is written at once and in one piece, so that whatever ends the writer leaves what was seen until then.


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
    write_line(path, json.dumps(describe(config.every, watched)))
    before, count = sample(pid), 1
    write_line(path, to_line(before))
    due = before["clock"]
    while True:
        due = max(due + config.every, time.monotonic())  # a machine that slept isn't sampled in a burst
        while not (over := ended()) and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, STEP))
        found = sample(pid, before)
        if over and count > 1 and found["since"] < config.every / 2:
            break  # over so short a time the counts of processor use are too coarse
        write_line(path, to_line(found))
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
        samples, broken = read(path)
        if not samples:
            raise UserError(f"{path}: holds no samples.")
        found = summarise(samples) | {"broken_lines": broken}
        files.write_json(path.parent / "summary.json", found)
    except OSError as error:
        raise UserError(f"{error.filename or path.parent / 'summary.json'}: {error.strerror}.") from error
    return found


# Samples of a machine, a program or a command, each second, into DIR/metrics.jsonl: `sftlab metrics`.
#
# Each line is written at once, so that whatever ends the watcher leaves what was seen until then. At the end DIR/summary.json
# says what it came to; `sftlab metrics DIR --summary` says it again from the lines. `watching` does it from within a program.


FORWARDED = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def watch(config: MetricsConfig, command: list[str]) -> int:
    """Watch as configured and return the exit code: the command's, 128 + its signal, else 0."""
    path = Path(config.output_dir) / "metrics.jsonl"
    if config.summary:
        print("\n".join(tell(write_summary(path))))
        return 0
    if command and config.pid is not None:
        raise UserError("pid: a command after -- is watched by itself; leave out --pid, or the command.")
    if command and shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: no such program. After -- stands a command as you would type it.")
    process = find_process(config.pid)
    claim_file(path, config)
    say = print if not command else lambda *words: print(*words, file=sys.stderr)  # its standard output is its own
    say(f"{path}: a line each {config.every:g} s" + ("" if command or process else ", until Ctrl-C"))
    if lab_machine.find_gpus()[1]:
        say(f"no GPU values: {lab_machine.find_gpus()[1]}")
    code = watch_command(path, config, command) if command else watch_others(path, config, process)
    try:
        say("\n".join(tell(write_summary(path))))
    except UserError as error:
        if not command:
            raise
        say(f"sftlab: {error}")  # the exit code is the command's
    return code


def find_process(pid: int | None):
    """The process, or None for none; raises UserError if it isn't there."""
    import psutil

    try:
        return None if pid is None else psutil.Process(pid)
    except psutil.Error as error:
        raise UserError(f"pid: no process {pid} runs here. `ps` lists those that do.") from error


def watch_others(path: Path, config: MetricsConfig, process) -> int:
    """Watch a process that runs, until it ends, or the machine, until Ctrl-C or SIGTERM."""
    import psutil

    stopped = []

    def ended() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(stopped) or (process is not None and process.status() == psutil.STATUS_ZOMBIE)
        return True

    name = "the machine" if process is None else f"process {process.pid}"
    with handling(("SIGINT", "SIGTERM"), lambda number, frame: stopped.append(number)):
        try:
            record(path, config, config.pid, name, ended, live=sys.stderr.isatty())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; what was written until then is whole.") from error
    return 0


def watch_command(path: Path, config: MetricsConfig, command: list[str]) -> int:
    """Run a command and watch it and all below it; what can't be written doesn't end it."""
    child, early = None, []

    def forward(number, frame) -> None:
        if number in (signal.SIGINT, signal.SIGQUIT) and at_terminal():
            return  # the terminal has sent it to the command as well
        early.append(number) if child is None else child.send_signal(number)

    with handling(FORWARDED, forward):
        try:
            child = subprocess.Popen(command)
        except OSError as error:
            raise UserError(f"{command[0]}: can't be run: {error.strerror}.") from error
        for number in early:
            child.send_signal(number)
        try:
            # From here down, itself left out: the time of a command that has ended stands in its parent's count.
            record(path, config, os.getpid(), Path(command[0]).name, lambda: child.poll() is not None)
        except OSError as error:
            print(f"sftlab: {path}: {error.strerror}; the command goes on, unwatched", file=sys.stderr)
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def handling(names: tuple, handler):
    """Let a function receive these signals; those that are ignored (nohup) stay so, for a command, too."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def at_terminal() -> bool:
    """Whether this process is in the foreground of a terminal, whose Ctrl-C goes to all processes there."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def watching(folder: str | Path | None, every: float = 1.0, pid: int | None = None):
    """Watch this process, or `pid`, and all below it while the block runs: `with watching(folder) as found:`.

    A process of its own samples, which ends with the block, or with the process that it watches, whatever ends that.
    After the block `found` holds the summary (`summarise`), and is empty where folder is None: nothing is watched.
    Raises UserError if the folder has samples already, or can't be written.
    """
    found = {}
    if folder is None:
        yield found
        return
    path = Path(folder) / "metrics.jsonl"
    claim_file(path, MetricsConfig(output_dir=str(folder), every=every))
    command = [sys.executable, "-m", "sftlab.cli", "metrics", str(folder), "--append"]
    command += ["--pid", str(pid or os.getpid()), "--every", str(every)]
    watcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)  # fmt: skip
    while not path.read_bytes().count(b"\n") > 1:  # the block begins when it's watched
        if watcher.poll() is not None:
            raise UserError(f"watching {pid or os.getpid()} failed: {watcher.stderr.read().strip()}")
        time.sleep(STEP)
    try:
        yield found
    finally:
        watcher.terminate()
        watcher.communicate()
        found |= summarise(read(path)[0])
