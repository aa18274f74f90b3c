"""The folder of a training run: who may write into it, what may change on resume, and its files for whoever looks.

run.json holds the configuration, and is written first; log.jsonl and progress.json follow the run from its first step on
(the Trainer writes its own log into checkpoints only); result.json is written last. An entry of log.jsonl is one of the
Trainer's `log_history` with `time` (seconds since the epoch), `max_steps` and `memory_bytes` (of the process, or on a GPU there).

    python -c "from sftlab.train import folder; print(folder.find_last('runs/first'))"
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import time
from pathlib import Path

import psutil

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError, place_error

LOG, PROGRESS = "log.jsonl", "progress.json"
SAME = 0.05  # seconds by which two readings of a process's start may differ
LAST_FILE = "trainer_state.json"  # the Trainer writes it last, so a checkpoint that has it is whole
# A resumed run needs the weights, the optimizer's state and the order of rows that these made.
KEPT_ON_RESUME = set(
    "processes model_name dataset_path use_flash_attention use_liger_kernel train_new_tokens batch_size gradient_accumulation_steps optim "
    "packing max_length use_lora lora_r lora_alpha lora_target_modules use_rslora use_dora use_4bit use_8bit deepspeed seed".split()
)


def claim_folder(config: TrainConfig, processes: int) -> Path | None:
    """Return the checkpoint to resume from, or None; refuse an output folder that exists. Changes nothing."""
    folder = Path(config.output_dir)
    read = {"the folder you work in": ".", "in model_name": config.model_name, "in dataset_path": config.dataset_path}
    read |= {"in init_adapter": config.init_adapter} if config.init_adapter else {}
    for name, place in read.items():
        if Path(place).resolve().is_relative_to(folder.resolve()):
            raise place_error(folder, f"holds what is {name}")
    progress = {} if (folder / "result.json").exists() else files.read_json(folder / PROGRESS)
    process = progress.get("process")
    if process and "ended" not in progress and not (is_elsewhere(process) or is_this(process)) and is_alive(process):
        raise place_error(folder, f"holds a run that is at work, as process {process['pid']}")
    if config.resume:
        checkpoint = find_last(folder)
        if checkpoint is None:
            raise UserError(f"resume: {folder} holds no whole checkpoint to resume from; start again with --overwrite.")
        check_resumed(config, processes)
        return checkpoint
    if folder.is_file() or folder.is_dir() and any(PROGRESS not in path.name for path in folder.iterdir()):
        if not config.overwrite or folder.is_file():
            resume = "Add --resume to continue it, or --overwrite to delete it"
            again = "It has no checkpoint to resume from: add --overwrite to begin again"
            raise place_error(folder, "exists", resume if find_last(folder) else again)
        if not any("config_hash" in files.read_json(folder / name) for name in ("run.json", "result.json")):
            raise place_error(folder, "is not a run folder of the lab; it stays")
    return None


def check_resumed(config: TrainConfig, processes: int) -> None:
    """Raise UserError where nothing is left to train or an option has changed that the checkpoint needs; print other changes."""
    folder = Path(config.output_dir)
    run = files.read_json(folder / "run.json")
    before = {"processes": run.get("processes", 1)} | run.get("config", {})
    now = dataclasses.asdict(config) | {"processes": processes}
    known = (now.keys() & before.keys()) - {"output_dir", "resume", "overwrite"}
    changed = {name: f"{before[name]} -> {now[name]}" for name in now if name in known and before[name] != now[name]}
    if fixed := next((name for name in changed if name in KEPT_ON_RESUME), None):
        values = f"{before[fixed]}, not {now[fixed]}. Give it as it was, or name another --output-dir."
        raise UserError(f"{fixed}: the run in {folder} began with {values}")
    completed = files.read_json(folder / "result.json").get("status") == "completed"
    if completed and "config" in run and not changed.keys() & {"max_steps", "num_epochs"}:
        raise UserError(f"resume: the run in {folder} is complete. Raise --max-steps or --num-epochs to train on.")
    if changed:
        print("resume: changed since the run began:", ", ".join(f"{name} {change}" for name, change in changed.items()))


def begin(config: TrainConfig, about: dict) -> None:
    """Print what was chosen, and write run.json; called when the run has all it needs.

    --overwrite deletes the folder first. Of a resumed run the earlier result and its report go.
    """
    folder = Path(config.output_dir)
    print("\n".join(f"{name}: {choice}" for name, choice in about["choices"].items()), flush=True)
    start = files.read_json(folder / PROGRESS).get("start")  # by `runs.start`
    if config.overwrite and folder.exists():
        shutil.rmtree(folder)
    if not config.resume:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "run.json").touch(exist_ok=False)
        except FileExistsError:
            raise place_error(folder, "was begun by another command meanwhile; it stays") from None
    files.write_json(folder / "run.json", about)
    write_process(folder, start)
    for name in ("result.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def identify(pid: int | None = None) -> dict:
    """Return what distinguishes a process from all others: pid, host, and its start in seconds since this machine's.

    Process ids are given again, and clocks are set. Raises psutil.Error where there is no such process.
    """
    since_boot = psutil.Process(pid).create_time() - psutil.boot_time()
    return {"pid": pid or os.getpid(), "since_boot": round(since_boot, 2), "host": platform.node()}


def write_process(folder: Path, start: dict | None) -> None:
    """Begin progress.json: which process trains, and where. start: what started it in the background, if it is this run's."""
    kept = {"start": start} if start and is_this(start["process"]) else {}
    files.write_json(folder / PROGRESS, {"process": identify(), "started": time.time(), "cwd": os.getcwd()} | kept)


