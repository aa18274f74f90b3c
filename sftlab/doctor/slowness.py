"""Where the time of a complete run went: checks, each a measurement and a threshold.

What a check finds is a line for which the table of known errors has a row (`slow-NAME`) with the advice.

    python -c "from sftlab import runs; from sftlab.doctor import slowness; print(slowness.find_slow(runs.read('runs/first')))"
"""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from sftlab import files, machine
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.runs import logs
from sftlab.runs.state import Run


@dataclass(frozen=True)
class Check:
    """measure: a run and its result.json -> a number, or None where it isn't known; reported beyond the threshold."""

    name: str
    measure: Callable[[Run, dict], float | None]
    threshold: float
    sentence: str
    below: bool = False


def find_slow(run: Run) -> list[str]:
    """A line for each thing that made a complete run slow; empty where none did."""
    result, found = files.read_json(run.folder / "result.json"), []
    for check in CHECKS if run.config else ():
        value = check.measure(run, result)
        if value is not None and (value < check.threshold if check.below else value > check.threshold):
            found.append(f"slow: {check.name}: {check.sentence.format(value=value)}")
    return found


def measure_padding(run: Run, result: dict) -> float | None:
    """The share of padding in the first epoch's batches."""
    from datasets import load_from_disk

    if "padded" in result.get("choices", {}).get("batches", ""):
        with contextlib.suppress(OSError, ValueError, KeyError):
            rows = load_from_disk(run.config.dataset_path)["train"].select_columns("input_ids").with_format("arrow")
            return count_padding([min(len(ids), run.config.max_length) for ids in rows[:]["input_ids"]], run.config)
    return None


def count_padding(lengths: list[int], config: TrainConfig) -> float:
    """The share of padding in batches of rows of similar length, in the order of the first epoch. lengths: tokens by row."""
    from sftlab.train.trainer import LikeLengths

    order, size = list(LikeLengths(lengths, config.batch_size, config.seed)), config.batch_size
    batches = [[lengths[row] for row in order[at : at + size]] for at in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def measure_precision(run: Run, result: dict) -> float | None:
    """1 where float32 was asked for and bfloat16 is faster on this machine, else 0."""
    from sftlab.models import load

    if run.config.bf16 is not False or not result.get("choices", {}).get("precision", "").startswith("float32"):
        return None
    return float(load.choose_precision(dataclasses.replace(run.config, bf16=None))[0])


def measure_checkpointing(run: Run, result: dict) -> float | None:
    """The share of this machine's memory that the run would need without gradient checkpointing, by the estimate."""
    from sftlab.memory import dry_run

    if not run.config.gradient_checkpointing:
        return None
    gpu = result.get("time", {}).get("device") == "cuda"
    tokens = result.get("memory", {}).get("tokens", run.config.batch_size * run.config.max_length)
    bf16 = result.get("choices", {}).get("precision", "").startswith("bfloat16")
    plain = dataclasses.replace(run.config, gradient_checkpointing=False, bf16=bf16)
    with contextlib.suppress(UserError, dry_run.CantCount):
        plan = MemoryConfig(device="gpu" if gpu else "cpu")
        return dry_run.estimate(plain, plan, -(-tokens // run.config.batch_size)).total / machine.find_limit(gpu)
    return None


def measure_evaluation(run: Run, result: dict) -> float | None:
    """The share of the time that went into the validation loss."""
    seconds = result.get("time", {}).get("seconds") or result.get("metrics", {}).get("seconds")
    return sum(entry.get("eval_runtime", 0) for entry in run.history) / seconds if seconds else None


def measure_steps(run: Run, result: dict) -> float | None:
    """The share of the rate of matrix products that the run reached, on a CPU."""
    return result["time"].get("share") if result.get("time", {}).get("device") == "cpu" else None


def measure_gpus(run: Run, result: dict) -> float | None:
    """The lowest mean use of a GPU, from what `sftlab metrics` has left in the run's folder of logs."""
    gpus = files.read_json(logs.find_logs(run.folder) / "summary.json").get("gpus", [])
    return min((gpu["use_percent"]["mean"] / 100 for gpu in gpus if gpu.get("use_percent")), default=None)


CHECKS = (
    Check("padding", measure_padding, 0.15, "{value:.0%} of the tokens in its batches were padding"),
    Check("precision", measure_precision, 0.5, "float32 was asked for (--no-bf16), and bfloat16 is faster here"),
    Check(
        "checkpointing",
        measure_checkpointing,
        0.5,
        "without it the run needs {value:.0%} of this machine's memory",
        True,
    ),
    Check("evaluation", measure_evaluation, 0.15, "{value:.0%} of the time went into the validation loss"),
    Check("small steps", measure_steps, 0.12, "the run reached {value:.0%} of the rate of matrix products", True),
    Check("idle GPU", measure_gpus, 0.6, "a GPU was at {value:.0%} on average", True),
)
