"""The state of a run, read from its files: where it is, whether its process is alive, why it ended. Nothing is changed here.

Whatever trains into a run folder is found: `runs.start`, `sftlab train` in a terminal, launchers, notebooks. One file says
what a run is doing, progress.json: `start` in it is from who started it in the background, all else from the training.

    python -c "from sftlab.runs import state; print(*state.find('runs'), sep='\\n')"
"""

from dataclasses import dataclass, field
from pathlib import Path

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.memory import duration
from sftlab.runs import logs
from sftlab.train import folder as run_folder

ACTIVE = ("starting", "running")
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
    history: the entries of its log. progress: its progress.json. process: the one to stop (`folder.identify`); None where
    none is at work.
    """

    folder: Path
    status: str
    reason: str = ""
    config: TrainConfig | None = None
    step: int = 0
    history: list[dict] = field(default_factory=list, repr=False)
    progress: dict = field(default_factory=dict, repr=False)
    process: dict | None = field(default=None, repr=False)

    @property
    def started(self) -> float | None:
        """Seconds since the epoch."""
        return self.progress.get("started")

    @property
    def max_steps(self) -> int | None:
        return self.progress.get("max_steps")

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
    about, result = files.read_json(folder / "run.json"), files.read_json(folder / "result.json")
    progress = files.read_json(folder / run_folder.PROGRESS)
    progress = progress if "started" in progress else {}  # another program's
    process = find_process(progress)
    if "start" in progress and "process" not in progress:  # it doesn't train yet; what else is here is an earlier run's
        result = {}
        if process or not about:  # of a start that was refused the earlier run's options are left, to resume it
            about = {"config": progress["start"]["config"]}
    config = TrainConfig(**TrainConfig.keep_known(about["config"])) if about.get("config") else None
    step = result.get("metrics", {}).get("steps", progress.get("step", 0))
    if not result and not process and (last := run_folder.find_last(folder)):
        step = max(step, run_folder.get_step(last))  # it's saved before progress.json has its step
    status, reason = find_status(folder, about, progress, result, process)
    return Run(folder, status, reason, config, step, run_folder.read_log(folder), progress, process)


def find_status(folder: Path, about: dict, progress: dict, result: dict, process: dict | None) -> tuple[str, str]:
    """(status, reason) of a run, from its files and the process that is at work."""
    if result:
        saved = f"a checkpoint is saved ({result.get('signal')})" if result["status"] == "interrupted" else ""
        return result["status"], result.get("error") or saved
    if process:
        return ("running" if "doing" in progress else "starting"), ""
    if "ended" in progress:
        return progress["status"], progress["reason"]
    if "asked" in progress and "doing" not in progress:
        return "interrupted", "before its first step"
    if "start" in progress and (reason := logs.explain_end(logs.read_end(logs.find_logs(folder) / logs.LOG))):
        return "failed", reason  # before it could note that: an import that fails
    return ("killed", KILLED) if progress or "config_hash" in about else ("none", "there is no run")


def find_process(progress: dict) -> dict | None:
    """The process of a run, if it is at work."""
    process = progress.get("process") or progress.get("start", {}).get("process")
    # ended: a notebook's kernel lives on
    return process if process and "ended" not in progress and run_folder.is_alive(process) else None


def find_place() -> Path:
    """The default folder of runs: `runs` in the working directory; where there is none, that of the course."""
    here = Path("runs")
    return here if here.is_dir() else files.ROOT / "runs"


def find(folder: str | Path | None = None) -> list[Run]:
    """All runs in a folder (default: `find_place`) and the folders in it, the last one that began first."""
    top = Path(folder or find_place()).absolute()
    places = {path.parent for name in ("run.json", run_folder.PROGRESS) for path in top.rglob(name)}
    found = [run for run in map(read, sorted(places)) if run.status != "none"]
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
    speed, left, texts = run.speed, run.seconds_left, {}
    texts["step"] = f"{run.step} of {run.max_steps}" if run.max_steps else str(run.step or "")
    texts["time left"] = "" if left is None else duration.format_seconds(left)
    numbers = {
        "epoch": (run.progress.get("epoch"), "{:.4g}"),
        "loss": (run.find_last("loss"), "{:.4g}"),
        "validation loss": (run.find_last("eval_loss"), "{:.4g}"),
        "learning rate": (run.find_last("learning_rate"), "{:.4g}"),
        "tokens per second": (speed and speed[1], "{:,.0f}"),
        "memory": (run.progress.get("memory_bytes", 0) / 1e9 or None, "{:.2f} GB"),
    }
    return texts | {name: "" if value is None else form.format(value) for name, (value, form) in numbers.items()}


def format_run(run: Run) -> str:
    """A run in a line or two of text."""
    facts = ", ".join(f"{name} {text}" for name, text in list_facts(run).items() if text)
    return format_status(run) + (f"\n  {facts}" if facts else "")
