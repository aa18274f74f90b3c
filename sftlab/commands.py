"""What each command of `sftlab` does: its options as a configuration, and the module that does the work, called.

python -c "from sftlab import commands; help(commands.train_command)"
"""

import argparse
import dataclasses
import json
import signal
import sys
import traceback
from pathlib import Path

from sftlab.config import (
    AccessConfig,
    BenchmarkConfig,
    ChatConfig,
    DataConfig,
    DoctorConfig,
    DownloadConfig,
    EvaluateConfig,
    ExportConfig,
    LaunchConfig,
    MemoryConfig,
    MetricsConfig,
    ModelsConfig,
    ReportConfig,
    RunsConfig,
    SweepConfig,
    TokenConfig,
    TrainConfig,
)
from sftlab.options import Options, UserError

MENDED = (UserError, FileExistsError, NotADirectoryError, PermissionError)  # what `cli.main` says in a line


def build_options(options: type[Options], args: argparse.Namespace) -> Options:
    return options.build(**options.keep_known(vars(args)))


def build_training(args: argparse.Namespace) -> TrainConfig:
    """A training's configuration: from --config, if it's given, and the flags beside it, which win."""
    if not getattr(args, "config", None):
        return build_options(TrainConfig, args)
    from sftlab import config_file

    return TrainConfig.build(**config_file.read(Path(args.config)) | TrainConfig.keep_known(vars(args)))


def prepare_command(args: argparse.Namespace) -> int:
    config = build_options(DataConfig, args)
    from sftlab import data, models, prepared

    if config.overwrite or not prepared.find_prepared(
        config, prepared.fingerprint(config)
    ):  # or there is nothing to load the libraries for
        models.quiet_libraries()
    data.prepare(config)
    return 0


def tell_unexpected(output_dir: str) -> int:
    """Show an error that nobody foresaw as Python does, and where more is known of it; its exit code."""
    traceback.print_exc()
    print(name_doctor(output_dir), file=sys.stderr)
    return 1


def name_doctor(output_dir: str) -> str:
    folder = Path(output_dir)
    if (folder / "result.json").is_file() or folder.with_name(f"{folder.name}-logs").is_dir():
        return f"sftlab doctor {output_dir} says more"
    return "sftlab doctor FILE says more, of what stands above, saved in a file"


def train_command(args: argparse.Namespace) -> int:
    config = build_training(args)
    from sftlab import models

    models.quiet_libraries()
    from sftlab import distributed, train

    try:
        result = train.train(config)
    except MENDED:
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
    config, plan = build_training(args), build_options(MemoryConfig, args)
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
    training = build_training(args.parse_training(args.training))
    from sftlab import launch, models

    models.quiet_libraries()
    code = launch.launch(config, args.training[1:], training)
    if code not in (0, 2, 130):  # 2: a process has said in a line what to do
        print(name_doctor(training.output_dir), file=sys.stderr)
    return code


def runs_command(args: argparse.Namespace) -> int:
    config = build_options(RunsConfig, args)
    from sftlab import run_list

    return run_list.show_runs(config)


def report_command(args: argparse.Namespace) -> int:
    config = build_options(ReportConfig, args)
    from sftlab import benchmark_report, models

    models.quiet_libraries()
    print(f"saved {benchmark_report.write_report(config)}")
    return 0


def sweep_command(args: argparse.Namespace) -> int:
    config = build_options(SweepConfig, args)
    from sftlab import sweep

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a batch system's stop also leaves statuses and the table
    return sweep.run_sweep(config)


def models_command(args: argparse.Namespace) -> int:
    config = build_options(ModelsConfig, args)
    from sftlab import catalog_table

    print(catalog_table.show(config.model, config.json))
    return 0


def token_command(args: argparse.Namespace) -> int:
    config = build_options(TokenConfig, args)
    from sftlab import token_file

    if config.status:
        lines, good = token_file.describe_status()
    else:
        lines, good = token_file.forget() if config.forget else token_file.save_token(), True
    print("\n".join(lines))
    return 0 if good else 1


def access_command(args: argparse.Namespace) -> int:
    config = build_options(AccessConfig, args)
    from sftlab import access

    found = access.check_all(config.models)
    print(
        json.dumps([dataclasses.asdict(one) for one in found], indent=2) if config.json else access.format_table(found)
    )
    return 0 if all(one.usable for one in found) else 1


def download_command(args: argparse.Namespace) -> int:
    config = build_options(DownloadConfig, args)
    from sftlab import access, download, models

    if not config.model:
        raise UserError("download: name a model, as `sftlab download gpt2`.")
    if access.is_here(config.model):
        print(f"{config.model}: nothing to fetch, it is on this machine")
        return 0
    download.fetch_asked(models.locate(config.model), config.yes)
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    config = build_options(DoctorConfig, args)
    from sftlab import doctor

    return doctor.run(config)
