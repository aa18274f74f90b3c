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
from sftlab.bench.results import Point, Result
from sftlab.config.configs import SET_BY_BENCHMARK, BenchmarkConfig, DataConfig, TrainConfig
from sftlab.data import dataset, sources
from sftlab.data import report as data_report
from sftlab.data.dataset import FACTS, put_in_place
from sftlab.errors import UserError, place_error
from sftlab.hub import client as hub_client
from sftlab.models import load

ASIDE = ".replaced"  # an old point's ending under --overwrite, until its first new run has succeeded


def list_points(bench: BenchmarkConfig, config: TrainConfig) -> list[Point]:
    """All points of a grid, in the order of a round. Raises UserError for a batch that can't be shared out evenly.

    Weak scaling: each device has the batch size and the accumulation of the configuration. Strong: the global batch is the
    same everywhere, and fewer devices add up more batches, so that a device holds the same at a time.
    """
    if bench.seconds and 0 < config.warmup_steps < 1:
        raise UserError(f"warmup_steps: {config.warmup_steps:g} is a share of the steps, and with --seconds their number isn't known; give "
                        "whole steps, or --steps instead of --seconds.")  # fmt: skip
    counts = [nodes * bench.devices_per_node for nodes in bench.nodes]
    own = config.batch_size * config.gradient_accumulation_steps
    whole = bench.global_batch or own * math.lcm(*counts)
    points = []
    for size in bench.sizes:
        for scaling in ("strong", "weak") if bench.scaling == "both" else (bench.scaling,):
            for nodes, devices in zip(bench.nodes, counts, strict=True):
                batch, accumulation = config.batch_size, config.gradient_accumulation_steps
                if scaling == "strong":
                    batch, accumulation = share_out(whole, devices, config.batch_size)
                total = devices * batch * accumulation
                if total > size:
                    raise UserError(f"sizes: {size} rows don't fill a step of {total} samples, on {devices} devices; take larger sizes, "
                                    "fewer nodes or a smaller --batch-size.")  # fmt: skip
                points.append(Point(config.model_name, size, nodes, devices, scaling, total, batch, accumulation))
    return points


def share_out(whole: int, devices: int, batch_size: int) -> tuple[int, int]:
    """(samples at a time, how many times) that make a device's share of a global batch. Raises UserError."""
    if whole % devices:
        raise UserError(f"global_batch: {whole} samples can't be shared out evenly over {devices} devices; "
                        f"take {math.lcm(whole, devices)}, or other numbers of nodes.")  # fmt: skip
    share = whole // devices
    batch = min(batch_size, share)
    if share % batch:
        fits = max(size for size in range(1, batch) if share % size == 0)
        raise UserError(f"batch_size: {share} samples, the share of each of {devices} devices, are no multiple of {batch}; "
                        f"take --batch-size {fits}, or another --global-batch.")  # fmt: skip
    return batch, share // batch


def check_room(bench: BenchmarkConfig, points: list[Point], gpus: int, cores: int) -> None:
    """Raises UserError for points that this machine has no devices for. With a hostfile the launcher looks at that."""
    most = max(point.devices for point in points)
    if bench.hostfile:
        return
    if gpus and most > gpus:
        raise UserError(f"nodes: {most} devices, and this machine has {gpus} GPU(s). Measure up to {gpus // bench.devices_per_node or 1} here, "
                        "or name the machines in a --hostfile.")  # fmt: skip
    if not gpus and most > cores and not bench.oversubscribe:
        raise UserError(f"nodes: {most} processes on {cores} cores would measure how they get in each other's way. Measure up to "
                        f"{cores // bench.devices_per_node or 1} here, name more machines in a --hostfile, or add --oversubscribe; "
                        "the results then say so.")  # fmt: skip


