"""`sftlab metrics`: how busy a machine is, in samples of processor, memory and GPUs, and their summary.

A sample is a line of DIR/metrics.jsonl, written at once and in one piece, so that whatever ends the monitor leaves what was
measured until then. summary.json beside it is written at the end.

    time      seconds since the epoch
    machine   cpu_percent (100: all cores at work, since the sample before), memory_bytes (in use, without caches)
    gpus      a list: index, use_percent, memory_bytes, power_watts, celsius (`machine.read_gpus`); None for what isn't known

    python -c "from sftlab.bench import monitor as m; print(m.summarise([m.take_sample(), m.take_sample()])[0])"
"""

import contextlib
import json
import shutil
import signal
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


def take_sample() -> dict:
    """Take a sample of the machine."""
    import psutil

    memory = psutil.virtual_memory()
    machine = {"cpu_percent": psutil.cpu_percent(), "memory_bytes": memory.total - memory.available}
    return {"time": time.time(), "machine": machine, "gpus": lab_machine.read_gpus()}


def write_sample(path: Path, sample: dict) -> None:
    """Append a sample as a line of JSON, in one piece."""
    with open(path, "ab", buffering=0) as sink:
        sink.write(json.dumps(sample).encode() + b"\n")


def read_samples(path: Path) -> list[dict]:
    """Read the samples of a metrics.jsonl, without lines that are none: a killed monitor may leave half a line."""
    samples = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            content = json.loads(line)
            samples.append({name: content[name] for name in ("time", "machine", "gpus")})
    return samples


def list_values(sample: dict) -> dict[str, float | None]:
    """List the numbers of a sample by name, as `machine: memory, GB` and `GPU 0: use, %`."""
    parts = {"machine": sample["machine"]} | {f"GPU {gpu['index']}": gpu for gpu in sample["gpus"]}
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


def watch(config: MetricsConfig) -> None:
    """Write samples until Ctrl-C or SIGTERM, then the summary. Raises UserError for a file that is there or can't grow."""
    path = Path(config.output_dir) / "metrics.jsonl"
    if path.exists() and not config.overwrite:
        raise place_error(path, "exists", "Add --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    print(f"{path}: a line each {config.every:g} s, until Ctrl-C")
    if lab_machine.find_gpus()[1]:
        print(f"no GPU values: {lab_machine.find_gpus()[1]}")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has its background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        record(path, config.every)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. What was written before is whole.") from error
    except KeyboardInterrupt:
        if path.exists() and (samples := read_samples(path)):
            table, facts = summarise(samples)
            print("\n".join([format_values(table).to_string(), *facts]))
            values = json.loads(table.to_json(orient="index"))  # null for what was never known
            files.write_json(path.with_name("summary.json"), {"values": values, "facts": facts})


def record(path: Path, every: float) -> None:
    """Write samples for ever, and show each in a terminal. Raises OSError where one can't be written."""
    take_sample()  # from here on processor use is counted
    due = time.monotonic()
    while True:
        due = max(due + every, time.monotonic())  # a machine that slept isn't sampled in a burst
        time.sleep(max(0, due - time.monotonic()))
        write_sample(path, found := take_sample())
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            words = " | ".join(f"{name} {value:.4g}" for name, value in list_values(found).items() if value is not None)
            print(f"\r{words[:width]:{width}}", end="", file=sys.stderr, flush=True)
