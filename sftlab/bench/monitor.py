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
import statistics
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
CPU_MEASURES = (("processor", "cpu_percent", "%"), ("memory", "memory_bytes", "GB"))
GPU_MEASURES = (
    ("use", "use_percent", "%"),
    ("memory", "memory_bytes", "GB"),
    ("power", "power_watts", "W"),
    ("temperature", "celsius", "°C"),
)
FIELDS = ("time", "since", "machine", "process", "gpus")


def take_sample(pid: int | None = None, before: dict | None = None) -> dict:
    """Take a sample of the machine and, with `pid`, of that process and all below it.

    Processor use is counted since the sample `before`; without one it is None. The caller's own work is left out.
    """
    import psutil

    busy, total = count_machine_seconds()
    found = {"time": time.time(), "clock": time.monotonic(), "machine_seconds": (busy, total)}
    since = found["clock"] - before["clock"] if before else None
    ran = total - before["machine_seconds"][1] if before else 0
    memory = psutil.virtual_memory()
    percent = round(100 * (busy - before["machine_seconds"][0]) / ran, 1) if ran > 0 else None
    machine = {"cpu_percent": percent, "memory_bytes": memory.total - memory.available}
    found |= {"since": since, "machine": machine, "process": None, "gpus": lab_machine.read_gpus()}
    if pid is not None:
        seconds, resident, processes = count_processes(pid)
        found["process_seconds"] = seconds
        earlier = before.get("process_seconds") if before else None
        known = since and earlier is not None and seconds is not None
        # Processes that another parent took over leave the count: their time is lost, but never counts as negative.
        percent = round(100 * max(0, seconds - earlier) / since, 1) if known else None
        memory_bytes = resident if processes else None
        found["process"] = {"cpu_percent": percent, "memory_bytes": memory_bytes, "processes": processes}
    return found


def count_machine_seconds() -> tuple[float, float]:
    """Return (seconds in which a core worked, seconds of all cores) since the machine was started."""
    import psutil

    spent = psutil.cpu_times()._asdict()
    total = sum(spent.values()) - spent.get("guest", 0) - spent.get("guest_nice", 0)  # user and nice include these
    return total - spent["idle"] - spent.get("iowait", 0), total


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


def format_line(sample: dict) -> str:
    """Format a sample as a line of JSON, without what only the next sample needs."""
    rounded = {name: round(sample[name], 3) if isinstance(sample[name], float) else sample[name] for name in FIELDS}
    return json.dumps(rounded)


