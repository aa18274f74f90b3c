"""What each command of `sftlab` does: its options as a configuration, and the module that does the work, called.

python -c "from sftlab import commands; help(commands.train_command)"
"""

import argparse
import dataclasses
import signal

from sftlab.config import (
    BenchmarkConfig,
    ChatConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    LaunchConfig,
    MemoryConfig,
    MetricsConfig,
    ReportConfig,
    TrainConfig,
)
from sftlab.options import Options, UserError


def build_options(options: type[Options], args: argparse.Namespace) -> Options:
    names = {field.name for field in dataclasses.fields(options)}
    return options.build(**{name: value for name, value in vars(args).items() if name in names})


def prepare_command(args: argparse.Namespace) -> int:
    config = build_options(DataConfig, args)
    from sftlab import data, models, prepared

    if config.overwrite or not prepared.find_prepared(
        config, prepared.fingerprint(config)
    ):  # or there is nothing to load the libraries for
        models.quiet_libraries()
    data.prepare(config)
    return 0


def train_command(args: argparse.Namespace) -> int:
    config = build_options(TrainConfig, args)
    from sftlab import distributed, models, train

    models.quiet_libraries()
    result = train.train(config)
    first = distributed.read_world().rank == 0
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items() if value is not None)
    if result["status"] == "interrupted":
        if first:
            print(f"{numbers}\ninterrupted by {result['signal']}; a checkpoint is saved, go on with --resume")
        return 128 + signal.Signals[result["signal"]]
    if first:
        print(f"{numbers}\nsaved {config.output_dir}")
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    config = build_options(EvaluateConfig, args)
    from sftlab import models, proof

    models.quiet_libraries()
    found = proof.evaluate_run(config)
    print(f"{found['verdict']}\n{found['forgetting']['verdict']}")
    if found["leakage"]["rows"]:
        print(
            f"{found['leakage']['rows']} of {found['questions']} questions are given away by training rows, and don't count"
        )
    print(f"saved {config.run_dir}/result.json; the whole report: {config.run_dir}/report.html")
    return 0


def export_command(args: argparse.Namespace) -> int:
    config = build_options(ExportConfig, args)
    from sftlab import export, models

    models.quiet_libraries()
    export.export(config)
    return 0


def chat_command(args: argparse.Namespace) -> int:
    config = build_options(ChatConfig, args)
    from sftlab import chat, models

    models.quiet_libraries()
    chat.talk(config)
    return 0


def memory_command(args: argparse.Namespace) -> int:
    config, plan = build_options(TrainConfig, args), build_options(MemoryConfig, args)
    from sftlab import memory, models

    models.quiet_libraries()
    print("\n".join(memory.describe(config, plan)))
    return 0


def metrics_command(args: argparse.Namespace) -> int:
    config = build_options(MetricsConfig, args)
    from sftlab import watch

    return watch.watch(config, args.command)


def benchmark_command(args: argparse.Namespace) -> int:
    bench, config = build_options(BenchmarkConfig, args), build_options(TrainConfig, args)
    args.source = getattr(args, "source", "facts" if config.model_name == "tiny-base" else "alpaca")
    rows = build_options(DataConfig, args)
    from sftlab import benchmark, models

    models.quiet_libraries()
    return benchmark.run_benchmark(bench, config, rows)


def launch_command(args: argparse.Namespace) -> int:
    config = build_options(LaunchConfig, args)
    if not args.training or args.training[0] != "train":
        raise UserError("launch: after its own options come `train` and those of the training, as "
                        "`sftlab launch --gpus-per-node 2 train --use-lora`.")  # fmt: skip
    training = build_options(TrainConfig, args.parse_training(args.training))
    from sftlab import launch, models

    models.quiet_libraries()
    return launch.launch(config, args.training[1:], training)


def report_command(args: argparse.Namespace) -> int:
    config = build_options(ReportConfig, args)
    from sftlab import benchmark_report, models

    models.quiet_libraries()
    print("saved " + ", ".join(map(str, benchmark_report.write_report(config))))
    return 0


def models_command(args: argparse.Namespace) -> int:
    from sftlab import catalog

    print(catalog.format_table())
    return 0
