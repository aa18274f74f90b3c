"""`sftlab COMMAND`: the lab's command line, thin over the rooms. Each command stands here with its options and what it calls.

sftlab --help
"""

import argparse
import inspect
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from sftlab import __version__
from sftlab.config import configs
from sftlab.config.text import add_options, build_options
from sftlab.course import headless
from sftlab.errors import UserError, run_guarded

GROUPS = ("data", "train", "look", "scale", "set up")  # in the order of --help


COMMANDS: dict[str, "Command"] = {}


@dataclass
class Command:
    """Makes `run(args, *configurations)`, which returns an exit code, a command of its name; --help says its docstring.

    options: the configurations whose fields are its flags; places: which of them may be given without a flag, and how --help
    writes them; add: adds further arguments to its parser; usage: what --help says of these.
    """

    group: str
    example: str
    options: tuple = ()
    places: dict[str, str] = field(default_factory=dict)
    add: Callable[[argparse.ArgumentParser], None] | None = None
    usage: str = ""

    def __call__(self, run: Callable) -> Callable:
        self.run = run
        COMMANDS[run.__name__] = self
        return run


def build_parser() -> argparse.ArgumentParser:
    listing = []
    for group in GROUPS:
        listing += [f"\n{group}:"]
        members = {name: one for name, one in COMMANDS.items() if one.group == group}
        listing += [f"  {name:11}{inspect.getdoc(one.run).splitlines()[0]}" for name, one in members.items()]
    parser = argparse.ArgumentParser(
        prog="sftlab",
        usage="sftlab [-h] [--version] COMMAND ...",
        description="\n".join(["Learn, run and measure supervised fine-tuning.", *listing]),
        epilog="`sftlab COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sftlab {__version__}")
    names = parser.add_subparsers(metavar="COMMAND", dest="name", required=True, help=argparse.SUPPRESS)
    for name, one in COMMANDS.items():
        own = names.add_parser(
            name,
            usage=f"sftlab {name} {one.usage or ' '.join([*one.places.values(), '[options]'])}",
            description=inspect.getdoc(one.run),
            epilog=f"example:\n  {one.example}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for option, shown in one.places.items():
            nargs, flag = "*" if "..." in shown else "?", option.replace("_", "-")
            place = {"nargs": nargs, "metavar": shown.strip("[ .]"), "help": f"as --{flag}"}
            own.add_argument(option, default=argparse.SUPPRESS, **place)
        for options in one.options:
            add_options(own, options)
        if one.add:
            one.add(own)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, as `errors.run_guarded` says."""
    arguments = sys.argv[1:] if argv is None else argv

    def run() -> int:
        args = build_parser().parse_args(arguments)
        one = COMMANDS[args.name]
        return one.run(args, *(build_options(kind, args) for kind in one.options)) or 0

    return run_guarded(run, arguments)


def quiet_libraries() -> None:
    from sftlab.models import load

    load.quiet_libraries()


@Command("data", "sftlab prepare --source json --source-path data_samples/facts_train.json", (configs.DataConfig,))
def prepare(args, config):
    """Make a tokenised data set with a mask from rows of instructions or chats."""
    from sftlab.data import dataset

    quiet_libraries()
    dataset.prepare(config)


@Command("train", "sftlab train --config quick --output-dir runs/first", (configs.TrainConfig,))
def train(args, config):
    """Fine-tune a model on a prepared data set."""
    from sftlab.train.__main__ import run_training

    return run_training(config)


@Command(
    "train",
    "sftlab sweep notebooks/08_hyperparameters.ipynb --grid learning_rate=1e-3,3e-3 --seeds 1,2,3 -p seeds 0",
    (configs.SweepConfig,),
    places={"notebook": "NOTEBOOK"},
    add=headless.add_parameters,
)
def sweep(args, config):
    """Run a notebook at every point of a grid, on some seeds: which setting is best, and how sure that is."""
    from sftlab.course.sweep import run_sweep

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop leaves the table, too
    return run_sweep(config)


@Command(
    "train",
    "sftlab run notebooks/05_lora.ipynb -p lora_r 8",
    add=headless.add_run_arguments,
    usage="NOTEBOOK ... [options]",
)
def run(args):
    """Run notebooks headless with papermill."""
    return headless.run_command(args)


@Command(
    "train",
    "sftlab export runs/first --kind merged --dtype bfloat16",
    (configs.ExportConfig,),
    places={"run_dir": "[RUN]"},
)
def export(args, config):
    """Make of a run a model that others can load, checked."""
    quiet_libraries()
    from sftlab.export import folder

    folder.export(config)


@Command("look", "sftlab runs --follow runs/first", (configs.RunsConfig,), places={"folder": "[DIR]"})
def runs(args, config):
    """List the runs in a folder, at work or ended; stop, resume or follow one of them."""
    from sftlab.runs import panel

    return panel.run_command(config)


@Command("look", "sftlab evaluate runs/first", (configs.EvaluateConfig,), places={"run_dir": "[RUN]"})
def evaluate(args, config):
    """Compare a run's tuned model with its base on held-out rows, with intervals."""
    quiet_libraries()
    from sftlab.evaluate import compare

    found = compare.evaluate_run(config)
    print(f"{found['verdict']}\n{found['forgetting']['verdict']}")
    if found["leakage"]["rows"]:
        left = f"{found['leakage']['rows']} of {found['questions']} questions"
        print(f"{left} are given away by training rows, and don't count")
    print(f"saved {config.run_dir}/result.json; the whole report: {config.run_dir}/report.html")


@Command("look", "sftlab chat runs/first", (configs.ChatConfig,), places={"model_name": "[MODEL]"})
def chat(args, config):
    """Talk to a run, an export or a model in the terminal."""
    quiet_libraries()
    from sftlab.export.chat import talk

    talk(config)


@Command("look", "sftlab report results/ --bandwidth 50", (configs.ReportConfig,), places={"folder": "[DIR]"})
def report(args, config):
    """Make a page of a folder of results: speed, scaling, memory, loss."""
    from sftlab.bench.report import write_report

    quiet_libraries()
    print(f"saved {write_report(config)}")


@Command("look", "sftlab metrics results/current/", (configs.MetricsConfig,), places={"output_dir": "[DIR]"})
def metrics(args, config):
    """Watch the machine until Ctrl-C: processor, memory and GPUs, each second, into a folder."""
    from sftlab.bench import monitor

    monitor.watch(config)


@Command(
    "scale",
    "sftlab memory meta-llama/Llama-2-7b-hf --device gpu --room 24 --use-lora --batch-size 4",
    (configs.MemoryConfig, configs.TrainConfig),
    places={"model_name": "[MODEL]"},
)
def memory(args, plan, config):
    """Estimate the memory that a training run takes, in parts; what fits, and what to do if it doesn't."""
    from sftlab.memory import advice

    quiet_libraries()
    print("\n".join(advice.format_estimate(config, plan)))


@Command(
    "scale",
    "sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --use-lora",
    (configs.LaunchConfig,),
    add=lambda parser: parser.add_argument("training", nargs=argparse.REMAINDER, help="`train` and its options"),
    usage="[options] train [options of train]",
)
def launch(args, config):
    """Start a training on several devices and nodes: checks, the exact commands, a log for each rank."""
    if not args.training or args.training[0] != "train":
        example = "`sftlab launch --gpus-per-node 2 train --use-lora`"
        raise UserError(f"launch: after its own options come `train` and those of the training, as {example}.")
    training = build_options(configs.TrainConfig, build_parser().parse_args(args.training))
    quiet_libraries()
    from sftlab.runs import launcher

    code = launcher.launch(config, args.training[1:], training)
    if code not in (0, 2, 130):  # 2: a process has said in a line what to do
        print(f"sftlab doctor {training.output_dir} says more", file=sys.stderr)
    return code


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    source = "facts for tiny-base, else alpaca"
    add_options(parser, configs.DataConfig, only=configs.DATA_OF_BENCHMARK, source=source)
    add_options(parser, configs.TrainConfig, but=configs.SET_BY_BENCHMARK)


@Command(
    "scale",
    "sftlab benchmark tiny-base 2 --sizes 1000 --use-lora",
    (configs.BenchmarkConfig,),
    places={"model_name": "[MODEL]", "nodes": "[NODES ...]"},
    add=add_benchmark_arguments,
)
def benchmark(args, bench):
    """Measure throughput and scaling: data sets of some sizes, on 1, 2, 4, … nodes."""
    config = build_options(configs.TrainConfig, args)
    args.source = getattr(args, "source", "facts" if config.model_name == "tiny-base" else "alpaca")
    rows = build_options(configs.DataConfig, args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop ends the point's processes, too
    quiet_libraries()
    from sftlab.bench import measure

    return measure.run_benchmark(bench, config, rows)


@Command("set up", "sftlab token --status", (configs.TokenConfig,))
def token(args, config):
    """Store a Hugging Face token, asked for without echo or read from standard input.

    Exit code 1: there's none, or the Hub doesn't take it.
    """
    from sftlab.hub import token as stored

    lines, good = stored.describe_status() if config.status else (stored.save_token(), True)
    print("\n".join(lines))
    return 0 if good else 1


@Command(
    "set up",
    "sftlab access meta-llama/Llama-2-7b-hf google/gemma-7b",
    (configs.ModelsConfig,),
    places={"models": "[MODEL ...]"},
)
def access(args, config):
    """Check which models you can use, and what to do for the others.

    Exit code 1: not all can be used.
    """
    from sftlab.hub.access import check_all, format_table

    found = check_all(config.models)
    print(format_table(found))
    return 0 if all(one.usable for one in found) else 1


@Command("set up", "sftlab models")
def models(args):
    """List the models that the lab knows: size, gate, licence, memory, and what fits here."""
    from sftlab.memory import model_table

    print(model_table.format_models())


@Command("set up", "sftlab download gpt2", (configs.ModelsConfig,), places={"models": "[MODEL ...]"})
def download(args, config):
    """Fetch models into the cache: their size first, room on the disk, then a progress bar."""
    from sftlab.hub import access, download
    from sftlab.models import load

    if not config.models:
        raise UserError("models: name a model, as `sftlab download gpt2`.")
    for model in config.models:
        here = access.is_here(model)
        done = f"{model}: nothing to fetch, it is on this machine"
        print(done if here else f"whole: {download.fetch_model(load.locate(model))}")


@Command("set up", "sftlab doctor runs/first", (configs.DoctorConfig,), places={"target": "[RUN]"})
def doctor(args, config):
    """Check whether this machine is fit for the course; or, of a run that failed, what happened, why, and what to do.

    Exit code 1: something is wrong.
    """
    from sftlab.doctor import checks

    return checks.run(config)


if __name__ == "__main__":
    sys.exit(main())