def read_samples(path: str | Path) -> tuple[list[dict], int]:
    """Read a metrics.jsonl: (its samples, how many lines are none): a killed monitor may leave half a line.

    The line that begins a session is neither. Raises OSError.
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


def summarise(samples: list[dict]) -> dict:
    """Return mean, median and peak of everything sampled, the share of samples with a busy device, and the energy.

    samples, seconds (over which was sampled, without gaps between sessions); machine, process: of each field mean, median
    and peak; gpus: the same of each GPU, with `busy_share` and `energy_joules` (power x time, added up); busy: `of` gpu or
    cpu, `share` in 0..1 of samples at 90 % use or more, the mean over the GPUs that did anything, else of the processor;
    energy_joules of all GPUs. None for what was never known.
    """
    spans = [one["since"] or 0 for one in samples]
    found = {"samples": len(samples), "seconds": round(sum(spans), 3)}
    for part in ("machine", "process"):
        found[part] = average_fields([one[part] for one in samples if one[part]])
    found["gpus"] = []
    for index in range(max((len(one["gpus"]) for one in samples), default=0)):
        timed = zip(spans, samples, strict=True)
        pairs = [(span, one["gpus"][index]) for span, one in timed if len(one["gpus"]) > index]
        joules = [span * gpu["power_watts"] for span, gpu in pairs if gpu["power_watts"] is not None]
        about = {"index": index} | average_fields([gpu for _, gpu in pairs])
        about["busy_share"] = count_busy([gpu["use_percent"] for _, gpu in pairs])
        about["energy_joules"] = round(sum(joules), 1) if joules else None
        found["gpus"].append(about)
    used = [gpu["busy_share"] for gpu in found["gpus"] if (gpu["use_percent"] or {}).get("peak")]
    share = statistics.mean(used) if used else count_busy([one["machine"]["cpu_percent"] for one in samples])
    found["busy"] = {"of": "gpu" if used else "cpu", "at_percent": BUSY, "share": share}
    known = [gpu["energy_joules"] for gpu in found["gpus"] if gpu["energy_joules"] is not None]
    return found | {"energy_joules": sum(known) if known else None}


def average_fields(parts: list[dict]) -> dict | None:
    """Return the mean, median and peak of each field but `index`, of its known values; None where there are none."""
    averages = {}
    for name in parts[0] if parts else ():
        known = [part[name] for part in parts if part[name] is not None]
        found = (
            {"mean": statistics.mean(known), "median": statistics.median(known), "peak": max(known)} if known else None
        )
        averages |= {name: found} if name != "index" else {}
    return averages or None


def count_busy(percents: list) -> float | None:
    """Return the share of the known values that are BUSY or more."""
    known = [value for value in percents if value is not None]
    return sum(value >= BUSY for value in known) / len(known) if known else None


def list_rows(found: dict) -> list[tuple[str, ...]]:
    """List a summary's measures: the name, and mean, median and peak with the unit."""
    parts = [("machine", found["machine"], CPU_MEASURES), ("watched", found["process"], CPU_MEASURES)]
    parts += [(f"GPU {gpu['index']}", gpu, GPU_MEASURES) for gpu in found["gpus"]]
    rows = []
    for title, part, measures in parts:
        for label, name, unit in measures if part else ():
            size, digits = (1e9, 2) if unit == "GB" else (1, 1)
            cells = [f"{part[name][kind] / size:.{digits}f} {unit}" if part[name] else "unknown" for kind in AVERAGES]
            rows.append((f"{title}: {label}", *cells))
    return rows


def list_facts(found: dict) -> list[str]:
    """List the rest of a summary in sentences: how long, how busy, how much energy."""
    busy = found["busy"]
    share = "unknown" if busy["share"] is None else f"{busy['share']:.0%} of the samples"
    lines = [f"{found['samples']} samples over {found['seconds']:.0f} s"]
    lines += [f"{busy['of'].upper()} at {busy['at_percent']} % or more: {share}"]
    if found["energy_joules"] is not None:
        lines.append(f"energy of the GPUs: {found['energy_joules'] / 3600:.1f} Wh")
    return lines


def format_summary(found: dict) -> str:
    """Format a summary as lines for a terminal."""
    first, *others = list_facts(found)
    return "\n".join([first, *format_table(("", *AVERAGES), list_rows(found)), *others])


def watch(config: MetricsConfig, command: list[str]) -> int:
    """Watch as configured and return the exit code: the command's, 128 + its signal, else 0. Raises UserError."""
    path = Path(config.output_dir) / "metrics.jsonl"
    if config.summary:
        print(format_summary(write_summary(path)))
        return 0
    if command and config.pid is not None:
        raise UserError("pid: a command after -- is watched by itself. Leave out --pid, or the command.")
    if command and shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: no such program. After -- write a command as you would type it.")
    process = find_process(config.pid)
    claim_file(path, config)
    out = sys.stderr if command else sys.stdout  # the command's standard output is its own
    print(f"{path}: a line each {config.every:g} s" + ("" if command or process else ", until Ctrl-C"), file=out)
    if lab_machine.find_gpus()[1]:
        print(f"no GPU values: {lab_machine.find_gpus()[1]}", file=out)
    code = watch_command(path, config, command) if command else watch_others(path, config, process)
    try:
        print(format_summary(write_summary(path)), file=out)
    except UserError as error:
        if not command:
            raise
        print(f"sftlab: {error}", file=out)  # the exit code is the command's
    return code


def find_process(pid: int | None):
    """Return the process, or None for none. Raises UserError if it doesn't run."""
    import psutil

    try:
        return None if pid is None else psutil.Process(pid)
    except psutil.Error as error:
        raise UserError(f"pid: no process {pid} runs here. `ps` lists those that do.") from error


