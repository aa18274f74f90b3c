"""`python -m sftlab.train`: what `sftlab train` does, as torchrun and the deepspeed launcher start it.

torchrun --nproc-per-node 2 -m sftlab.train --dataset-path datasets/facts_tiny-base_1408 --use-lora
"""

import argparse
import signal
import sys
import traceback

from sftlab.config.configs import TrainConfig
from sftlab.config.text import CommandParser, add_config_file, add_options, build_training
from sftlab.errors import FIXABLE, name_doctor, run_guarded


def build_train_parser() -> argparse.ArgumentParser:
    """The parser of `sftlab train` alone."""
    parser = CommandParser(
        prog="sftlab train", description="Fine-tune a model on a prepared data set.", allow_abbrev=False
    )
    add_config_file(parser)
    add_options(parser, TrainConfig)
    return parser


def main() -> None:
    """Train as launchers start it; torchrun is told of an error by `record`."""
    from torch.distributed.elastic.multiprocessing.errors import record

    arguments = [text for text in sys.argv[1:] if not text.startswith("--local_rank=")]  # the deepspeed launcher's
    run = record(lambda: run_training(build_training(build_train_parser().parse_args(arguments))))
    sys.exit(run_guarded(run, arguments))


def tell_unexpected(output_dir: str) -> int:
    """Show an error that nobody foresaw as Python does, and where more is known of it; its exit code."""
    traceback.print_exc()
    print(name_doctor(output_dir), file=sys.stderr)
    return 1


def run_training(config: TrainConfig) -> int:
    """Train, and print what came of it; its exit code: 0 completed, 1 failed, 128 and the signal's number interrupted."""
    from sftlab.models import load

    load.quiet_libraries()
    from sftlab.train import distributed, run

    try:
        result = run.train(config)
    except FIXABLE:
        raise
    except Exception:
        return tell_unexpected(config.output_dir)
    first = distributed.read_world().rank == 0
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items() if value is not None)
    if result["status"] == "interrupted":
        if first:
            print(f"{numbers}\ninterrupted by {result['signal']}; a checkpoint is saved, go on with --resume")
        return 128 + signal.Signals[result["signal"]]
    if first:
        print(f"{numbers}\nsaved {config.output_dir}")
    return 0


if __name__ == "__main__":
    main()
