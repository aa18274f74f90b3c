"""Throughput and scaling, measured: a grid of data sets and nodes, each point in processes of its own, in turns.

A point's repeats don't follow each other but take turns with the other points', so that a machine that slows down slows all
of them. After each repeat the point's file is whole (`results`), and a grid that was stopped is resumed by the same command.

    sftlab benchmark tiny-base 2 --sizes 1000 --use-lora
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sftlab import files, machine
from sftlab.bench import plan, results
from sftlab.bench.results import DISTURBED, Point, Result, Run
from sftlab.config.configs import BenchmarkConfig, DataConfig, LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.memory import duration
from sftlab.runs import launcher, logs
from sftlab.train import distributed

NEVER = 10**9
LAST_LINES = 30  # of a failed point's output are kept


class PointFailed(Exception):
    """A point whose processes ended with an error, which is the message; `lines` are the last ones of its output."""

    def __init__(self, message: str, lines: list[str]):
        super().__init__(message)
        self.lines = lines


@dataclass
class Grid:
    """What all points of a benchmark have in common. sets: as `plan.prepare_sizes` returns them."""

    bench: BenchmarkConfig
    config: TrainConfig
    sets: dict[int, dict]
    gpus: int

    @property
    def folder(self) -> Path:
        return Path(self.bench.output_dir)


def run_benchmark(bench: BenchmarkConfig, config: TrainConfig, rows: DataConfig) -> int:
    """Measure a grid and return the exit code: 0, or 1 where points failed. Raises UserError for what can't be measured."""
    import torch

    gpus, folder = torch.cuda.device_count(), Path(bench.output_dir)
    points = plan.list_points(bench, config)
    plan.check_devices(bench, points, gpus, machine.count_cores())
    made_up = config.model_name.startswith(("random:", "random-tiny:"))  # with the tokenizer of tiny-base
    rows = replace(rows, model="tiny-base" if made_up else config.model_name, output_dir=str(folder / "data"))
    rows = replace(rows, trust_remote_code=config.trust_remote_code, max_length=config.max_length)
    grid = Grid(bench, config, plan.prepare_sizes(rows, bench.sizes), gpus)
    if bench.overwrite:
        plan.set_aside(folder, points)
    measured = plan.read_measured(folder, points, bench, config, grid.sets)
    print(plan.format_plan(points, bench, grid.sets, gpus))
    if threading.current_thread() is threading.main_thread():  # SIGTERM ends a grid, with its processes, as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # the end of the terminal, unless nohup is in use
            signal.signal(signal.SIGHUP, signal.default_int_handler)
    failed = take_turns(grid, points, measured)
    print(format_grid([measured[point.name] for point in points if point.name in measured]))
    left_out = f"; {len(failed)} of {len(points)} points failed, see {folder}/*.failed.json" if failed else ""
    print(f"saved {folder}/*.json{left_out}; the whole report: sftlab report {folder}")
    return 1 if failed else 0


def take_turns(grid: Grid, points: list[Point], measured: dict[str, Result]) -> set[str]:
    """Make all runs that are not in `measured` yet, a repeat of each point in turn, and add them; return the failed points."""
    from tqdm.auto import tqdm

    repeats, failed, expected = grid.bench.repeats, set(), False
    done = {name: len(result.runs) for name, result in measured.items()}
    todo = [(turn, point) for turn in range(repeats) for point in points if turn >= done.get(point.name, 0)]
    if len(todo) < len(points) * repeats:
        print(f"{len(points) * repeats - len(todo)} runs are there already, {len(todo)} are left")
    for number, (turn, point) in enumerate(tqdm(todo, desc="runs", disable="TQDM_DISABLE" in os.environ or not todo)):
        if point.name in failed:
            continue
        try:
            result = measured[point.name] = add_run(grid, point, measured)
        except KeyboardInterrupt:
            again, kept = "the same command", ""
            if grid.bench.overwrite:
                again += " without --overwrite"
                kept = f". Old points that have no new run yet are kept as {grid.folder}/*{plan.ASIDE}"
            tqdm.write(f"stopped; {again} resumes{kept}")
            raise
        except PointFailed as error:
            failed.add(point.name)
            about = {"schema": results.SCHEMA, "point": asdict(point), "error": str(error), "last_lines": error.lines}
            files.write_json(grid.folder / f"{point.name}.failed.json", about)
            tqdm.write(f"{point.name}: failed: {error}")
            continue
        tqdm.write(f"{point.name}, repeat {turn + 1}: {format_run(result.runs[-1])}")
        if not expected and todo[number + 1 :]:
            left = expect_seconds(grid, point, result.runs[-1], [other for _, other in todo[number + 1 :]])
            tqdm.write(f"by this run, the others will take {duration.say(left)}")
        expected = True
    return failed


