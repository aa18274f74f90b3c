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

from sftlab import distributed, files, hostfile, launch, run_process
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
    passed_on = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    passed_on |= launch.pass_on(passed_on, work)
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
    bench, worker = grid.bench, ["sftlab.throughput", str(plan.resolve()), str(out.resolve())]
    if point.devices == 1 and grid.gpus < 2 and not grid.config.deepspeed and not bench.hostfile:
        return [sys.executable, "-m", *worker]
    hosts = (
        hostfile.choose_hosts(bench.hostfile, point.nodes, bench.devices_per_node) if bench.hostfile else ["localhost"]
    )
    far = len(hosts) > 1 or not hostfile.is_here(hosts[0])
    if far:
        launch.check_remote()
    config = LaunchConfig(
        nodes=len(hosts), gpus_per_node=point.devices // len(hosts), hostfile=bench.hostfile,
        launcher="deepspeed" if grid.config.deepspeed or far else "torchrun", master_port=distributed.find_port(),
    )  # fmt: skip
    return launch.build_command(config, worker, None if far else 0, hosts[0], plan.resolve().with_name("ranks-0"))


def explain(work: Path, code: int) -> PointFailed:
    """What went wrong with a point: which process failed first, and its last words; else what the launcher said."""
    failed = run_process.find_failed(work)
    lines = [line for line in run_process.read_end(failed.log).splitlines() if line.strip()][-LAST_LINES:]
    words = failed.words or run_process.explain_end("\n".join(lines))  # without a launcher there is one log
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
