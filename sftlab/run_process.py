"""The process of a run in the background: started so that it outlives who started it, known again, and asked to stop.

What is known of it stands beside the run folder, in OUTPUT_DIR-logs: background.json says which process it is and what it
was asked for; run.log has all that it wrote.

    python -c "from sftlab import run_process; help(run_process.start)"
"""

import os
import re
import subprocess
import threading
import time
from pathlib import Path

from sftlab import files, run_log

ABOUT, LOG = "background.json", "run.log"
SAME = 0.05  # seconds by which two readings of a process's start may differ
LAST_BYTES = 20_000  # of a log are read to show its end
LAST_LINES = 12  # that may follow the error a process ended with: the rest of its text, warnings of what is cleaned up
TRACEBACK = "Traceback (most recent call last):"
NO_REFUSAL = re.compile(
    r"sftlab: ((rank \d+: )?another process of this run is gone|rank \d+ on |interrupted|stopped;|a launcher failed)"
)
LAUNCHER = re.compile(r"sftlab: (?P<who>rank \d+ on .*?|a launcher failed.*?); (the others were ended|its last lines)")


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


def read_output(logs: Path, offset: int = 0, last_bytes: int = LAST_BYTES) -> str:
    """The end of what a run wrote, from `offset` bytes on; of a progress bar's line what was there last."""
    try:
        with (logs / LOG).open("rb") as log:
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
