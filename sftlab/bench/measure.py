"""Throughput and scaling, measured: a grid of data sets and nodes, each point in processes of its own, in turns.

A point's repeats don't follow each other but take turns with the other points', so that a machine that slows down slows all
of them. After each repeat the point's file is whole (`results`), and a grid that was stopped is resumed by the same command.

    sftlab benchmark tiny-base 2 --sizes 1000 --use-lora
"""

import contextlib
import io
import itertools
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pandas import DataFrame

from sftlab import files, machine
from sftlab.bench.results import DISTURBED, Point, Result, Run, read_result, write_result
from sftlab.config.configs import SET_BY_BENCHMARK, BenchmarkConfig, DataConfig, LaunchConfig, TrainConfig
from sftlab.data import dataset
from sftlab.errors import UserError, place_error
from sftlab.runs import background, launcher, logs
from sftlab.train import distributed

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
    each = bench.devices_per_node
    unit = config.batch_size * each * math.lcm(*bench.nodes)  # can be divided among any number of them
    whole = bench.global_batch or unit * config.gradient_accumulation_steps
    kinds = ("strong", "weak") if bench.scaling == "both" else (bench.scaling,)
    points = []
    for size, scaling, nodes in itertools.product(bench.sizes, kinds, bench.nodes):
        devices, batch, accumulation = nodes * each, config.batch_size, config.gradient_accumulation_steps
        if scaling == "strong":
            batch = max(1, min(batch, whole // devices))
            accumulation, rest = divmod(whole, devices * batch)
            if rest:
                why = f"{whole} samples can't be divided evenly among {devices} devices with {batch} each"
                fix = f"Take --global-batch {-(-whole // unit) * unit}, or another --batch-size."
                raise UserError(f"global_batch: {why}. {fix}")
        total = devices * batch * accumulation
        points.append(Point(config.model_name, size, nodes, devices, scaling, total, batch, accumulation))
    return points


def describe_node(grid: Grid, point: Point) -> dict:
    """Describe a node at a point: node_is in words, and threads of each process.

    The processes of a machine divide its cores among them, unless OMP_NUM_THREADS sets the threads of each.
    """
    each, hosts, cores = grid.bench.devices_per_node, grid.bench.hostfile, machine.count_cores()
    here = each if hosts else point.devices
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, int(asked) if asked.isdigit() else cores // here)
    place = "a host of the hostfile" if hosts else f"a part of one machine, on which {here} share {cores} cores"
    kind = "GPUs" if grid.gpus else "processes"
    return {"node_is": f"{place}; {kind} of a node: {each}, threads of each: {threads}", "threads": threads}


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


def check_alike(path: Path, old: dict, new: dict) -> None:
    """Raises UserError where the repeats of a point are of other options, or were made elsewhere, than those to come."""
    if changed := ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]):
        why = f"was measured with other settings or hardware ({changed})"
        raise place_error(path, why, "Add --overwrite to measure it again")


def read_measured(grid: Grid, points: list[Point]) -> dict[str, Result]:
    """Read what was measured of these points before, by name. Raises UserError for a point of other options."""
    measured = {}
    for path, point in ((grid.folder / f"{point.name}.json", point) for point in points):
        if not path.exists():
            continue
        try:
            found = read_result(path)
        except ValueError as error:
            raise place_error(path, f"can't be read: {error}", "Move it away") from error
        steps = found.runs[0].step_seconds
        old = {"steps": steps.steps, "untimed_steps": steps.warmup, "data": found.data["fingerprint"]}
        new = {"steps": grid.bench.steps, "untimed_steps": grid.bench.untimed_steps}
        new |= {"data": grid.sets[point.samples]["fingerprint"]}
        options = asdict(make_config(grid, point)).items()
        new |= {name: value for name, value in options if name not in SET_BY_BENCHMARK} | asdict(point)
        check_alike(path, found.config | asdict(found.point) | old, new)
        measured[point.name] = found
    return measured