def describe_node(bench: BenchmarkConfig, point: Point, gpus: int, cores: int) -> dict:
    """What a node is at a point, in words, the threads of each process, and whether there are more of them than cores.

    The processes of a machine share its cores out, unless OMP_NUM_THREADS says how many threads each shall have.
    """
    here = bench.devices_per_node if bench.hostfile else point.devices
    threads = max(1, cores // here)
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        threads = max(1, int(os.environ["OMP_NUM_THREADS"]))
    kind = "GPU" if gpus else "process"
    many = "es" if kind == "process" else "s"
    if bench.hostfile:
        words = f"a host of the hostfile with {here} {kind}{many if here > 1 else ''}, {threads} threads for each"
    else:
        each = f"{bench.devices_per_node} {kind}{many}" if bench.devices_per_node > 1 else f"a {kind}"
        words = f"{each} of one machine; {point.devices} {kind}{many if point.devices > 1 else ''} share {cores} cores, {threads} thread(s) each"
    return {"node_is": words, "threads": threads, "oversubscribed": not bench.hostfile and not gpus and here > cores}


def hash_point(point: Point, bench: BenchmarkConfig, config: TrainConfig, fingerprint: str) -> str:
    """12 hex digits of all that repeats must have in common."""
    about = [
        dataclasses.asdict(point),
        keep_options(config),
        bench.steps,
        bench.seconds,
        bench.untimed_steps,
        fingerprint,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def keep_options(config: TrainConfig) -> dict:
    """The options of a training that a benchmark doesn't set itself."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in SET_BY_BENCHMARK}


def read_measured(
    folder: Path, points: list[Point], bench: BenchmarkConfig, config: TrainConfig, sets: dict[int, dict]
) -> dict[str, Result]:
    """What was measured of these points before, by name. Raises UserError where that was done with other options.

    sets: of each size, with its fingerprint.
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
                before, now = found.point.global_batch, point.global_batch
                raise place_error(
                    path,
                    f"was measured with a global batch of {before}, and now it is {now}",
                    f"Add --global-batch {before} to go on with it, or --overwrite to measure it anew",
                )
            now = keep_options(config) | {
                "batch_size": point.per_device_batch,
                "gradient_accumulation_steps": point.accumulation,
            }
            changed = [f"{name} {found.config.get(name)} -> {now[name]}" for name in now if found.config.get(name) != now[name]]  # fmt: skip
            told = ", ".join(changed) or "steps, batch or data"
            raise place_error(path, f"was measured otherwise ({told})", "Add --overwrite to measure it anew")
        measured[point.name] = found
    return measured


def set_aside(folder: Path, points: list[Point]) -> None:
    """Rename what was measured of these points. Raises UserError for a file that is no result of a benchmark."""
    paths = [folder / f"{point.name}.json" for point in points]
    for path in paths:
        if path.exists() and "schema" not in files.read_json(path):
            raise place_error(path, "is no result of `sftlab benchmark`; it stays")
    for path in paths:
        if path.exists():
            path.replace(path.with_suffix(ASIDE))
        path.with_suffix(".failed.json").unlink(missing_ok=True)


def describe(points: list[Point], bench: BenchmarkConfig, sets: dict[int, dict], gpus: int) -> list[str]:
    """The plan as lines for a terminal."""
    cores = machine.count_cores()
    time = f"{bench.seconds:g} s" if bench.seconds else f"{bench.steps} steps"
    lines = [f"{points[0].model}: {len(points)} points, {bench.repeats} repeats in turn, {time} each after {bench.untimed_steps} untimed",
             f"  {'scaling':8}{'samples':>9}{'nodes':>7}{'devices':>9}{'batch of each':>16}{'global batch':>14}"]  # fmt: skip
    for point in points:
        each = f"{point.per_device_batch} x {point.accumulation}"
        lines.append(f"  {point.scaling:8}{point.samples:>9}{point.nodes:>7}{point.devices:>9}{each:>16}{point.global_batch:>14}")  # fmt: skip
    lines.append(f"a node is {describe_node(bench, points[-1], gpus, cores)['node_is']}")
    for size, one in sets.items():
        if one["distinct_rows"] < size:
            lines.append(f"{size} rows: {one['source']} has {one['distinct_rows']}, which repeat; the speed is the same, the loss falls faster")  # fmt: skip
    if bench.global_batch and bench.scaling == "weak":
        lines.append("--global-batch is of strong scaling alone, and isn't used")
    if len(sets) > 1 and not bench.seconds:
        lines.append(f"a run trains on ({bench.untimed_steps} + {bench.steps}) x global batch rows, whatever the size: sizes differ in the data "
                     "alone")  # fmt: skip
    return lines


def spread(rows: int, size: int) -> list[int]:
    """Which of so many rows make a set of `size`: the first ones, or all of them again and again."""
    return [number % rows for number in range(size)]


def prepare_sizes(config: DataConfig, sizes: list[int]) -> dict[int, dict]:
    """A prepared folder for each size: {size: path, source, rows, distinct_rows, fingerprint}.

    A smaller set is the beginning of a larger one, and the rows are in random order. Raises UserError as `prepare` does.
    """
    if config.source in sources.HUB_IDS and not config.hub_id and not hub_client.reach():
        config = replace(config, offline=True)  # so that a grid that goes on finds the set again
    told = io.StringIO()
    with contextlib.redirect_stdout(told):  # a report of pages would hide the plan of the grid
        whole = dataset.prepare(replace(config, num_samples=max(sizes)))
    splits, report = dataset.load_prepared(whole)
    if config.offline and config.source in sources.HUB_IDS:
        print(f"offline: the bundled sample {report['source']} stands in for {sources.HUB_IDS[config.source]}")
    tokenizer = load.load_tokenizer(config.model, config.trust_remote_code)
    return {size: make_set(whole, splits, report, tokenizer, size) for size in sizes}


def make_set(whole: Path, splits, report: dict, tokenizer, size: int) -> dict:
    """The set of one size beside the folder that it is taken from, made unless it is there."""
    rows = len(splits["train"])
    about = {"source": report["source"], "rows": size, "distinct_rows": min(rows, size),
             "fingerprint": f"{report['fingerprint']}-{size}"}  # fmt: skip
    folder = whole.with_name(f"{whole.name.rpartition('_')[0]}_{size}")
    if size == rows:
        return about | {"path": str(whole), "fingerprint": report["fingerprint"]}
    if files.read_json(folder / FACTS).get("fingerprint") != about["fingerprint"]:
        train = splits["train"].select(spread(rows, size))
        counts = data_report.measure(train, tokenizer, report["max_length"])
        del counts["lengths"]
        made = report | about | {"name": folder.name, "splits": report["splits"] | {"train": counts}}
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
            dataset.save(Path(aside) / "new", {"train": train, "test": splits["test"]}, made)
            put_in_place(Path(aside) / "new", folder, Path(aside) / "old")
    return about | {"path": str(folder)}
