"""`sftlab metrics`: how busy a machine is, in samples of processor, memory and GPUs, and their summary.

A sample is a line of DIR/metrics.jsonl, written at once and in one piece, so that whatever ends the monitor leaves what was
measured until then: `time` (seconds since the epoch), and each value by its name.

    machine: processor, %    100: all cores at work, since the sample before
    machine: memory, GB      in use, without caches
    GPU 0: use, %            and its memory, power and temperature (`machine.read_gpus`); null for what a GPU doesn't tell

    python -c "from sftlab.bench import monitor; print(monitor.take_sample())"
"""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

from sftlab import machine
from sftlab.config.configs import MetricsConfig
from sftlab.errors import place_error

BUSY = 90  # percent: from here on a device counts as busy


def take_sample() -> dict:
    """Take a sample of the machine."""
    import psutil

    memory = psutil.virtual_memory()
    used = (memory.total - memory.available) / 1e9
    sample = {"time": time.time(), "machine: processor, %": psutil.cpu_percent(), "machine: memory, GB": used}
    for index, (use, size, power, heat) in enumerate(machine.read_gpus()):
        sample |= {f"GPU {index}: use, %": use, f"GPU {index}: memory, GB": size and size / 1e9}
        sample |= {f"GPU {index}: power, W": power and power / 1000, f"GPU {index}: temperature, °C": heat}
    return sample


def write_sample(path: Path, sample: dict) -> None:
    """Append a sample as a line of JSON, in one piece."""
    with open(path, "ab", buffering=0) as sink:
        sink.write(json.dumps(sample).encode() + b"\n")


def read_samples(path: Path):
    """Read a metrics.jsonl as a pandas.DataFrame over seconds, NaN where a value wasn't known."""
    from pandas import DataFrame

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    samples = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed monitor may leave half a line
    frame = DataFrame(samples, dtype=float).set_index("time")
    return frame.set_index(frame.index - frame.index[0])


def summarise(frame) -> str:
    """Return mean, median and peak of all that was sampled as a table, and below it how long and how busy.

    Busy is the share of known samples at 90 % use or more, of the GPUs that did anything, else of the processor.
    """
    gpus = [name for name in frame if name.endswith(": use, %") and frame[name].max() > 0]
    known = frame[gpus or ["machine: processor, %"]].stack().dropna()
    busy = f"{'GPU' if gpus else 'CPU'} at {BUSY} % or more: {(known >= BUSY).mean():.0%} of the samples"
    table = frame.agg(["mean", "median", "max"]).T.rename(columns={"max": "peak"})
    lines = [table.to_string(float_format="{:,.4g}".format, na_rep="unknown")]
    return "\n".join([*lines, f"{len(frame)} samples over {frame.index[-1]:.0f} s", busy])


def watch(config: MetricsConfig) -> None:
    """Write samples until Ctrl-C or SIGTERM, then the summary. Raises UserError for a file that is there."""
    path = Path(config.output_dir) / "metrics.jsonl"
    if path.exists() and not config.overwrite:
        raise place_error(path, "exists", "Add --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    print(f"{path}: a line each {config.every:g} s, until Ctrl-C")
    if machine.find_gpus()[1]:
        print(f"no GPU values: {machine.find_gpus()[1]}")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has its background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        record(path, config.every)
    except KeyboardInterrupt:
        if path.exists():
            print(summarise(read_samples(path)))


def record(path: Path, every: float) -> None:
    """Write samples for ever, and show each in a terminal."""
    take_sample()  # from here on processor use is counted
    due = time.monotonic()
    while True:
        due = max(due + every, time.monotonic())  # a machine that slept isn't sampled in a burst
        time.sleep(max(0, due - time.monotonic()))
        write_sample(path, sample := take_sample())
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            known = (f"{name} {value:.4g}" for name, value in sample.items() if name != "time" and value is not None)
            print(f"\r{' | '.join(known)[:width]:{width}}", end="", file=sys.stderr, flush=True)
