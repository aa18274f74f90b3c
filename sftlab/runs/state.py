"""A run as its files tell it: where it stands, whether its process is alive, why it ended. Nothing is changed here.

Whatever trains into a run folder is found: what `background.start` began, `sftlab train` in a terminal, launchers, notebooks.

    python -c "from sftlab.runs import state; print(*state.find('runs'), sep='\\n')"
"""

import contextlib
import dataclasses
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.files import ROOT
from sftlab.memory import duration
from sftlab.train import checkpoints, distributed
from sftlab.train import folder as run_folder

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
    about, progress = files.read_json(folder / "run.json"), files.read_json(folder / run_folder.PROGRESS)
    result, history = files.read_json(folder / "result.json"), run_folder.read(folder)
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
    logs = find_logs(folder)
    attempt = files.read_json(logs / ABOUT)
    if not attempt or attempt["launch"] or progress.get("started", 0) < attempt["started"]:
        return attempt
    if is_same(attempt["process"], progress["process"]):
        return attempt
    log = logs / LOG
    return {"cwd": attempt["cwd"], "offset": log.stat().st_size if log.is_file() else 0}


def explain_attempt(folder: Path, attempt: dict) -> str:
    return explain_end(read_output(find_logs(folder), attempt["offset"]))


def find_process(attempt: dict, progress: dict) -> dict | None:
    """The process of a run that is at work: the one that was started in the background, else the one that trains."""
    for about in (attempt, progress):
        if "process" in about and "ended" not in about and is_alive(about["process"]):
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
    return here if here.is_dir() else ROOT / "runs"


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
        deep = len(place.relative_to(top).parts) >= DEPTH
        names[:] = (
            [] if deep or place in found else [name for name in names if not name.startswith((".", "checkpoint-"))]
        )
    return sorted(map(read, found), key=lambda run: run.started or 0, reverse=True)


WORDS = {
    "starting": "is starting: the libraries, the data and the model are being loaded",
    "running": "is running",
    "completed": "is complete",
    "interrupted": "was stopped",
    "failed": "has failed",
    "killed": "was killed",
    "none": "is not there",
}
HEADS = ("run", "status", "step", "time left", "loss", "held-out", "tokens/s", "began", "configuration")


def tell_status(run: Run) -> str:
    """What a run is doing, or why it ended, in a sentence that changes only with that."""
    if run.status == "failed" and run.said.startswith("refused: "):
        return f"{run.folder.name} was {run.said}"
    words = WORDS[run.status]
    if run.status in ACTIVE and run.attempt.get("asked"):
        words = "is stopping: a checkpoint is written first"
    elif run.status == "running" and run.progress.get("doing") == "evaluating":
        words = "is running, and measures the held-out loss"
    return f"{run.folder.name} {words}" + (f": {run.said}" if run.said else "")


def tell_step(run: Run) -> str:
    return f"{run.step} of {run.max_steps}" if run.max_steps else str(run.step or "")


def tell_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def list_facts(run: Run) -> list[tuple[str, str]]:
    """What a run has come to, as pairs of a name and a text; what isn't known yet is left out."""
    memory, gpu = run.progress.get("memory_bytes"), run.progress.get("gpu_memory_bytes")
    left, epoch = run.seconds_left, run.progress.get("epoch")
    facts = [
        ("step", tell_step(run)),
        ("epoch", tell_number(epoch)),
        ("time left", "" if left is None else duration.say(left)),
        ("loss", tell_number(run.find_last("loss"))),
        ("held-out loss", tell_number(run.find_last("eval_loss"))),
        ("learning rate", tell_number(run.find_last("learning_rate"))),
        ("tokens per second", f"{run.speed[1]:,.0f}" if run.speed else ""),
        ("memory", f"{memory / 1e9:.2f} GB" if memory else ""),
        ("memory of the GPU", f"{gpu / 1e9:.2f} GB" if gpu else ""),
    ]
    return [(name, text) for name, text in facts if text]


def tell(run: Run) -> str:
    """A run in a line or two of text."""
    facts = ", ".join(f"{name} {text}" for name, text in list_facts(run))
    return tell_status(run) + (f"\n  {facts}" if facts else "")


