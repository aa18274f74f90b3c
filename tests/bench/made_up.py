"""Results as `sftlab benchmark` writes them, with numbers that are easy to reckon with."""

import dataclasses

from sftlab.bench.results import Point, Result, Run, StepSeconds
from sftlab.config.configs import TrainConfig

MACHINE = {"cpu": "Some CPU", "cores": 8, "memory_GB": 17.2, "gpu": None, "gpus": 0, "machines": 1, "threads": 1}
MACHINE |= {"node_is": "a process of one machine"}


def make_run(devices: int = 1, rate: float = 1000.0, accumulation: int = 1, **changes) -> Run:
    """A run of 30 steps of 400 tokens for each device and micro-batch, at `rate` tokens per second."""
    tokens = 30 * 400 * devices * accumulation
    step = tokens / rate / 30
    about = {"tokens": tokens, "tokens_per_second": rate, "tokens_per_second_per_device": rate / devices}
    about |= {"step_seconds": StepSeconds(step, 0.9 * step, 1.2 * step, 30, 5), "started": "2026-01-01T00:00:00+00:00"}
    about |= {"peak_bytes": [int(2e9 + 1e8 * rank) for rank in range(devices)], "others_use": 0.01}
    about |= {"flops_per_second_per_device": 2.5e12, "utilisation": None, "first_loss": 3.0, "last_loss": 2.66}
    return Run(**about | {"losses": [3.0 - step / 100 for step in range(35)]} | changes)


def make_result(devices=1, scaling="weak", rates=None, batch=4, config=None, nodes=None, run=None, **changes):
    """A point with its runs; by default a device takes a second for 1000 tokens, and repeats are 1 % apart."""
    rates = rates or [1000 * devices / (1 + 0.01 * ((repeat + devices) % 3)) for repeat in range(3)]
    accumulation = 8 // devices if scaling == "strong" else 1
    model = changes.pop("model", "tiny-base")
    point = Point(model, 1000, nodes or devices, devices, scaling, batch * accumulation * devices, batch, accumulation)
    settings = dataclasses.asdict(TrainConfig()) | {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    about = {"point": point, "config": settings | (config or {}), "machine": MACHINE, "versions": {"torch": "2.13.0"}}
    about |= {"choices": {"precision": "float32: why"}}
    about |= {"data": {"source": "facts", "rows": 1000, "distinct_rows": 1000, "fingerprint": "f"}}
    about |= {"runs": [make_run(devices, rate, accumulation, **(run or {})) for rate in rates]}
    return Result(**about | changes)


GRID = [make_result(devices, scaling) for scaling in ("strong", "weak") for devices in (1, 2, 4, 8)]
