"""The folder of a training run: claimed without losing anything, resumed, and ended with result.json.

A run folder holds run.json (the configuration, written first), log.jsonl and progress.json (as it goes on), checkpoints,
the adapter or model with its tokenizer, trainer_state.json and, written last, result.json.

    python -c "from sftlab.train import folder; help(folder.claim_folder)"
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError, place_error
from sftlab.models import load
from sftlab.train import checkpoints, distributed

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
READ_FROM = ("model_name", "dataset_path")  # what a run reads must not lie in the folder that it writes
# A resumed run goes on with the weights, the optimizer's state and the order of rows that these made.
KEPT_ON_RESUME = (
    "model_name", "dataset_path", "use_flash_attention", "train_new_tokens", "batch_size", "gradient_accumulation_steps",
    "optim", "packing", "max_length", "use_lora", "lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora",
    "use_4bit", "use_8bit", "deepspeed", "seed",
)  # fmt: skip


def check_resumed(config: TrainConfig, processes: int) -> None:
    """Raises UserError where nothing is left to train, or an option was changed that the checkpoint depends on.

    Other changes are told.
    """
    folder = Path(config.output_dir)
    before, now = files.read_json(folder / "run.json").get("config", {}), dataclasses.asdict(config)
    ours = [name for name in now if name in before and name not in ("resume", "overwrite")]
    changed = [name for name in ours if before[name] != now[name]]
    for name in changed:
        if name in KEPT_ON_RESUME:
            raise UserError(f"{name}: the run in {folder} began with {before[name]}, not {now[name]}. Give it as it was, "
                            "or name another --output-dir.")  # fmt: skip
    completed = files.read_json(folder / "result.json").get("status") == "completed"
    if completed and before and "max_steps" not in changed and "num_epochs" not in changed:
        raise UserError(f"resume: the run in {folder} is complete. Raise --max-steps or --num-epochs to train on.")
    began = files.read_json(folder / "run.json").get("processes", 1)
    if began != processes:
        raise UserError(f"resume: the run in {folder} began with {began} processes, not {processes}; a step would be of other rows. Start as "
                        "many, or name another --output-dir.")  # fmt: skip
    if changed:
        told = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)
        print(f"resume: changed since the run began: {told}")


def claim_folder(config: TrainConfig, processes: int) -> Path | None:
    """Return the checkpoint to resume from, or None; an output folder that exists is refused unasked. Changes nothing.

    processes: how many will train.
    """
    folder = Path(config.output_dir)
    for name, place in (
        ("the folder you work in", "."),
        *((f"in {name}", getattr(config, name)) for name in READ_FROM),
    ):
        if Path(place).resolve().is_relative_to(folder.resolve()):
            raise place_error(folder, f"holds what is {name}")
    if config.resume:
        checkpoint = checkpoints.find_last(folder)
        if checkpoint is None:
            raise UserError(f"resume: {folder} holds no whole checkpoint to go on from; start again with --overwrite.")
        check_resumed(config, processes)
        return checkpoint
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        if not config.overwrite or folder.is_file():
            raise place_error(folder, "exists", "Add --resume to go on, or --overwrite to delete it")
        if not any("config_hash" in files.read_json(folder / name) for name in ("run.json", "result.json")):
            raise place_error(folder, "is not a run folder of the lab; it stays")
    return None


def begin(config: TrainConfig, about: dict) -> None:
    """Say what was chosen, and make the folder again (--overwrite) or go on in it; called when the run has all it needs."""
    folder = Path(config.output_dir)
    print("\n".join(f"{name}: {choice}" for name, choice in about["choices"].items()), flush=True)
    if config.overwrite and folder.exists():
        shutil.rmtree(folder)
    files.write_json(folder / "run.json", about)
    put_result_aside(folder)
    begin_log(folder)


def put_result_aside(folder: Path) -> None:
    """Take away the result of an earlier part of the run; an evaluation of the model as it was is kept under other names."""
    result = folder / "result.json"
    evaluated = files.read_json(result)
    if "evaluation" not in evaluated:
        return result.unlink(missing_ok=True)
    step = evaluated["metrics"]["steps"]
    for path in (result, folder / "report.html"):
        if path.exists():
            path.rename(path.with_stem(f"{path.stem}-step-{step}"))
    print(
        f"{folder}: the evaluation of the model at step {step} is kept as result-step-{step}.json and report-step-{step}.html"
    )


def is_at_end(checkpoint: Path, config: TrainConfig) -> bool:
    """Whether a checkpoint is that of the last step, so that nothing is left to train."""
    state = files.read_json(checkpoint / checkpoints.LAST_FILE)
    if config.max_steps > 0:
        return state["global_step"] >= config.max_steps
    return state["epoch"] >= config.num_epochs


def read_precision(config: TrainConfig) -> tuple[bool, str] | None:
    """What was chosen when the run began holds to its end: (bfloat16 or not, why), or None for a new run."""
    if not config.resume or config.bf16 is not None:
        return None
    before = files.read_json(Path(config.output_dir) / "run.json").get("choices", {}).get("precision", "")
    return (before.startswith("bfloat16"), "as when the run began") if before else None


def load_end(trainer, checkpoint: Path) -> None:
    """Put a trainer at the end of a run that was killed after its last checkpoint and before it was saved."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / checkpoints.LAST_FILE))
    keep(Path(trainer.args.output_dir), trainer.state.log_history)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        trainer._load_best_model()