def format_plan(grid: Grid, points: list[Point]) -> str:
    """Format the plan as lines for a terminal."""
    bench = grid.bench
    steps = f"{bench.steps} steps each after {bench.untimed_steps} untimed"
    table = DataFrame(map(asdict, points)).drop(columns="model").rename(columns=lambda name: name.replace("_", " "))
    lines = [f"{grid.config.model_name}: {len(points)} points, {bench.repeats} repeats in turn, {steps}"]
    lines += [table.to_string(index=False), f"a node is {describe_node(grid, points[-1])['node_is']}"]
    few = {size: one for size, one in grid.sets.items() if one["distinct_rows"] < size}
    lines += [f"{size} rows: {one['source']} has {one['distinct_rows']}, which repeat" for size, one in few.items()]
    return "\n".join(lines)


def prepare_sizes(config: DataConfig, sizes: list[int]) -> dict[int, dict]:
    """Prepare a folder for each size: {size: path, source, rows, distinct_rows, fingerprint}. Raises UserError as `prepare`."""
    sets = {}
    for size in sizes:
        with contextlib.redirect_stdout(io.StringIO()):  # a report of pages would hide the plan of the grid
            folder = dataset.prepare(replace(config, num_samples=size, output_dir=f"{config.output_dir}/{size}"))
        splits, report = dataset.load_prepared(folder)
        about = {"path": str(folder), "source": report["source"], "fingerprint": report["fingerprint"]}
        sets[size] = about | {"rows": size, "distinct_rows": len(splits["train"])}
    return sets


def run_benchmark(bench: BenchmarkConfig, config: TrainConfig, rows: DataConfig) -> int:
    """Measure a grid and return the exit code: 0, or 1 where points failed. Raises UserError for what can't be measured."""
    gpus = torch.cuda.device_count()
    points = list_points(bench, config)
    if bench.hostfile:  # before anything is measured
        launcher.choose_hosts(bench.hostfile, bench.nodes[-1], bench.devices_per_node)
    made_up = config.model_name.startswith(("random:", "random-tiny:"))  # with the tokenizer of tiny-base
    rows = replace(
        rows,
        model="tiny-base" if made_up else config.model_name,
        trust_remote_code=config.trust_remote_code,
        max_length=config.max_length,
        output_dir=f"{bench.output_dir}/data",
        overwrite=bench.overwrite,
    )
    grid = Grid(bench, config, prepare_sizes(rows, bench.sizes), gpus)
    if bench.overwrite:
        for point in points:
            (grid.folder / f"{point.name}.json").unlink(missing_ok=True)
    measured = read_measured(grid, points)
    print(format_plan(grid, points))
    failed = take_turns(grid, points, measured)
    left_out = f"; {len(failed)} of {len(points)} points failed" if failed else ""
    print(f"saved {grid.folder}/*.json{left_out}; a page of them: sftlab report {grid.folder}")
    return 1 if failed else 0


def take_turns(grid: Grid, points: list[Point], measured: dict[str, Result]) -> set[str]:
    """Make all runs that are not in `measured` yet, a repeat of each point in turn, and add them; return the failed points."""
    failed, done = set(), {name: len(result.runs) for name, result in measured.items()}
    todo = [(turn, one) for turn in range(grid.bench.repeats) for one in points if turn >= done.get(one.name, 0)]
    if there := len(points) * grid.bench.repeats - len(todo):
        print(f"{there} runs are there already, {len(todo)} are left")
    for left, (turn, point) in zip(reversed(range(len(todo))), todo, strict=True):
        if point.name in failed:
            continue
        try:
            result = measured[point.name] = add_run(grid, point, measured.get(point.name))
            print(f"{point.name}, repeat {turn + 1}: {format_run(result.runs[-1])}; {left} left")
        except KeyboardInterrupt:
            print(f"stopped; the same command{' without --overwrite' if grid.bench.overwrite else ''} resumes")
            raise
        except UserError as error:
            failed.add(point.name)
            print(f"{point.name}: failed: {error}")
    return failed


