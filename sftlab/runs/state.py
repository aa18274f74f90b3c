"""The state of a run, read from its files: where it is, whether its process is alive, why it ended. Nothing is changed here.

Whatever trains into a run folder is found: `runs.start`, `sftlab train` in a terminal, launchers, notebooks. One file says
what a run is doing, progress.json: `start` in it is from who started it in the background, all else from the training.

    python -c "from sftlab.runs import state; print(*state.find('runs'), sep='\\n')"
"""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.memory import duration
from sftlab.train import folder as run_folder

ACTIVE = ("starting", "running")
DEPTH = 5  # levels of folders that are searched for runs
SAME = 0.05  # seconds by which two readings of a process's start may differ
KILLED = "ended without a message: killed from outside, most often because memory ran out, or the machine went down"
STATUS = {
    "starting": "is starting: loading the libraries, the data and the model",
    "running": "is running",
    "completed": "is complete",
    "interrupted": "was stopped",
    "failed": "has failed",
    "killed": "was killed",
    "none": "does not exist",
}


@dataclass(frozen=True)
class Run:
    """A run at one moment, from its files; `read(run.folder)` for the next.

    status: starting, running, completed, interrupted, failed, killed (it left no message), or none (there is no run).
    started: seconds since the epoch. history: the entries of its log. progress: its progress.json. process: the one to
    stop (`folder.identify`): a launcher, or the one that trains; None where none is at work.
    """

    folder: Path
    status: str
    reason: str = ""
    config: TrainConfig | None = None
    config_hash: str = ""
    step: int = 0
    max_steps: int | None = None
    history: list[dict] = field(default_factory=list, repr=False)
    progress: dict = field(default_factory=dict, repr=False)
    process: dict | None = field(default=None, repr=False)

    @property
    def started(self) -> float | None:
        return self.progress.get("started")

    @property
    def speed(self) -> tuple[float, float] | None:
        """(steps, tokens) per second since the first step after the last start; None until there are two more."""
        began, now = self.progress.get("began"), self.progress
        if not began or now["step"] <= began["step"] or now["time"] <= began["time"]:
            return None
        return tuple((now[name] - began[name]) / (now["time"] - began["time"]) for name in ("step", "tokens"))

    @property
    def seconds_left(self) -> float | None:
        """What the remaining steps take at this speed; None for a run that isn't training."""
        if self.status != "running" or not self.speed or not self.max_steps:
            return None
        return (self.max_steps - self.step) / self.speed[0]

    def find_last(self, name: str) -> float | None:
        """The last logged loss, eval_loss, learning_rate …"""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)


def read(folder: str | Path) -> Run:
    """The run of a folder, from its files and from whether its process is alive."""
    folder = Path(folder).absolute()
    names = ("run.json", run_folder.PROGRESS, "result.json")
    about, progress, result = (files.read_json(folder / name) for name in names)
    process, history = find_process(progress), run_folder.read_log(folder)
    loading = process is not None and "process" not in progress
    if loading:  # what is in the folder is of an earlier start
        result = {}
    if "start" in progress and (loading or not about):
        about = {"config": progress["start"]["config"]}
    config = TrainConfig(**TrainConfig.keep_known(about["config"])) if about.get("config") else None
    if loading and config.overwrite:
        history = []
    status, reason = find_status(about, progress, result, process)
    logged = next((entry for entry in reversed(history) if "max_steps" in entry), {})
    step = result.get("metrics", {}).get("steps", progress.get("step", logged.get("step", 0)))
    if not result and not process and (last := run_folder.find_last(folder)):
        step = max(step, run_folder.get_step(last))  # it's saved before progress.json has its step
    return Run(
        folder,
        status,
        reason,
        config,
        about.get("config_hash") or (config.hash() if config else ""),
        step,
        progress.get("max_steps", logged.get("max_steps")),
        history,
        progress,
        process,
    )