def copy_end(trainer, checkpoint: Path, folder: Path) -> None:
    """`load_end` and `save` with DeepSpeed, whose engine doesn't exist before the first step: the checkpoint has the model whole."""
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / checkpoints.LAST_FILE))
    best = trainer.state.best_model_checkpoint
    source = Path(best) if trainer.args.load_best_model_at_end and best else checkpoint
    of_training = ("optimizer", "scheduler", "rng_state", "meters", "trainer_state", "latest", "zero_to_fp32")
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(of_training):
            shutil.copy2(path, folder / path.name)
    trainer.save_state()
    keep(folder, trainer.state.log_history)
    check_saved(trainer, folder)


def check_moved(weights) -> None:
    """Raises UserError if an adapter learned nothing: LoRA's B starts at zero, and one training step moves it.

    weights: pairs of names and tensors.
    """
    still = [name for name, weight in weights if "lora_B" in name and not weight.any()]
    if still:
        raise UserError(f"training moved nothing: {len(still)} adapters are still zero, {still[0]} first. Raise --learning-rate "
                        "or --max-steps; with --gradient-checkpointing, inputs must require gradients.")  # fmt: skip


def check_saved(trainer, folder: Path) -> None:
    """Raises UserError if what was saved is not whole: under ZeRO-3 a process holds pieces, which must be gathered to save.

    Every trained weight must be there in its true shape.
    """
    from safetensors import safe_open

    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as saved:
            names = list(saved.keys())
            shapes |= {name: tuple(saved.get_slice(name).get_shape()) for name in names}
            check_moved((name, saved.get_tensor(name)) for name in names if "lora_B" in name)
    for name, weight in trainer.model.named_parameters():
        plain = name.replace(".default", "").replace("modules_to_save.", "")
        if (
            weight.requires_grad
            and "token_adapter" not in name
            and shapes.get(plain) != (shape := tuple(getattr(weight, "ds_shape", weight.shape)))
        ):
            raise UserError(f"output_dir: {folder} is not whole: {plain} was saved as {shapes.get(plain, 'nothing')}, and has the shape {shape}. "
                            "With ZeRO-3, stage3_gather_16bit_weights_on_model_save must be true; the checkpoints are whole.")  # fmt: skip


def save(trainer, folder: Path) -> None:
    """The adapter or the model, the tokenizer with its template, and the Trainer's state, in the run folder."""
    if not trainer.in_pieces:
        check_moved(trainer.model.named_parameters())
    try:
        trainer.save_model()
        trainer.save_state()
    except Exception as error:
        if checkpoints.is_full(error):
            raise UserError(f"output_dir: no room for the model in {folder}. Its last checkpoint is {checkpoints.find_last(folder)}; "
                            "make room, then go on with --resume.") from error  # fmt: skip
        raise
    if trainer.in_pieces:
        distributed.from_main(check_saved, trainer, folder)


