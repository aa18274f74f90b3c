"""How busy a machine and a program are: samples of processor, memory and GPUs, and what many of them come to.

A sample is a plain dict:

    time      seconds since the epoch
    since     seconds since the sample before it, over which processor use was counted; None for a first one
    machine   cpu_percent (100: all cores at work), memory_bytes (in use, caches apart)
    process   cpu_percent (100: one core), memory_bytes, processes: of the watched process and all below it
    gpus      a list: index, use_percent, memory_bytes, power_watts, celsius (`gpus.read_gpus`)

What could not be read is None. A process's memory is what is resident; pages that several processes share count in each.
`sftlab metrics` (watch.py) writes samples into a file; a program takes its own:

    python -c "from sftlab import metrics; a = metrics.sample(); b = metrics.sample(before=a); print(metrics.summarise([a, b]))"
"""

import json
import os
import statistics
import time
from pathlib import Path

from sftlab import gpus

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
    found |= {"since": since, "machine": machine, "process": None, "gpus": gpus.read_gpus()}
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
            "memory_total_bytes": psutil.virtual_memory().total, "gpus": gpus.describe_gpus()}  # fmt: skip


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
