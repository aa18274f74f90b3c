"""What each process of a run writes, in a file of its own; and which one failed first, when a run ends.

With SFTLAB_LOG_DIR set, rank 3 writes all its output to rank-3.log there, and who it is, and how it ended, to rank-3.json.
A process that was killed leaves no word of its end: that is how it is told from those that only lost their partner.

    python -m sftlab.rank_logs runs/first-logs
"""

import contextlib
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sftlab import distributed, files

VARIABLE = "SFTLAB_LOG_DIR"
LAST_LINES = 15
KILLED = 128 + 9  # what shells give as the exit code of a process that SIGKILL ended
# Exit codes of processes that did not fail themselves: done, stopped by SIGHUP, SIGINT, SIGTERM, or because another failed.
NOT_ITS_OWN = (0, 129, 130, 143, distributed.FOLLOWED)


@dataclass(frozen=True)
class Failed:
    """The process that failed first."""

    rank: int
    host: str
    code: int
    how: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.how}"


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


def read_ranks(folder: str | Path, ranks: list[int] | None = None) -> list[dict]:
    """What the processes have noted, by rank; of these ranks alone, or of all."""
    found = [files.read_json(path) for path in Path(folder).glob("rank-*.json")]
    kept = [about for about in found if "rank" in about and (ranks is None or about["rank"] in ranks)]
    return sorted(kept, key=lambda about: about["rank"])


def forget(folder: str | Path, ranks: list[int] | None) -> None:
    """Take away what these ranks, or all and the launchers, left at an earlier start, so that it isn't taken for this one's."""
    folder = Path(folder)
    names = ["rank-*.json", "rank-*.log", "launcher-*.log"]
    if ranks is not None:
        names = [f"rank-{rank}.{kind}" for rank in ranks for kind in ("json", "log")]
    for path in [path for name in names for path in folder.glob(name)]:
        path.unlink(missing_ok=True)


def read_last(folder: str | Path, rank: int) -> list[str]:
    """The last lines of a rank's log; of progress bars only what stands last."""
    path = Path(folder) / f"rank-{rank}.log"
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line][-LAST_LINES:]


def lost_partner(folder: str | Path, rank: int) -> bool:
    """Whether a rank ended because another one was gone, by its own words or those of its network."""
    words = f"{distributed.GONE}|{distributed.LOST}"
    return any(re.search(words, line) for line in read_last(folder, rank))


def is_alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def list_alive(folder: str | Path, ranks: list[int]) -> list[int]:
    """Ranks on this machine whose process is there."""
    here = [about for about in read_ranks(folder, ranks) if about["host"] == platform.node()]
    return [about["rank"] for about in here if "ended" not in about and is_alive(about["pid"])]


def find_killed(folder: str | Path, ranks: list[int]) -> list[int]:
    """Ranks on this machine whose process is gone without a note of its end."""
    here = [about for about in read_ranks(folder, ranks) if about["host"] == platform.node() and "ended" not in about]
    gone = {about["rank"] for about in here if not is_alive(about["pid"])}
    # one that has ended well in the meantime has written its note by now
    return [about["rank"] for about in read_ranks(folder, ranks) if about["rank"] in gone and "ended" not in about]


def find_failed(
    folder: str | Path, ranks: list[int] | None = None, killed: dict[int, float] | None = None
) -> Failed | None:
    """The process that failed first, by what all have noted; None where none has.

    killed: ranks that were seen to be gone without a word, and when. One that fails later was its victim, and one that is
    killed later, too: launchers end those that wait for a process that has failed.
    """
    killed, found = killed or {}, read_ranks(folder, ranks)
    own = [
        about for about in found if about.get("exit", 0) not in NOT_ITS_OWN and not lost_partner(folder, about["rank"])
    ]
    first = min(own, key=lambda about: about["ended"], default=None)
    gone = [about for about in found if about["rank"] in killed]
    early = min(gone, key=lambda about: killed[about["rank"]], default=None)
    if early and (first is None or killed[early["rank"]] < first["ended"]):
        return Failed(early["rank"], early["host"], KILLED, "was killed from outside, most often for want of memory")
    if first:
        return Failed(first["rank"], first["host"], first["exit"], f"ended with exit code {first['exit']}")
    for about in found:
        if "ended" not in about:
            return Failed(about["rank"], about["host"], KILLED, "ended without a word: something killed it, most often for want of memory")  # fmt: skip
    return None


if __name__ == "__main__":
    failed = find_failed(sys.argv[1])
    if failed:
        print("\n".join([f"sftlab: {failed}; its last lines:", *read_last(sys.argv[1], failed.rank)]), file=sys.stderr)