def claim_file(path: Path, config: MetricsConfig) -> None:
    """Make the file, or prepare it for more lines. Raises UserError for one that exists unless options allow it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.overwrite or not path.exists():
        path.write_bytes(b"")
    elif not config.append:
        raise place_error(path, "exists", "Add --append to continue it, or --overwrite")
    elif path.stat().st_size and not path.read_bytes().endswith(b"\n"):  # a killed monitor's last line
        write_line(path, "")


def write_line(path: Path, line: str) -> None:
    """Append a line in one piece."""
    with open(path, "ab", buffering=0) as sink:
        sink.write(line.encode() + b"\n")


def watch_others(path: Path, config: MetricsConfig, process) -> int:
    """Watch a process that runs, until it ends, or the machine, until Ctrl-C or SIGTERM."""
    import psutil

    def has_ended() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process is not None and process.status() == psutil.STATUS_ZOMBIE
        return True

    name = "the machine" if process is None else f"process {process.pid}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        record(path, config, config.pid, name, has_ended, live=sys.stderr.isatty())
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. What was written before is whole.") from error
    return 0


def watch_command(path: Path, config: MetricsConfig, command: list[str]) -> int:
    """Run a command and watch it and all below it; if nothing can be written, it runs on."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"{command[0]}: can't be run: {error.strerror}. Name a program.") from error
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the command as well
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        # From this process down, itself left out: the time of a command that has ended is in its parent's count.
        record(path, config, os.getpid(), Path(command[0]).name, lambda: child.poll() is not None)
    except OSError as error:
        print(f"sftlab: {path}: {error.strerror}; the command continues, unwatched", file=sys.stderr)
    code = child.wait()
    return code if code >= 0 else 128 - code


def record(path: Path, config: MetricsConfig, pid: int | None, watched: str, has_ended, live: bool = False) -> None:
    """Write samples until `has_ended()`. Raises OSError where they can't be written."""
    import psutil

    about = {"started": time.time(), "every": config.every, "watched": watched, "cores": psutil.cpu_count()}
    about |= {"memory_total_bytes": psutil.virtual_memory().total, "gpus": lab_machine.describe_gpus()}
    write_line(path, json.dumps(about))
    before, count = take_sample(pid), 1
    write_line(path, format_line(before))
    due, over = before["clock"], False
    while not over:
        due = max(due + config.every, time.monotonic())  # a machine that slept isn't sampled in a burst
        while not (over := has_ended()) and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, STEP))
        found = take_sample(pid, before)
        if over and count > 1 and found["since"] < config.every / 2:
            break  # over so short a time the counts of processor use are too coarse
        write_line(path, format_line(found))
        if live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{format_live(found)[:width]:{width}}", end="", file=sys.stderr, flush=True)
        before, count = found, count + 1


def format_live(sample: dict) -> str:
    """Format a sample as one line for a terminal."""
    parts = [("CPU", sample["machine"], "cpu_percent"), ("watched", sample["process"], "cpu_percent")]
    parts += [(f"GPU {gpu['index']}", gpu, "use_percent") for gpu in sample["gpus"]]
    words = []
    for name, part, use in parts:
        if part:
            percent = "?" if part[use] is None else f"{part[use]:.0f} %"
            words.append(f"{name} {percent}, {(part['memory_bytes'] or 0) / 1e9:.2f} GB")
    return time.strftime("%H:%M:%S") + "  " + "  |  ".join(words)


def write_summary(path: Path) -> dict:
    """Write summary.json beside the lines and return it. Raises UserError where there are none."""
    try:
        samples, broken = read_samples(path)
        if not samples:
            raise UserError(f"{path}: holds no samples. Name a folder that `sftlab metrics` wrote to.")
        found = summarise(samples) | {"broken_lines": broken}
        files.write_json(path.parent / "summary.json", found)
    except OSError as error:
        raise UserError(
            f"{error.filename or path.parent / 'summary.json'}: {error.strerror}. Name another --output-dir."
        ) from error
    return found