def find_status(about: dict, progress: dict, result: dict, process: dict | None) -> tuple[str, str]:
    """(status, reason) of a run, from its files and the process that is at work."""
    if result:
        reason = result.get("error", "")
        if result["status"] == "interrupted" and not reason:
            reason = f"a checkpoint is saved ({result.get('signal')})"
        if "start" in progress and "process" not in progress:  # a later start, which left the run as it was
            ended = "stopped before its first step" if "asked" in progress else KILLED
            reason = f"{reason}; the last start: {progress.get('reason', ended)}".removeprefix("; ")
        return result["status"], reason
    if process:
        return ("running" if "doing" in progress else "starting"), ""
    if "ended" in progress:
        return progress["status"], progress.get("reason", "")  # an earlier version called it otherwise
    if "asked" in progress and "doing" not in progress:
        return "interrupted", "before its first step"
    return ("killed", KILLED) if progress or "config_hash" in about else ("none", "there is no run")


def find_process(progress: dict) -> dict | None:
    """The process of a run that is at work: the one that was started in the background, else the one that trains."""
    if "ended" in progress:  # a notebook's kernel lives on
        return None
    own = (progress.get("start", {}).get("process"), progress.get("process"))
    return next((process for process in own if process and is_alive(process)), None)


def is_elsewhere(process: dict) -> bool:
    """Whether a process is one of another machine."""
    return process["host"] != platform.node()


def is_alive(process: dict) -> bool:
    """Whether a process (`folder.identify`) is at work. One of another machine can't be asked, and counts as alive."""
    import psutil

    if is_elsewhere(process):
        return True
    try:
        began = run_folder.identify(process["pid"])["since_boot"]
        zombie = psutil.Process(process["pid"]).status() == psutil.STATUS_ZOMBIE
        return not zombie and abs(began - process["since_boot"]) < SAME  # process numbers are used again
    except psutil.Error:
        return False


def find_place() -> Path:
    """The default folder of runs: `runs` in the working directory; where there is none, that of the course."""
    here = Path("runs")
    return here if here.is_dir() else files.ROOT / "runs"


def find(folder: str | Path | None = None) -> list[Run]:
    """All runs in a folder (default: `find_place`) and the folders in it, the last one that began first."""
    found, top = [], Path(folder or find_place()).absolute()
    for place, names, _ in os.walk(top):
        place = Path(place)
        known = files.read_json(place / "run.json") | files.read_json(place / run_folder.PROGRESS)
        is_run = not known.keys().isdisjoint({"config_hash", "started"})  # other programs use these file names, too
        if is_run:
            found.append(read(place))
        deep = len(place.relative_to(top).parts) >= DEPTH
        names[:] = [] if is_run or deep else [name for name in names if not name.startswith(".")]
    return sorted(found, key=lambda run: run.started or 0, reverse=True)


def format_status(run: Run) -> str:
    """What a run is doing, or why it ended, in a sentence that changes only with that."""
    if run.status == "failed" and run.reason.startswith("refused: "):
        return f"{run.folder.name} was {run.reason}"
    sentence = STATUS[run.status]
    if run.status in ACTIVE and "asked" in run.progress:
        sentence = "is stopping: a checkpoint is written first"
    elif run.status == "running" and run.progress["doing"] == "evaluating":
        sentence = "is running, and measures the validation loss"
    return f"{run.folder.name} {sentence}" + (f": {run.reason}" if run.reason else "")


def list_facts(run: Run) -> dict[str, str]:
    """The figures of a run as texts by their names; empty where one isn't known."""

    def format_number(value: float | None, form: str = ".4g") -> str:
        return "" if value is None else f"{value:{form}}"

    def format_bytes(size: int | None) -> str:
        return f"{size / 1e9:.2f} GB" if size else ""

    return {
        "step": f"{run.step} of {run.max_steps}" if run.max_steps else str(run.step or ""),
        "epoch": format_number(run.progress.get("epoch")),
        "time left": "" if run.seconds_left is None else duration.format_seconds(run.seconds_left),
        "loss": format_number(run.find_last("loss")),
        "validation loss": format_number(run.find_last("eval_loss")),
        "learning rate": format_number(run.find_last("learning_rate")),
        "tokens per second": format_number(run.speed and run.speed[1], ",.0f"),
        "memory": format_bytes(run.progress.get("memory_bytes")),
        "memory of the GPU": format_bytes(run.progress.get("gpu_memory_bytes")),
    }


def format_run(run: Run) -> str:
    """A run in a line or two of text."""
    facts = ", ".join(f"{name} {text}" for name, text in list_facts(run).items() if text)
    return format_status(run) + (f"\n  {facts}" if facts else "")
