"""A training's configuration as YAML: read strictly, from a file, a text or a preset's name, and written.

Every value is read as the command line reads it, so `2e-4` is a number, and a folder called `007` stays one. JSON is YAML, too.

    sftlab train --config run.yaml --output-dir runs/b
    python -c "from sftlab import config_file; print(config_file.build('{lora_r: 8, use_lora: true}').lora_r)"
"""

import dataclasses
from pathlib import Path

from sftlab import presets
from sftlab.config import TrainConfig
from sftlab.options import UserError, check_value, near_match

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
        top = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: no YAML: {getattr(error, 'problem', None) or error}. Write `option: value`.") from error  # fmt: skip
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
            values[name] = check_value(fields[name], read_value(name, node))
        except UserError as error:
            raise UserError(f"{line}: {error}") from None
    return values


def read_value(name: str, node) -> object:
    """A scalar's text as it stands, or the texts of a list; YAML's `~` is its `null`. Raises UserError for what holds more."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return "null" if node.value == "~" and node.style is None else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(part, yaml.ScalarNode) for part in node.value):
        return [part.value for part in node.value]
    raise UserError(f"{name}: there are options inside it, and it takes one value.")


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


def write(config: TrainConfig, everything: bool = False, comments: bool = False) -> str:
    """A configuration as YAML that `read` gives back: what differs from the defaults, or everything; comments: with each help."""
    chosen = choose(config, everything)
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(config)}
    lines = [
        f"{name}: {to_scalar(value)}" + (f"  # {helps[name]}" if comments else "") + "\n"
        for name, value in chosen.items()
    ]
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
