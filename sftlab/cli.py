"""`sftlab COMMAND`: the lab's command line, thin over the modules.

sftlab --help
"""

import argparse
import dataclasses
import io
import os
import sys
import typing

from sftlab import __version__, benchmark_plan, commands, course, presets
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
from sftlab.options import Options, UserError, refuse_token


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
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        several = {"nargs": "+"} if kind is list else {}
        parser.add_argument(flag, metavar=choices, default=argparse.SUPPRESS, help=help + default, **several)


def add_config_file(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(preset.name for preset in presets.PRESETS)
    help = f"a YAML file with options of a training, or a preset: {names}; flags beside it win"
    parser.add_argument("--config", metavar="FILE", default=None, help=help)


def add_place(parser: argparse.ArgumentParser, name: str, metavar: str, help: str, nargs: str = "?") -> None:
    """An option that may be given without its flag."""
    parser.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, metavar=metavar, help=help)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sftlab", description="Learn, run and measure supervised fine-tuning.")
    parser.add_argument("--version", action="version", version=f"sftlab {__version__}")
    names = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)

    def add(name: str, run, help: str, example: str) -> argparse.ArgumentParser:
        command = names.add_parser(
            name, help=help, description=help, epilog=f"example:\n  {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        return command

    add_options(add("prepare", commands.prepare_command, "Make a tokenised data set with a mask from rows of instructions.",
                    "sftlab prepare --source json --source-path data_samples/facts_train.json"), DataConfig)  # fmt: skip
    train = add("train", commands.train_command, "Fine-tune a model on a prepared data set.",
                "sftlab train --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/first "
                "--use-lora --learning-rate 2e-3 --batch-size 16")  # fmt: skip
    add_config_file(train)
    add_options(train, TrainConfig)
    evaluate = add("evaluate", commands.evaluate_command, "Prove it: a run's tuned model against its base on held-out rows, with intervals.",
                   "sftlab evaluate runs/first")  # fmt: skip
    add_place(evaluate, "run_dir", "RUN", "the run folder")
    add_options(evaluate, EvaluateConfig)
    export = add("export", commands.export_command, "Make of a run a model that others can load, checked; on request, push it to the Hub.",
                 "sftlab export runs/first --kind merged --dtype bfloat16")  # fmt: skip
    add_place(export, "run_dir", "RUN", "the run folder")
    add_options(export, ExportConfig)
    chat = add(
        "chat", commands.chat_command, "Talk to a run, an export or a model in the terminal.", "sftlab chat runs/first"
    )
    add_place(chat, "model_name", "MODEL", "a run, an export, a model")
    add_options(chat, ChatConfig)
    estimate = add("memory", commands.memory_command, "Estimate what a training run takes, in parts; what fits, and what to do if it doesn't.",
                   "sftlab memory --model meta-llama/Llama-2-7b-hf --device gpu --room 24 --use-lora --batch-size 4")  # fmt: skip
    add_config_file(estimate)
    add_options(estimate, MemoryConfig)
    estimate.add_argument(
        "--model", dest="model_name", default=argparse.SUPPRESS, metavar="STR", help="short for --model-name"
    )
    add_options(estimate, TrainConfig)
    course.add_run_arguments(add("run", course.run_command, "Run notebooks headless with papermill.",
                                 "sftlab run notebooks/05_lora.ipynb -p lora_r 8"))  # fmt: skip
    sweep = add("sweep", commands.sweep_command, "Run a notebook at every point of a grid, on some seeds: which setting is best, and how sure that is.",
                "sftlab sweep notebooks/08_hyperparameters.ipynb --grid learning_rate=1e-3,3e-3 --seeds 1,2,3 -p seeds 0")  # fmt: skip
    sweep.add_argument("notebook", metavar="NOTEBOOK", help="the notebook")
    for flag, options in (
        ("--grid", {"metavar": "NAME=VALUES"}),
        ("-p", {"nargs": 2, "metavar": ("NAME", "VALUE"), "dest": "parameters"}),
    ):
        help = SweepConfig.__dataclass_fields__[options.get("dest", "grid")].metadata["help"]
        sweep.add_argument(flag, action="append", default=argparse.SUPPRESS, help=help, **options)
    add_options(sweep, SweepConfig, but=("notebook", "grid", "parameters"))
    watched = add("metrics", commands.metrics_command, "Watch the machine, a process or a command: processor, memory and GPUs, each second, into a folder.",
                  "sftlab metrics results/current/ -- sftlab train --use-lora")  # fmt: skip
    add_place(watched, "output_dir", "DIR", "the folder")
    watched.set_defaults(command=[])
    add_options(watched, MetricsConfig)
    bench = add("benchmark", commands.benchmark_command, "Measure throughput and scaling: data sets of some sizes, on 1, 2, 4, … nodes.",
                "sftlab benchmark tiny-base 2 --sizes 1000 --use-lora")  # fmt: skip
    add_place(bench, "model_name", "MODEL", "as --model-name")
    add_place(bench, "max_nodes", "NODES", "as --max-nodes")
    add_options(bench, BenchmarkConfig)
    add_options(bench, DataConfig, only=benchmark_plan.FROM_DATA)
    add_options(bench, TrainConfig, but=benchmark_plan.SET_HERE)
    launch = add("launch", commands.launch_command, "Start a training on several devices and nodes: checks, the exact commands, a log for each rank.",
                 "sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --use-lora")  # fmt: skip
    launch.set_defaults(parse_training=parser.parse_args)
    add_options(launch, LaunchConfig)
    launch.add_argument("training", nargs=argparse.REMAINDER, metavar="train …", help="`train` and its options")
    listed = add("runs", commands.runs_command, "List the runs in a folder, at work or ended; stop, resume or follow one of them.",
                 "sftlab runs --follow runs/first")  # fmt: skip
    add_place(listed, "folder", "DIR", "the folder")
    add_options(listed, RunsConfig)
    pages = add("report", commands.report_command, "Make a page of results: speed, scaling, memory, loss, use; several folders are compared.",
                "sftlab report results/ --bandwidth 50")  # fmt: skip
    add_place(pages, "folders", "DIR", "folders with results", nargs="*")
    add_options(pages, ReportConfig)
    token = add("token", commands.token_command, "Store a Hugging Face token, asked for without echo or read from standard input; exit code 1: there's none, or "
                "the Hub doesn't take it.", "sftlab token --status")  # fmt: skip
    add_options(token, TokenConfig)
    asked = add("access", commands.access_command, "Where models stand for you, and what to do; exit code 1: not all can be used.",
                "sftlab access meta-llama/Llama-2-7b-hf google/gemma-7b")  # fmt: skip
    add_place(asked, "models", "MODEL", "as --models", nargs="*")
    add_options(asked, AccessConfig)
    known = add("models", commands.models_command, "The models that the lab knows: size, gate, licence, memory, and what fits here.",
                "sftlab models gpt2")  # fmt: skip
    add_place(known, "model", "MODEL", "as --model")
    add_options(known, ModelsConfig)
    fetched = add("download", commands.download_command, "Fetch a model into the cache: its size first, room on the disk, then a progress bar.",
                  "sftlab download EleutherAI/gpt-neo-125M")  # fmt: skip
    add_place(fetched, "model", "MODEL", "as --model")
    add_options(fetched, DownloadConfig)
    examined = add("doctor", commands.doctor_command, "Is this machine fit for the course; or, of a run that failed, what happened, why, and what to do. Exit "
                   "code 1: something is wrong.", "sftlab doctor runs/first")  # fmt: skip
    add_place(examined, "target", "RUN", "as --target")
    add_options(examined, DoctorConfig)
    return parser


def run_command(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; errors are raised."""
    for argument in sys.argv[1:] if argv is None else argv:
        refuse_token(argument, "an argument")
    args = build_parser().parse_args(argv)
    return args.run(args)


def main(argv: list[str] | None = None, run=run_command) -> int:
    """Run a command and return its exit code: 0 done, 2 something the user can fix, said in one line, 130 interrupted.

    run: what runs it; `python -m sftlab.train` has torch note its errors.
    """
    for stream in (sys.stdout, sys.stderr):  # a log file in a narrow encoding must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return run(argv)
    except UserError as error:
        message = str(error)
    except commands.MENDED as error:
        message = f"{error.filename}: {error.strerror}. Name another file or folder."
    except KeyboardInterrupt:
        print("sftlab: interrupted", file=sys.stderr)
        return 130
    rank = os.environ.get("RANK", "0")
    print(f"sftlab: {f'rank {rank}: ' if rank != '0' else ''}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
