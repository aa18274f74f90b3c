"""The worker of a benchmark: one training in a process of its own, or in one process per device, with a stop-watch on it.

`sftlab benchmark` starts it, through torchrun or the deepspeed launcher where there are several processes. It is the real
training: `train.make_trainer` as `sftlab train` has it, without checkpoints and evaluations.

    python -m sftlab.throughput PLAN.json OUT.json
"""

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from sftlab import distributed, files, flops, hardware
from sftlab.config import TrainConfig
from sftlab.options import UserError
from sftlab.results import Point, Run


def measure(plan: dict) -> dict | None:
    """Train as planned and return what the first process writes down: `run`, and machine, versions, attention, choices.

    plan: point, config, untimed, steps, seconds, threads, started (seconds since the epoch), precision (what the first run
    chose and why, or None).
    """
    import torch

    from sftlab import machine, meter, models, run_memory, train

    point, config = Point(**plan["point"]), TrainConfig(**plan["config"])
    with distributed.joined(config) as world:
        if world.size != point.devices:
            raise UserError(f"devices: {world.size} processes were started for a point of {point.devices}.")
        if config.bf16 is None:
            bf16, why = distributed.from_main(models.choose_precision, config)
            config, plan["precision"] = replace(config, bf16=bf16), f"{'bfloat16' if bf16 else 'float32'}: {why}"
        distributed.gather(None)
        rate = flops.measure_rate(torch.bfloat16 if config.bf16 else torch.float32)  # of all at the same time
        trainer = train.make_trainer(config)
        meter.keep_whole_steps(trainer, point.global_batch)
        watch = meter.Meter(trainer, plan["untimed"], plan["steps"], plan["seconds"])
        with run_memory.advising(config, trainer.expected["memory"]):
            trainer.train()
        memory = run_memory.measure(trainer.expected["memory"])
        mine = watch.read() | {"rate": rate, "peak": machine.read_peak(), "device": hardware.name_device(), "host": platform.node(), "memory": {
            "expected_bytes": memory["expected_bytes"], "taken_bytes": memory["peak_bytes"], "kept": memory["kept"]}}  # fmt: skip
        parts = distributed.gather(mine)
        if world.rank:
            return None
        lengths = [length for part in parts for length in part["lengths"]]
        shared = getattr(trainer.data_collator, "shared", 0)
        work = flops.count_step(trainer.model, lengths, shared, config.batch_size)
        run = summarise(parts, point, work, watch.started, plan | {"bf16": config.bf16, "local_size": world.local_size})
        choices = {name: why for name, why in trainer.choices.items() if name != "time"}
        choices["precision"] = plan["precision"] or choices["precision"]
        attention = getattr(trainer.model.config, "_attn_implementation", None)
        machine_facts = hardware.describe([part["device"] for part in parts]) | {
            "machines": len({part["host"] for part in parts})
        }
        return {"run": run, "choices": choices, "attention": f"{attention}: {choices['attention'].split(': ', 1)[-1]}",
                "machine": machine_facts, "versions": hardware.list_versions()}  # fmt: skip


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
    peak = flops.find_peak(gpu) if gpu and plan["bf16"] else None
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
        device_use=statistics.mean(uses) if uses else None if gpu else min(1.0, used / window / hardware.count_cores()),
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
    from sftlab import models

    models.quiet_libraries()
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
