"""The scaling in a benchmark's results: what was measured, and where the model says that it goes, apart from each other.

python -c "from sftlab import results, scaling_series as s; print(*s.list_series(results.read_results('results')[0]), sep='\\n')"
"""

import json
from dataclasses import dataclass, replace

from sftlab import communication, dry_run, scaling_model, zero
from sftlab.communication import Job, Network
from sftlab.config import TrainConfig
from sftlab.options import UserError
from sftlab.results import Result
from sftlab.scaling import Gain, Speed, compare
from sftlab.scaling_model import Fit

NODES, DEVICES = (2, 4, 8), (64, 512)  # to where the model goes on
WRONG = 0.3  # a model that is off by more on a point left out of its fit is worth no projection
# What differs from point to point of a series, or says nothing of its speed.
VARIES = ("batch_size", "gradient_accumulation_steps", "max_steps", "output_dir", "dataset_path", "seed")


@dataclass(frozen=True)
class Series:
    """Points that differ in their devices alone. speeds: measured, by devices; notes: what a reader must know of them;
    same: what points must have in common beside model, rows and scaling to be held against each other.
    """

    model: str
    samples: int
    scaling: str
    results: tuple[Result, ...]
    speeds: tuple[Speed, ...]
    notes: tuple[str, ...]
    same: str

    @property
    def gains(self) -> list[Gain]:
        """Speed-up over the point with the fewest devices."""
        return [compare(self.speeds[0], speed) for speed in self.speeds]


@dataclass(frozen=True)
class Extension:
    """Where the model says that a series goes: modelled speeds and gains. `why` says why there are none, where there aren't.

    dropped: what is not among them, and why; empty where nothing is.
    """

    fit: Fit | None
    speeds: tuple[Speed, ...]
    gains: tuple[Gain, ...]
    why: str = ""
    dropped: str = ""


def read_speed(result: Result) -> Speed:
    """A point's measured speed, with the rate of each repeat."""
    point, runs = result.point, result.runs
    tokens = sum(run.tokens for run in runs) / sum(run.step_seconds["steps"] for run in runs)
    rates = tuple(run.tokens_per_second for run in runs)
    return Speed(point.devices, point.nodes, point.global_batch, tokens, rates, point.accumulation, count_cores(result))


def count_cores(result: Result) -> int:
    """The cores that a point's processes had together; 0 where GPUs compute."""
    machine = result.machine
    if machine.get("gpu"):
        return 0
    there = machine["cores"] * (machine.get("machines") or 1) if isinstance(machine["cores"], int) else 10**9
    return min(result.point.devices * machine["threads"], there)


def list_series(found: list[Result]) -> list[Series]:
    """The results as series, of those that have the same model, rows, batch, precision, options, machine and versions.

    The batch of a strong series is that of a step, of a weak one that of a device.
    """
    groups = {}
    for result in found:
        options = {name: value for name, value in result.config.items() if name not in VARIES}
        machine = {name: result.machine.get(name) for name in ("cpu", "gpu")}
        same = json.dumps([options, machine, result.versions], sort_keys=True, default=str)
        point = result.point
        batch = point.global_batch if point.scaling == "strong" else point.per_device_batch * point.accumulation
        work = result.data.get("fingerprint"), str(result.choices.get("precision")).split(":")[0], batch
        groups.setdefault((point.model, point.samples, point.scaling, same, work), []).append(result)
    out = []
    for (model, samples, scaling, same, _), group in groups.items():
        group.sort(key=lambda result: result.point.devices)
        out.append(
            Series(model, samples, scaling, tuple(group), tuple(map(read_speed, group)), find_notes(group), same)
        )
    return out


def find_notes(group: list[Result]) -> tuple[str, ...]:
    """What makes devices of a series unlike each other."""
    notes = []
    threads = [result.machine.get("threads") for result in group]
    if not group[0].machine.get("gpu") and len(set(threads)) > 1:
        counts = ", ".join(f"{result.point.devices}: {count}" for result, count in zip(group, threads, strict=True))
        notes.append(f"threads of a process, by devices: {counts}; the ideal counts cores, not processes")
    if not group[0].machine.get("gpu") and len(group) > 1:
        notes.append(
            "the processes share one machine's memory and caches; the model takes what they lose by it for communication"
        )
    if any(result.machine.get("oversubscribed") for result in group):
        notes.append("there are more processes than cores: they wait for each other's cores")
    return tuple(notes)


def read_job(result: Result) -> Job:
    """What a point's devices exchange in a step, by its configuration. Raises UserError for a model that can't be had.

    DDP sends float32. DeepSpeed sends bfloat16 where that is computed in.
    """
    config = TrainConfig.build(**TrainConfig.keep_known(result.config))
    bf16, stage = result.choices.get("precision", "").startswith("bfloat16"), zero.find_stage(config.deepspeed)
    with dry_run.counting(config):
        settings = dry_run.read_settings(config.model_name, config.trust_remote_code)
        layers = settings.get_text_config().num_hidden_layers
        model = dry_run.build(replace(config, bf16=bf16), settings, layers)
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    size = 2 if config.deepspeed and bf16 else 4
    return communication.make_job(f"zero{stage}" if stage else "ddp", sum(count for count, _ in counts),
                                  sum(count for count, learns in counts if learns), size, size, layers)  # fmt: skip


def extend(series: Series, among: list[Series] = (), network: Network | None = None) -> Extension:
    """The model fitted to a series, and to others of `among` that only differ in their scaling, and where it goes on.

    network: what was measured of it apart (`network_speed`); then few points will do.

    On to 2, 4 and 8 nodes, and to 64 and 512 devices, beyond those measured; the modelled gains of the measured numbers are
    there too, to be held against these.
    """
    first = series.results[0]
    alike = [other for other in among if (other.model, other.samples, other.same) == (series.model, series.samples, series.same)
             and other.scaling != series.scaling]  # fmt: skip
    base, per_node = series.speeds[0], first.point.devices // first.point.nodes
    far = {nodes * per_node for nodes in NODES} | set(DEVICES)
    counts = sorted(
        {speed.devices for speed in series.speeds} | {count for count in far if count > series.speeds[-1].devices}
    )
    try:
        fit = scaling_model.fit([speed for one in (series, *alike) for speed in one.speeds], read_job(first), network)
        if fit.error > WRONG:
            return Extension(
                fit, (), (), f"off by up to {fit.error:.0%} on points left out of the fit; nothing is projected by it"
            )
        speeds = scaling_model.project(fit, base, counts, per_node, series.scaling)
    except UserError as error:
        return Extension(None, (), (), str(error))
    dropped = find_dropped(counts, base.rows) if series.scaling == "strong" else ""
    return Extension(fit, tuple(speeds), tuple(compare(base, speed) for speed in speeds), dropped=dropped)


def find_dropped(counts: list[int], rows: int) -> str:
    """The numbers of devices over which a strong step's rows can't be shared out, and what to do; empty where there are none."""
    left = [str(count) for count in counts if rows % count]
    if not left:
        return ""
    return (f"{', '.join(left)}: a step of {rows} rows can't be shared out over so many; measure with --scaling both, "
            "or a larger --global-batch")  # fmt: skip


def say(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """A number with its interval, as 1.85 (1.71 to 2.01)."""
    return f"{value:.3g}{unit}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")
