"""Samples of a machine, a program or a command, each second, into DIR/metrics.jsonl: `sftlab metrics`.

    sftlab metrics results/current/                          # the machine, until Ctrl-C
    sftlab metrics results/current/ --pid 123                # that process and all below it, until it ends
    sftlab metrics results/current/ -- sftlab train …        # a command: its output, exit code and signals are its own

Each line is written at once, so that whatever ends the watcher leaves what was seen until then. At the end DIR/summary.json
says what it came to; `sftlab metrics DIR --summary` says it again from the lines. `watching` does it from within a program.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlab import gpus, metrics, metrics_file
from sftlab.config import MetricsConfig
from sftlab.options import UserError

FORWARDED = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def watch(config: MetricsConfig, command: list[str]) -> int:
    """Watch as configured and return the exit code: the command's, 128 + its signal, else 0."""
    path = Path(config.output_dir) / "metrics.jsonl"
    if config.summary:
        print("\n".join(metrics.tell(metrics_file.write_summary(path))))
        return 0
    if command and config.pid is not None:
        raise UserError("pid: a command after -- is watched by itself; leave out --pid, or the command.")
    if command and shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: no such program. After -- stands a command as you would type it.")
    process = find_process(config.pid)
    metrics_file.claim_file(path, config)
    say = print if not command else lambda *words: print(*words, file=sys.stderr)  # its standard output is its own
    say(f"{path}: a line each {config.every:g} s" + ("" if command or process else ", until Ctrl-C"))
    if gpus.find_gpus()[1]:
        say(f"no GPU values: {gpus.find_gpus()[1]}")
    code = watch_command(path, config, command) if command else watch_others(path, config, process)
    try:
        say("\n".join(metrics.tell(metrics_file.write_summary(path))))
    except UserError as error:
        if not command:
            raise
        say(f"sftlab: {error}")  # the exit code is the command's
    return code


def find_process(pid: int | None):
    """The process, or None for none; raises UserError if it isn't there."""
    import psutil

    try:
        return None if pid is None else psutil.Process(pid)
    except psutil.Error as error:
        raise UserError(f"pid: no process {pid} runs here. `ps` lists those that do.") from error


def watch_others(path: Path, config: MetricsConfig, process) -> int:
    """Watch a process that runs, until it ends, or the machine, until Ctrl-C or SIGTERM."""
    import psutil

    stopped = []

    def ended() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(stopped) or (process is not None and process.status() == psutil.STATUS_ZOMBIE)
        return True

    name = "the machine" if process is None else f"process {process.pid}"
    with handling(("SIGINT", "SIGTERM"), lambda number, frame: stopped.append(number)):
        try:
            metrics_file.record(path, config, config.pid, name, ended, live=sys.stderr.isatty())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; what was written until then is whole.") from error
    return 0


def watch_command(path: Path, config: MetricsConfig, command: list[str]) -> int:
    """Run a command and watch it and all below it; what can't be written doesn't end it."""
    child, early = None, []

    def forward(number, frame) -> None:
        if number in (signal.SIGINT, signal.SIGQUIT) and at_terminal():
            return  # the terminal has sent it to the command as well
        early.append(number) if child is None else child.send_signal(number)

    with handling(FORWARDED, forward):
        try:
            child = subprocess.Popen(command)
        except OSError as error:
            raise UserError(f"{command[0]}: can't be run: {error.strerror}.") from error
        for number in early:
            child.send_signal(number)
        try:
            # From here down, itself left out: the time of a command that has ended stands in its parent's count.
            metrics_file.record(path, config, os.getpid(), Path(command[0]).name, lambda: child.poll() is not None)
        except OSError as error:
            print(f"sftlab: {path}: {error.strerror}; the command goes on, unwatched", file=sys.stderr)
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def handling(names: tuple, handler):
    """Let a function receive these signals; those that are ignored (nohup) stay so, for a command, too."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def at_terminal() -> bool:
    """Whether this process is in the foreground of a terminal, whose Ctrl-C goes to all processes there."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def watching(folder: str | Path | None, every: float = 1.0, pid: int | None = None):
    """Watch this process, or `pid`, and all below it while the block runs: `with watching(folder) as found:`.

    A process of its own samples, which ends with the block, or with the process that it watches, whatever ends that.
    After the block `found` holds the summary (`metrics.summarise`), and is empty where folder is None: nothing is watched.
    Raises UserError if the folder has samples already, or can't be written.
    """
    found = {}
    if folder is None:
        yield found
        return
    path = Path(folder) / "metrics.jsonl"
    metrics_file.claim_file(path, MetricsConfig(output_dir=str(folder), every=every))
    command = [sys.executable, "-m", "sftlab.cli", "metrics", str(folder), "--append"]
    command += ["--pid", str(pid or os.getpid()), "--every", str(every)]
    watcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)  # fmt: skip
    while not path.read_bytes().count(b"\n") > 1:  # the block begins when it's watched
        if watcher.poll() is not None:
            raise UserError(f"watching {pid or os.getpid()} failed: {watcher.stderr.read().strip()}")
        time.sleep(metrics_file.STEP)
    try:
        yield found
    finally:
        watcher.terminate()
        watcher.communicate()
        found |= metrics.summarise(metrics.read(path)[0])
