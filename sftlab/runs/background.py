"""Runs in the background: start, stop with a checkpoint, resume, wait.

A run that is started here continues when the notebook, its kernel, the browser and the terminal are closed; `state` finds
it again.

    python -c "from sftlab import runs; from sftlab.config import TrainConfig; runs.start(TrainConfig(max_steps=5))"
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from sftlab import files
from sftlab.config import text as config_text
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.runs import logs, state
from sftlab.runs.state import ACTIVE, Run, read
from sftlab.train import folder as run_folder


def start(config: TrainConfig) -> Run:
    """Start a training in the background, and return at once.

    A refusal that is cheap to find is raised here (UserError); any other is the run's `reason`.
    """
    if read(config.output_dir).status in ACTIVE:
        raise UserError(f"output_dir: a run is at work in {config.output_dir}. Stop it first, or name another.")
    run_folder.claim_folder(config, 1)
    return spawn(config, os.getcwd())


def spawn(config: TrainConfig, cwd: str, step: int = 0) -> Run:
    """Start the process of a run, and note it in progress.json. cwd: what the relative paths of `config` start from.

    This process waits for it in a thread, so that none is left defunct. Its output goes into run.log.
    """
    folder = Path(cwd, config.output_dir)
    environment = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | os.environ
    command = [sys.executable, "-m", "sftlab.cli", "train", *config_text.to_flags(config)]
    process = start_process(command, logs.find_logs(folder) / logs.LOG, environment, cwd)
    identity = run_folder.identify(process.pid)  # it exists, even if it has ended, as nobody has waited for it
    threading.Thread(target=process.wait, name=f"run {process.pid}", daemon=True).start()
    about = {"process": identity, "config": dataclasses.asdict(config)}
    progress = {"start": about, "started": time.time(), "step": step, "cwd": cwd}
    files.write_json(folder / run_folder.PROGRESS, progress)
    return read(folder)


def start_process(command: list[str], log: Path, environment: dict, cwd: str | None = None) -> psutil.Popen:
    """Start a process whose output goes into a log, in a session of its own: no Ctrl-C and no end of a kernel reaches it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        return psutil.Popen(command, env=environment, cwd=cwd, start_new_session=True, **streams)


def end_processes(processes: list[psutil.Popen]) -> None:
    """End those that are at work, and all below them."""
    family = [one for first in processes if first.poll() is None for one in (*first.children(recursive=True), first)]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(one)
        _, family = psutil.wait_procs(family, timeout=10)


def stop(run: Run) -> None:
    """Ask a run to write a checkpoint and end, which it does after its present step. Returns at once.

    Raises UserError for a run that is not at work, or is on another machine.
    """
    run = read(run.folder)
    if run.status not in ACTIVE:
        raise UserError(f"{state.format_status(run)}; there is nothing to stop.")
    if run_folder.is_elsewhere(run.process):
        raise UserError(f"{run.folder.name}: the run is at work on {run.process['host']}. Stop it there.")
    # a notebook's kernel or a terminal's command takes SIGINT in every state; a background process may ignore it
    os.kill(run.process["pid"], signal.SIGTERM if "start" in run.progress else signal.SIGINT)
    run_folder.update_progress(run.folder, {"asked": time.time()})


def resume(run: Run) -> Run:
    """Resume a run from its last checkpoint, in the background, with the options that it had. Returns at once.

    Raises UserError where there is nothing to resume from.
    """
    run = read(run.folder)
    if run.status in ACTIVE or run.config is None:
        why = "the run is at work already" if run.config else "there is no run to resume"
        raise UserError(f"{run.folder.name}: {why}.")
    config = dataclasses.replace(run.config, resume=True, overwrite=False, output_dir=str(run.folder))
    run_folder.claim_folder(config, 1)
    cwd = run.progress.get("cwd", "")
    return spawn(config, cwd if os.path.isdir(cwd) else os.getcwd(), run.step)


def wait(run: Run) -> Run:
    """Wait until a run has ended, with a progress bar, and return it. When the wait is interrupted, the run continues."""
    from tqdm.auto import tqdm

    with tqdm(desc=run.folder.name, unit="step") as bar:
        while True:
            run = read(run.folder)
            bar.total = run.max_steps
            bar.update(run.step - bar.n)
            bar.set_postfix({name: text for name, text in state.list_facts(run).items() if text and "loss" in name})
            if run.status not in ACTIVE:
                return run
            time.sleep(0.5)
