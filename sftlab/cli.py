"""`sftlab COMMAND`: the lab's command line, thin over the modules.

sftlab --help
"""

import argparse
import dataclasses
import json
import signal
import sys

from sftlab import __version__
from sftlab.config import configs
from sftlab.config.configs import (
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
from sftlab.config.text import CommandParser, add_config_file, add_options, add_place, build_options, build_training
from sftlab.course import headless
from sftlab.errors import UserError, name_doctor, run_guarded


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

    add_options(add("prepare", prepare_command, "Make a tokenised data set with a mask from rows of instructions.",
                    "sftlab prepare --source json --source-path data_samples/facts_train.json"), DataConfig)  # fmt: skip
    train = add("train", train_command, "Fine-tune a model on a prepared data set.",
                "sftlab train --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/first "
                "--use-lora --learning-rate 2e-3 --batch-size 16")  # fmt: skip
    add_config_file(train)
    add_options(train, TrainConfig)
    evaluate = add("evaluate", evaluate_command, "Prove it: a run's tuned model against its base on held-out rows, with intervals.",
                   "sftlab evaluate runs/first")  # fmt: skip
    add_place(evaluate, "run_dir", "RUN", "the run folder")
    add_options(evaluate, EvaluateConfig)
    export = add("export", export_command, "Make of a run a model that others can load, checked; on request, push it to the Hub.",
                 "sftlab export runs/first --kind merged --dtype bfloat16")  # fmt: skip
    add_place(export, "run_dir", "RUN", "the run folder")
    add_options(export, ExportConfig)
    chat = add("chat", chat_command, "Talk to a run, an export or a model in the terminal.", "sftlab chat runs/first")
    add_place(chat, "model_name", "MODEL", "a run, an export, a model")
    add_options(chat, ChatConfig)
    estimate = add("memory", memory_command, "Estimate what a training run takes, in parts; what fits, and what to do if it doesn't.",
                   "sftlab memory --model meta-llama/Llama-2-7b-hf --device gpu --room 24 --use-lora --batch-size 4")  # fmt: skip
    add_config_file(estimate)
    add_options(estimate, MemoryConfig)
    estimate.add_argument(
        "--model", dest="model_name", default=argparse.SUPPRESS, metavar="STR", help="short for --model-name"
    )
    add_options(estimate, TrainConfig)
    headless.add_run_arguments(add("run", headless.run_command, "Run notebooks headless with papermill.",
                                 "sftlab run notebooks/05_lora.ipynb -p lora_r 8"))  # fmt: skip
    sweep = add("sweep", sweep_command, "Run a notebook at every point of a grid, on some seeds: which setting is best, and how sure that is.",
                "sftlab sweep notebooks/08_hyperparameters.ipynb --grid learning_rate=1e-3,3e-3 --seeds 1,2,3 -p seeds 0")  # fmt: skip
    sweep.add_argument("notebook", metavar="NOTEBOOK", help="the notebook")
    for flag, options in (
        ("--grid", {"metavar": "NAME=VALUES"}),
        ("-p", {"nargs": 2, "metavar": ("NAME", "VALUE"), "dest": "parameters"}),
    ):
        help = SweepConfig.__dataclass_fields__[options.get("dest", "grid")].metadata["help"]
        sweep.add_argument(flag, action="append", default=argparse.SUPPRESS, help=help, **options)
    add_options(sweep, SweepConfig, but=("notebook", "grid", "parameters"))
    watched = add("metrics", metrics_command, "Watch the machine, a process or a command: processor, memory and GPUs, each second, into a folder.",
                  "sftlab metrics results/current/ -- sftlab train --use-lora")  # fmt: skip
    add_place(watched, "output_dir", "DIR", "the folder")
    watched.set_defaults(command=[])
    add_options(watched, MetricsConfig)
    bench = add("benchmark", benchmark_command, "Measure throughput and scaling: data sets of some sizes, on 1, 2, 4, … nodes.",
                "sftlab benchmark tiny-base 2 --sizes 1000 --use-lora")  # fmt: skip
    add_place(bench, "model_name", "MODEL", "as --model-name")
    add_place(bench, "max_nodes", "NODES", "as --max-nodes")
    add_options(bench, BenchmarkConfig)
    add_options(bench, DataConfig, only=configs.DATA_OF_BENCHMARK)
    add_options(bench, TrainConfig, but=configs.SET_BY_BENCHMARK)
    launch = add("launch", launch_command, "Start a training on several devices and nodes: checks, the exact commands, a log for each rank.",
                 "sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --use-lora")  # fmt: skip
    launch.set_defaults(parse_training=parser.parse_args)
    add_options(launch, LaunchConfig)
    launch.add_argument("training", nargs=argparse.REMAINDER, metavar="train …", help="`train` and its options")
    listed = add("runs", runs_command, "List the runs in a folder, at work or ended; stop, resume or follow one of them.",
                 "sftlab runs --follow runs/first")  # fmt: skip
    add_place(listed, "folder", "DIR", "the folder")
    add_options(listed, RunsConfig)
    pages = add("report", report_command, "Make a page of results: speed, scaling, memory, loss, use; several folders are compared.",
                "sftlab report results/ --bandwidth 50")  # fmt: skip
    add_place(pages, "folders", "DIR", "folders with results", nargs="*")
    add_options(pages, ReportConfig)
    token = add("token", token_command, "Store a Hugging Face token, asked for without echo or read from standard input; exit code 1: there's none, or "
                "the Hub doesn't take it.", "sftlab token --status")  # fmt: skip
    add_options(token, TokenConfig)
    asked = add("access", access_command, "Where models stand for you, and what to do; exit code 1: not all can be used.",
                "sftlab access meta-llama/Llama-2-7b-hf google/gemma-7b")  # fmt: skip
    add_place(asked, "models", "MODEL", "as --models", nargs="*")
    add_options(asked, AccessConfig)
    known = add("models", models_command, "The models that the lab knows: size, gate, licence, memory, and what fits here.",
                "sftlab models gpt2")  # fmt: skip
    add_place(known, "model", "MODEL", "as --model")
    add_options(known, ModelsConfig)
    fetched = add("download", download_command, "Fetch a model into the cache: its size first, room on the disk, then a progress bar.",
                  "sftlab download EleutherAI/gpt-neo-125M")  # fmt: skip
    add_place(fetched, "model", "MODEL", "as --model")
    add_options(fetched, DownloadConfig)
    examined = add("doctor", doctor_command, "Is this machine fit for the course; or, of a run that failed, what happened, why, and what to do. Exit "
                   "code 1: something is wrong.", "sftlab doctor runs/first")  # fmt: skip
    add_place(examined, "target", "RUN", "as --target")
    add_options(examined, DoctorConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, as `errors.run_guarded` says."""

    def run() -> int:
        args = build_parser().parse_args(argv)
        return args.run(args)

    return run_guarded(run, sys.argv[1:] if argv is None else argv)


def train_command(args: argparse.Namespace) -> int:
    from sftlab.train.__main__ import run_training

    return run_training(args)


def prepare_command(args: argparse.Namespace) -> int:
    config = build_options(DataConfig, args)
    from sftlab.data import dataset
    from sftlab.models import load

    if config.overwrite or not dataset.find_prepared(
        config, dataset.fingerprint(config)
    ):  # or there is nothing to load the libraries for
        load.quiet_libraries()
    dataset.prepare(config)
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    config = build_options(EvaluateConfig, args)
    from sftlab.evaluate import compare
    from sftlab.models import load

    load.quiet_libraries()
    found = compare.evaluate_run(config)
    print(f"{found['verdict']}\n{found['forgetting']['verdict']}")
    if found["leakage"]["rows"]:
        print(
            f"{found['leakage']['rows']} of {found['questions']} questions are given away by training rows, and don't count"
        )
    print(f"saved {config.run_dir}/result.json; the whole report: {config.run_dir}/report.html")
    return 0


def export_command(args: argparse.Namespace) -> int:
    config = build_options(ExportConfig, args)
    from sftlab.export import folder
    from sftlab.models import load

    load.quiet_libraries()
    folder.export(config)
    return 0


def chat_command(args: argparse.Namespace) -> int:
    config = build_options(ChatConfig, args)
    from sftlab.export import chat
    from sftlab.models import load

    load.quiet_libraries()
    chat.talk(config)
    return 0


def memory_command(args: argparse.Namespace) -> int:
    config, plan = build_training(args), build_options(MemoryConfig, args)
    from sftlab.memory import advice
    from sftlab.models import load

    load.quiet_libraries()
    print("\n".join(advice.describe(config, plan)))
    return 0


def metrics_command(args: argparse.Namespace) -> int:
    config = build_options(MetricsConfig, args)
    from sftlab.bench import monitor

    return monitor.watch(config, args.command)


def benchmark_command(args: argparse.Namespace) -> int:
    bench, config = build_options(BenchmarkConfig, args), build_options(TrainConfig, args)
    args.source = getattr(args, "source", "facts" if config.model_name == "tiny-base" else "alpaca")
    rows = build_options(DataConfig, args)
    from sftlab.bench import measure
    from sftlab.models import load

    load.quiet_libraries()
    return measure.run_benchmark(bench, config, rows)


def launch_command(args: argparse.Namespace) -> int:
    config = build_options(LaunchConfig, args)
    if not args.training or args.training[0] != "train":
        raise UserError("launch: after its own options come `train` and those of the training, as "
                        "`sftlab launch --gpus-per-node 2 train --use-lora`.")  # fmt: skip
    training = build_training(args.parse_training(args.training))
    from sftlab.models import load
    from sftlab.runs import launcher

    load.quiet_libraries()
    code = launcher.launch(config, args.training[1:], training)
    if code not in (0, 2, 130):  # 2: a process has said in a line what to do
        print(name_doctor(training.output_dir), file=sys.stderr)
    return code


def runs_command(args: argparse.Namespace) -> int:
    config = build_options(RunsConfig, args)
    from sftlab.runs import table

    return table.show_runs(config)


def report_command(args: argparse.Namespace) -> int:
    config = build_options(ReportConfig, args)
    from sftlab.bench import report
    from sftlab.models import load

    load.quiet_libraries()
    print(f"saved {report.write_report(config)}")
    return 0


def sweep_command(args: argparse.Namespace) -> int:
    config = build_options(SweepConfig, args)
    from sftlab.course import sweep

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a batch system's stop also leaves statuses and the table
    return sweep.run_sweep(config)


def models_command(args: argparse.Namespace) -> int:
    config = build_options(ModelsConfig, args)
    from sftlab.memory import model_table

    print(model_table.show(config.model, config.json))
    return 0


def token_command(args: argparse.Namespace) -> int:
    config = build_options(TokenConfig, args)
    from sftlab.hub import token as hub_token

    if config.status:
        lines, good = hub_token.describe_status()
    else:
        lines, good = hub_token.forget() if config.forget else hub_token.save_token(), True
    print("\n".join(lines))
    return 0 if good else 1


def access_command(args: argparse.Namespace) -> int:
    config = build_options(AccessConfig, args)
    from sftlab.hub import access

    found = access.check_all(config.models)
    print(
        json.dumps([dataclasses.asdict(one) for one in found], indent=2) if config.json else access.format_table(found)
    )
    return 0 if all(one.usable for one in found) else 1


def download_command(args: argparse.Namespace) -> int:
    config = build_options(DownloadConfig, args)
    from sftlab.hub import access, download
    from sftlab.models import load

    if not config.model:
        raise UserError("download: name a model, as `sftlab download gpt2`.")
    if access.is_here(config.model):
        print(f"{config.model}: nothing to fetch, it is on this machine")
        return 0
    download.fetch_asked(load.locate(config.model), config.yes)
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    config = build_options(DoctorConfig, args)
    from sftlab.doctor import checks

    return checks.run(config)


if __name__ == "__main__":
    sys.exit(main())