def write_result(folder: Path, about: dict, trainer, started: float) -> dict:
    """Write `result.json` whole and return its content; started: seconds since the epoch."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    result = about | {
        "metrics": {
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None, "eval_loss": held_out[-1] if held_out else None,
            "best_eval_loss": min(held_out, default=None), "steps": trainer.state.global_step,
            "seconds": round(time.time() - started, 2),
            "trained_parameters": sum(load.count_numel(p) for p in trainer.model.parameters() if p.requires_grad),
        },
        "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip
    files.write_json(folder / "result.json", result)
    return result


# What a run leaves while it goes on: log.jsonl, a line for each entry of its log, and progress.json, the step it is at.
#
# The Trainer writes its own log into checkpoints only. These two files are there from the first step, for whoever looks:
# a panel in a notebook, `sftlab runs`, `tail -f`. log.jsonl holds the entries of the Trainer's `log_history` in their order,
# each with `time` (seconds since the epoch), `max_steps`, `memory_bytes` and, on a GPU, `gpu_memory_bytes` beside.


LOG, PROGRESS = "log.jsonl", "progress.json"
BESIDE = ("time", "max_steps", "memory_bytes", "gpu_memory_bytes")  # what an entry has more than the Trainer's


def identify(pid: int | None = None) -> dict:
    """What tells a process from all others: pid, host, and when it began in seconds since this machine did.

    Process ids are taken again, and clocks are set. Raises psutil.Error where there is no such process.
    """
    import psutil

    since_boot = psutil.Process(pid).create_time() - psutil.boot_time()
    return {"pid": pid or os.getpid(), "since_boot": round(since_boot, 2), "host": platform.node()}


def measure_memory() -> dict:
    """Bytes that this process holds: resident, and what torch has taken of its GPU."""
    import psutil
    import torch

    found = {"memory_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        found["gpu_memory_bytes"] = torch.cuda.memory_reserved()
    return found


def begin_log(folder: Path) -> None:
    """Say that a run is about to train in a folder, and in which process."""
    files.write_json(folder / PROGRESS, {"process": identify(), "started": time.time()})


def end(folder: Path, status: str, said: str) -> None:
    """Say that this process, which lives on in a notebook, trains in a folder no more; one that trains there now is left alone.

    On a disk without room progress.json goes instead.
    """
    path = folder / PROGRESS
    progress = files.read_json(path)
    process, own = progress.get("process", {}), identify()
    if (process.get("pid"), process.get("host")) != (own["pid"], own["host"]):
        return
    with contextlib.suppress(OSError):
        try:
            files.write_json(path, progress | {"ended": time.time(), "status": status, "said": said})
        except OSError:
            path.unlink()


def keep(folder: Path, history: list[dict]) -> None:
    """Make the log of a run that goes on end where its checkpoint does: what came after is trained again.

    Entries that the log lacks, as a killed run may leave it, are taken from the checkpoint's.
    """
    entries = []
    for entry, logged in zip(history, read(folder) + [{}] * len(history), strict=False):
        same = {name: value for name, value in logged.items() if name not in BESIDE} == entry
        entries.append(logged if same else entry)
    files.write_text(folder / LOG, "".join(map(to_line, entries)))


def append(folder: Path, entry: dict) -> None:
    """Add an entry; it is in the file, whole, when this returns."""
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(to_line(entry))


def to_line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False, default=float) + "\n"


def read(folder: str | Path) -> list[dict]:
    """The entries of a run's log so far, in order; those of an older run from what its Trainer left at the end.

    A line that is being written, or was torn, is left out.
    """
    try:
        lines = (Path(folder) / LOG).read_bytes().splitlines()
    except OSError:
        return files.read_json(Path(folder) / "trainer_state.json").get("log_history", [])
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]
