"""The points of a benchmark: which, what a step of each is, whether this machine can, and what was measured before.

python -c "from sftlab.bench import plan; from sftlab.config import configs; print(plan.list_points(configs.BenchmarkConfig(max_nodes=2), configs.TrainConfig()))"
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from sftlab import files, machine
from sftlab.bench import results
from sftlab.bench.results import Point, Result, format_table
from sftlab.config.configs import SET_BY_BENCHMARK, BenchmarkConfig, DataConfig, TrainConfig
from sftlab.data import dataset, sources
from sftlab.data import report as data_report
from sftlab.data.dataset import FACTS, put_in_place
from sftlab.errors import UserError, place_error
from sftlab.hub import client as hub_client
from sftlab.models import load

ASIDE = ".replaced"  # an old point's ending under --overwrite, until its first new run has succeeded


def list_points(bench: BenchmarkConfig, config: TrainConfig) -> list[Point]:
    """List all points of a grid, in the order of a round. Raises UserError for a batch that can't be divided evenly.

    Weak scaling: each device has the batch size and the accumulation of the configuration. Strong: the global batch is the
    same everywhere, and fewer devices accumulate more batches, so that each batch is of the same size.
    """
    if bench.seconds and 0 < config.warmup_steps < 1:
        raise UserError(
            f"warmup_steps: {config.warmup_steps:g} is a share of the steps, and with --seconds their number isn't known. "
            "Give whole steps, or --steps instead of --seconds."
        )
    counts = [nodes * bench.devices_per_node for nodes in bench.nodes]
    whole = bench.global_batch or config.batch_size * config.gradient_accumulation_steps * math.lcm(*counts)
    points = []
    for size in bench.sizes:
        for scaling in results.SCALINGS if bench.scaling == "both" else (bench.scaling,):
            for nodes, devices in zip(bench.nodes, counts, strict=True):
                batch, accumulation = config.batch_size, config.gradient_accumulation_steps
                if scaling == "strong":
                    batch, accumulation = divide_batch(whole, devices, config.batch_size)
                total = devices * batch * accumulation
                if total > size:
                    raise UserError(
                        f"sizes: {size} rows don't fill a step of {total} samples, on {devices} devices. Take larger sizes, "
                        "fewer nodes or a smaller --batch-size."
                    )
                points.append(Point(config.model_name, size, nodes, devices, scaling, total, batch, accumulation))
    return points


def divide_batch(whole: int, devices: int, batch_size: int) -> tuple[int, int]:
    """Return (samples of a batch, accumulated batches) of each device for a global batch. Raises UserError."""
    if whole % devices:
        raise UserError(
            f"global_batch: {whole} samples can't be divided evenly among {devices} devices. "
            f"Take {math.lcm(whole, devices)}, or other numbers of nodes."
        )
    share = whole // devices
    batch = min(batch_size, share)
    if share % batch:
        fits = max(size for size in range(1, batch) if share % size == 0)
        raise UserError(
            f"batch_size: {share} samples, the part of each of {devices} devices, are no multiple of {batch}. "
            f"Take --batch-size {fits}, or another --global-batch."
        )
    return batch, share // batch


def check_devices(bench: BenchmarkConfig, points: list[Point], gpus: int, cores: int) -> None:
    """Raises UserError for points that this machine has no devices for. With a hostfile the launcher checks that."""
    most = max(point.devices for point in points)
    if bench.hostfile:
        return
    if gpus and most > gpus:
        raise UserError(
            f"nodes: {most} devices, and this machine has {gpus} GPU(s). Measure up to {gpus // bench.devices_per_node or 1} "
            "here, or name the machines in a --hostfile."
        )
    if not gpus and most > cores and not bench.oversubscribe:
        raise UserError(
            f"nodes: {most} processes on {cores} cores would measure how they get in each other's way. Measure up to "
            f"{cores // bench.devices_per_node or 1} here, name more machines in a --hostfile, or add --oversubscribe, "
            "which is noted in the results."
        )


def describe_node(bench: BenchmarkConfig, point: Point, gpus: int, cores: int) -> dict:
    """Describe a node at a point: node_is in words, threads of each process, and oversubscribed.

    The processes of a machine divide its cores among them, unless OMP_NUM_THREADS sets the threads of each.
    """
    here = bench.devices_per_node if bench.hostfile else point.devices
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, int(asked) if asked.isdigit() else cores // here)

    def count(number: int) -> str:
        return f"{number} {'GPU' if gpus else 'process'}{'' if number == 1 else 's' if gpus else 'es'}"

    if bench.hostfile:
        words = f"a host of the hostfile with {count(here)}, {threads} threads for each"
    else:
        each = count(bench.devices_per_node) if bench.devices_per_node > 1 else "a " + count(1).split()[1]
        words = f"{each} of one machine; {count(point.devices)} share {cores} cores, {threads} thread(s) each"
    return {"node_is": words, "threads": threads, "oversubscribed": not bench.hostfile and not gpus and here > cores}


def hash_point(point: Point, bench: BenchmarkConfig, config: TrainConfig, fingerprint: str) -> str:
    """Return 12 hex digits of all that repeats must have in common."""
    about = [dataclasses.asdict(point), select_options(config), bench.steps, bench.seconds, bench.untimed_steps]
    return hashlib.sha256(json.dumps([*about, fingerprint], sort_keys=True).encode()).hexdigest()[:12]


def select_options(config: TrainConfig) -> dict:
    """Select the options of a training that a benchmark doesn't set itself."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in SET_BY_BENCHMARK}


