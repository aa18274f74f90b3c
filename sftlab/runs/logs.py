"""What the processes of a run print: the end of a log, why a process ended, which process failed first.

A background run writes OUTPUT_DIR-logs/run.log; a launcher keeps a log for each rank in OUTPUT_DIR-logs/ranks-NODE.

    python -c "from pathlib import Path; from sftlab.runs import logs; print(logs.find_failed(Path('runs/first-logs')))"
"""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

LOG = "run.log"
LAST_BYTES = 20_000  # of a log are read to show its end
PRINTED = 15  # lines of a failed process's log
LAST_LINES = 12  # that may follow the error a process ended with: the rest of its text, warnings at its clean-up
TRACEBACK = "Traceback (most recent call last):"
REFUSAL = re.compile(r"(?:^\s*|\])sftlab: (?!interrupted)(.+)", re.M)  # ]: of a progress bar before it
# torchrun writes [rank0]: before each line
ERROR = re.compile(rf"^(.*){re.escape(TRACEBACK)}\n(?:\1[ \t].*\n)+\1(\S.*)", re.M)
# what torch says in a process that only lost its partner
LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket Timeout|Timed out waiting|ncclRemoteError|remote process exited|"
    r"Watchdog caught collective operation timeout|socketPoll"
)
# as torchrun and as the deepspeed launcher write it
SIGNALLED = re.compile(r"local_rank: (\d+)\)\s+exitcode +: -(\d+)|(?:--local_rank=(\d+)'.*)?return code = -(\d+)")


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

    @property
    def last_lines(self) -> list[str]:
        return [line for line in read_end(self.log).splitlines() if line.strip()][-PRINTED:]

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
    if len(own) == 1 < len(ranks):  # it left no word, and all others say that they lost it
        return FailedProcess(rank := own.pop(), ranks[rank], code=128 + signal.SIGKILL)
    return FailedProcess(None, next((log for log in launchers if log.stat().st_size), folder))
