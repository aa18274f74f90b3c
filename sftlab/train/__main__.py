"""`python -m sftlab.train`: what `sftlab train` does, as torchrun and the deepspeed launcher start it.

torchrun --nproc-per-node 2 -m sftlab.train --dataset-path datasets/facts_tiny-base_1408 --use-lora
"""

import argparse
import signal
import sys
import traceback

from sftlab.config.configs import TrainConfig
from sftlab.config.text import add_options, build_options
from sftlab.errors import explain, run_guarded


def main() -> None:
    """Train as launchers start it; `record` reports an error to torchrun."""
    from torch.distributed.elastic.multiprocessing.errors import record

    parser = argparse.ArgumentParser("sftlab train", description="Fine-tune a model.", allow_abbrev=False)
    add_options(parser, TrainConfig)
    arguments = [text for text in sys.argv[1:] if not text.startswith("--local_rank=")]  # the deepspeed launcher's
    run = record(lambda: run_training(build_options(TrainConfig, parser.parse_args(arguments))))
    sys.exit(run_guarded(run, arguments))


def run_training(config: TrainConfig) -> int:
    """Train, and print the result; the exit code: 0 completed, 1 failed, 128 and the signal's number interrupted."""
    from sftlab.models import load

    load.quiet_libraries()
    from sftlab.train import distributed, run

    try:
        result = run.train(config)
    except Exception as error:  # that nobody foresaw
        if explain(error):
            raise
        traceback.print_exc()
        print(f"sftlab doctor {config.output_dir} says more", file=sys.stderr)
        return 1
    interrupted = result["status"] == "interrupted"
    if distributed.read_world().rank == 0:
        print(", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items() if value is not None))
        stopped = f"interrupted by {result.get('signal')}; a checkpoint is saved; resume with --resume"
        print(stopped if interrupted else f"saved {config.output_dir}")
    return 128 + signal.Signals[result["signal"]] if interrupted else 0


if __name__ == "__main__":
    main()
