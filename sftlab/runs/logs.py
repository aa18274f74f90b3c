"""What the processes of a run print: launchers run and their logs followed, the end of a log, which process failed first.

A background run writes OUTPUT_DIR-logs/run.log; a launcher keeps a log for each rank in OUTPUT_DIR-logs/ranks-NODE.

    python -c "from pathlib import Path; from sftlab.runs import logs; print(logs.find_failed(Path('runs/first-logs')))"
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sftlab import files
from sftlab.runs import state
from sftlab.train import distributed
from sftlab.train import folder as run_folder

LOG = "run.log"
PROGRAMS = Path(sys.executable).parent
LAST_BYTES = 20_000  # of a log are read to show its end
LAST_LINES = 12  # that may follow the error a process ended with: the rest of its text, warnings at its clean-up
PRINTED = 15  # lines of a failed rank's log
TRACEBACK = "Traceback (most recent call last):"
REFUSAL = re.compile(r"(?:^\s*|\])sftlab: (?!interrupted)(.+)", re.M)  # ]: of a progress bar before it
ERROR = re.compile(
    rf"^(.*){re.escape(TRACEBACK)}\n(?:\1[ \t].*\n)+\1(\S.*)", re.M
)  # torchrun writes [rank0]: before each line
LOST = re.compile(f"{distributed.GONE}|{distributed.LOST}")  # what a process says that only lost its partner
# as torchrun and as the deepspeed launcher write it
SIGNALLED = re.compile(r"local_rank: (\d+)\)\s+exitcode +: -(\d+)|(?:--local_rank=(\d+)'.*)?return code = -(\d+)")


def run(commands: dict[int, list[str]], log_dir: Path, environment: dict, folder: Path) -> int:
    """Start the launchers of this machine, print the first rank's output, and wait; when one fails, end the others.

    commands: by the node's rank; folder: of the run. Ctrl-C asks rank 0 to stop, which passes it on to all, so that they save
    a checkpoint at the same step; where rank 0 isn't here or hasn't begun, and at the second Ctrl-C, the launchers end their
    processes. Returns 0, 130 for a run that was stopped, or an exit code that says how it failed.
    """
    places = [log_dir / f"ranks-{node}" for node in commands]
    for place in places if 0 not in commands else log_dir.glob("ranks-*"):
        shutil.rmtree(place, ignore_errors=True)  # of an earlier start
    started = [
        start_launcher(command, place, environment) for place, command in zip(places, commands.values(), strict=True)
    ]
    asked, ended, printed = [], False, {}

    def end_all() -> None:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def stop(number, frame) -> None:
        asked.append(number)
        first = files.read_json(folder / run_folder.PROGRESS).get("process")
        if len(asked) == 1 and first and not state.is_elsewhere(first) and state.is_alive(first):
            os.kill(first["pid"], signal.SIGTERM)
        else:
            end_all()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(process.poll() is None or has_members(process.pid) for process in started):
            print_new(log_dir, min(commands), printed)
            if not ended and any(process.poll() for process in started):
                end_all()
                ended = True
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print_new(log_dir, min(commands), printed)
    if not any(process.returncode for process in started):
        print(f"all processes have ended without an error; their logs: {log_dir}")
        return 0
    return report_failure(log_dir, folder, bool(asked))


def start_launcher(command: list[str], place: Path, environment: dict) -> subprocess.Popen:
    """Start one; it has a session of its own, so that Ctrl-C comes here alone, and all it starts can be ended at once."""
    tools = f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}"  # with what DeepSpeed compiles
    place.mkdir(parents=True)
    with (place / "launcher.log").open("wb") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen(
            command, env=os.environ | environment | {"PATH": tools}, start_new_session=True, **streams
        )


def has_members(group: int) -> bool:
    """Whether any process of a group is at work."""
    import psutil

    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def print_new(log_dir: Path, node: int, printed: dict[Path, int]) -> None:
    """Print what the logs of a node's first rank have grown by. printed: bytes by log, which is updated."""
    ranks = list_rank_logs(log_dir, f"ranks-{node}")
    for log in ranks[min(ranks)] if ranks else ():
        with log.open("rb") as file:
            file.seek(printed.get(log, 0))
            text = file.read()
        printed[log] = printed.get(log, 0) + len(text)
        print(text.decode("utf-8", "replace"), end="", flush=True)