def list_row(run: Run, name: str) -> tuple[str, ...]:
    """A run as a line of a table under HEADS; name: what it is called there."""
    left = run.seconds_left
    began = time.strftime("%m-%d %H:%M", time.localtime(run.started)) if run.started else ""
    return (name, run.status, tell_step(run), "" if left is None else duration.say(left), tell_number(run.find_last("loss")),
            tell_number(run.find_last("eval_loss")), f"{run.speed[1]:,.0f}" if run.speed else "", began, run.config_hash)  # fmt: skip


def to_json(run: Run) -> dict:
    """A run as plain data: what the table says, in numbers, with its configuration and the last entry of its log."""
    names = ("status", "said", "step", "max_steps", "started", "config_hash", "seconds_left")
    return {"folder": str(run.folder)} | {name: getattr(run, name) for name in names} | {
        "loss": run.find_last("loss"), "eval_loss": run.find_last("eval_loss"), "tokens_per_second": run.speed[1] if run.speed else None,
        "memory_bytes": run.progress.get("memory_bytes"), "config": dataclasses.asdict(run.config) if run.config else None,
    }  # fmt: skip


# The process of a run in the background: started so that it outlives who started it, known again, and asked to stop.
#
# What is known of it stands beside the run folder, in OUTPUT_DIR-logs: background.json says which process it is and what it
# was asked for; run.log has all that it wrote.


ABOUT, LOG = "background.json", "run.log"
SAME = 0.05  # seconds by which two readings of a process's start may differ
LAST_BYTES = 20_000  # of a log are read to show its end
LAST_LINES = 12  # that may follow the error a process ended with: the rest of its text, warnings of what is cleaned up
TRACEBACK = "Traceback (most recent call last):"
NO_REFUSAL = re.compile(
    r"sftlab: ((rank \d+: )?another process of this run is gone|(rank \d+|a process) (failed|was)|interrupted|stopped;|a launcher failed)"
)
LAUNCHER = re.compile(r"sftlab: (?P<who>(rank \d+|a process|a launcher) (failed|was).*?); the others were ended")


def find_logs(folder: Path) -> Path:
    """The folder of a run's logs, as `sftlab launch` names it, too."""
    return folder.with_name(f"{folder.name}-logs")


def is_same(process: dict, other: dict) -> bool:
    """Whether `folder.identify` told the same process twice."""
    return (process["pid"], process["host"]) == (other["pid"], other["host"]) and abs(
        process["since_boot"] - other["since_boot"]
    ) < SAME


def is_elsewhere(process: dict) -> bool:
    """Whether a process is one of another machine."""
    return process["host"] != run_folder.identify()["host"]


def is_alive(process: dict) -> bool:
    """Whether a process, as `folder.identify` told it, is at work. One of another machine can't be asked, and counts as alive."""
    import psutil

    if not process:
        return False
    if is_elsewhere(process):
        return True
    try:
        now = run_folder.identify(process["pid"])
        ended = psutil.Process(process["pid"]).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    return not ended and is_same(now, process)


def has_members(group: int) -> bool:
    """Whether any process of a group is at work."""
    import psutil

    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def read_output(logs: Path, offset: int = 0, last_bytes: int = LAST_BYTES) -> str:
    """The end of what a run in the background wrote, from `offset` bytes on."""
    return read_end(logs / LOG, offset, last_bytes)


def read_end(path: Path, offset: int = 0, last_bytes: int = LAST_BYTES) -> str:
    """The end of a log, from `offset` bytes on; of a progress bar's line what was there last."""
    try:
        with path.open("rb") as log:
            log.seek(max(offset, log.seek(0, os.SEEK_END) - last_bytes))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).strip("\n")


def explain_end(output: str) -> str:
    """Why a process ended that left no result, as its last words have it; empty where it has none.

    A refusal of the lab begins with "refused: ". What is told of a process of a launch is what the launcher saw.
    """
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("sftlab doctor ")]
    for line in map(str.strip, reversed(lines)):  # a launcher indents the words of its processes
        if line.startswith("sftlab: ") and not NO_REFUSAL.match(line):
            return "refused: " + line.removeprefix("sftlab: ")
    for line in reversed(lines):
        if seen := LAUNCHER.match(line):
            failed = line != lines[-1] and "killed" not in seen["who"]
            return seen["who"] + (f": {lines[-1].strip()}" if failed else "")
    return find_error(lines)


