"""`sftlab COMMAND`: the lab's command line, thin over the rooms. Each command stands here with its options and what it calls.

sftlab --help
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sftlab import __version__
from sftlab.config import configs
from sftlab.config.configs import DataConfig, SweepConfig, TrainConfig
from sftlab.config.text import CommandParser, add_config_file, add_options, add_place, build_options, build_training
from sftlab.course import headless
from sftlab.errors import UserError, name_doctor, run_guarded

GROUPS = ("data", "train", "look", "scale", "set up")  # in the order of --help


@dataclass(frozen=True)
class Command:
    """A command: what `run(args, *configurations)` does and returns as an exit code, and what --help says of it.

    options: the configurations whose fields are its flags; places: what may be given without a flag, (option, name, help, nargs);
    add: adds further arguments to its parser; arguments: those of them without a flag, as --help writes them.
    """

    run: Callable[..., int]
    group: str
    help: str
    example: str
    options: tuple = ()
    places: tuple = ()
    add: Callable[[argparse.ArgumentParser], None] | None = None
    arguments: tuple = ()


COMMANDS: dict[str, Command] = {}


def command(group: str, help: str, example: str, *options, places: tuple = (), add=None, arguments: tuple = ()):
    """Make a function a command of its name."""

    def keep(run):
        COMMANDS[run.__name__] = Command(run, group, help, example, options, places, add, arguments)
        return run

    return keep


def build_parser() -> argparse.ArgumentParser:
    listing = []
    for group in GROUPS:
        lines = [f"  {name:11}{one.help.split(';')[0]}\n" for name, one in COMMANDS.items() if one.group == group]
        listing.append("".join([f"{group}:\n", *lines]))
    parser = argparse.ArgumentParser(
        prog="sftlab",
        usage="sftlab [-h] [--version] COMMAND ...",
        description="Learn, run and measure supervised fine-tuning.\n\n" + "\n".join(listing),
        epilog="`sftlab COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sftlab {__version__}")
    parsers = {"metavar": "COMMAND", "dest": "name", "required": True, "parser_class": CommandParser}
    names = parser.add_subparsers(**parsers, help=argparse.SUPPRESS)
    form = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    for name, one in COMMANDS.items():
        usage = " ".join(["sftlab", name, *one.arguments, *(f"[{place[1]}]" for place in one.places), "[options]"])
        own = names.add_parser(name, usage=usage, description=one.help, epilog=f"example:\n  {one.example}", **form)
        for option, metavar, help, nargs in one.places:
            add_place(own, option, metavar, help, nargs)
        if one.add:
            one.add(own)
        for options in one.options:
            add_options(own, options)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, as `errors.run_guarded` says."""
    arguments = sys.argv[1:] if argv is None else argv

    def run() -> int:
        args = build_parser().parse_args(arguments)
        one = COMMANDS[args.name]
        build = {TrainConfig: build_training}
        return one.run(args, *(build.get(kind, partial(build_options, kind))(args) for kind in one.options)) or 0

    return run_guarded(run, arguments)


def quiet_libraries() -> None:
    from sftlab.models import load

    load.quiet_libraries()


@command(
    "data",
    "Make a tokenised data set with a mask from rows of instructions or chats.",
    "sftlab prepare --source json --source-path data_samples/facts_train.json",
    DataConfig,
)
def prepare(args, config):
    from sftlab.data import dataset

    if config.overwrite or not dataset.find_prepared(config, dataset.fingerprint(config)):
        quiet_libraries()  # which takes seconds, and a set that is there needs none
    dataset.prepare(config)


