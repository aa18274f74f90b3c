"""The worker of a benchmark: one training in a process of its own, or in one process per device, with a stop-watch on it.

`sftlab benchmark` starts it, through torchrun or the deepspeed launcher where there are several processes. It is the real
training: `run.make_trainer` as `sftlab train` has it, without checkpoints and evaluations.

    python -m sftlab.bench.worker PLAN.json OUT.json
"""

import contextlib
import json
import os
import platform
import statistics
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from transformers import TrainerCallback

from sftlab import files, machine
from sftlab.bench import monitor
from sftlab.bench.results import Point, Run
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.memory import duration
from sftlab.models.load import IGNORED
from sftlab.train import distributed


def measure(plan: dict) -> dict | None:
    """Train as planned and return what the first process writes down: `run`, and machine, versions, attention, choices.

    plan: point, config, untimed, steps, seconds, threads, started (seconds since the epoch), precision (what the first run
    chose and why, or None).
    """
    import torch

    from sftlab.models import load
    from sftlab.train import forecast
    from sftlab.train import run as train_run

    point, config = Point(**plan["point"]), TrainConfig(**plan["config"])
    with distributed.joined(config) as world:
        if world.size != point.devices:
            raise UserError(f"devices: {world.size} processes were started for a point of {point.devices}.")
        if config.bf16 is None:
            bf16, why = distributed.from_main(load.choose_precision, config)
            config, plan["precision"] = replace(config, bf16=bf16), f"{'bfloat16' if bf16 else 'float32'}: {why}"
        distributed.gather(None)
        rate = duration.measure_products(torch.bfloat16 if config.bf16 else torch.float32)  # of all at the same time
        trainer = train_run.make_trainer(config)
        keep_whole_steps(trainer, point.global_batch)
        watch = Meter(trainer, plan["untimed"], plan["steps"], plan["seconds"])
        with forecast.advising(config, trainer.expected["memory"]):
            trainer.train()
        memory = forecast.measure(trainer.expected["memory"])
        mine = watch.read() | {"rate": rate, "peak": machine.read_peak(), "device": machine.name_device(), "host": platform.node(), "memory": {
            "expected_bytes": memory["expected_bytes"], "taken_bytes": memory["peak_bytes"], "kept": memory["kept"]}}  # fmt: skip
        parts = distributed.gather(mine)
        if world.rank:
            return None
        lengths = [length for part in parts for length in part["lengths"]]
        shared = getattr(trainer.data_collator, "shared", 0)
        work = duration.count_step(trainer.model, lengths, shared, config.batch_size)
        run = summarise(parts, point, work, watch.started, plan | {"bf16": config.bf16, "local_size": world.local_size})
        choices = {name: why for name, why in trainer.choices.items() if name != "time"}
        choices["precision"] = plan["precision"] or choices["precision"]
        attention = getattr(trainer.model.config, "_attn_implementation", None)
        machine_facts = machine.describe([part["device"] for part in parts]) | {
            "machines": len({part["host"] for part in parts})
        }
        return {"run": run, "choices": choices, "attention": f"{attention}: {choices['attention'].split(': ', 1)[-1]}",
                "machine": machine_facts, "versions": machine.list_versions()}  # fmt: skip


def summarise(parts: list[dict], point: Point, work: float, started: datetime, plan: dict) -> dict:
    """The fields of a `results.Run` from what each process saw. work: FLOPs of all timed steps."""
    window = max(part["window"] for part in parts)
    took = parts[0]["seconds"]
    tokens, samples = (sum(count(part["lengths"]) for part in parts) for count in (sum, len))
    trained = sum(part["trained"] for part in parts)
    cuts = statistics.quantiles(took, n=10, method="inclusive") if len(took) > 1 else took * 9
    rate, per_device = statistics.mean(part["rate"] for part in parts), work / window / point.devices
    gpu, uses = parts[0]["device"]["gpu"], [part["gpu_use"] for part in parts if part["gpu_use"] is not None]
    used = sum(part["used"] for part in parts[: plan["local_size"]])  # by those of this machine, the first one
    peak = duration.find_peak(gpu) if gpu and plan["bf16"] else None
    losses = [statistics.mean(step) for step in zip(*(part["losses"] for part in parts), strict=True)]
    run = Run(
        tokens=tokens, trained_tokens=trained, samples=samples, window_seconds=window, tokens_per_second=tokens / window,
        trained_tokens_per_second=trained / window, samples_per_second=samples / window,
        tokens_per_second_per_device=tokens / window / point.devices,
        padding_share=1 - tokens / sum(part["positions"] for part in parts),
        step_seconds={"median": statistics.median(took), "p10": cuts[0], "p90": cuts[-1], "steps": len(took),
                      "warmup": plan["untimed"], "all": took},
        peak_bytes=[part["peak"] for part in parts], memory=[part["memory"] for part in parts],
        flops_per_second_per_device=per_device, matrix_rate=rate, utilisation=per_device / peak if peak else None,
        utilisation_measured=per_device / rate,
        device_use=statistics.mean(uses) if uses else None if gpu else min(1.0, used / window / machine.count_cores()),
        losses=losses, first_loss=losses[0], last_loss=losses[-1],
        others_use=max(0.0, parts[0]["busy"] - used) / window / os.cpu_count(),
        started=started.isoformat(timespec="seconds"), seconds=time.time() - plan["started"],
    )  # fmt: skip
    return vars(run)


