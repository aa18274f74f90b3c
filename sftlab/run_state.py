"""A run as its files tell it: where it stands, whether its process is alive, why it ended. Nothing is changed here.

Whatever trains into a run folder is found: what `runs.start` began, `sftlab train` in a terminal, launchers, notebooks.

    python -c "from sftlab import run_state; print(*run_state.find('runs'), sep='\\n')"
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import checkpoints, files, run_log, run_process
from sftlab.config import TrainConfig

ACTIVE = ("starting", "running")
DEPTH = 5  # folders deep that runs are looked for
KILLED = "ended without a word: killed from outside, most often for want of memory, or the machine went down"


@dataclass(frozen=True)
class Run:
    """A run as its files tell it at one moment; `read(run.folder)` for the next.

    status: starting, running, completed, interrupted, failed, killed (it left no word of its end), or none (nothing is
    there); `said`: why it ended so. `history` holds the entries of its log, `progress` the last progress.json, `attempt`
    what was started in the background. `started` is in seconds since the epoch. A start that ended before its training began
    leaves the run that was there as it is, and is told in `said` alone.
    """

    folder: Path
    status: str
    said: str = ""
    config: TrainConfig | None = None
    config_hash: str = ""
    step: int = 0
    max_steps: int | None = None
    started: float | None = None
    history: list[dict] = field(default_factory=list, repr=False)
    progress: dict = field(default_factory=dict, repr=False)
    attempt: dict = field(default_factory=dict, repr=False)

    @property
    def speed(self) -> tuple[float, float] | None:
        """(steps, tokens) per second since the first step of what was trained last; None until there are two more."""
        began, now = self.progress.get("began"), self.progress
        if not began or now["step"] <= began["step"] or now["time"] <= began["time"]:
            return None
        return tuple((now[name] - began[name]) / (now["time"] - began["time"]) for name in ("step", "tokens"))

    @property
    def seconds_left(self) -> float | None:
        """What the rest of the steps takes at this speed; None for a run that is at none."""
        if self.status != "running" or not self.speed or not self.max_steps:
            return None
        return (self.max_steps - self.step) / self.speed[0]

    def find_last(self, name: str) -> float | None:
        """The last logged loss, eval_loss, learning_rate …"""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)


def read(folder: str | Path) -> Run:
    """The run of a folder, from its files and from whether its process is alive."""
    folder = Path(folder).absolute()
    about, progress = files.read_json(folder / "run.json"), files.read_json(folder / run_log.PROGRESS)
    result, history = files.read_json(folder / "result.json"), run_log.read(folder)
    attempt = read_attempt(folder, progress)
    waiting = "process" in attempt and progress.get("started", 0) < attempt["started"]  # its training hasn't begun
    left = waiting and attempt["result_before"] == stamp(folder)  # the result, of an earlier run, is as it was
    process, note = find_process(attempt, progress), ""
    alive = process is not None
    if process and process != attempt.get("process"):
        attempt.pop("asked", None)  # who was asked to stop isn't who is at work
    if waiting and process == attempt["process"]:
        about, progress = {"config": attempt["config"]}, {}
        result = {} if left else result
        if attempt["config"]["overwrite"]:
            history = []  # about to be deleted
    elif waiting and about and (progress or result):
        note = tell_start(folder, attempt) if left else ""
        if not attempt["config"]["resume"]:  # then how it was started says nothing of the run
            attempt = {name: attempt[name] for name in ("process", "started", "offset")}
    elif waiting:
        about, result = about or {"config": attempt["config"]}, {} if left else result
    config = TrainConfig(**TrainConfig.keep_known(about["config"])) if about.get("config") else None
    logged = next((entry for entry in reversed(history) if "max_steps" in entry), {})
    if result:
        status, said = result["status"], result.get("error", "")
        if status == "interrupted" and not said:
            said = f"a checkpoint is saved ({result.get('signal')})"
    elif alive:
        status, said = "running" if "step" in progress else "starting", ""
    else:
        status, said = tell_end(folder, {} if note else attempt, progress)
    said = "; ".join(filter(None, (said, note)))
    step = result.get("metrics", {}).get("steps", progress.get("step", logged.get("step", 0)))
    if not result and not alive and (last := checkpoints.find_last(folder)):
        step = max(step, checkpoints.get_step(last))  # it's saved before progress.json tells of its step
    return Run(folder, status, said, config, about.get("config_hash") or (config.hash() if config else ""), step,
               progress.get("max_steps", logged.get("max_steps")), progress.get("started") or attempt.get("started"),
               history, progress, attempt)  # fmt: skip


def stamp(folder: Path) -> int | None:
    """When a run folder's result was written, to the nanosecond, or None."""
    try:
        return (folder / "result.json").stat().st_mtime_ns
    except OSError:
        return None


def read_attempt(folder: Path, progress: dict) -> dict:
    """What was started last in the background; of one that another process has trained after (a terminal's) where it was."""
    logs = run_process.find_logs(folder)
    attempt = files.read_json(logs / run_process.ABOUT)
    if not attempt or attempt["launch"] or progress.get("started", 0) < attempt["started"]:
        return attempt
    if run_process.is_same(attempt["process"], progress["process"]):
        return attempt
    log = logs / run_process.LOG
    return {"cwd": attempt["cwd"], "offset": log.stat().st_size if log.is_file() else 0}


def explain_attempt(folder: Path, attempt: dict) -> str:
    return run_process.explain_end(run_process.read_output(run_process.find_logs(folder), attempt["offset"]))


def find_process(attempt: dict, progress: dict) -> dict | None:
    """The process of a run that is at work: the one that was started in the background, else the one that trains."""
    for about in (attempt, progress):
        if "process" in about and "ended" not in about and run_process.is_alive(about["process"]):
            return about["process"]
    return None


def tell_end(folder: Path, attempt: dict, progress: dict) -> tuple[str, str]:
    """(status, why) of a run without a process and without a result."""
    if not attempt and not progress and not (folder / "run.json").is_file():
        return "none", "there is no run"
    if attempt.get("asked") and not progress.get("step"):
        return "interrupted", "before its first step"
    if "ended" in progress:
        return progress["status"], progress["said"]
    if "process" in attempt and (words := explain_attempt(folder, attempt)):
        return "failed", words
    return "killed", KILLED


def tell_start(folder: Path, attempt: dict) -> str:
    """How a start ended that has left the run of before as it was."""
    if attempt.get("asked"):
        return "the last start was stopped before it began"
    words = explain_attempt(folder, attempt)
    return f"the last start {'was ' if words.startswith('refused: ') else 'failed: ' if words else ''}{words or KILLED}"


def find_place() -> Path:
    """Where runs are looked for unasked: `runs` in the folder that one works in; where there is none, that of the course."""
    here = Path("runs")
    return here if here.is_dir() else Path(__file__).resolve().parent.parent / "runs"


def find(folder: str | Path | None = None) -> list[Run]:
    """All runs in a folder (default: `find_place`) and the folders in it, the last one that began first."""
    found, top = set(), Path(folder or find_place()).absolute()
    for place, names, own in os.walk(top):
        place = Path(place)
        if "run.json" in own and "config_hash" in files.read_json(place / "run.json"):
            found.add(place)
        name = place.name.removesuffix("-logs")
        if run_process.ABOUT in own and place != top and name not in ("", place.name):
            found.add(place.with_name(name))
        deep = len(place.relative_to(top).parts) >= DEPTH
        names[:] = (
            [] if deep or place in found else [name for name in names if not name.startswith((".", "checkpoint-"))]
        )
    return sorted(map(read, found), key=lambda run: run.started or 0, reverse=True)