def add_run(grid: Grid, point: Point, before: Result | None) -> Result:
    """Measure a point once more, write its file, and return it. Raises UserError where it fails, and on another machine."""
    node, data = describe_node(grid, point), grid.sets[point.samples]
    out = run_point(grid, point, node["threads"])
    result = Result(
        point=point,
        config=asdict(make_config(grid, point)),
        machine=out["machine"] | node,
        versions=out["versions"],
        choices=out["choices"],
        data={name: value for name, value in data.items() if name != "path"},
        runs=[*(before.runs if before else ()), out["run"]],
    )
    both = before or result, result
    places = (one.machine | one.versions | {"precision": one.choices["precision"].split(":")[0]} for one in both)
    check_alike(grid.folder / f"{point.name}.json", *places)
    write_result(grid.folder, result)
    return result


def format_run(run: Run) -> str:
    """Format a run as a line."""
    step, others = run.step_seconds, run.others_use or 0
    line = f"{run.tokens_per_second:,.0f} tokens/s, step {step.median:.3g} s ({step.p10:.3g} to {step.p90:.3g}), "
    line += f"{run.largest_peak_bytes / 1e9:.2f} GB, loss {run.first_loss:.2f} -> {run.last_loss:.2f}"
    return line + (f"; other programs took {others:.0%} of the machine" if others > DISTURBED else "")


def run_point(grid: Grid, point: Point, threads: int) -> dict:
    """Run `worker.measure_point` in processes of its own and return its result. Raises UserError with their last lines.

    Several nodes read the plan and the data from this folder, so it must be on a disk that they share.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    grid.folder.mkdir(parents=True, exist_ok=True)
    # a new one each time: the processes of a grid that was killed may still use theirs
    with tempfile.TemporaryDirectory(prefix=f".{point.name}.", dir=grid.folder.resolve()) as folder:
        work = Path(folder)
        config = asdict(make_config(grid, point)) | {"output_dir": str(work / "run")}
        plan = {"point": asdict(point), "config": config, "untimed": grid.bench.untimed_steps}
        files.write_json(work / "plan.json", plan | {"steps": grid.bench.steps})
        environment |= launcher.pass_on(environment, work)
        code = run_command(build_command(grid, point, work), work, environment)
        if code or not (work / "out.json").is_file():
            raise explain_failure(work, code)
        return files.read_json(work / "out.json")


def build_command(grid: Grid, point: Point, work: Path) -> list[str]:
    """Build what starts the processes of a point: python, torchrun, or, with DeepSpeed or a hostfile, its launcher."""
    bench, hosts = grid.bench, ["localhost"]
    worker = ["sftlab.bench.worker", str(work / "plan.json"), str(work / "out.json")]
    if point.devices == 1 and grid.gpus < 2 and not grid.config.deepspeed and not bench.hostfile:
        return [sys.executable, "-m", *worker]
    if bench.hostfile:
        hosts = launcher.choose_hosts(bench.hostfile, point.nodes, bench.devices_per_node)
    remote = len(hosts) > 1 or not launcher.is_here(hosts[0])
    config = LaunchConfig(
        nodes=len(hosts),
        gpus_per_node=point.devices // len(hosts),
        hostfile=bench.hostfile,
        launcher="deepspeed" if grid.config.deepspeed or remote else "torchrun",
        master_port=distributed.find_port(),
    )
    return launcher.build_command(config, worker, None if remote else 0, hosts[0], work / "ranks-0")


def run_command(command: list[str], work: Path, environment: dict) -> int:
    """Run the command of a point until it has ended and return its exit code. Whatever happens, all it started ends with it."""
    process = launcher.start_launcher(command, work / "ranks-0", environment)
    try:
        return process.wait()
    finally:
        background.end_processes([process])


def explain_failure(work: Path, code: int) -> UserError:
    """Explain what went wrong with a point: the error of the process that failed first, else the launcher's."""
    failed = logs.find_failed(work)
    message = failed.reason or logs.explain_end("\n".join(failed.last_lines))  # without a launcher there is one log
    message = message.removeprefix("refused: ") or (str(failed) if failed.code > 128 else f"exit code {code}")
    return UserError("\n  ".join([message, *failed.last_lines]))
