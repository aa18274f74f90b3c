"""A run in words, for a terminal, a panel and a log: where it stands, what is left, what it came to.

python -c "from sftlab import runs, run_words; print(run_words.tell(runs.read('runs/first')))"
"""

import dataclasses
import time

from sftlab import run_time
from sftlab.run_state import ACTIVE, Run

WORDS = {
    "starting": "is starting: the libraries, the data and the model are being loaded",
    "running": "is running",
    "completed": "is complete",
    "interrupted": "was stopped",
    "failed": "has failed",
    "killed": "was killed",
    "none": "is not there",
}
HEADS = ("run", "status", "step", "time left", "loss", "held-out", "tokens/s", "began", "configuration")


def tell_status(run: Run) -> str:
    """What a run is doing, or why it ended, in a sentence that changes only with that."""
    if run.status == "failed" and run.said.startswith("refused: "):
        return f"{run.folder.name} was {run.said}"
    words = WORDS[run.status]
    if run.status in ACTIVE and run.attempt.get("asked"):
        words = "is stopping: a checkpoint is written first"
    elif run.status == "running" and run.progress.get("doing") == "evaluating":
        words = "is running, and measures the held-out loss"
    return f"{run.folder.name} {words}" + (f": {run.said}" if run.said else "")


def tell_step(run: Run) -> str:
    return f"{run.step} of {run.max_steps}" if run.max_steps else str(run.step or "")


def tell_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def list_facts(run: Run) -> list[tuple[str, str]]:
    """What a run has come to, as pairs of a name and a text; what isn't known yet is left out."""
    memory, gpu = run.progress.get("memory_bytes"), run.progress.get("gpu_memory_bytes")
    left, epoch = run.seconds_left, run.progress.get("epoch")
    facts = [
        ("step", tell_step(run)),
        ("epoch", tell_number(epoch)),
        ("time left", "" if left is None else run_time.say(left)),
        ("loss", tell_number(run.find_last("loss"))),
        ("held-out loss", tell_number(run.find_last("eval_loss"))),
        ("learning rate", tell_number(run.find_last("learning_rate"))),
        ("tokens per second", f"{run.speed[1]:,.0f}" if run.speed else ""),
        ("memory", f"{memory / 1e9:.2f} GB" if memory else ""),
        ("memory of the GPU", f"{gpu / 1e9:.2f} GB" if gpu else ""),
    ]
    return [(name, text) for name, text in facts if text]


def tell(run: Run) -> str:
    """A run in a line or two of text."""
    facts = ", ".join(f"{name} {text}" for name, text in list_facts(run))
    return tell_status(run) + (f"\n  {facts}" if facts else "")


def list_row(run: Run, name: str) -> tuple[str, ...]:
    """A run as a line of a table under HEADS; name: what it is called there."""
    left = run.seconds_left
    began = time.strftime("%m-%d %H:%M", time.localtime(run.started)) if run.started else ""
    return (name, run.status, tell_step(run), "" if left is None else run_time.say(left), tell_number(run.find_last("loss")),
            tell_number(run.find_last("eval_loss")), f"{run.speed[1]:,.0f}" if run.speed else "", began, run.config_hash)  # fmt: skip


def to_json(run: Run) -> dict:
    """A run as plain data: what the table says, in numbers, with its configuration and the last entry of its log."""
    names = ("status", "said", "step", "max_steps", "started", "config_hash", "seconds_left")
    return {"folder": str(run.folder)} | {name: getattr(run, name) for name in names} | {
        "loss": run.find_last("loss"), "eval_loss": run.find_last("eval_loss"), "tokens_per_second": run.speed[1] if run.speed else None,
        "memory_bytes": run.progress.get("memory_bytes"), "config": dataclasses.asdict(run.config) if run.config else None,
    }  # fmt: skip