def report_failure(log_dir: Path, folder: Path, asked: bool) -> int:
    """Print why a run ended, note it in the run folder, and return the exit code. asked: whether it was asked to stop."""
    failed = find_failed(log_dir)
    if asked and not failed.reason:
        print(f"sftlab: stopped; add --resume to the same command to resume. Logs: {log_dir}", file=sys.stderr)
        return 130
    said = failed.reason if failed.code == 2 else f"{failed}: {failed.reason}".removesuffix(": ")
    run_folder.note_end(folder, "failed", said)
    lines = [f"  {line}" for line in read_end(failed.log).splitlines() if line.strip()][-PRINTED:]
    last = f"Its last lines ({failed.log}):" if lines else f"It wrote no error ({failed.log})."
    print("\n".join([f"\nsftlab: {failed}; the others were ended. {last}", *lines]), file=sys.stderr)
    return failed.code


def find_logs(folder: Path) -> Path:
    """The folder of a run's logs, beside the run folder."""
    return folder.with_name(f"{folder.name}-logs")


def read_end(path: Path, last_bytes: int = LAST_BYTES) -> str:
    """The last bytes of a log; empty without one. Of a progress bar only its last state is kept."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - last_bytes))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def explain_end(output: str) -> str:
    """Why a process ended that left no result, from the end of its output; empty where that doesn't say.

    A refusal of the lab begins with "refused: "; else it is the error of the last traceback, unless the process continued.
    """
    if refusals := REFUSAL.findall(output):
        return f"refused: {refusals[-1]}"
    *_, last = None, *ERROR.finditer(output)
    return last[2] if last and output.count("\n", last.end()) <= LAST_LINES else ""


@dataclass(frozen=True)
class FailedProcess:
    """The process of a launch that failed first. `rank`: None where it isn't known.

    code: its exit code: 2 for what the lab refuses, 128 and the number of a signal, else 1.
    """

    rank: int | None
    log: Path
    reason: str = ""
    code: int = 1

    def __str__(self) -> str:
        who = "a process" if self.rank is None else f"rank {self.rank}"
        if self.code == 128 + signal.SIGKILL:
            return f"{who} was killed from outside, most often because memory ran out"
        if self.code > 128:
            return f"{who} was ended by signal {self.code - 128} ({signal.strsignal(self.code - 128)})"
        return f"{who} failed" if self.reason else "a launcher failed"


def list_rank_logs(folder: Path, place: str = "ranks-*") -> dict[int, list[Path]]:
    """The logs of each rank of the last start, by rank; stderr is in the last one.

    torchrun keeps NODE/RUN/attempt_0/LOCAL_RANK/stdout.log and stderr.log, deepspeed NODE/TIME_rankK.log.
    """
    found = {}
    for node in folder.glob(place):
        ranks = sorted(node.glob("*/attempt_0/*/stderr.log"))
        for log in ranks:
            rank = int(node.name.removeprefix("ranks-")) * len(ranks) + int(log.parent.name)
            found[rank] = [log.with_name("stdout.log"), log]
        found |= {int(log.stem.rpartition("_rank")[2]): [log] for log in node.glob("*_rank*.log")}
    return dict(sorted(found.items()))


def find_failed(folder: Path) -> FailedProcess:
    """The process that failed first, not one that only lost its partner.

    Where no rank's log says why, the launchers' logs name the signal that ended one; else a launcher itself failed.
    """
    ranks = {rank: paths[-1] for rank, paths in list_rank_logs(folder).items()}
    ends = {rank: read_end(log) for rank, log in ranks.items()}
    own = {rank for rank, end in ends.items() if not any(map(LOST.search, end.splitlines()[-LAST_LINES:]))}
    reasons = {rank: reason for rank in own if (reason := explain_end(ends[rank]))}
    if reasons:
        rank = min(reasons, key=lambda rank: (ranks[rank].stat().st_mtime, rank))
        return FailedProcess(rank, ranks[rank], reasons[rank], 2 if reasons[rank].startswith("refused: ") else 1)
    launchers = sorted(folder.glob("ranks-*/launcher.log"))
    for log in launchers:
        here = sorted(rank for rank, path in ranks.items() if path.is_relative_to(log.parent))
        for found in SIGNALLED.finditer(read_end(log)):
            local, number = found[1] or found[3], int(found[2] or found[4])
            if number != signal.SIGTERM:
                rank = here[int(local)] if local and int(local) < len(here) else None
                rank = rank if rank in own else None  # by ssh one log is of several nodes
                return FailedProcess(rank, ranks.get(rank, log), code=128 + number)
    return FailedProcess(None, next((log for log in launchers if log.stat().st_size), folder))