@command(
    "train",
    "Fine-tune a model on a prepared data set.",
    "sftlab train --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/first --use-lora --learning-rate 2e-3",
    TrainConfig,
    add=add_config_file,
)
def train(args, config):
    from sftlab.train.__main__ import run_training

    return run_training(config)


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(SweepConfig)}
    parser.add_argument("notebook", metavar="NOTEBOOK", help="the notebook")
    repeated = {"action": "append", "default": argparse.SUPPRESS}
    parser.add_argument("--grid", metavar="NAME=VALUES", help=helps["grid"], **repeated)
    pair = {"nargs": 2, "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="parameters", help=helps["parameters"], **pair, **repeated)
    add_options(parser, SweepConfig, but=("notebook", "grid", "parameters"))


@command(
    "train",
    "Run a notebook at every point of a grid, on some seeds: which setting is best, and how sure that is.",
    "sftlab sweep notebooks/08_hyperparameters.ipynb --grid learning_rate=1e-3,3e-3 --seeds 1,2,3 -p seeds 0",
    add=add_sweep_arguments,
    arguments=("NOTEBOOK",),
)
def sweep(args):
    config = build_options(SweepConfig, args)
    from sftlab.course.sweep import run_sweep

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop leaves the table, too
    return run_sweep(config)


@command(
    "train",
    "Run notebooks headless with papermill.",
    "sftlab run notebooks/05_lora.ipynb -p lora_r 8",
    add=headless.add_run_arguments,
    arguments=("NOTEBOOK ...",),
)
def run(args):
    return headless.run_command(args)


@command(
    "train",
    "Make of a run a model that others can load, checked; on request, push it to the Hub.",
    "sftlab export runs/first --kind merged --dtype bfloat16",
    configs.ExportConfig,
    places=(("run_dir", "RUN", "the run folder", "?"),),
)
def export(args, config):
    from sftlab.export import folder

    quiet_libraries()
    folder.export(config)


@command(
    "look",
    "List the runs in a folder, at work or ended; stop, resume or follow one of them.",
    "sftlab runs --follow runs/first",
    configs.RunsConfig,
    places=(("folder", "DIR", "the folder", "?"),),
)
def runs(args, config):
    from sftlab.runs import table

    return table.run_command(config)


@command(
    "look",
    "Compare a run's tuned model with its base on held-out rows, with intervals.",
    "sftlab evaluate runs/first",
    configs.EvaluateConfig,
    places=(("run_dir", "RUN", "the run folder", "?"),),
)
def evaluate(args, config):
    from sftlab.evaluate import compare

    quiet_libraries()
    found = compare.evaluate_run(config)
    print(f"{found['verdict']}\n{found['forgetting']['verdict']}")
    if found["leakage"]["rows"]:
        left = f"{found['leakage']['rows']} of {found['questions']} questions"
        print(f"{left} are given away by training rows, and don't count")
    print(f"saved {config.run_dir}/result.json; the whole report: {config.run_dir}/report.html")


@command(
    "look",
    "Talk to a run, an export or a model in the terminal.",
    "sftlab chat runs/first",
    configs.ChatConfig,
    places=(("model_name", "MODEL", "a run, an export, a model", "?"),),
)
def chat(args, config):
    from sftlab.export.chat import talk

    quiet_libraries()
    talk(config)


@command(
    "look",
    "Make a page of results: speed, scaling, memory, loss, use; several folders are compared.",
    "sftlab report results/ --bandwidth 50",
    configs.ReportConfig,
    places=(("folders", "DIR", "folders with results", "*"),),
)
def report(args, config):
    from sftlab.bench.report import write_report

    quiet_libraries()
    print(f"saved {write_report(config)}")


@command(
    "look",
    "Watch the machine, a process or a command: processor, memory and GPUs, each second, into a folder.",
    "sftlab metrics results/current/ -- sftlab train --use-lora",
    configs.MetricsConfig,
    places=(("output_dir", "DIR", "the folder", "?"),),
    add=lambda parser: parser.set_defaults(command=[]),
    arguments=("[-- PROGRAM ...]",),
)
def metrics(args, config):
    from sftlab.bench import monitor

    return monitor.watch(config, args.command)


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_file(parser)
    short = {"dest": "model_name", "default": argparse.SUPPRESS, "metavar": "STR"}
    parser.add_argument("--model", help="short for --model-name", **short)


@command(
    "scale",
    "Estimate the memory that a training run takes, in parts; what fits, and what to do if it doesn't.",
    "sftlab memory --model meta-llama/Llama-2-7b-hf --device gpu --room 24 --use-lora --batch-size 4",
    configs.MemoryConfig,
    TrainConfig,
    add=add_memory_arguments,
)
def memory(args, plan, config):
    from sftlab.memory import advice

    quiet_libraries()
    print("\n".join(advice.format_estimate(config, plan)))


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, configs.LaunchConfig)
    parser.add_argument("training", nargs=argparse.REMAINDER, metavar="train …", help="`train` and its options")


