"""One run of a point of a benchmark: its processes started, waited for, and ended whatever happens.

python -c "from sftlab import benchmark_point; help(benchmark_point.run_point)"
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sftlab import distributed, files, hostfile, launch, node_check, rank_logs
from sftlab.config import BenchmarkConfig, LaunchConfig, TrainConfig
from sftlab.results import Point

NEVER = 10**9
LAST_LINES = 30  # of a failed point's output are kept


class PointFailed(Exception):
    """A point whose processes ended with an error; the message says which, `lines` are the last ones of its output."""

    def __init__(self, words: str, lines: list[str]):
        super().__init__(words)
        self.lines = lines


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


def train_config(grid: Grid, point: Point) -> TrainConfig:
    """The training of a point, without anything beside the steps."""
    steps = NEVER if grid.bench.seconds else grid.bench.untimed_steps + grid.bench.steps
    return replace(
        grid.config, dataset_path=grid.sets[point.samples]["path"], output_dir=str(grid.folder / ".work"),
        batch_size=point.per_device_batch, gradient_accumulation_steps=point.accumulation, max_steps=steps,
        logging_steps=NEVER, save_steps=NEVER, eval_samples=1, report_to="none",
    )  # fmt: skip


def run_point(grid: Grid, point: Point, precision: str | None, threads: int) -> dict:
    """What `throughput.measure` returned in processes of its own. Raises PointFailed with what they said last.

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
    passed_on = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", rank_logs.VARIABLE: str(work.resolve())}
    own = {} if grid.gpus else {"DS_ACCELERATOR": "cpu"}  # of this machine; what other nodes have they see themselves
    try:
        code = run_all(
            build_commands(grid, point, plan, out, passed_on), work / "launchers.txt", os.environ | passed_on | own
        )
        if code or not out.is_file():
            raise explain(work, code)
        return json.loads(out.read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(work)
        with contextlib.suppress(OSError):  # there are others
            work.parent.rmdir()


def run_all(commands: list[list[str]], output: Path, environment: dict) -> int:
    """Run a command for each node, all at once, until all have ended; the first that fails ends the others: its exit code."""
    with open(output, "wb") as log:
        started = []
        try:
            for command in commands:
                started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                                start_new_session=True))  # fmt: skip
            while True:
                codes = [process.poll() for process in started]
                failed = next((code for code in codes if code), 0)
                if failed or None not in codes:
                    return failed
                time.sleep(0.1)
        finally:
            for process in started:
                end(process)


def build_commands(grid: Grid, point: Point, plan: Path, out: Path, environment: dict) -> list[list[str]]:
    """What starts the processes of a point, a command for each node: directly, by torchrun, or by the deepspeed launcher."""
    bench, worker = grid.bench, ["sftlab.throughput", str(plan.resolve()), str(out.resolve())]
    if point.devices == 1 and grid.gpus < 2 and not grid.config.deepspeed and not bench.hostfile:
        return [[sys.executable, "-m", *worker]]
    hosts = (
        hostfile.choose_hosts(bench.hostfile, point.nodes, bench.devices_per_node) if bench.hostfile else ["localhost"]
    )
    config = LaunchConfig(
        nodes=len(hosts), gpus_per_node=point.devices // len(hosts), hostfile=bench.hostfile,
        launcher="deepspeed" if grid.config.deepspeed else "torchrun", master_port=distributed.find_port(),
    )  # fmt: skip
    return [node_check.wrap(host, launch.build_command(config, worker, rank, hosts[0]), environment, terminal=True)
            for rank, host in enumerate(hosts)]  # fmt: skip


def explain(work: Path, code: int) -> PointFailed:
    """What went wrong with a point: which process failed first, and its last words; else what the launcher said."""
    failed = rank_logs.find_failed(work)
    if failed is None:
        text = (work / "launchers.txt").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
        return PointFailed(f"exit code {code}: {lines[-1] if lines else 'without a word'}", lines)
    lines = rank_logs.read_last(work, failed.rank)
    said = next((line.removeprefix("sftlab: ") for line in reversed(lines) if line.startswith("sftlab: ")), None)
    return PointFailed(said or f"{failed}: {lines[-1] if lines else 'without a word'}", lines)


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