def read_measured(
    folder: Path, points: list[Point], bench: BenchmarkConfig, config: TrainConfig, sets: dict[int, dict]
) -> dict[str, Result]:
    """Read what was measured of these points before, by name. Raises UserError for a point of other options.

    sets: as `prepare_sizes` returns them.
    """
    measured = {}
    for point in points:
        path = folder / f"{point.name}.json"
        if not path.exists():
            continue
        try:
            found = results.read_result(path)
        except ValueError as error:
            raise place_error(path, f"can't be read: {error}", "Move it away") from error
        data = sets[point.samples]["fingerprint"]
        if found.config_hash != hash_point(point, bench, config, data):
            if found.config_hash == hash_point(found.point, bench, config, data):
                before = found.point.global_batch
                why = f"was measured with a global batch of {before}, and now it is {point.global_batch}"
                instead = f"Add --global-batch {before} to continue, or --overwrite to measure it again"
                raise place_error(path, why, instead)
            now = select_options(config)
            now |= {"batch_size": point.per_device_batch, "gradient_accumulation_steps": point.accumulation}
            old = found.config
            changed = [f"{name} {old.get(name)} -> {now[name]}" for name in now if old.get(name) != now[name]]
            why = f"was measured with other options ({', '.join(changed) or 'steps, batch or data'})"
            raise place_error(path, why, "Add --overwrite to measure it again")
        measured[point.name] = found
    return measured


def set_aside(folder: Path, points: list[Point]) -> None:
    """Rename what was measured of these points. Raises UserError for a file that is no result of a benchmark."""
    paths = [folder / f"{point.name}.json" for point in points]
    for path in paths:
        if path.exists() and "schema" not in files.read_json(path):
            raise place_error(path, "is no result of `sftlab benchmark`, and isn't replaced")
    for path in paths:
        if path.exists():
            path.replace(path.with_suffix(ASIDE))
        path.with_suffix(".failed.json").unlink(missing_ok=True)


def format_plan(points: list[Point], bench: BenchmarkConfig, sets: dict[int, dict], gpus: int) -> str:
    """Format the plan as lines for a terminal."""
    time = f"{bench.seconds:g} s" if bench.seconds else f"{bench.steps} steps"
    about = f"{len(points)} points, {bench.repeats} repeats in turn, {time} each after {bench.untimed_steps} untimed"
    heads = ("scaling", "samples", "nodes", "devices", "batch of each", "global batch")
    rows = [
        (p.scaling, p.samples, p.nodes, p.devices, f"{p.per_device_batch} x {p.accumulation}", p.global_batch)
        for p in points
    ]
    lines = [f"{points[0].model}: {about}", *format_table(heads, rows)]
    lines.append(f"a node is {describe_node(bench, points[-1], gpus, machine.count_cores())['node_is']}")
    for size, one in sets.items():
        if one["distinct_rows"] < size:
            why = "which repeat; the speed is the same, the loss falls faster"
            lines.append(f"{size} rows: {one['source']} has {one['distinct_rows']}, {why}")
    if bench.global_batch and bench.scaling == "weak":
        lines.append("--global-batch is for strong scaling only, and isn't used")
    if len(sets) > 1 and not bench.seconds:
        rows = f"({bench.untimed_steps} + {bench.steps}) x global batch rows"
        lines.append(f"a run trains on {rows}, whatever the size: sizes differ in the data only")
    return "\n".join(lines)


def prepare_sizes(config: DataConfig, sizes: list[int]) -> dict[int, dict]:
    """Prepare a folder for each size: {size: path, source, rows, distinct_rows, fingerprint}.

    A smaller set is the beginning of a larger one, and the rows are in random order. Raises UserError as `prepare` does.
    """
    if config.source in sources.HUB_IDS and not config.hub_id and not hub_client.reach():
        config = replace(config, offline=True)  # so that a grid that is resumed finds the set again
    with contextlib.redirect_stdout(io.StringIO()):  # a report of pages would hide the plan of the grid
        whole = dataset.prepare(replace(config, num_samples=max(sizes)))
    splits, report = dataset.load_prepared(whole)
    if config.offline and config.source in sources.HUB_IDS:
        print(f"offline: the bundled sample {report['source']} stands in for {sources.HUB_IDS[config.source]}")
    tokenizer = load.load_tokenizer(config.model, config.trust_remote_code)
    return {size: make_set(whole, splits, report, tokenizer, size) for size in sizes}


def make_set(whole: Path, splits, report: dict, tokenizer, size: int) -> dict:
    """Make the set of one size next to the folder that it is taken from, unless it is there: of few rows, which repeat."""
    rows, fingerprint = len(splits["train"]), report["fingerprint"]
    about = {"source": report["source"], "rows": size, "distinct_rows": min(rows, size)}
    if size == rows:
        return about | {"path": str(whole), "fingerprint": fingerprint}
    about["fingerprint"] = f"{fingerprint}-{size}"
    folder = whole.with_name(f"{whole.name.rpartition('_')[0]}_{size}")
    if files.read_json(folder / FACTS).get("fingerprint") != about["fingerprint"]:
        train = splits["train"].select([number % rows for number in range(size)])
        counts = data_report.measure(train, tokenizer, report["max_length"])
        del counts["lengths"]
        made = report | about | {"name": folder.name, "splits": report["splits"] | {"train": counts}}
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
            dataset.save(Path(aside) / "new", {"train": train, "test": splits["test"]}, made)
            put_in_place(Path(aside) / "new", folder, Path(aside) / "old")
    return about | {"path": str(folder)}
