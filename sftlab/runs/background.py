"""Runs in the background: started, found again, stopped with a checkpoint, gone on with, shown.

A run that was started here goes on when the notebook, its kernel, the browser and the terminal are closed; how it is known
again is in `state`.

    python -c "from sftlab.runs import state; print(*state.find('runs'), sep='\\n')"
"""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from sftlab import files
from sftlab.config import text as config_text
from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.runs import state
from sftlab.runs.state import ABOUT, ACTIVE, LOG, Run, find_process, read, stamp
from sftlab.train import checkpoints
from sftlab.train import folder as run_folder


def start(config: TrainConfig, launch: LaunchConfig | None = None) -> Run:
    """Start a training in the background, on several devices with `launch`, and return at once.

    What it refuses before it begins is raised here where that is cheap to know (UserError), else it is the run's `said`.
    """
    folder = Path(config.output_dir).absolute()
    check_idle(read(folder), f"output_dir: a run is at work in {config.output_dir}. Stop it first, or name another.")
    processes = 1
    if launch:
        from sftlab.runs.launcher import count_gpus

        if launch.slurm or launch.dry_run or launch.node_rank is not None:
            raise UserError(
                "launch: --slurm, --dry-run and --node-rank start no whole run from here; use `sftlab launch` in a terminal."
            )
        processes = launch.nodes * (launch.gpus_per_node or count_gpus())
    run_folder.claim_folder(config, processes)
    return spawn(config, launch, folder, os.getcwd())


def check_idle(run: Run, words: str) -> None:
    """Raises UserError, with these words, for a run that is at work."""
    if run.status in ACTIVE:
        raise UserError(words)


def spawn(config: TrainConfig, launch: LaunchConfig | None, folder: Path, cwd: str) -> Run:
    """Start the command that trains into a run folder. cwd: what the configuration's relative paths are relative to."""
    training = ["train", *config_text.to_flags(config)]
    words = ["launch", *config_text.to_flags(launch), *training] if launch else training
    command = [sys.executable, "-m", "sftlab.cli", *words]
    about = {"config": dataclasses.asdict(config), "launch": dataclasses.asdict(launch) if launch else None,
             "result_before": stamp(folder), "command": command}  # fmt: skip
    start_process(command, state.find_logs(folder), about, cwd)
    return read(folder)


def stop(run: Run) -> None:
    """Ask a run to write a checkpoint and end; it does so after the step that it is at. Returns at once.

    Raises UserError for a run that is not at work, or is on another machine.
    """
    run = read(run.folder)
    process = find_process(run.attempt, run.progress)
    if run.status not in ACTIVE or process is None:
        raise UserError(f"{run.folder.name}: the run is {run.status}; there is nothing to stop.")
    if state.is_elsewhere(process):
        raise UserError(f"{run.folder.name}: the run is at work on {process['host']}; stop it there.")
    ours, about = process == run.attempt.get("process"), state.find_logs(run.folder) / state.ABOUT
    if ours:
        files.write_json(about, run.attempt | {"asked": time.time()})
    # a notebook's kernel or a terminal's command takes SIGINT for a stop in every state; a background process may ignore it
    try:
        os.kill(process["pid"], signal.SIGTERM if ours else signal.SIGINT)
    except ProcessLookupError:
        if ours:
            files.write_json(about, run.attempt)
        raise UserError(f"{run.folder.name}: the run has just ended; there is nothing to stop.") from None


def resume(run: Run) -> Run:
    """Go on with a run from its last checkpoint, in the background, with the options that it had. Returns at once.

    Raises UserError where there is nothing to go on from.
    """
    run = read(run.folder)
    check_idle(run, f"{run.folder.name}: the run is at work already.")
    if run.status == "completed":
        raise UserError(f"{run.folder.name}: the run is complete. Raise --max-steps or --num-epochs to train on.")
    if run.config is None or checkpoints.find_last(run.folder) is None:
        raise UserError(f"{run.folder.name}: there is no whole checkpoint to go on from; start it anew.")
    launch = run.attempt.get("launch")
    began = files.read_json(run.folder / "run.json").get("processes", 1)
    if not launch and began > 1:
        raise UserError(
            f"{run.folder.name}: the run began with {began} processes; go on with the `sftlab launch` that it was started by, and --resume."
        )
    base = find_base(run)
    place = run.config.output_dir if base else str(run.folder)
    config = dataclasses.replace(run.config, output_dir=place, resume=True, overwrite=False)
    launch = LaunchConfig(**LaunchConfig.keep_known(launch)) if launch else None
    return spawn(config, launch, run.folder, base or os.getcwd())


def find_base(run: Run) -> str | None:
    """The folder in which a run was started, which its relative paths start from; None where the run folder was moved."""
    known = [place for place in (run.attempt.get("cwd"), os.getcwd()) if place]
    for base in map(Path, [*known, *run.folder.parents]):
        if base.is_dir() and (base / run.config.output_dir).resolve() == run.folder.resolve():
            return str(base)
    return None


def wait(run: Run, timeout: float | None = None) -> Run:
    """Wait until a run has ended, with a progress bar, and return it; after `timeout` seconds TimeoutError is raised.

    The run goes on in any case: also when the wait is interrupted.
    """
    from tqdm.auto import tqdm

    end = None if timeout is None else time.monotonic() + timeout
    with tqdm(desc=run.folder.name, unit="step", total=run.max_steps) as bar:
        while True:
            run = read(run.folder)
            bar.total = run.max_steps
            bar.update(run.step - bar.n)
            if run.status not in ACTIVE:
                return run
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"{run.folder.name}: still {run.status} at step {run.step}; the run goes on")
            bar.set_postfix(loss=run.find_last("loss"))
            time.sleep(0.5)


def start_process(command: list[str], logs: Path, about: dict, cwd: str) -> None:
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
    identity = run_folder.identify(process.pid)  # while it can't be gone, as nobody has waited for it
    threading.Thread(target=process.wait, name=f"run {process.pid}", daemon=True).start()
    about = {"process": identity, "started": time.time(), "offset": offset, "cwd": cwd} | about
    files.write_json(logs / ABOUT, about)
