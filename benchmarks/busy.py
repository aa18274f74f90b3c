"""Time the same training alone, and beside as many busy programs as there are cores, with threads that spin as long as they
like and as the lab lets them (sftlab/machine.py); in turns, each run in a process of its own, with equal losses.

python benchmarks/busy.py              # about 5 minutes on 2 cores, most of it the threads that spin as they like
python benchmarks/busy.py --steps 10 --repeats 1
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# GCC's OpenMP library spins 300,000 times where nothing is set. None: what the lab chooses when the process starts.
SPINS = {"as the library does": "300000", "as the lab chooses": None}


def run_one(folder: Path, precision: str, steps: int, output: Path) -> None:
    """One training in this process: seconds of each step but the first, and the last loss, to a JSON file."""
    from sftlab import files
    from sftlab.config.configs import TrainConfig
    from sftlab.models import load
    from sftlab.train import run

    load.quiet_libraries()
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append(time.perf_counter())

    trainer = run.make_trainer(
        TrainConfig(dataset_path=str(folder / "data"), output_dir=str(folder / "run"), overwrite=True, use_lora=True, batch_size=16,
                    max_steps=steps + 1, learning_rate=2e-4, max_length=128, logging_steps=1, save_steps=10**6, eval_steps=10**6,
                    bf16=precision == "bfloat16")
    )  # fmt: skip
    trainer.add_callback(Clock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    files.write_json(
        output, {"seconds": marks[-1] - marks[0], "loss": losses[-1], "spins": os.environ["GOMP_SPINCOUNT"]}
    )


@contextlib.contextmanager
def keep_busy(count: int):
    """So many programs that compute without end, until the block does."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=4, metavar=("FOLDER", "PRECISION", "STEPS", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, precision, steps, output = args.one
        return run_one(Path(folder), precision, int(steps), Path(output))
    from sftlab import machine
    from sftlab.config.configs import DataConfig
    from sftlab.data import dataset

    print("\n".join(machine.describe_machine()))
    taken: dict[tuple, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            dataset.prepare(DataConfig(output_dir=name)).rename(folder / "data")
        losses: dict[str, set] = {"float32": set(), "bfloat16": set()}
        turns = itertools.product(losses, (0, os.cpu_count()), range(args.repeats), SPINS.items())
        for precision, busy, _, (spinning, count) in turns:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("GOMP_")}
            environment |= {"TQDM_DISABLE": "1"} | ({"GOMP_SPINCOUNT": count} if count else {})
            command = [sys.executable, __file__, "--one", name, precision, str(args.steps), str(folder / "out.json")]
            with keep_busy(busy):
                subprocess.run(command, env=environment, check=True, capture_output=True)
            found = json.loads((folder / "out.json").read_text())
            losses[precision].add(round(found["loss"], 3))
            taken.setdefault((precision, busy, spinning), []).append(found["seconds"])
            print(f"{precision:9} beside {busy} busy programs, threads spin {spinning} ({found['spins']}): "
                  f"{found['seconds']:.2f} s", flush=True)  # fmt: skip
    assert all(len(found) == 1 for found in losses.values()), losses
    print(f"\nseconds for {args.steps} steps, medians")
    for precision, spinning in itertools.product(losses, SPINS):
        alone, beside = (statistics.median(taken[precision, busy, spinning]) for busy in (0, os.cpu_count()))
        print(f"{precision:9} {spinning:20} alone {alone:6.2f}, beside busy programs {beside:6.2f}, "
              f"{beside / alone:.1f} times as long")  # fmt: skip


if __name__ == "__main__":
    main()
