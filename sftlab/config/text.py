"""A training's configuration in four forms that all give it back: YAML, papermill, `sftlab train`, `sftlab launch`.

YAML is read strictly, from a file, a text or a preset's name. Every value is read as the command line reads it, so `2e-4` is a
number, and a folder called `007` stays one. JSON is YAML, too.

    sftlab train --config run.yaml --output-dir runs/b
    python -c "from sftlab.config import text; print(text.build('{lora_r: 8, use_lora: true}').lora_r)"
"""

import argparse
import functools
import math
import os
import shlex
import typing
from dataclasses import fields
from pathlib import Path

import yaml

from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.config.options import Options, check_value
from sftlab.errors import UserError, near_match
from sftlab.files import ROOT

FIELDS = TrainConfig.__dataclass_fields__
NOTEBOOK = ROOT / "notebooks" / "08_hyperparameters.ipynb"


def read(source: str | Path) -> dict:
    """The options that a configuration names, as their types. Raises UserError for unknown names and wrong values.

    source: a file, the name of a preset, or the YAML itself, which a text is that holds a colon, or nothing.
    """
    if isinstance(source, str) and (":" in source or not source.strip()):
        return parse(source, "options")
    path = Path(source)
    if path.is_file():
        return parse(path.read_bytes(), str(path))
    known = read_presets()
    if str(source) not in known:
        hint = near_match(str(source), known)
        raise UserError(f"config: no file and no preset '{source}'.{hint} There are: {', '.join(known)}.")
    return dict(known[str(source)]["options"])


@functools.cache
def read_presets() -> dict[str, dict]:
    """Settings to begin with: name -> a row of presets.yaml, which says what it holds, with its options as their types."""
    rows = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
    for row in rows.values():
        row["options"] = {name: check_value(FIELDS[name], value) for name, value in row["options"].items()}
    return rows


def parse(text: str | bytes, where: str) -> dict:
    """The options that a YAML mapping names, as their types. where: what a message calls the text."""
    try:
        found = yaml.load(text, yaml.BaseLoader)  # every value as it stands: the options' types read it
    except yaml.YAMLError as error:
        raise UserError(f"{where}: no YAML: {' '.join(str(error).split())}. Write `lora_r: 8`, in UTF-8.") from error
    if not isinstance(found or {}, dict):
        raise UserError(f"{where}: no options in it. Write one on a line, as `lora_r: 8`, or all as `{{lora_r: 8}}`.")
    values, names = {}, [key.value.replace("-", "_") for key, _ in yaml.compose(text).value] if found else []
    for key, value in (found or {}).items():
        name = key.replace("-", "_")
        if names.count(name) > 1:
            raise UserError(f"{where}: {name} stands there twice. Keep one.")
        if name not in FIELDS:
            raise UserError(f"{where}: sftlab train has no option {key!r}.{near_match(name, FIELDS)}")
        try:
            values[name] = check_value(FIELDS[name], value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return values


def build(options: str | Path = "", **values: object) -> TrainConfig:
    """The configuration of these values and of `options` (as `read` takes them), which win."""
    return TrainConfig.build(**values | read(options))


def choose(options: Options, start: Options | None = None) -> dict:
    """The options that differ from those of `start`, by default from their defaults."""
    before = vars(start or type(options)())
    return {name: value for name, value in vars(options).items() if value != before[name]}


def to_yaml(values: dict, flow: bool = False) -> str:
    """Some options as YAML that `read` gives back."""
    breaks = "\x85\u2028\u2029"  # PyYAML would read them as spaces, unless they are escaped
    plain = not any(mark in str(value) for value in values.values() for mark in breaks)
    form = {"default_flow_style": flow, "sort_keys": False, "allow_unicode": plain, "width": math.inf}
    return yaml.safe_dump(values, **form)


def to_flags(options: Options, start: Options | None = None) -> list[str]:
    """The options that differ from those of `start`, by default from their defaults, as arguments of a command line."""
    words = []
    for name, value in choose(options, start).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        elif str(value).startswith("-"):  # which would be taken for a flag
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def to_papermill(config: TrainConfig, notebook: str | Path | None, start: TrainConfig) -> str:
    """The papermill command that runs a notebook with this configuration, given in its parameter `options`.

    notebook: one whose configuration is made by `build(options, …)` (default: 08); start: what it makes unasked. Every option
    is named in which one of the two differs from the defaults.
    """
    options = to_yaml({name: getattr(config, name) for name in choose(start) | choose(config)}, flow=True)
    book = os.path.relpath(notebook or NOTEBOOK)
    return shlex.join(["papermill", book, "out.ipynb", "-p", "options", options.strip()])


def list_forms(config: TrainConfig, launch: LaunchConfig, notebook, start: TrainConfig) -> list[dict]:
    """The four forms, {name, text}, in the order of a panel; notebook, start: of `to_papermill`."""
    train = ["train", *to_flags(config)]
    return [
        {"name": "YAML, for --config", "text": to_yaml(choose(config))},
        {"name": "papermill", "text": to_papermill(config, notebook, start)},
        {"name": "sftlab train", "text": shlex.join(["sftlab", *train])},
        {"name": "sftlab launch", "text": shlex.join(["sftlab", "launch", *to_flags(launch), *train])},
    ]


def add_options(parser: argparse.ArgumentParser, options: type[Options], only=(), but=(), **defaults: str) -> None:
    """One flag for each field of a configuration, in its groups; values stay text, the configuration itself checks them.

    defaults: what --help names as the default of an option for which the command chooses one.
    """
    if options is TrainConfig:
        names = ", ".join(read_presets())
        help = f"a YAML file with options of a training, or a preset: {names}; flags beside it win"
        parser.add_argument("--config", metavar="FILE", default=None, help=help)
    groups: dict = {"": parser}
    for field in fields(options):
        if field.name in but or (only and field.name not in only) or not field.metadata["help"]:
            continue
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        help = field.metadata["help"].replace("%", "%%")
        kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
        if kind is bool:
            help += " (default: on)" if field.default else ""
            form = {"action": argparse.BooleanOptionalAction}
        else:
            default = defaults.get(field.name, field.default)
            help += "" if default in (None, "") else f" (default: {default})"
            choices = ",".join(field.metadata["choices"])
            form = {"metavar": f"{{{choices}}}" if choices else kind.__name__.upper()}
            form |= {"nargs": "+", "action": "extend"} if kind is list else {}
        flag = "--" + field.name.replace("_", "-")
        groups[title].add_argument(flag, default=argparse.SUPPRESS, help=help, **form)


def build_options(options: type[Options], args: argparse.Namespace) -> Options:
    """A configuration from a parser's result; a training's options also from --config, over which the flags win."""
    chosen = read(Path(args.config)) if options is TrainConfig and args.config else {}
    return options.build(**chosen | options.keep_known(vars(args)))
