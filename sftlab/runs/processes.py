"""The launchers of a run on this machine: started, watched, ended; what the first rank prints, and why the run failed."""

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlab import files
from sftlab.runs import logs, state
from sftlab.train import folder as run_folder

LAST_LINES = 15  # of a failed rank's log are printed


def run(commands: dict[int, list[str]], log_dir: Path, environment: dict, folder: Path) -> int:
    """Start the launchers of this machine, print the first rank's output, and wait; when one fails, end the others.

    commands: by the node's rank; folder: of the run. Ctrl-C asks rank 0 to stop, which passes it on to all, so that they save
    a checkpoint at the same step; where rank 0 isn't here or hasn't begun, and at the second Ctrl-C, the launchers end their
    processes. Returns 0, 130 for a run that was stopped, or an exit code that says how it failed.
    """
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # with what DeepSpeed compiles
    environment, started, asked = os.environ | environment | {"PATH": tools}, [], []
    places = [log_dir.absolute() / f"ranks-{node}" for node in commands]
    for place in places if 0 not in commands else log_dir.glob("ranks-*"):
        shutil.rmtree(place, ignore_errors=True)  # of an earlier start
    for place, command in zip(places, commands.values(), strict=True):
        place.mkdir(parents=True)
        with (place / "launcher.log").open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            # a session of its own, so that Ctrl-C comes here alone, and a whole launcher can be ended at once
            started.append(subprocess.Popen(command, env=environment, start_new_session=True, **streams))

    def end_all() -> None:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def stop(number, frame) -> None:
        asked.append(number)
        first = files.read_json(folder / run_folder.PROGRESS).get("process", {})
        if len(asked) == 1 and first.get("host") == platform.node() and state.is_alive(first):
            os.kill(first["pid"], signal.SIGTERM)
        else:
            end_all()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    printed, ended = {}, False
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
    return report_failure(log_dir, bool(asked))


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
    ranks = logs.list_rank_logs(log_dir, f"ranks-{node}")
    for log in ranks[min(ranks)] if ranks else ():
        with log.open("rb") as file:
            file.seek(printed.get(log, 0))
            text = file.read()
        printed[log] = printed.get(log, 0) + len(text)
        sys.stdout.write(text.decode("utf-8", "replace"))
        sys.stdout.flush()


def report_failure(log_dir: Path, asked: bool) -> int:
    """Print why a run ended, and return its exit code. asked: whether it was asked to stop."""
    failed = logs.find_failed(log_dir)
    if asked and not failed.reason:
        print(f"sftlab: stopped; add --resume to the same command to resume. Logs: {log_dir}", file=sys.stderr)
        return 130
    lines = [f"  {line}" for line in logs.read_end(failed.log).splitlines() if line.strip()][-LAST_LINES:]
    last = f"Its last lines ({failed.log}):" if lines else f"It wrote no error ({failed.log})."
    print("\n".join([f"\nsftlab: {failed}; the others were ended. {last}", *lines]), file=sys.stderr)
    return failed.code