@dataclass(frozen=True)
class Failed:
    """The process of a launch that failed first: its rank (None: not known), its log, its last words, the signal that ended it."""

    rank: int | None
    log: Path
    words: str = ""
    signal: int = 0

    @property
    def code(self) -> int:
        """An exit code: 2 for what the lab refuses, as shells have it for a signal, else 1."""
        return 128 + self.signal if self.signal else 2 if self.words.startswith("refused: ") else 1

    def __str__(self) -> str:
        who = "a process" if self.rank is None else f"rank {self.rank}"
        if self.signal == signal.SIGKILL:
            return f"{who} was killed from outside, most often for want of memory"
        if self.signal:
            return f"{who} was ended by signal {self.signal} ({signal.strsignal(self.signal)})"
        return f"{who} failed" if self.words else "a launcher failed"


def list_rank_logs(logs: Path, place: str = "ranks-*") -> dict[int, list[Path]]:
    """The logs of each rank of the last start, by rank; what it wrote to stderr stands in the last one.

    torchrun keeps NODE/RUN/attempt_0/LOCAL_RANK/stdout.log and stderr.log, deepspeed NODE/TIME_rankK.log.
    """
    found = {}
    for node in logs.glob(place):
        ranks = sorted(node.glob("*/attempt_0/*/stderr.log"))
        for log in ranks:
            rank = int(node.name.removeprefix("ranks-")) * len(ranks) + int(log.parent.name)
            found[rank] = [log.with_name("stdout.log"), log]
        found |= {int(log.stem.rpartition("_rank")[2]): [log] for log in node.glob("*_rank*.log")}
    return dict(sorted(found.items()))


def find_failed(logs: Path) -> Failed:
    """The process that failed first, by the last words of all; not one that only lost its partner.

    Where none has said why, the launchers tell of a signal that ended one; else a launcher failed itself.
    """
    ranks = {rank: paths[-1] for rank, paths in list_rank_logs(logs).items()}
    texts = {rank: read_end(log) for rank, log in ranks.items()}
    gone = re.compile(f"{distributed.GONE}|{distributed.LOST}")
    lost = {rank for rank, text in texts.items() if any(map(gone.search, text.splitlines()[-LAST_LINES:]))}
    words = {rank: explain_end(text) for rank, text in texts.items() if rank not in lost}
    if said := sorted((ranks[rank].stat().st_mtime, rank) for rank in words if words[rank]):
        rank = said[0][1]
        return Failed(rank, ranks[rank], words[rank])
    launchers = sorted(logs.glob("ranks-*/launcher.log"))
    for log in launchers:
        for found in re.finditer(r"\(local_rank: (\d+)\)\s+exitcode +: -(\d+)|return code = -(\d+)", read_end(log)):
            number = int(found[2] or found[3])
            here = [rank for rank in words if ranks[rank].is_relative_to(log.parent)]  # deepspeed doesn't say which
            if found[1]:
                here = [rank for rank, path in ranks.items() if path.match(f"{log.parent}/*/*/{found[1]}/stderr.log")]
            if number != signal.SIGTERM:
                return Failed(*(here[0], ranks[here[0]]) if len(here) == 1 else (None, log), signal=number)
    return Failed(None, next((log for log in launchers if log.stat().st_size), logs))


def find_error(lines: list[str]) -> str:
    """The error of the last traceback, if it's what a process ended with; empty if the process went on after it."""
    last = max((number for number, line in enumerate(lines) if TRACEBACK in line), default=None)
    if last is None:
        return ""
    before, after = lines[last].partition(TRACEBACK)[0], lines[last + 1 :]
    frames = (before + " ", before + "\t")
    at = next((number for number, line in enumerate(after) if not line.startswith(frames)), len(after))
    went_on = any(line.lstrip().startswith("{'") for line in after[at:])  # an entry of the Trainer's log
    return "" if at == len(after) or went_on or len(after) - at > LAST_LINES else after[at].removeprefix(before)
