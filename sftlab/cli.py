"""`sftlab COMMAND`: the lab's command line, thin over the modules.

sftlab --help
"""

import argparse
import dataclasses
import io
import os
import signal
import sys
import typing

from sftlab import __version__, benchmark_plan, course
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


class CommandParser(argparse.ArgumentParser):
    """A parser that leaves what stands after -- alone where it is a command: argparse would take its own -- out of it."""

    def parse_known_args(self, args=None, namespace=None):
        takes = self.get_default("command") is not None and "--" in args
        cut = args.index("--") if takes else len(args)
        found, unknown = super().parse_known_args(args[:cut], namespace)
        if takes:
            found.command = args[cut + 1 :]
        return found, unknown


def add_options(parser: argparse.ArgumentParser, options: type[Options], only: tuple = (), but: tuple = ()) -> None:
    """One flag for each field of a configuration; values stay text, the configuration itself checks them."""
    for field in dataclasses.fields(options):
        if only and field.name not in only or field.name in but:
            continue
        flag = "--" + field.name.replace("_", "-")
        help = field.metadata["help"].replace("%", "%%")
        kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
            continue
        choices = (
            "{" + ",".join(field.metadata["choices"]) + "}" if field.metadata["choices"] else kind.__name__.upper()
        )
        default = "" if field.default is None else f" (default: {field.default})"
        several = {"nargs": "+"} if kind is list else {}
        parser.add_argument(flag, metavar=choices, default=argparse.SUPPRESS, help=help + default, **several)


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
    training = build_options(TrainConfig, build_parser().parse_args(args.training))
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sftlab", description="Learn, run and measure supervised fine-tuning.")
    parser.add_argument("--version", action="version", version=f"sftlab {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)

    def add(name: str, run, help: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=help, description=help, epilog=f"example:\n  {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        return command

    add_options(add("prepare", prepare_command, "Make a tokenised data set with a mask from rows of instructions.",
                    "sftlab prepare --source json --source-path data_samples/facts_train.json"), DataConfig)  # fmt: skip
    add_options(add("train", train_command, "Fine-tune a model on a prepared data set.",
                    "sftlab train --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/first "
                    "--use-lora --learning-rate 2e-3 --batch-size 16"), TrainConfig)  # fmt: skip
    evaluate = add("evaluate", evaluate_command, "Prove it: a run's tuned model against its base on held-out rows, with intervals.",
                   "sftlab evaluate runs/first")  # fmt: skip
    evaluate.add_argument("run_dir", nargs="?", default=argparse.SUPPRESS, metavar="RUN", help="the run folder")
    add_options(evaluate, EvaluateConfig)
    export = add("export", export_command, "Make of a run a model that others can load, checked; on request, push it to the Hub.",
                 "sftlab export runs/first --kind merged --dtype bfloat16")  # fmt: skip
    export.add_argument("run_dir", nargs="?", default=argparse.SUPPRESS, metavar="RUN", help="the run folder")
    add_options(export, ExportConfig)
    chat = add("chat", chat_command, "Talk to a run, an export or a model in the terminal.", "sftlab chat runs/first")
    chat.add_argument(
        "model_name", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="a run, an export, a model"
    )
    add_options(chat, ChatConfig)
    estimate = add("memory", memory_command, "Estimate what a training run takes, in parts; what fits, and what to do if it doesn't.",
                   "sftlab memory --model meta-llama/Llama-2-7b-hf --device gpu --room 24 --use-lora --batch-size 4")  # fmt: skip
    add_options(estimate, MemoryConfig)
    estimate.add_argument(
        "--model", dest="model_name", default=argparse.SUPPRESS, metavar="STR", help="short for --model-name"
    )
    add_options(estimate, TrainConfig)
    course.add_run_arguments(add("run", course.run_command, "Run notebooks headless with papermill.",
                                 "sftlab run notebooks/05_lora.ipynb -p lora_r 8"))  # fmt: skip
    watched = add("metrics", metrics_command, "Watch the machine, a process or a command: processor, memory and GPUs, each second, into a folder.",
                  "sftlab metrics results/current/ -- sftlab train --use-lora")  # fmt: skip
    watched.add_argument("output_dir", nargs="?", default=argparse.SUPPRESS, metavar="DIR", help="the folder")
    watched.set_defaults(command=[])
    add_options(watched, MetricsConfig)
    bench = add("benchmark", benchmark_command, "Measure throughput and scaling: data sets of some sizes, on 1, 2, 4, … nodes.",
                "sftlab benchmark tiny-base 2 --sizes 1000 --use-lora")  # fmt: skip
    bench.add_argument("model_name", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="as --model-name")
    bench.add_argument("max_nodes", nargs="?", default=argparse.SUPPRESS, metavar="NODES", help="as --max-nodes")
    add_options(bench, BenchmarkConfig)
    add_options(bench, DataConfig, only=benchmark_plan.FROM_DATA)
    add_options(bench, TrainConfig, but=benchmark_plan.SET_HERE)
    launch = add("launch", launch_command, "Start a training on several devices and nodes: checks, the exact commands, a log for each rank.",
                 "sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --use-lora")  # fmt: skip
    add_options(launch, LaunchConfig)
    launch.add_argument("training", nargs=argparse.REMAINDER, metavar="train …", help="`train` and its options")
    pages = add("report", report_command, "Make a page of results: speed, scaling, memory, loss, use, cost; several folders are compared.",
                "sftlab report results/ --price 2.5 --currency EUR")  # fmt: skip
    pages.add_argument("folders", nargs="*", default=argparse.SUPPRESS, metavar="DIR", help="folders with results")
    add_options(pages, ReportConfig)
    add("models", models_command, "List the models that the lab knows by name.", "sftlab models")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 something the user can mend, said in one line, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # a log file in a narrow encoding must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        message = str(error)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        message = f"{error.filename}: {error.strerror}. Name another file or folder."
    except KeyboardInterrupt:
        print("sftlab: interrupted", file=sys.stderr)
        return 130
    rank = os.environ.get("RANK", "0")
    print(f"sftlab: {f'rank {rank}: ' if rank != '0' else ''}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
