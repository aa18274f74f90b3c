"""The grid of a benchmark: its points, what each of them trains on, whether this machine can, and what was measured before.

python -c "from sftlab.bench import plan; from sftlab.config import configs; print(plan.list_points(configs.BenchmarkConfig(nodes=[2]), configs.TrainConfig()))"
"""

import contextlib
import io
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pandas import DataFrame

from sftlab import machine
from sftlab.bench import results
from sftlab.bench.results import Point, Result
from sftlab.config.configs import SET_BY_BENCHMARK, BenchmarkConfig, DataConfig, TrainConfig
from sftlab.data import dataset, sources
from sftlab.errors import UserError, place_error
from sftlab.hub import client as hub_client

NEVER = 10**9


@dataclass(frozen=True)
class Grid:
    """What all points of a benchmark have in common. sets: as `prepare_sizes` returns them."""

    bench: BenchmarkConfig
    config: TrainConfig
    sets: dict[int, dict]
    gpus: int

    @property
    def folder(self) -> Path:
        return Path(self.bench.output_dir)


def list_points(bench: BenchmarkConfig, config: TrainConfig) -> list[Point]:
    """List all points of a grid, in the order of a round. Raises UserError for a batch that can't be divided evenly.

    In strong scaling fewer devices accumulate more batches, so that each batch is of the same size.
    """
    counts = [nodes * bench.devices_per_node for nodes in bench.nodes]
    unit = config.batch_size * math.lcm(*counts)  # can be divided among any of them
    whole = bench.global_batch or unit * config.gradient_accumulation_steps
    points = []
    for size in bench.sizes:
        for scaling in ("strong", "weak") if bench.scaling == "both" else (bench.scaling,):
            for nodes, devices in zip(bench.nodes, counts, strict=True):
                batch, accumulation = config.batch_size, config.gradient_accumulation_steps
                if scaling == "strong":
                    batch = max(1, min(batch, whole // devices))
                    accumulation, rest = divmod(whole, devices * batch)
                    if rest:
                        raise UserError(
                            f"global_batch: {whole} samples can't be divided evenly among {devices} devices with {batch} "
                            f"each. Take --global-batch {-(-whole // unit) * unit}, or another --batch-size."
                        )
                total = devices * batch * accumulation
                if total > size:
                    raise UserError(
                        f"sizes: {size} rows don't fill a step of {total} samples, on {devices} devices. Take larger sizes, "
                        "fewer nodes or a smaller --batch-size."
                    )
                points.append(Point(config.model_name, size, nodes, devices, scaling, total, batch, accumulation))
    return points


def check_devices(bench: BenchmarkConfig, gpus: int) -> None:
    """Raises UserError for points that this machine has no devices for. With a hostfile the launcher checks that."""
    most, cores = bench.nodes[-1] * bench.devices_per_node, machine.count_cores()
    if bench.hostfile or most <= (gpus or cores):
        return
    if gpus:
        raise UserError(f"nodes: {most} devices, and this machine has {gpus} GPU(s). Take fewer, or name a --hostfile.")
    if not bench.oversubscribe:
        raise UserError(
            f"nodes: {most} processes on {cores} cores would measure how they get in each other's way. Take fewer nodes, name "
            "more machines in a --hostfile, or add --oversubscribe, which is noted in the results."
        )


def describe_node(grid: Grid, point: Point) -> dict:
    """Describe a node at a point: node_is in words, threads of each process, and oversubscribed.

    The processes of a machine divide its cores among them, unless OMP_NUM_THREADS sets the threads of each.
    """
    each, hosts, cores = grid.bench.devices_per_node, grid.bench.hostfile, machine.count_cores()
    here = each if hosts else point.devices
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, int(asked) if asked.isdigit() else cores // here)
    kind = "GPUs" if grid.gpus else "processes"
    place = "a host of the hostfile" if hosts else f"a part of one machine, on which {here} share {cores} cores"
    return {
        "node_is": f"{place}; {kind} of a node: {each}, threads of each: {threads}",
        "threads": threads,
        "oversubscribed": not hosts and not grid.gpus and here > cores,
    }


def make_config(grid: Grid, point: Point) -> TrainConfig:
    """Make the training of a point: its steps, without logs, checkpoints and evaluations."""
    return replace(
        grid.config,
        dataset_path=grid.sets[point.samples]["path"],
        output_dir=str(grid.folder),  # each run has one of its own
        batch_size=point.per_device_batch,
        gradient_accumulation_steps=point.accumulation,
        max_steps=grid.bench.untimed_steps + grid.bench.steps,
        logging_steps=NEVER,
        save_steps=NEVER,
        eval_samples=1,
        report_to="none",
    )


def list_settings(point: Point, config: dict, steps: int, untimed_steps: int, data: dict) -> dict:
    """List all that the repeats of a point must have in common, but for the machine and the versions."""
    options = {name: value for name, value in config.items() if name not in SET_BY_BENCHMARK}
    return options | asdict(point) | {"steps": steps, "untimed_steps": untimed_steps, "data": data["fingerprint"]}


def list_changes(old: dict, new: dict) -> str:
    return ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name])


