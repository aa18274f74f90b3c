"""Throughput and scaling, measured: a grid of data sets and nodes, each point in processes of its own, in turns.

A point's repeats don't follow each other but take turns with the other points', so that a machine that slows down slows all
of them. After each repeat the point's file is whole (`results`), and a grid that was stopped goes on where it was.

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
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sftlab import files, machine
from sftlab.bench import plan, results
from sftlab.bench.results import DISTURBED, Point, Result, Run
from sftlab.config.configs import BenchmarkConfig, DataConfig, LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.memory import duration
from sftlab.runs import launcher, state
from sftlab.train import distributed


def run_benchmark(bench: BenchmarkConfig, config: TrainConfig, rows: DataConfig) -> int:
    """Measure a grid and return the exit code: 0, or 1 where points failed. Raises UserError for what can't be measured."""
    import torch

    gpus, cores = torch.cuda.device_count(), machine.count_cores()
    points = plan.list_points(bench, config)
    plan.check_room(bench, points, gpus, cores)
    folder = Path(bench.output_dir)
    rows = replace(
        rows,
        model=config.model_name,
        trust_remote_code=config.trust_remote_code,
        max_length=config.max_length,
        output_dir=str(folder / "data"),
    )
    if config.model_name.startswith(("random:", "random-tiny:")):
        rows = replace(rows, model="tiny-base")  # whose tokenizer they take
    grid = Grid(bench, config, plan.prepare_sizes(rows, bench.sizes), gpus)
    hashes = {point.name: plan.hash_point(point, bench, config, grid.sets[point.samples]["fingerprint"]) for point in points}  # fmt: skip
    if bench.overwrite:
        plan.set_aside(folder, points)
    measured = plan.read_measured(folder, points, bench, config, grid.sets)
    print("\n".join(plan.describe(points, bench, grid.sets, gpus)))
    failed = take_turns(grid, points, hashes, measured)
    print("\n".join(summarise([measured[point.name] for point in points if point.name in measured])))
    lost = f"; {len(failed)} of {len(points)} points failed, see {folder}/*.failed.json" if failed else ""
    print(f"saved {folder}/*.json{lost}; the whole report: sftlab report {folder}")
    return 1 if failed else 0


@dataclass
class Grid:
    """What all points of a benchmark have in common."""

    bench: BenchmarkConfig
    config: TrainConfig
    sets: dict[int, dict]
    gpus: int

    @property
    def folder(self) -> Path:
        return Path(self.bench.output_dir)


def take_turns(grid: Grid, points: list[Point], hashes: dict[str, str], measured: dict[str, Result]) -> set[str]:
    """Make all runs that are not in `measured` yet, a repeat of each point in turn, and add them; the points that failed."""
    from tqdm.auto import tqdm

    folder, repeats, failed = grid.folder, grid.bench.repeats, set()
    todo = [(turn, point) for turn in range(repeats) for point in points
            if turn >= len(measured[point.name].runs if point.name in measured else ())]  # fmt: skip
    if len(todo) < len(points) * repeats:
        print(f"{len(points) * repeats - len(todo)} runs are there already, {len(todo)} are left")
    with stopping_on_signals(), tqdm(todo, desc="runs", disable="TQDM_DISABLE" in os.environ or not todo) as bar:
        for number, (turn, point) in enumerate(bar):
            if point.name in failed:
                continue
            bar.set_postfix_str(point.name)
            try:
                result = measured[point.name] = add_run(grid, point, measured, hashes[point.name])
            except KeyboardInterrupt:
                tqdm.write(tell_stopped(grid.bench))
                raise
            except PointFailed as error:
                failed.add(point.name)
                files.write_json(folder / f"{point.name}.failed.json", {
                    "schema": results.SCHEMA, "point": asdict(point), "error": str(error), "last_lines": error.lines})  # fmt: skip
                tqdm.write(f"{point.name}: failed: {error}")
                continue
            tqdm.write(f"{point.name}, repeat {turn + 1}: {tell(result.runs[-1])}")
            if number == 0 and len(todo) > 1:
                left = expect(grid, point, result.runs[-1], [other for _, other in todo[1:]])
                tqdm.write(f"by this run, the others will take {duration.say(left)}")
    return failed


