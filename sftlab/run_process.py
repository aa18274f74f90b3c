"""The process of a run in the background: started so that it outlives who started it, known again, and asked to stop.

What is known of it stands beside the run folder, in OUTPUT_DIR-logs: background.json says which process it is and what it
was asked for; run.log has all that it wrote.

    python -c "from sftlab import run_process; help(run_process.start)"
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sftlab import distributed, files, run_log

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


def start(command: list[str], logs: Path, about: dict, cwd: str) -> None:
    """Start a command that goes on when this process, its terminal or its notebook ends; note it in background.json.

    It has a session of its own, so that neither Ctrl-C nor the end of a kernel reaches it, and this process takes note of
    its end as soon as it comes, so that none is left defunct. What it writes is added to run.log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JPY_")}
    environment = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | environment
    with (logs / LOG).open("ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        log.flush()
        offset = log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=cwd, env=environment,
                                   start_new_session=True)  # fmt: skip
    identity = run_log.identify(process.pid)  # while it can't be gone, as nobody has waited for it
    threading.Thread(target=process.wait, name=f"run {process.pid}", daemon=True).start()
    about = {"process": identity, "started": time.time(), "offset": offset, "cwd": cwd} | about
    files.write_json(logs / ABOUT, about)


def is_same(process: dict, other: dict) -> bool:
    """Whether `run_log.identify` told the same process twice."""
    return (process["pid"], process["host"]) == (other["pid"], other["host"]) and abs(
        process["since_boot"] - other["since_boot"]
    ) < SAME


def is_elsewhere(process: dict) -> bool:
    """Whether a process is one of another machine."""
    return process["host"] != run_log.identify()["host"]


def is_alive(process: dict) -> bool:
    """Whether a process, as `run_log.identify` told it, is at work. One of another machine can't be asked, and counts as alive."""
    import psutil

    if not process:
        return False
    if is_elsewhere(process):
        return True
    try:
        now = run_log.identify(process["pid"])
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
