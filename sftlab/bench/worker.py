"""The worker of a benchmark: one training in a process of its own, or in one process per device, whose steps are timed.

`sftlab benchmark` starts it, through torchrun or the deepspeed launcher where there are several processes. It is the real
training: `run.make_trainer` as `sftlab train` has it, without checkpoints and evaluations.

    python -m sftlab.bench.worker PLAN.json OUT.json
"""

import itertools
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy
import psutil
import torch
from transformers import TrainerCallback

from sftlab import files, machine
from sftlab.bench.results import Point, Run, StepSeconds
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError, run_guarded
from sftlab.memory import duration
from sftlab.models import load
from sftlab.train import distributed, forecast
from sftlab.train import run as train_run


def measure_point(plan: dict) -> dict | None:
    """Train as planned and return what the first process writes: run, machine, versions, choices.

    plan: point, config, untimed, steps.
    """
    point, config = Point(**plan["point"]), TrainConfig(**plan["config"])
    with distributed.initialized(config) as world:
        if world.size != point.devices:
            raise UserError(f"devices: {world.size} processes were started for {point.devices}. Start as many.")
        trainer = train_run.make_trainer(config)
        keep_whole_steps(trainer, point.global_batch)
        timer = StepTimer(trainer, plan["untimed"], plan["steps"])
        with forecast.advising(config, trainer.expected["memory"]):
            trainer.train()
        mine = timer.summarise() | {"peak": machine.read_peak(), "host": platform.node()}
        mine["device"] = machine.name_device()
        parts = distributed.gather(mine)
        if world.rank:
            return None
        rows, shared = trainer.train_dataset, getattr(trainer.data_collator, "shared", 0)
        packed = itertools.chain(*rows["seq_lengths"]) if config.packing else map(len, rows["input_ids"])
        lengths = list(packed)  # of all samples; the timed ones are as long on average
        work = duration.count_step(trainer.model, lengths, shared, config.batch_size) / sum(lengths) * mine["tokens"]
        used = sum(part["used"] for part in parts[: world.local_size])  # of the processes of the first machine
        choices = {name: why for name, why in trainer.choices.items() if name != "time"}
        bf16 = choices["precision"].startswith("bfloat16")
        run = combine(parts, point, work, used, plan | {"bf16": bf16, "begun": timer.started})
        devices = machine.merge_devices([part["device"] for part in parts])
        devices["machines"] = len({part["host"] for part in parts})
        return {"run": asdict(run), "machine": devices, "versions": machine.list_versions(), "choices": choices}


def combine(parts: list[dict], point: Point, work: float, used: float, plan: dict) -> Run:
    """Combine what each process measured. work: FLOPs of all timed steps. used: this machine's processor seconds."""
    window, first = max(part["window"] for part in parts), parts[0]
    tokens, gpu = first["tokens"], first["device"]["gpu"]  # the trainer counts tokens over all processes
    middle, low, high = numpy.percentile(first["seconds"], (50, 10, 90)).tolist()
    per_device = work / window / point.devices
    peak = duration.find_peak(gpu) if gpu and plan["bf16"] else None
    losses = [statistics.mean(step) for step in zip(*(part["losses"] for part in parts), strict=True)]
    return Run(
        tokens=tokens,
        tokens_per_second=tokens / window,
        tokens_per_second_per_device=tokens / window / point.devices,
        step_seconds=StepSeconds(middle, low, high, len(first["seconds"]), plan["untimed"]),
        peak_bytes=[part["peak"] for part in parts],
        flops_per_second_per_device=per_device,
        utilisation=per_device / peak if peak else None,
        losses=losses,
        first_loss=losses[0],
        last_loss=losses[-1],
        others_use=max(0.0, first["busy"] - used / window / os.cpu_count()),
        started=plan["begun"].isoformat(timespec="seconds"),
    )


def keep_whole_steps(trainer, global_batch: int) -> None:
    """Leave out the rows at the end that fill no step, so that all steps are alike, and evaluations and checkpoints.

    Raises UserError for a set that doesn't fill one step.
    """
    rows = len(trainer.train_dataset)
    if rows < global_batch:
        why = f"{rows} rows of which tokens are in the loss don't fill a step of {global_batch}"
        raise UserError(f"sizes: {why}. Take larger sizes or a smaller --batch-size.")
    trainer.train_dataset = trainer.train_dataset.select(range(rows - rows % global_batch))
    if trainer.lengths is not None:
        trainer.lengths = trainer.lengths[: len(trainer.train_dataset)]
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"


class StepTimer(TrainerCallback):
    """Times `steps` steps after the `untimed` ones; `summarise` returns what this process measured.

    It waits for a GPU at both ends of the timed window only. Since the trainer reads the loss of each batch, the host is never
    ahead of the GPU by more than the optimizer's work.
    """

    def __init__(self, trainer, untimed: int, steps: int):
        self.untimed, self.steps = untimed, steps
        self.trainer, self.train_batch = trainer, trainer.training_step
        self.losses, self.times = [[]], []
        trainer.training_step = self.training_step
        trainer.add_callback(self)

    def training_step(self, model, inputs, *rest):
        self.losses[-1].append(self.train_batch(model, inputs, *rest))
        return self.losses[-1][-1]

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        self.losses.append([])
        if step > self.untimed:
            self.times.append(time.perf_counter())
        if step == self.untimed:
            distributed.gather(None)  # all begin together
            self.started, self.begun = datetime.now(UTC), self.read_clocks()
            self.times.append(time.perf_counter())
        if step == self.untimed + self.steps:
            self.ended = self.read_clocks()

    def read_clocks(self) -> tuple[float, float, float, int]:
        """Return (seconds, processor seconds of this process, this machine's use since the last call, 0..1, tokens so far)."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        used = sum(psutil.Process().cpu_times()[:2])
        return time.perf_counter(), used, psutil.cpu_percent() / 100, self.trainer._total_train_tokens

    def summarise(self) -> dict:
        """Return what this process measured in the timed steps, in plain numbers."""
        (began, used, _, tokens), (ended, used_then, busy, tokens_then) = self.begun, self.ended
        return {
            "window": ended - began,
            "used": used_then - used,
            "busy": busy,
            "seconds": [after - before for before, after in itertools.pairwise(self.times)],
            "tokens": tokens_then - tokens,
            "losses": [float(sum(part)) for part in self.losses if part],
        }


def main(arguments: list[str]) -> int:
    """Measure a plan, write the outcome, and return the exit code."""
    plan_file, out = (Path(text) for text in arguments if not text.startswith("--local_rank"))
    plan = files.read_json(plan_file)
    load.quiet_libraries()

    def run() -> int:
        if measured := measure_point(plan):
            files.write_json(out, measured)
        return 0

    return run_guarded(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