def add_run(grid: Grid, point: Point, measured: dict[str, Result], config_hash: str) -> Result:
    """Measure a point once more, write its file, and return it. Raises PointFailed."""
    precision = next((result.choices["precision"] for result in measured.values()), None)
    node = plan.describe_node(grid.bench, point, grid.gpus, machine.count_cores())
    out = run_point(grid, point, precision, node["threads"])
    about = grid.sets[point.samples]
    data = {name: about[name] for name in ("source", "rows", "distinct_rows", "fingerprint")}
    result = Result(point, asdict(train_config(grid, point)), config_hash, grid.bench.repeats, out["machine"] | node, out["versions"],
                    out["attention"], out["choices"], data, [])  # fmt: skip
    before = measured.get(point.name)
    if before:
        for name, words in (("machine", "on another machine"), ("versions", "with other versions of packages")):
            old, new = getattr(before, name), getattr(result, name)
            if old != new:
                changed = ", ".join(f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key])
                raise UserError(f"{before.path}: its repeats were measured {words} ({changed}), and don't go together. "
                                "Name another --output-dir, or add --overwrite.")  # fmt: skip
    result = replace(result, runs=[*(before.runs if before else []), results.build(Run, out["run"], "run")])
    path = results.write_result(grid.folder, result)
    for old in (".failed.json", plan.ASIDE):
        path.with_suffix(old).unlink(missing_ok=True)
    return replace(result, path=path)


def tell_stopped(bench: BenchmarkConfig) -> str:
    """What to do after an interrupt."""
    if not bench.overwrite:
        return "stopped; the same command goes on where it was"
    return ("stopped; the same command without --overwrite goes on where it was. Old points that have no new run yet are "
            f"kept as {bench.output_dir}/*{plan.ASIDE}")  # fmt: skip


@contextlib.contextmanager
def stopping_on_signals():
    """SIGTERM, and the end of the terminal unless nohup is in use, end a grid as Ctrl-C does: its processes with it."""
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    except ValueError:  # signals reach only the main thread, and this is another
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def expect(grid: Grid, point: Point, run: Run, left: list[Point]) -> float:
    """Seconds that the runs left will take, from one that was made: loading as it took, steps by their samples."""

    def size(one: Point) -> float:  # processes of one machine share its cores
        return one.global_batch / (one.devices if grid.gpus or grid.bench.hostfile else 1)

    loading = run.seconds - run.window_seconds
    return sum(
        loading + run.window_seconds * (1 if grid.bench.seconds else size(other) / size(point)) for other in left
    )


def tell(run: Run) -> str:
    """A run in a line."""
    step = run.step_seconds
    return (f"{run.tokens_per_second:,.0f} tokens/s, step {step['median']:.3g} s ({step['p10']:.3g} to {step['p90']:.3g}), "
            f"{max(run.peak_bytes) / 1e9:.2f} GB, loss {run.first_loss:.2f} -> {run.last_loss:.2f}"
            + (f"; other programs took {run.others_use:.0%} of the machine" if (run.others_use or 0) > DISTURBED else ""))  # fmt: skip


def summarise(measured: list[Result]) -> list[str]:
    """The grid as a table: medians over the repeats, and the lowest and highest tokens per second."""
    lines = [f"{'point':44}{'tokens/s':>10}{'lowest':>9}{'highest':>9}{'per device':>12}{'step s':>8}{'peak GB':>9}"]
    for result in measured:
        rates = [run.tokens_per_second for run in result.runs]
        middle = statistics.median(rates)
        step = statistics.median(run.step_seconds["median"] for run in result.runs)
        peak = max(size for run in result.runs for size in run.peak_bytes)
        lines.append(f"{result.point.name:44}{middle:>10,.0f}{min(rates):>9,.0f}{max(rates):>9,.0f}"
                     f"{middle / result.point.devices:>12,.0f}{step:>8.3g}{peak / 1e9:>9.2f}")  # fmt: skip
    return lines


NEVER = 10**9
LAST_LINES = 30  # of a failed point's output are kept


class PointFailed(Exception):
    """A point whose processes ended with an error; the message says which, `lines` are the last ones of its output."""

    def __init__(self, words: str, lines: list[str]):
        super().__init__(words)
        self.lines = lines


