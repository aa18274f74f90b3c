"""A training's configuration in four forms that all give it back: YAML, papermill, `sftlab train`, `sftlab launch`.

YAML is read strictly, from a file, a text or a preset's name. Every value is read as the command line reads it, so `2e-4` is a
number, and a folder called `007` stays one. JSON is YAML, too.

    sftlab train --config run.yaml --output-dir runs/b
    python -c "from sftlab.config import text; print(text.build('{lora_r: 8, use_lora: true}').lora_r)"
"""

import argparse
import ast
import dataclasses
import shlex
import typing
from dataclasses import fields
from pathlib import Path

from sftlab import files
from sftlab.config import presets
from sftlab.config.configs import GROUPS, LaunchConfig, TrainConfig
from sftlab.config.options import Options, check_value
from sftlab.errors import UserError, near_match
from sftlab.files import ROOT

ENDINGS = (".yaml", ".yml", ".json")


def read(source: str | Path) -> dict:
    """The options that a configuration names, as their types. Raises UserError for unknown names and wrong values.

    source: a file, the name of a preset, or the YAML itself, which a text is that holds a colon, or nothing.
    """
    if isinstance(source, str) and (":" in source or not source.strip()):
        return parse(source, "options")
    path = Path(source)
    if path.is_file():
        try:
            return parse(path.read_text(encoding="utf-8-sig"), str(path))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start + 1} is not UTF-8. Save the file as UTF-8.") from error
    if path.suffix in ENDINGS or len(path.parts) > 1:
        raise UserError(f"{path}: no such file. Write one with options of `sftlab train`, as `lora_r: 8`.")
    return dict(presets.find_preset(str(source)).options)


def parse(text: str, where: str) -> dict:
    """The options that a YAML mapping names, as their types. where: what a message calls the text."""
    import yaml

    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    try:
        top = yaml.compose(text, Loader=yaml.BaseLoader)  # every value as it stands: the options' types read it
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{where}{line}: no YAML: {problem}. Write `option: value`.") from error
    if top is None:
        return {}
    if not isinstance(top, yaml.MappingNode):
        raise UserError(f"{where}: no options in it. Write one on a line, as `lora_r: 8`, or all as `{{lora_r: 8}}`.")
    values: dict = {}
    for key, node in top.value:
        name, line = str(key.value).replace("-", "_"), f"{where}, line {key.start_mark.line + 1}"
        if name not in fields:
            raise UserError(f"{line}: sftlab train has no option {key.value!r}.{near_match(name, fields)}")
        if name in values:
            raise UserError(f"{line}: {name} stands there twice; leave one out.")
        try:
            value = yaml.BaseLoader("").construct_object(node, deep=True)
            values[name] = check_value(fields[name], "null" if value == "~" and node.style is None else value)
        except (UserError, yaml.YAMLError) as error:
            raise UserError(f"{line}: {' '.join(str(error).split())}") from None
    return values


def build(options: str | Path = "", **values: object) -> TrainConfig:
    """The configuration of these values and of `options` (as `read` takes them), which win."""
    return TrainConfig.build(**values | read(options))