def add_run(grid: Grid, point: Point, measured: dict[str, Result]) -> Result:
    """Measure a point once more, write its file, and return it. Raises PointFailed."""
    precision = next((result.choices["precision"] for result in measured.values()), None)
    node = plan.describe_node(grid.bench, point, grid.gpus, machine.count_cores())
    out = run_point(grid, point, precision, node["threads"])
    about = grid.sets[point.samples]
    result = Result(
        point=point,
        config=asdict(make_config(grid, point)),
        config_hash=plan.hash_point(point, grid.bench, grid.config, about["fingerprint"]),
        repeats=grid.bench.repeats,
        machine=out["machine"] | node,
        versions=out["versions"],
        attention=out["attention"],
        choices=out["choices"],
        data={name: about[name] for name in ("source", "rows", "distinct_rows", "fingerprint")},
        runs=[results.convert(Run, out["run"], "run")],
    )
    before = measured.get(point.name)
    if before:
        for name, words in (("machine", "on another machine"), ("versions", "with other versions of packages")):
            old, new = getattr(before, name), getattr(result, name)
            if old != new:
                changed = ", ".join(f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key])
                raise UserError(
                    f"output_dir: the repeats in {before.path} were measured {words} ({changed}), and don't go together. "
                    "Name another --output-dir, or add --overwrite."
                )
        result = replace(result, runs=before.runs + result.runs)
    path = results.write_result(grid.folder, result)
    for old in (".failed.json", plan.ASIDE):
        path.with_suffix(old).unlink(missing_ok=True)
    return replace(result, path=path)


def expect_seconds(grid: Grid, point: Point, run: Run, left: list[Point]) -> float:
    """Estimate the seconds of the runs left from one that was made: loading as it took, steps by their samples."""

    def size(one: Point) -> float:  # processes of one machine share its cores
        return one.global_batch / (one.devices if grid.gpus or grid.bench.hostfile else 1)

    sizes = sum(1 if grid.bench.seconds else size(other) / size(point) for other in left)
    return len(left) * (run.seconds - run.window_seconds) + run.window_seconds * sizes


def format_run(run: Run) -> str:
    """Format a run as a line."""
    step, others = run.step_seconds, run.others_use or 0
    parts = [f"{run.tokens_per_second:,.0f} tokens/s", f"step {step.median:.3g} s ({step.p10:.3g} to {step.p90:.3g})"]
    parts += [f"{max(run.peak_bytes) / 1e9:.2f} GB", f"loss {run.first_loss:.2f} -> {run.last_loss:.2f}"]
    return ", ".join(parts) + (f"; other programs took {others:.0%} of the machine" if others > DISTURBED else "")


def format_grid(measured: list[Result]) -> str:
    """Format the grid as a table: medians over the repeats, and the lowest and highest tokens per second."""
    rows = []
    for result in measured:
        rates = [run.tokens_per_second for run in result.runs]
        middle = statistics.median(rates)
        rates = (middle, min(rates), max(rates), middle / result.point.devices)
        step = statistics.median(run.step_seconds.median for run in result.runs)
        peak = max(size for run in result.runs for size in run.peak_bytes) / 1e9
        rows.append((result.point.name, *(f"{rate:,.0f}" for rate in rates), f"{step:.3g}", f"{peak:.2f}"))
    heads = ("point", "tokens/s", "lowest", "highest", "per device", "step s", "peak GB")
    return "\n".join(results.format_table(heads, rows))