def is_this(process: dict | None) -> bool:
    """Whether a process (`identify`) is the one that asks."""
    return bool(process) and (process["pid"], process["host"]) == (os.getpid(), platform.node())


def is_elsewhere(process: dict) -> bool:
    """Whether a process is one of another machine."""
    return process["host"] != platform.node()


def is_alive(process: dict) -> bool:
    """Whether a process (`identify`) is at work. One of another machine can't be asked, and counts as alive."""
    if is_elsewhere(process):
        return True
    try:
        began = identify(process["pid"])["since_boot"]
        zombie = psutil.Process(process["pid"]).status() == psutil.STATUS_ZOMBIE
        return not zombie and abs(began - process["since_boot"]) < SAME  # process numbers are used again
    except psutil.Error:
        return False


def update_progress(folder: Path, changes: dict) -> None:
    files.write_json(folder / PROGRESS, files.read_json(folder / PROGRESS) | changes)


@contextlib.contextmanager
def noting_end(folder: Path):
    """Note in progress.json an error that ends the block: of a run that was refused it is the only trace."""
    try:
        yield
    except BaseException as error:
        progress, (status, reason) = files.read_json(folder / PROGRESS), explain_end(error)
        if is_this(progress.get("process")) or is_this(progress.get("start", {}).get("process")):  # not another's run
            with contextlib.suppress(OSError):
                update_progress(folder, {"ended": time.time(), "status": status, "reason": reason})
        raise


def explain_end(error: BaseException) -> tuple[str, str]:
    """Return the status of a run that an error has ended, and the reason in a line."""
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    name = "refused" if isinstance(error, UserError) else type(error).__name__
    return status, f"{name}: {' '.join(str(error).split())[:1000] or 'stopped at once'}"


def read_precision(config: TrainConfig) -> tuple[bool, str] | None:
    """Return (bfloat16 or not, why) as chosen when a resumed run began, or None for a new run."""
    if not config.resume or config.bf16 is not None:
        return None
    before = files.read_json(Path(config.output_dir) / "run.json").get("choices", {}).get("precision", "")
    return (before.startswith("bfloat16"), "as when the run began") if before else None


def is_whole(checkpoint: Path) -> bool:
    """Whether the last file of a checkpoint is there, and not torn."""
    return bool(files.read_json(checkpoint / LAST_FILE))


def find_last(folder: str | Path) -> Path | None:
    """Find the last whole checkpoint of a run folder."""
    found = [path for path in Path(folder).glob("checkpoint-*") if get_step(path) is not None and is_whole(path)]
    return max(found, key=get_step, default=None)


def get_step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def clear_full_disk(folder: Path) -> UserError:
    """Delete what a full disk left of a checkpoint, and return the error that names the last whole one."""
    for partial in folder.glob("checkpoint-*"):
        if not is_whole(partial):
            shutil.rmtree(partial, ignore_errors=True)
    last = find_last(folder)
    left = f"{last} is whole: make room, and add --resume" if last else "Make room, and start again with --overwrite"
    return UserError(f"output_dir: the disk of {folder} is full. {left}.")


def append_entry(folder: Path, entry: dict) -> None:
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry, ensure_ascii=False, default=float) + "\n")


def read_log(folder: str | Path) -> list[dict]:
    """Read the entries of a run's log so far, in order, without a torn line; of what has no log, those of its Trainer."""
    log, entries = Path(folder) / LOG, []
    if not log.is_file():
        return files.read_json(Path(folder) / LAST_FILE).get("log_history", [])
    for line in log.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def cut_log(folder: Path, step: int) -> None:
    """Let the log of a resumed run end with the step of its checkpoint: what came after is trained again."""
    entries = [entry for entry in read_log(folder) if entry["step"] <= step and "train_loss" not in entry]
    files.write_text(folder / LOG, "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries))
