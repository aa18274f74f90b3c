"""The state of a run, read from its files: where it is, whether its process is alive, why it ended. Nothing is changed here.

Whatever trains into a run folder is found: `runs.start`, `sftlab train` in a terminal, launchers, notebooks.

    python -c "from sftlab.runs import state; print(*state.find('runs'), sep='\\n')"
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.memory import duration
from sftlab.runs import logs
from sftlab.train import folder as run_folder

ACTIVE = ("starting", "running")
ABOUT = "background.json"  # in the folder of logs: which process was started last in the background, and with what
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
    reason: why it ended so; also how a later start ended before its training began, which leaves the run as it is.
    started: seconds since the epoch. history: the entries of its log. progress: the last progress.json.
    attempt: what was started in the background. process: the one that lives (`folder.identify`), or None; a
    notebook's kernel outlives its run.
    """

    folder: Path
    status: str
    reason: str = ""
    config: TrainConfig | None = None
    config_hash: str = ""
    step: int = 0
    max_steps: int | None = None
    started: float | None = None
    history: list[dict] = field(default_factory=list, repr=False)
    progress: dict = field(default_factory=dict, repr=False)
    attempt: dict = field(default_factory=dict, repr=False)
    process: dict | None = field(default=None, repr=False)

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
    about, progress = files.read_json(folder / "run.json"), files.read_json(folder / run_folder.PROGRESS)
    result, history = files.read_json(folder / "result.json"), run_folder.read_log(folder)
    attempt = read_attempt(folder, progress)
    process, note = find_process(attempt, progress), ""
    if process and process != attempt.get("process"):
        attempt.pop("asked", None)  # the process that was asked to stop isn't the one at work
    if "process" in attempt and progress.get("started", 0) < attempt["started"]:  # the last start hasn't trained
        same_result, planned = attempt["result_before"] == stamp(folder), {"config": attempt["config"]}
        if process == attempt["process"]:  # it is loading
            about, progress = planned, {}
            history = [] if attempt["config"]["overwrite"] else history
        elif about and (progress or result):  # it ended, and left an earlier run as it was
            note = explain_start(folder, attempt) if same_result else ""
            if not attempt["config"]["resume"]:  # how it was started says nothing of that run
                attempt = {name: attempt[name] for name in ("process", "started", "offset")}
            same_result = False
        else:
            about = about or planned
        result = {} if same_result else result
    config = TrainConfig(**TrainConfig.keep_known(about["config"])) if about.get("config") else None
    if result:
        status, reason = result["status"], result.get("error", "")
        if status == "interrupted" and not reason:
            reason = f"a checkpoint is saved ({result.get('signal')})"
    elif process:
        status, reason = "running" if "step" in progress else "starting", ""
    else:
        status, reason = find_end(folder, {} if note else attempt, progress)
    logged = next((entry for entry in reversed(history) if "max_steps" in entry), {})
    step = result.get("metrics", {}).get("steps", progress.get("step", logged.get("step", 0)))
    if not result and not process and (last := run_folder.find_last(folder)):
        step = max(step, run_folder.get_step(last))  # it's saved before progress.json has its step
    return Run(
        folder,
        status,
        "; ".join(filter(None, (reason, note))),
        config,
        about.get("config_hash") or (config.hash() if config else ""),
        step,
        progress.get("max_steps", logged.get("max_steps")),
        progress.get("started") or attempt.get("started"),
        history,
        progress,
        attempt,
        process,
    )


def stamp(folder: Path) -> int | None:
    """When a run folder's result was written, to the nanosecond, or None."""
    path = folder / "result.json"
    return path.stat().st_mtime_ns if path.is_file() else None


def read_attempt(folder: Path, progress: dict) -> dict:
    """What was started last in the background; only its place where another process (a terminal's) has trained since."""
    place = logs.find_logs(folder)
    attempt = files.read_json(place / ABOUT)
    if not attempt or attempt["launch"] or progress.get("started", 0) < attempt["started"]:
        return attempt
    if is_same(attempt["process"], progress["process"]):
        return attempt
    log = place / logs.LOG
    return {"cwd": attempt["cwd"], "offset": log.stat().st_size if log.is_file() else 0}


def explain_attempt(folder: Path, attempt: dict) -> str:
    """Why the process that was started in the background ended, from its log; empty where that doesn't say."""
    return logs.explain_end(logs.read_end(logs.find_logs(folder) / logs.LOG, attempt["offset"]))