def main(arguments: list[str]) -> int:
    """Measure a plan and write the outcome; the exit code."""
    plan_file, out = (Path(text) for text in arguments if not text.startswith("--local_rank"))
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    os.environ["OMP_NUM_THREADS"] = str(plan["threads"])  # the launchers have opinions of their own
    from sftlab.models import load

    load.quiet_libraries()
    import torch

    torch.set_num_threads(plan["threads"])
    try:
        measured = measure(plan)
    except UserError as error:
        print(f"sftlab: {error}", file=sys.stderr)
        return 2
    if measured:
        files.write_json(out, measured)
    return 0


KEPT = (
    "labels",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "lengths",
    "shared_prefix",
)  # what tells of a batch how long its samples are
EVERY = 0.2  # seconds between looks at a GPU's use


def count_batch(inputs: dict) -> tuple[list[int], int, int]:
    """(tokens of each sample without padding, trained tokens, positions with padding) of a batch as the model gets it.

    A beginning that samples share counts for each of them, as in a batch that doesn't hold it once.
    """
    labels = inputs["labels"]
    if "lengths" in inputs:
        lengths = inputs["lengths"].tolist()
        again = inputs["shared_prefix"] * (len(lengths) - 1)
        return lengths, int((labels != IGNORED).sum()), labels.numel() + again
    if "cu_seq_lens_q" in inputs:
        lengths = inputs["cu_seq_lens_q"].diff().tolist()
    elif "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(-1).tolist()
    elif "position_ids" in inputs:  # which begin anew with each sample
        starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], labels.numel()], strict=True)]
    else:
        lengths = [labels.shape[-1]] * labels.shape[0]
    return lengths, int((labels != IGNORED).sum()), labels.numel()


def keep_whole_steps(trainer, global_batch: int) -> None:
    """Leave out the rows at the end that fill no step, so that all steps are alike, and what is no training.

    Raises UserError for a set that doesn't fill one.
    """
    rows = len(trainer.train_dataset)
    if rows < global_batch:
        kind = "packed rows" if trainer.args.packing else "rows that teach something"
        raise UserError(f"sizes: {rows} {kind} don't fill a step of {global_batch}; take larger sizes or a smaller --batch-size.")  # fmt: skip
    trainer.train_dataset = trainer.train_dataset.select(range(rows - rows % global_batch))
    if trainer.lengths is not None:
        trainer.lengths = trainer.lengths[: len(trainer.train_dataset)]
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"


class Meter(TrainerCallback):
    """Times `steps` steps after the `untimed` ones; `read` tells what this process saw.

    seconds: take as many steps as fill them, by the last untimed one. On a GPU steps are timed by events, so that the host
    runs ahead as it always does; it waits for the device at both ends of the timed window only.
    """

    def __init__(self, trainer, untimed: int, steps: int, seconds: float | None = None):
        self.untimed, self.steps, self.seconds = untimed, steps, seconds
        self.gpu = torch.cuda.is_available()
        self.batches, self.losses, self.marks, self.uses = [], [[]], [], []
        self.begun = self.ended = None
        self.last, self.done = time.perf_counter(), threading.Event()
        self.train_batch = trainer.training_step
        trainer.training_step = self.training_step
        trainer.add_callback(self)

    def training_step(self, model, inputs, *rest):
        """The trainer's own, and what the batch held is kept, to be looked at after the end."""
        loss = self.train_batch(model, inputs, *rest)
        self.batches.append((len(self.losses) - 1, {name: inputs[name] for name in KEPT if name in inputs}))
        self.losses[-1].append(loss)
        return loss

    def mark(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def look(self) -> dict:
        """The clocks at an end of the window: the wall's, this process's, the machine's."""
        if self.gpu:
            torch.cuda.synchronize()
        return {"clock": time.perf_counter(), "used": sum(psutil.Process().cpu_times()[:2]),
                "busy": monitor.count_machine_seconds()[0]}  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        self.losses.append([])
        if step > self.untimed:
            self.marks.append(self.mark())
        if step == self.untimed:
            self.begin()
        if step == self.untimed + self.steps:
            self.ended = self.look()
            self.done.set()
            control.should_training_stop = True
        self.last = time.perf_counter()

    def begin(self) -> None:
        took = time.perf_counter() - self.last
        if self.seconds:
            self.steps = distributed.from_main(lambda: max(2, round(self.seconds / took)))
        if self.gpu:
            threading.Thread(target=self.watch, daemon=True).start()
        distributed.gather(None)  # all begin together
        self.started, self.begun = datetime.now(UTC), self.look()
        self.marks.append(self.mark())

    def watch(self) -> None:
        with contextlib.suppress(ImportError, RuntimeError):  # without NVML the use stays unknown
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                while not self.done.wait(EVERY):
                    self.uses.append(torch.cuda.utilization() / 100)

    def read(self) -> dict:
        """What this process saw in the timed steps, in plain numbers."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        end = self.untimed + self.steps
        counts = [count_batch(batch) for step, batch in self.batches if self.untimed <= step < end]
        window, used, busy = (self.ended[name] - self.begun[name] for name in ("clock", "used", "busy"))
        return {
            "window": window, "used": used, "busy": busy, "gpu_use": statistics.median(self.uses) if self.uses else None,
            "seconds": [a.elapsed_time(b) / 1000 if self.gpu else b - a for a, b in pairs],
            "lengths": [length for lengths, _, _ in counts for length in lengths],
            "trained": sum(trained for _, trained, _ in counts), "positions": sum(size for _, _, size in counts),
            "losses": [float(sum(part)) for part in self.losses if part],
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
