"""Throughput and scaling, measured: a grid of data sets and nodes, each point in processes of its own, in turns.

A point's repeats don't follow each other but take turns with the other points', so that a machine that slows down slows all
of them. After each repeat the point's file is whole (`results`), and a grid that was stopped is resumed by the same command.

    sftlab benchmark tiny-base 2 --sizes 1000 --use-lora
"""

import contextlib
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from sftlab import files
from sftlab.bench import plan, results
from sftlab.bench.plan import Grid
from sftlab.bench.results import DISTURBED, Point, Result, Run
from sftlab.config.configs import BenchmarkConfig, DataConfig, LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.memory import duration
from sftlab.runs import launcher, logs
from sftlab.train import distributed

LAST_LINES = 30  # of a failed point's output are kept


class PointFailed(Exception):
    """A point whose processes ended with an error: its message, and the last lines of its output."""


def run_benchmark(bench: BenchmarkConfig, config: TrainConfig, rows: DataConfig) -> int:
    """Measure a grid and return the exit code: 0, or 1 where points failed. Raises UserError for what can't be measured."""
    import torch

    gpus = torch.cuda.device_count()
    points = plan.list_points(bench, config)
    plan.check_devices(bench, gpus)
    made_up = config.model_name.startswith(("random:", "random-tiny:"))  # with the tokenizer of tiny-base
    rows = replace(
        rows,
        model="tiny-base" if made_up else config.model_name,
        trust_remote_code=config.trust_remote_code,
        max_length=config.max_length,
        output_dir=f"{bench.output_dir}/data",
        overwrite=bench.overwrite,
    )
    grid = Grid(bench, config, plan.prepare_sizes(rows, bench.sizes), gpus)
    if bench.overwrite:
        for point in points:
            (grid.folder / f"{point.name}.json").unlink(missing_ok=True)
    measured = plan.read_measured(grid, points)
    print(plan.format_plan(grid, points))
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end a grid, with its processes, as Ctrl-C does
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    failed = take_turns(grid, points, measured)
    left_out = f"; {len(failed)} of {len(points)} points failed, see {grid.folder}/*.failed.json" if failed else ""
    print(f"saved {grid.folder}/*.json{left_out}; a page of them: sftlab report {grid.folder}")
    return 1 if failed else 0


def take_turns(grid: Grid, points: list[Point], measured: dict[str, Result]) -> set[str]:
    """Make all runs that are not in `measured` yet, a repeat of each point in turn, and add them; return the failed points."""
    failed, seconds = set(), []
    done = {name: len(result.runs) for name, result in measured.items()}
    todo = [(turn, one) for turn in range(grid.bench.repeats) for one in points if turn >= done.get(one.name, 0)]
    if there := len(points) * grid.bench.repeats - len(todo):
        print(f"{there} runs are there already, {len(todo)} are left")
    for left, (turn, point) in zip(reversed(range(len(todo))), todo, strict=True):
        if point.name in failed:
            continue
        try:
            result = measured[point.name] = add_run(grid, point, measured)
        except KeyboardInterrupt:
            print(f"stopped; the same command{' without --overwrite' if grid.bench.overwrite else ''} resumes")
            raise
        except PointFailed as error:
            failed.add(point.name)
            message, lines = error.args
            about = {"point": asdict(point), "error": message, "last_lines": lines}
            files.write_json(grid.folder / f"{point.name}.failed.json", about)
            print(f"{point.name}: failed: {message}")
            continue
        seconds.append(result.runs[-1].seconds)
        rest = f"; {left} runs are left, about {duration.format_seconds(left * mean(seconds))}" if left else ""
        print(f"{point.name}, repeat {turn + 1}: {format_run(result.runs[-1])}{rest}")
    return failed


