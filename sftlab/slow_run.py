"""Where the time of a complete run went: data, padding, precision, checkpointing, threads, small steps, held-out loss, GPU.

Each is measured, by the run itself or now on this machine; what can't be known is left out. The lines are found in the table
of known errors, which has what to do.

    python -c "from sftlab import runs, slow_run; print(*slow_run.find_slow(runs.read('runs/first')), sep='\\n')"
"""

import contextlib
import random
import time
from dataclasses import replace
from pathlib import Path

from sftlab import files, hardware, machine, run_process
from sftlab.batches import LikeLengths
from sftlab.config import MemoryConfig, TrainConfig
from sftlab.options import UserError

MUCH = 0.15  # a share of the time, or of the tokens, from which it is worth telling
FASTER = 1.5  # times as fast as during the run that matrix products must be now
SMALL = 0.12  # share of the matrix rate below which steps are too small for the machine


def find_slow(run) -> list[str]:
    """A line for each thing that took time; empty where none did. run: a complete `runs.Run`."""
    result = files.read_json(run.folder / "result.json")
    config, choices = run.config, result.get("choices", {})
    seconds = result.get("time", {}).get("seconds") or result.get("metrics", {}).get("seconds")
    if config is None or not seconds:
        return []
    lengths, loading = read_lengths(config), None
    with contextlib.suppress(UserError):
        loading = time_loading(config, run.step * config.batch_size * config.gradient_accumulation_steps)
    found = [look_at_loading(loading, seconds), look_at_padding(lengths, config, choices),
             look_at_precision(config, choices), look_at_checkpointing(config, result),
             look_at_evaluation(run.history, seconds), *look_at_rate(result), *look_at_gpus(run.folder)]  # fmt: skip
    return [line for line in found if line]


def read_lengths(config: TrainConfig) -> list[int]:
    """Tokens of each training row within max_length; empty where the data set isn't there."""
    from datasets import load_from_disk

    with contextlib.suppress(OSError, ValueError, KeyError):
        rows = load_from_disk(config.dataset_path)["train"].select_columns("input_ids").with_format("arrow")
        return [min(len(ids), config.max_length) for ids in rows[:]["input_ids"]]
    return []


def time_loading(config: TrainConfig, rows: int) -> float | None:
    """Seconds that reading so many rows takes now, by a sample of 200 in random order; None without the data set."""
    from datasets import load_from_disk

    with contextlib.suppress(OSError, ValueError, KeyError):
        split = load_from_disk(config.dataset_path)["train"].select_columns(["input_ids", "labels"])
        places = random.Random(0).choices(range(len(split)), k=200)
        started = time.perf_counter()
        for at in range(0, len(places), config.batch_size):
            split[places[at : at + config.batch_size]]
        return (time.perf_counter() - started) * rows / len(places) / max(1, config.dataloader_num_workers)
    return None


def look_at_loading(loading: float | None, seconds: float) -> str | None:
    if loading is not None and loading > MUCH * seconds:
        return f"slow: loading: reading the rows takes {loading:.1f} s on this disk, of {seconds:.0f} s"


def share_padding(lengths: list[int], config: TrainConfig) -> float:
    """The share of padding in padded batches of like length, in the order of the first epoch."""
    order = list(LikeLengths(lengths, config.batch_size, config.seed))
    size = config.batch_size
    longest = [max(lengths[row] for row in order[at : at + size]) for at in range(0, len(order), size)]
    held = sum(most * len(order[at : at + size]) for most, at in zip(longest, range(0, len(order), size), strict=True))
    return 1 - sum(lengths) / held


def look_at_padding(lengths: list[int], config: TrainConfig, choices: dict) -> str | None:
    if lengths and "padded" in choices.get("batches", "") and (share := share_padding(lengths, config)) > MUCH:
        return f"slow: padding: {share:.0%} of the tokens in its batches were padding"


def look_at_precision(config: TrainConfig, choices: dict) -> str | None:
    if config.bf16 is False and choices.get("precision", "").startswith("float32"):
        from sftlab import models

        faster, why = models.choose_precision(replace(config, bf16=None))
        if faster:
            return f"slow: precision: float32 was asked for (--no-bf16), and {why}"


def look_at_checkpointing(config: TrainConfig, result: dict) -> str | None:
    """Without recomputation a run takes what the estimate says; it must fit twice to be called needless."""
    if not config.gradient_checkpointing:
        return None
    from sftlab import dry_run, memory

    gpu = result.get("time", {}).get("device") == "cuda"
    bf16 = result.get("choices", {}).get("precision", "").startswith("bfloat16")
    tokens = result.get("memory", {}).get("tokens", config.batch_size * config.max_length)
    with contextlib.suppress(UserError, dry_run.CantCount):
        plain = replace(config, gradient_checkpointing=False, bf16=bf16)
        needs = memory.estimate(
            plain, MemoryConfig(device="gpu" if gpu else "cpu"), -(-tokens // config.batch_size)
        ).total
        if 2 * needs < (limit := machine.find_limit(gpu)):
            return f"slow: checkpointing: without it the run needs {needs / 1e9:.1f} GB, and this machine has {limit / 1e9:.1f}"
    return None


def look_at_evaluation(history: list[dict], seconds: float) -> str | None:
    spent = sum(entry.get("eval_runtime", 0) for entry in history)
    if spent > MUCH * seconds:
        count = sum("eval_runtime" in entry for entry in history)
        return f"slow: evaluation: {spent:.1f} s of {seconds:.0f} s, in {count} evaluations"


def look_at_rate(result: dict) -> list[str]:
    """Matrix products then and now, and the share of their rate that the run reached."""
    about = result.get("time", {})
    if about.get("device") != "cpu" or not about.get("matrix_rate"):
        return []
    import torch

    from sftlab import flops

    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(hardware.count_cores())
    try:
        bf16 = result["choices"]["precision"].startswith("bfloat16")
        now = flops.measure_rate(torch.bfloat16 if bf16 else torch.float32, 768)
    finally:
        torch.set_num_threads(threads)
    if now > FASTER * about["matrix_rate"]:
        found.append(f"slow: threads: matrix products reached {about['matrix_rate'] / 1e9:.0f} GFLOP/s then, "
                     f"{now / 1e9:.0f} now with {hardware.count_cores()} threads")  # fmt: skip
    if about.get("share") is not None and about["share"] < SMALL:
        found.append(f"slow: small steps: the run reached {about['share']:.0%} of the rate of matrix products")
    return found


def look_at_gpus(folder: Path) -> list[str]:
    """GPU use by `sftlab metrics`, from the summary.json in the run's folder of logs."""
    found = files.read_json(run_process.find_logs(folder) / "summary.json").get("gpus", [])
    means = [(gpu["index"], gpu["use_percent"]["mean"]) for gpu in found if gpu.get("use_percent")]
    return [f"slow: idle GPU: GPU {index} was at {mean:.0f} % on average" for index, mean in means if mean < 60]