def choose(config: TrainConfig, everything: bool = False, also: tuple = ()) -> dict:
    """The options of a configuration that differ from their defaults, and those named in `also`; or all of them."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if everything or field.name in also or getattr(config, field.name) != field.default
    }


def write(config: TrainConfig, everything: bool = False) -> str:
    """A configuration as YAML that `read` gives back: what differs from the defaults, or everything."""
    lines = [f"{name}: {to_scalar(value)}\n" for name, value in choose(config, everything).items()]
    return "".join(lines) or "{}  # all defaults\n"


def to_flow(values: dict) -> str:
    """Options as YAML in one line, `{lora_r: 8}`."""
    return "{" + ", ".join(f"{name}: {to_scalar(value)}" for name, value in values.items()) + "}"


def to_scalar(value: object) -> str:
    """A value as YAML that may stand in a line among others."""
    import yaml

    options = {"allow_unicode": True, "default_flow_style": True, "width": float("inf")}
    text = yaml.safe_dump([value], **options).strip()
    if len(text.splitlines()) > 1:  # a line break, which double quotes write as \n
        text = yaml.safe_dump([value], **options, default_style='"').strip()
    return text[1:-1]


NOTEBOOK = ROOT / "notebooks" / "08_hyperparameters.ipynb"


def to_flags(options: Options) -> list[str]:
    """The options that differ from their defaults, as arguments of a command line."""
    words = []
    for field in fields(options):
        value, flag = getattr(options, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        elif str(value).startswith("-"):  # which would be taken for a flag
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def to_train(config: TrainConfig) -> str:
    return shlex.join(["sftlab", "train", *to_flags(config)])


def to_launch(config: TrainConfig, launch: LaunchConfig) -> str:
    return shlex.join(["sftlab", "launch", *to_flags(launch), "train", *to_flags(config)])


def to_papermill(config: TrainConfig, notebook: str | Path | None = None, start: TrainConfig | None = None) -> str:
    """The papermill command that runs a notebook with this configuration, given in its parameter `options`.

    notebook: one whose configuration is made by `build(options, …)`; start: what it makes unasked, so that each
    option in which this configuration differs from it is named, and each knob of its own.
    """
    path = Path(notebook or NOTEBOOK)
    differing = [f.name for f in fields(config) if start and getattr(start, f.name) != getattr(config, f.name)]
    chosen = choose(config, also=(*read_knobs(path), *differing))
    place = path.resolve()
    near = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
    return shlex.join(["papermill", str(near), "out.ipynb", "-p", "options", to_flow(chosen)])


def read_knobs(notebook: Path) -> list[str]:
    """The options of a training that a notebook's parameters cell sets itself."""
    names = {field.name for field in fields(TrainConfig)}
    cells = files.read_json(notebook).get("cells", [])
    source = ["".join(cell["source"]) for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    assigned = [node for node in ast.walk(ast.parse("\n".join(source))) if isinstance(node, ast.Name)]
    return [node.id for node in assigned if isinstance(node.ctx, ast.Store) and node.id in names]


def list_forms(
    config: TrainConfig, launch: LaunchConfig, notebook=None, start: TrainConfig | None = None
) -> list[dict]:
    """The four forms, {name, text}, in the order of a panel."""
    return [
        {"name": "YAML, for --config", "text": write(config)},
        {"name": "papermill", "text": to_papermill(config, notebook, start)},
        {"name": "sftlab train", "text": to_train(config)},
        {"name": "sftlab launch", "text": to_launch(config, launch)},
    ]


class CommandParser(argparse.ArgumentParser):
    """A parser that leaves what stands after -- alone where it is a command: argparse would take its own -- out of it."""

    def parse_known_args(self, args=None, namespace=None):
        takes = self.get_default("command") is not None and "--" in args
        cut = args.index("--") if takes else len(args)
        found, unknown = super().parse_known_args(args[:cut], namespace)
        if takes:
            found.command = args[cut + 1 :]
        return found, unknown


def add_options(
    parser: argparse.ArgumentParser,
    options: type[Options],
    only: tuple = (),
    but: tuple = (),
    defaults: dict | None = None,
) -> None:
    """One flag for each field of a configuration, in its groups; values stay text, the configuration itself checks them.

    defaults: what --help names as the default of an option for which the command chooses one.
    """
    found = [field for field in dataclasses.fields(options) if field.name not in but]
    found = [field for field in found if field.name in only] if only else found
    groups = {
        name: parser.add_argument_group(name) for name in GROUPS if any(f.metadata["group"] == name for f in found)
    }
    for field in found:
        group = groups.get(field.metadata["group"], parser)
        flag = "--" + field.name.replace("_", "-")
        help = field.metadata["help"].replace("%", "%%")
        kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
        if kind is bool:
            help += " (default: on)" if field.default else ""
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
            continue
        choices = (
            "{" + ",".join(field.metadata["choices"]) + "}" if field.metadata["choices"] else kind.__name__.upper()
        )
        default = (defaults or {}).get(field.name, field.default)
        default = "" if default in (None, "") else f" (default: {default})"
        several = {"nargs": "+"} if kind is list else {}
        group.add_argument(flag, metavar=choices, default=argparse.SUPPRESS, help=help + default, **several)


def add_config_file(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(presets.read_presets())
    help = f"a YAML file with options of a training, or a preset: {names}; flags beside it win"
    parser.add_argument("--config", metavar="FILE", default=None, help=help)


def add_place(parser: argparse.ArgumentParser, name: str, metavar: str, help: str, nargs: str = "?") -> None:
    """An option that may be given without its flag."""
    parser.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, metavar=metavar, help=help)


def build_options(options: type[Options], args: argparse.Namespace) -> Options:
    return options.build(**options.keep_known(vars(args)))


def build_training(args: argparse.Namespace) -> TrainConfig:
    """A training's configuration: from --config, if it's given, and the flags beside it, which win."""
    chosen = read(Path(args.config)) if getattr(args, "config", None) else {}
    return TrainConfig.build(**chosen | TrainConfig.keep_known(vars(args)))