def add_run(grid: Grid, point: Point, measured: dict[str, Result]) -> Result:
    """Measure a point once more, write its file, and return it. Raises PointFailed, and UserError on another machine."""
    node, data, before = plan.describe_node(grid, point), grid.sets[point.samples], measured.get(point.name)
    out = run_point(grid, point, node["threads"])
    result = Result(
        point=point,
        config=asdict(plan.make_config(grid, point)),
        repeats=grid.bench.repeats,
        machine=out["machine"] | node,
        versions=out["versions"],
        choices=out["choices"],
        data={name: value for name, value in data.items() if name != "path"},
        runs=[*(before.runs if before else ()), out["run"]],
    )
    old, new = (
        one.machine | one.versions | {"precision": one.choices["precision"].split(":")[0]}
        for one in (before or result, result)
    )
    if changed := plan.list_changes(old, new):
        raise UserError(
            f"output_dir: the repeats of {point.name} there were measured with {changed}, and don't go together with new "
            "ones. Name another --output-dir, or add --overwrite."
        )
    path = results.write_result(grid.folder, result)
    path.with_suffix(".failed.json").unlink(missing_ok=True)
    return result


def format_run(run: Run) -> str:
    """Format a run as a line."""
    step, others = run.step_seconds, run.others_use or 0
    line = f"{run.tokens_per_second:,.0f} tokens/s, step {step.median:.3g} s ({step.p10:.3g} to {step.p90:.3g}), "
    line += f"{run.largest_peak_bytes / 1e9:.2f} GB, loss {run.first_loss:.2f} -> {run.last_loss:.2f}"
    return line + (f"; other programs took {others:.0%} of the machine" if others > DISTURBED else "")


def run_point(grid: Grid, point: Point, threads: int) -> dict:
    """Run `worker.measure_point` in processes of its own and return its result. Raises PointFailed with their last lines.

    Several nodes read the plan and the data from this folder, so it must be on a disk that they share.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    own = {} if grid.gpus else {"DS_ACCELERATOR": "cpu"}  # of this machine; other nodes find out what they have
    grid.folder.mkdir(parents=True, exist_ok=True)
    # a new one each time: the processes of a grid that was killed may still use theirs
    with tempfile.TemporaryDirectory(prefix=f".{point.name}.", dir=grid.folder.resolve()) as folder:
        work = Path(folder)
        config = asdict(plan.make_config(grid, point)) | {"output_dir": str(work / "run")}
        about = {"point": asdict(point), "config": config, "threads": threads, "untimed": grid.bench.untimed_steps}
        files.write_json(work / "plan.json", about | {"steps": grid.bench.steps, "started": time.time()})
        environment |= launcher.pass_on(environment, work)
        code = run_command(build_command(grid, point, work), work, environment | own)
        if code or not (work / "out.json").is_file():
            raise explain_failure(work, code)
        return json.loads((work / "out.json").read_text(encoding="utf-8"))


def build_command(grid: Grid, point: Point, work: Path) -> list[str]:
    """Build what starts the processes of a point: python, torchrun, or, with DeepSpeed or a hostfile, its launcher."""
    bench = grid.bench
    worker = ["sftlab.bench.worker", str(work / "plan.json"), str(work / "out.json")]
    if point.devices == 1 and grid.gpus < 2 and not grid.config.deepspeed and not bench.hostfile:
        return [sys.executable, "-m", *worker]
    hosts = ["localhost"]
    if bench.hostfile:
        hosts = launcher.choose_hosts(bench.hostfile, point.nodes, bench.devices_per_node)
    remote = len(hosts) > 1 or not launcher.is_here(hosts[0])
    if remote:
        launcher.check_remote()
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
    import psutil

    process, family = launcher.start_launcher(command, work / "ranks-0", environment), []
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            first = psutil.Process(process.pid)
            family = [*first.children(recursive=True), first]
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stop(member)
            _, family = psutil.wait_procs(family, timeout=10)


def explain_failure(work: Path, code: int) -> PointFailed:
    """Explain what went wrong with a point: the error of the process that failed first, else the launcher's."""
    failed = logs.find_failed(work)
    lines = [line for line in logs.read_end(failed.log).splitlines() if line.strip()][-LAST_LINES:]
    message = failed.reason or logs.explain_end("\n".join(lines))  # without a launcher there is one log
    if message:
        return PointFailed(message.removeprefix("refused: "), lines)
    who = failed if failed.code > 128 else f"exit code {code}"
    return PointFailed(f"{who}: {lines[-1] if lines else 'no output'}", lines)