def make_config(grid: Grid, point: Point) -> TrainConfig:
    """Make the training of a point: its steps, without logs, checkpoints and evaluations."""
    steps = NEVER if grid.bench.seconds else grid.bench.untimed_steps + grid.bench.steps
    return replace(
        grid.config,
        dataset_path=grid.sets[point.samples]["path"],
        output_dir=str(grid.folder / ".work"),
        batch_size=point.per_device_batch,
        gradient_accumulation_steps=point.accumulation,
        max_steps=steps,
        logging_steps=NEVER,
        save_steps=NEVER,
        eval_samples=1,
        report_to="none",
    )


def run_point(grid: Grid, point: Point, precision: str | None, threads: int) -> dict:
    """Run `worker.measure` in processes of its own and return its result. Raises PointFailed with their last lines.

    Several nodes read the plan and the data from this folder, so it must be on a disk that they share.
    """
    (grid.folder / ".work").mkdir(parents=True, exist_ok=True)
    # a new one each time: the processes of a grid that was killed may still use theirs
    work = Path(tempfile.mkdtemp(prefix=f"{point.name}.", dir=grid.folder / ".work"))
    config = asdict(make_config(grid, point)) | {"output_dir": str(work / "run")}
    if precision:  # as the first run found it, so that all repeats have the same
        config["bf16"] = precision.startswith("bfloat16")
    plan_file, out = work / "plan.json", work / "out.json"
    about = {"point": asdict(point), "config": config, "threads": threads, "precision": precision}
    about |= {"untimed": grid.bench.untimed_steps, "steps": grid.bench.steps, "seconds": grid.bench.seconds}
    files.write_json(plan_file, about | {"started": time.time()})
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    environment |= launcher.pass_on(environment, work)
    own = {} if grid.gpus else {"DS_ACCELERATOR": "cpu"}  # of this machine; other nodes find out what they have
    try:
        code = run_command(build_command(grid, point, plan_file, out), work, os.environ | environment | own)
        if code or not out.is_file():
            raise explain_failure(work, code)
        return json.loads(out.read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(work)
        with contextlib.suppress(OSError):  # there are others
            work.parent.rmdir()


def build_command(grid: Grid, point: Point, plan_file: Path, out: Path) -> list[str]:
    """Build what starts the processes of a point: python, torchrun, or, with DeepSpeed or a hostfile, its launcher."""
    bench, worker = grid.bench, ["sftlab.bench.worker", str(plan_file.resolve()), str(out.resolve())]
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
    logs = plan_file.resolve().with_name("ranks-0")
    return launcher.build_command(config, worker, None if remote else 0, hosts[0], logs)


def run_command(command: list[str], work: Path, environment: dict) -> int:
    """Run the command of a point until it has ended and return its exit code. Whatever happens, all it started ends with it."""
    import psutil

    place = work / "ranks-0"
    place.mkdir()
    with (place / "launcher.log").open("wb") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        try:
            return process.wait()
        finally:
            family = []
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.poll() is None:
                    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for stop in (psutil.Process.terminate, psutil.Process.kill):
                for member in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        stop(member)
                _, family = psutil.wait_procs(family, timeout=10)
            process.wait()


def explain_failure(work: Path, code: int) -> PointFailed:
    """Explain what went wrong with a point: the error of the process that failed first, else the launcher's."""
    failed = logs.find_failed(work)
    lines = [line for line in logs.read_end(failed.log).splitlines() if line.strip()][-LAST_LINES:]
    message = failed.reason or logs.explain_end("\n".join(lines))  # without a launcher there is one log
    if message:
        return PointFailed(message.removeprefix("refused: "), lines)
    who = failed if failed.signal else f"exit code {code}"
    return PointFailed(f"{who}: {lines[-1] if lines else 'no output'}", lines)