@command(
    "scale",
    "Start a training on several devices and nodes: checks, the exact commands, a log for each rank.",
    "sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --use-lora",
    add=add_launch_arguments,
    arguments=("[options] train",),
)
def launch(args):
    config = build_options(configs.LaunchConfig, args)
    if not args.training or args.training[0] != "train":
        example = "`sftlab launch --gpus-per-node 2 train --use-lora`"
        raise UserError(f"launch: after its own options come `train` and those of the training, as {example}.")
    training = build_training(build_parser().parse_args(args.training))
    from sftlab.runs import launcher

    quiet_libraries()
    code = launcher.launch(config, args.training[1:], training)
    if code not in (0, 2, 130):  # 2: a process has said in a line what to do
        print(name_doctor(training.output_dir), file=sys.stderr)
    return code


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, configs.BenchmarkConfig)
    source = {"source": "facts for tiny-base, else alpaca"}
    add_options(parser, DataConfig, only=configs.DATA_OF_BENCHMARK, defaults=source)
    add_options(parser, TrainConfig, but=configs.SET_BY_BENCHMARK)


@command(
    "scale",
    "Measure throughput and scaling: data sets of some sizes, on 1, 2, 4, … nodes.",
    "sftlab benchmark tiny-base 2 --sizes 1000 --use-lora",
    places=(("model_name", "MODEL", "as --model-name", "?"), ("max_nodes", "NODES", "as --max-nodes", "?")),
    add=add_benchmark_arguments,
)
def benchmark(args):
    bench, config = build_options(configs.BenchmarkConfig, args), build_options(TrainConfig, args)
    args.source = getattr(args, "source", "facts" if config.model_name == "tiny-base" else "alpaca")
    rows = build_options(DataConfig, args)
    from sftlab.bench import measure

    quiet_libraries()
    return measure.run_benchmark(bench, config, rows)


@command(
    "set up",
    "Store a Hugging Face token, asked for without echo or read from standard input; exit code 1: there's none, or the Hub "
    "doesn't take it.",
    "sftlab token --status",
    configs.TokenConfig,
)
def token(args, config):
    from sftlab.hub import token as stored

    if config.status:
        lines, good = stored.describe_status()
    else:
        lines, good = stored.forget() if config.forget else stored.save_token(), True
    print("\n".join(lines))
    return 0 if good else 1


@command(
    "set up",
    "Check which models you can use, and what to do for the others; exit code 1: not all can be used.",
    "sftlab access meta-llama/Llama-2-7b-hf google/gemma-7b",
    configs.AccessConfig,
    places=(("models", "MODEL", "as --models", "*"),),
)
def access(args, config):
    from sftlab.hub.access import check_all, format_table

    found = check_all(config.models)
    rows = [dataclasses.asdict(one) for one in found]
    print(json.dumps(rows, indent=2) if config.json else format_table(found))
    return 0 if all(one.usable for one in found) else 1


@command(
    "set up",
    "List the models that the lab knows: size, gate, licence, memory, and what fits here.",
    "sftlab models gpt2",
    configs.ModelsConfig,
    places=(("model", "MODEL", "as --model", "?"),),
)
def models(args, config):
    from sftlab.memory import model_table

    print(model_table.format_models(config.model, config.json))


@command(
    "set up",
    "Fetch a model into the cache: its size first, room on the disk, then a progress bar.",
    "sftlab download EleutherAI/gpt-neo-125M",
    configs.DownloadConfig,
    places=(("model", "MODEL", "as --model", "?"),),
)
def download(args, config):
    from sftlab.hub import access, download
    from sftlab.models import load

    if not config.model:
        raise UserError("download: name a model, as `sftlab download gpt2`.")
    if access.is_here(config.model):
        print(f"{config.model}: nothing to fetch, it is on this machine")
    else:
        download.fetch_asked(load.locate(config.model), config.yes)


@command(
    "set up",
    "Check whether this machine is fit for the course; or, of a run that failed, what happened, why, and what to do; exit code "
    "1: something is wrong.",
    "sftlab doctor runs/first",
    configs.DoctorConfig,
    places=(("target", "RUN", "as --target", "?"),),
)
def doctor(args, config):
    from sftlab.doctor import checks

    return checks.run(config)


if __name__ == "__main__":
    sys.exit(main())
