"""Checkpoints: which of them are whole, what they hold beside the Trainer's own files, and a disk that is full.

The Trainer writes trainer_state.json last, so a checkpoint that has it is whole. What it leaves out, and a resumed run
must know to log what an uninterrupted one logs, stands in meters.json: the losses since the last line of the log.

    python -c "from sftlab.train import checkpoints; print(checkpoints.find_last('runs/first'))"
"""

import errno
import re
import shutil
from pathlib import Path

from sftlab import files
from sftlab.errors import UserError

LAST_FILE = "trainer_state.json"
METERS = "meters{}.json"  # of the first process; the others' have their rank in the name
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def list_whole(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run folder, in the order of their steps."""
    found = [path for path in Path(folder).glob("checkpoint-*") if get_step(path) is not None and is_whole(path)]
    return sorted(found, key=get_step)


def is_whole(checkpoint: Path) -> bool:
    """Whether the last file of a checkpoint is there, and not torn."""
    return bool(files.read_json(checkpoint / LAST_FILE))


def find_last(folder: str | Path) -> Path | None:
    return next(reversed(list_whole(folder)), None)


def get_step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that there is no room: from Python, torch or safetensors."""
    while error is not None:
        if getattr(error, "errno", None) in FULL:
            return True
        codes = re.findall(r"\bcode: (\d+)|os error (\d+)", str(error))  # safetensors writes in Rust
        if {int(number) for pair in codes for number in pair if number} & set(FULL):
            return True
        if "PytorchStreamWriter" in str(error) or "enforce fail at inline_container" in str(error):
            return True  # torch writes zip files, and says no more than that
        error = error.__cause__ or error.__context__
    return False


def drop_partial(folder: Path, step: int) -> UserError:
    """Remove the checkpoint that did not fit, and say what is left, and what to do."""
    partial = folder / f"checkpoint-{step}"
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if not is_whole(partial):
        shutil.rmtree(partial, ignore_errors=True)
    last, free = find_last(folder), shutil.disk_usage(folder).free
    left = f"{last} is whole: go on from it with --resume" if last else "no checkpoint was written before"
    return UserError(f"output_dir: no room for the checkpoint of step {step} in {folder} (it broke off after {size / 1e6:.1f} MB; "
                     f"{free / 1e6:.1f} MB are free). {left}. Make room, or write fewer: --save-total-limit 1.")  # fmt: skip


def name_meters(trainer) -> str:
    rank = trainer.args.process_index
    return METERS.format(f"-{rank}" if rank else "")


def write_meters(checkpoint: Path, trainer) -> None:
    """What the Trainer has added up since it last logged, and TRL's count of tokens."""
    metrics = {mode: dict(values) for mode, values in trainer._metrics.items()}
    files.write_json(checkpoint / name_meters(trainer), {"loss": trainer._tr_loss.item(), "logged_at": trainer._globalstep_last_logged,
                                           "metrics": metrics, "tokens": trainer._total_train_tokens})  # fmt: skip


def read_meters(checkpoint: Path, trainer) -> None:
    """Set a trainer that is about to go on to what `write_meters` kept."""
    kept = files.read_json(checkpoint / name_meters(trainer))
    if not kept:
        return
    trainer._tr_loss += kept["loss"]
    trainer._globalstep_last_logged = kept["logged_at"]
    trainer._total_train_tokens = kept["tokens"]
    for mode, values in kept["metrics"].items():
        trainer._metrics[mode].update(values)


def note_best(checkpoint: Path, trainer) -> None:
    """Write down in a whole checkpoint what has come after it at the same step: that it has turned out to be the best."""
    from transformers.trainer_callback import ExportableState

    if trainer.state.best_global_step == get_step(checkpoint):
        trainer.state.best_model_checkpoint = str(checkpoint)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):  # the count of early stopping has moved on, too
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    if trainer.args.should_save:
        aside = checkpoint / f".{LAST_FILE}.partial"
        trainer.state.save_to_json(str(aside))
        aside.replace(checkpoint / LAST_FILE)