def find_end(folder: Path, attempt: dict, progress: dict) -> tuple[str, str]:
    """(status, reason) of a run without a process and without a result."""
    if not attempt and not progress and not (folder / "run.json").is_file():
        return "none", "there is no run"
    if attempt.get("asked") and not progress.get("step"):
        return "interrupted", "before its first step"
    if "process" in attempt and (reason := explain_attempt(folder, attempt)):
        return "failed", reason
    return "killed", KILLED


def explain_start(folder: Path, attempt: dict) -> str:
    """How a start ended that has left an earlier run as it was."""
    if attempt.get("asked"):
        return "the last start was stopped before it began"
    reason = explain_attempt(folder, attempt)
    return (
        f"the last start {'was ' if reason.startswith('refused: ') else 'failed: ' if reason else ''}{reason or KILLED}"
    )


def find_process(attempt: dict, progress: dict) -> dict | None:
    """The process of a run that is at work: the one that was started in the background, else the one that trains."""
    for about in (attempt, progress):
        if "process" in about and is_alive(about["process"]):
            return about["process"]
    return None


def is_same(process: dict, other: dict) -> bool:
    """Whether two results of `folder.identify` are of the same process."""
    same_id = (process["pid"], process["host"]) == (other["pid"], other["host"])
    return same_id and abs(process["since_boot"] - other["since_boot"]) < SAME


def is_elsewhere(process: dict) -> bool:
    """Whether a process is one of another machine."""
    return process["host"] != run_folder.identify()["host"]


def is_alive(process: dict) -> bool:
    """Whether a process (`folder.identify`) is at work. One of another machine can't be asked, and counts as alive."""
    import psutil

    if not process or is_elsewhere(process):
        return bool(process)
    try:
        zombie = psutil.Process(process["pid"]).status() == psutil.STATUS_ZOMBIE
        return not zombie and is_same(run_folder.identify(process["pid"]), process)
    except psutil.Error:
        return False


def find_place() -> Path:
    """The default folder of runs: `runs` in the working directory; where there is none, that of the course."""
    here = Path("runs")
    return here if here.is_dir() else files.ROOT / "runs"


def find(folder: str | Path | None = None) -> list[Run]:
    """All runs in a folder (default: `find_place`) and the folders in it, the last one that began first."""
    found, top = set(), Path(folder or find_place()).absolute()
    for place, names, own in os.walk(top):
        place = Path(place)
        if "run.json" in own and "config_hash" in files.read_json(place / "run.json"):
            found.add(place)
        name = place.name.removesuffix("-logs")
        if ABOUT in own and place != top and name not in ("", place.name):
            found.add(place.with_name(name))
        done = place in found or len(place.relative_to(top).parts) >= DEPTH
        names[:] = [] if done else [name for name in names if not name.startswith((".", "checkpoint-"))]
    return sorted(map(read, found), key=lambda run: run.started or 0, reverse=True)


def format_status(run: Run) -> str:
    """What a run is doing, or why it ended, in a sentence that changes only with that."""
    if run.status == "failed" and run.reason.startswith("refused: "):
        return f"{run.folder.name} was {run.reason}"
    sentence = STATUS[run.status]
    if run.status in ACTIVE and run.attempt.get("asked"):
        sentence = "is stopping: a checkpoint is written first"
    elif run.status == "running" and run.progress.get("doing") == "evaluating":
        sentence = "is running, and measures the validation loss"
    return f"{run.folder.name} {sentence}" + (f": {run.reason}" if run.reason else "")


def format_step(run: Run) -> str:
    return f"{run.step} of {run.max_steps}" if run.max_steps else str(run.step or "")


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def list_facts(run: Run) -> list[tuple[str, str]]:
    """The figures of a run, as pairs of a name and a text; what isn't known yet is left out."""
    memory, gpu = run.progress.get("memory_bytes"), run.progress.get("gpu_memory_bytes")
    left = run.seconds_left
    facts = [
        ("step", format_step(run)),
        ("epoch", format_number(run.progress.get("epoch"))),
        ("time left", "" if left is None else duration.format_seconds(left)),
        ("loss", format_number(run.find_last("loss"))),
        ("validation loss", format_number(run.find_last("eval_loss"))),
        ("learning rate", format_number(run.find_last("learning_rate"))),
        ("tokens per second", f"{run.speed[1]:,.0f}" if run.speed else ""),
        ("memory", f"{memory / 1e9:.2f} GB" if memory else ""),
        ("memory of the GPU", f"{gpu / 1e9:.2f} GB" if gpu else ""),
    ]
    return [(name, text) for name, text in facts if text]


def format_run(run: Run) -> str:
    """A run in a line or two of text."""
    facts = ", ".join(f"{name} {text}" for name, text in list_facts(run))
    return format_status(run) + (f"\n  {facts}" if facts else "")