def train_config(grid: Grid, point: Point) -> TrainConfig:
    """The training of a point, without anything beside the steps."""
    steps = NEVER if grid.bench.seconds else grid.bench.untimed_steps + grid.bench.steps
    return replace(
        grid.config, dataset_path=grid.sets[point.samples]["path"], output_dir=str(grid.folder / ".work"),
        batch_size=point.per_device_batch, gradient_accumulation_steps=point.accumulation, max_steps=steps,
        logging_steps=NEVER, save_steps=NEVER, eval_samples=1, report_to="none",
    )  # fmt: skip


def run_point(grid: Grid, point: Point, precision: str | None, threads: int) -> dict:
    """What `worker.measure` returned in processes of its own. Raises PointFailed with what they said last.

    Several nodes read the plan and the data from this folder, so it must be on a disk that they share.
    """
    (grid.folder / ".work").mkdir(parents=True, exist_ok=True)
    # a new one each time: the processes of a grid that was killed may still be at theirs
    work = Path(tempfile.mkdtemp(prefix=f"{point.name}.", dir=grid.folder / ".work"))
    config = asdict(train_config(grid, point)) | {"output_dir": str(work / "run")}
    if precision:  # as the first run found it: what is timed anew each time might waver
        config["bf16"] = precision.startswith("bfloat16")
    plan, out = work / "plan.json", work / "out.json"
    files.write_json(plan, {
        "point": asdict(point), "config": config, "untimed": grid.bench.untimed_steps, "steps": grid.bench.steps,
        "seconds": grid.bench.seconds, "threads": threads, "precision": precision, "started": time.time()})  # fmt: skip
    passed_on = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    passed_on |= launcher.pass_on(passed_on, work)
    own = {} if grid.gpus else {"DS_ACCELERATOR": "cpu"}  # of this machine; what other nodes have they see themselves
    try:
        code = run_command(build_command(grid, point, plan, out), work, os.environ | passed_on | own)
        if code or not out.is_file():
            raise explain(work, code)
        return json.loads(out.read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(work)
        with contextlib.suppress(OSError):  # there are others
            work.parent.rmdir()


def run_command(command: list[str], work: Path, environment: dict) -> int:
    """Run the command of a point until it has ended; its exit code. What it started ends with it, whatever happens."""
    place = work / "ranks-0"
    place.mkdir()
    with (place / "launcher.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                   start_new_session=True)  # fmt: skip
        try:
            return process.wait()
        finally:
            end(process)


def build_command(grid: Grid, point: Point, plan: Path, out: Path) -> list[str]:
    """What starts the processes of a point: directly, by torchrun, or, with DeepSpeed or a hostfile, by its launcher."""
    bench, worker = grid.bench, ["sftlab.bench.worker", str(plan.resolve()), str(out.resolve())]
    if point.devices == 1 and grid.gpus < 2 and not grid.config.deepspeed and not bench.hostfile:
        return [sys.executable, "-m", *worker]
    hosts = (
        launcher.choose_hosts(bench.hostfile, point.nodes, bench.devices_per_node) if bench.hostfile else ["localhost"]
    )
    far = len(hosts) > 1 or not launcher.is_here(hosts[0])
    if far:
        launcher.check_remote()
    config = LaunchConfig(
        nodes=len(hosts), gpus_per_node=point.devices // len(hosts), hostfile=bench.hostfile,
        launcher="deepspeed" if grid.config.deepspeed or far else "torchrun", master_port=distributed.find_port(),
    )  # fmt: skip
    return launcher.build_command(config, worker, None if far else 0, hosts[0], plan.resolve().with_name("ranks-0"))


def explain(work: Path, code: int) -> PointFailed:
    """What went wrong with a point: which process failed first, and its last words; else what the launcher said."""
    failed = state.find_failed(work)
    lines = [line for line in state.read_end(failed.log).splitlines() if line.strip()][-LAST_LINES:]
    words = failed.words or state.explain_end("\n".join(lines))  # without a launcher there is one log
    if words:
        return PointFailed(words.removeprefix("refused: "), lines)
    who = failed if failed.signal else f"exit code {code}"
    return PointFailed(f"{who}: {lines[-1] if lines else 'without a word'}", lines)


def end(process: subprocess.Popen) -> None:
    """End the processes of a point, with all that they started, if they are still at it."""
    import psutil

    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stop(member)
            _, family = psutil.wait_procs(family, timeout=10)
    process.wait()
