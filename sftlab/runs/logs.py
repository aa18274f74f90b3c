"""What the processes of a run printed: the end of a log, why a process ended, which process of a launch failed first.

A background run writes OUTPUT_DIR-logs/run.log; a launcher keeps a log for each rank in OUTPUT_DIR-logs/ranks-NODE.

    python -c "from pathlib import Path; from sftlab.runs import logs; print(logs.find_failed(Path('runs/first-logs')))"
"""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from sftlab.train import distributed

LOG = "run.log"
LAST_BYTES = 20_000  # of a log are read to show its end
LAST_LINES = 12  # that may follow the error a process ended with: the rest of its text, warnings at its clean-up
TRACEBACK = "Traceback (most recent call last):"
NO_REFUSAL = re.compile(
    r"sftlab: ((rank \d+: )?another process of this run is gone|(rank \d+|a process) (failed|was)|interrupted|stopped;|a launcher failed)"
)
LAUNCHER = re.compile(r"sftlab: (?P<who>(rank \d+|a process|a launcher) (failed|was).*?); the others were ended")
SIGNALLED = re.compile(r"\(local_rank: (\d+)\)\s+exitcode +: -(\d+)|return code = -(\d+)")


def find_logs(folder: Path) -> Path:
    """The folder of a run's logs, beside the run folder."""
    return folder.with_name(f"{folder.name}-logs")


def read_end(path: Path, offset: int = 0, last_bytes: int = LAST_BYTES) -> str:
    """The last bytes of a log, from `offset` on; empty without one. Of a progress bar only its last state is kept."""
    try:
        with path.open("rb") as log:
            log.seek(max(offset, log.seek(0, os.SEEK_END) - last_bytes))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def explain_end(output: str) -> str:
    """Why a process ended that left no result, from the end of its output; empty where that doesn't say.

    A refusal of the lab begins with "refused: ". For a launch it is what the launcher reported.
    """
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("sftlab doctor ")]
    for line in map(str.strip, reversed(lines)):  # a launcher indents what its processes printed
        if line.startswith("sftlab: ") and not NO_REFUSAL.match(line):
            return "refused: " + line.removeprefix("sftlab: ")
    for line in reversed(lines):
        if seen := LAUNCHER.match(line):
            failed = line != lines[-1] and "killed" not in seen["who"]
            return seen["who"] + (f": {lines[-1].strip()}" if failed else "")
    return find_error(lines)


def find_error(lines: list[str]) -> str:
    """The error of the last traceback, if a process ended with it; empty if the process continued."""
    last = max((number for number, line in enumerate(lines) if TRACEBACK in line), default=None)
    if last is None:
        return ""
    prefix, after = lines[last].partition(TRACEBACK)[0], lines[last + 1 :]
    frames = (prefix + " ", prefix + "\t")
    at = next((number for number, line in enumerate(after) if not line.startswith(frames)), len(after))
    continued = any(line.lstrip().startswith("{'") for line in after[at:])  # an entry of the Trainer's log
    return "" if at == len(after) or continued or len(after) - at > LAST_LINES else after[at].removeprefix(prefix)


@dataclass(frozen=True)
class FailedProcess:
    """The process of a launch that failed first. `rank` is None where it isn't known, `signal` 0 where none ended it."""

    rank: int | None
    log: Path
    reason: str = ""
    signal: int = 0

    @property
    def code(self) -> int:
        """An exit code: 2 for what the lab refuses, as shells have it for a signal, else 1."""
        return 128 + self.signal if self.signal else 2 if self.reason.startswith("refused: ") else 1

    def __str__(self) -> str:
        who = "a process" if self.rank is None else f"rank {self.rank}"
        if self.signal == signal.SIGKILL:
            return f"{who} was killed from outside, most often because memory ran out"
        if self.signal:
            return f"{who} was ended by signal {self.signal} ({signal.strsignal(self.signal)})"
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
    texts = {rank: read_end(log) for rank, log in ranks.items()}
    gone = re.compile(f"{distributed.GONE}|{distributed.LOST}")
    lost = {rank for rank, text in texts.items() if any(map(gone.search, text.splitlines()[-LAST_LINES:]))}
    reasons = {rank: explain_end(text) for rank, text in texts.items() if rank not in lost}
    if known := sorted((ranks[rank].stat().st_mtime, rank) for rank in reasons if reasons[rank]):
        rank = known[0][1]
        return FailedProcess(rank, ranks[rank], reasons[rank])
    launchers = sorted(folder.glob("ranks-*/launcher.log"))
    for log in launchers:
        for found in SIGNALLED.finditer(read_end(log)):
            number = int(found[2] or found[3])
            here = [rank for rank in reasons if ranks[rank].is_relative_to(log.parent)]  # deepspeed doesn't say which
            if found[1]:
                here = [rank for rank, path in ranks.items() if path.match(f"{log.parent}/*/*/{found[1]}/stderr.log")]
            if number != signal.SIGTERM:
                return FailedProcess(*(here[0], ranks[here[0]]) if len(here) == 1 else (None, log), signal=number)
    return FailedProcess(None, next((log for log in launchers if log.stat().st_size), folder))
