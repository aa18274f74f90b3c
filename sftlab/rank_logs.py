"""What each process of a run writes, in a file of its own; and which one failed first, when a run ends.

With SFTLAB_LOG_DIR set, rank 3 writes all its output to rank-3.log there, and who it is, and how it ended, to rank-3.json.
A process that was killed leaves no word of its end: that is how it is told from those that only lost their partner.

    python -c "from sftlab import rank_logs; print(rank_logs.find_failed('runs/first-logs'))"
"""

import contextlib
import os
import platform
import re
import sys
import time
from pathlib import Path

from sftlab import distributed, files

VARIABLE = "SFTLAB_LOG_DIR"
LAST_LINES = 15
KILLED = 128 + 9  # what shells give as the exit code of a process that SIGKILL ended


@contextlib.contextmanager
def logging_rank():
    """Send this process's output to its file, where the launcher asks for that, and note how the block ends."""
    if VARIABLE not in os.environ:
        yield
        return
    folder, rank = Path(os.environ[VARIABLE]), distributed.read_world().rank
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    about = {"rank": rank, "host": platform.node(), "pid": os.getpid(), "started": time.time()}
    files.write_json(folder / f"rank-{rank}.json", about)
    ended = {"exit": 1}
    try:
        yield
        ended = {"exit": 0}
    except SystemExit as error:
        ended = {"exit": error.code if isinstance(error.code, int) else 1}
        raise
    finally:
        files.write_json(folder / f"rank-{rank}.json", about | ended | {"ended": time.time()})


def read_ranks(folder: str | Path) -> list[dict]:
    """What the processes have noted, by rank."""
    found = [files.read_json(path) for path in Path(folder).glob("rank-*.json")]
    return sorted((rank for rank in found if "rank" in rank), key=lambda rank: rank["rank"])


def forget(folder: str | Path, ranks: list[int]) -> None:
    """Take away what these ranks left at an earlier start, so that it isn't taken for this one's."""
    for rank in ranks:
        for path in (Path(folder) / f"rank-{rank}.json", Path(folder) / f"rank-{rank}.log"):
            path.unlink(missing_ok=True)


def read_last(folder: str | Path, rank: int) -> list[str]:
    """The last lines of a rank's log; of progress bars only what stands last."""
    path = Path(folder) / f"rank-{rank}.log"
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line][-LAST_LINES:]


def lost_partner(folder: str | Path, rank: int) -> bool:
    """Whether a rank ended because another one was gone, by its own words or those of its network."""
    return any(
        "another process of this run is gone" in line or re.search(distributed.LOST, line)
        for line in read_last(folder, rank)
    )


def is_alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_killed(folder: str | Path) -> list[int]:
    """Ranks on this machine whose process is gone without a note of its end."""
    here = [rank for rank in read_ranks(folder) if rank["host"] == platform.node() and "ended" not in rank]
    return [rank["rank"] for rank in here if not is_alive(rank["pid"])]


def find_failed(folder: str | Path) -> tuple[int, int, str] | None:
    """(rank, exit code, how it ended) of the process that failed first, by what all have noted; None where none has."""
    ranks = read_ranks(folder)
    own = [
        rank for rank in ranks if rank.get("exit", 0) not in (0, 130, 143) and not lost_partner(folder, rank["rank"])
    ]
    if own:
        first = min(own, key=lambda rank: rank["ended"])
        return first["rank"], first["exit"], f"ended with exit code {first['exit']}"
    silent = [rank for rank in ranks if "ended" not in rank]
    if silent:
        return silent[0]["rank"], KILLED, "ended without a word: something killed it, most often for want of memory"
    return None
