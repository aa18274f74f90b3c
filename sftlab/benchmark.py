"""Throughput and scaling, measured: a grid of data sets and nodes, each point in processes of its own, in turns.

A point's repeats don't follow each other but take turns with the other points', so that a machine that slows down slows all
of them. After each repeat the point's file is whole (`results`), and a grid that was stopped goes on where it was.

    sftlab benchmark tiny-base 2 --sizes 1000 --use-lora
"""

import contextlib
import os
import signal
import statistics
from dataclasses import asdict, replace
from pathlib import Path

from sftlab import benchmark_data, benchmark_plan, benchmark_point, files, hardware, results, run_time
from sftlab.benchmark_point import Grid, PointFailed
from sftlab.config import BenchmarkConfig, DataConfig, TrainConfig
from sftlab.options import UserError
from sftlab.results import DISTURBED, Point, Result, Run


def run_benchmark(bench: BenchmarkConfig, config: TrainConfig, rows: DataConfig) -> int:
    """Measure a grid and return the exit code: 0, or 1 where points failed. Raises UserError for what can't be measured."""
    import torch

    gpus, cores = torch.cuda.device_count(), hardware.count_cores()
    points = benchmark_plan.list_points(bench, config)
    benchmark_plan.check_room(bench, points, gpus, cores)
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
    grid = Grid(bench, config, benchmark_data.prepare_sizes(rows, bench.sizes), gpus)
    hashes = {point.name: benchmark_plan.hash_point(point, bench, config, grid.sets[point.samples]["fingerprint"]) for point in points}  # fmt: skip
    if bench.overwrite:
        benchmark_plan.set_aside(folder, points)
    measured = benchmark_plan.read_measured(folder, points, bench, config, grid.sets)
    print("\n".join(benchmark_plan.describe(points, bench, grid.sets, gpus)))
    failed = take_turns(grid, points, hashes, measured)
    print("\n".join(summarise([measured[point.name] for point in points if point.name in measured])))
    lost = f"; {len(failed)} of {len(points)} points failed, see {folder}/*.failed.json" if failed else ""
    print(f"saved {folder}/*.json{lost}; the whole report: sftlab report {folder}")
    return 1 if failed else 0


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
                tqdm.write(f"by this run, the others will take {run_time.say(left)}")
    return failed


def add_run(grid: Grid, point: Point, measured: dict[str, Result], config_hash: str) -> Result:
    """Measure a point once more, write its file, and return it. Raises PointFailed."""
    precision = next((result.choices["precision"] for result in measured.values()), None)
    node = benchmark_plan.describe_node(grid.bench, point, grid.gpus, hardware.count_cores())
    out = benchmark_point.run_point(grid, point, precision, node["threads"])
    about = grid.sets[point.samples]
    data = {name: about[name] for name in ("source", "rows", "distinct_rows", "fingerprint")}
    result = Result(point, asdict(benchmark_point.train_config(grid, point)), config_hash, grid.bench.repeats, out["machine"] | node, out["versions"],
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
    for old in (".failed.json", benchmark_plan.ASIDE):
        path.with_suffix(old).unlink(missing_ok=True)
    return replace(result, path=path)


def tell_stopped(bench: BenchmarkConfig) -> str:
    """What to do after an interrupt."""
    if not bench.overwrite:
        return "stopped; the same command goes on where it was"
    return ("stopped; the same command without --overwrite goes on where it was. Old points that have no new run yet are "
            f"kept as {bench.output_dir}/*{benchmark_plan.ASIDE}")  # fmt: skip


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