def read_measured(grid: Grid, points: list[Point]) -> dict[str, Result]:
    """Read what was measured of these points before, by name. Raises UserError for a point of other options."""
    measured = {}
    for point in points:
        path = grid.folder / f"{point.name}.json"
        if not path.exists():
            continue
        try:
            found = results.read_result(path)
        except ValueError as error:
            raise place_error(path, f"can't be read: {error}", "Move it away") from error
        bench, times, batch = grid.bench, found.runs[0].step_seconds, found.point.global_batch
        old = list_settings(found.point, found.config, times.steps, times.warmup, found.data)
        config, data = asdict(make_config(grid, point)), grid.sets[point.samples]
        now = list_settings(point, config, bench.steps, bench.untimed_steps, data)
        if changed := list_changes(old, now):
            to_continue = f"--global-batch {batch} to continue, or " if batch != point.global_batch else ""
            instead = f"Add {to_continue}--overwrite to measure it again"
            raise place_error(path, f"was measured with other options ({changed})", instead)
        measured[point.name] = found
    return measured


def format_plan(grid: Grid, points: list[Point]) -> str:
    """Format the plan as lines for a terminal."""
    bench = grid.bench
    steps = f"{bench.steps} steps each after {bench.untimed_steps} untimed"
    table = DataFrame(map(asdict, points)).drop(columns="model").rename(columns=lambda name: name.replace("_", " "))
    lines = [f"{grid.config.model_name}: {len(points)} points, {bench.repeats} repeats in turn, {steps}"]
    lines += [table.to_string(index=False), f"a node is {describe_node(grid, points[-1])['node_is']}"]
    few = {size: one["distinct_rows"] for size, one in grid.sets.items() if one["distinct_rows"] < size}
    return "\n".join(lines + [f"{size} rows: there are {rows}, which repeat" for size, rows in few.items()])


def prepare_sizes(config: DataConfig, sizes: list[int]) -> dict[int, dict]:
    """Prepare a folder for each size: {size: path, source, rows, distinct_rows, fingerprint}. Raises UserError as `prepare`."""
    if config.source in sources.HUB_IDS and not config.hub_id and not hub_client.reach():
        config = replace(config, offline=True)  # so that a grid that is resumed finds the set again
        print(f"offline: the bundled sample stands in for {sources.HUB_IDS[config.source]}")
    sets = {}
    for size in sizes:
        one = replace(config, num_samples=size, output_dir=f"{config.output_dir}/{size}")
        with contextlib.redirect_stdout(io.StringIO()):  # a report of pages would hide the plan of the grid
            folder = dataset.prepare(one)
        splits, report = dataset.load_prepared(folder)
        about = {"source": report["source"], "rows": size, "distinct_rows": len(splits["train"])}
        sets[size] = about | {"path": str(folder), "fingerprint": report["fingerprint"]}
    return sets
