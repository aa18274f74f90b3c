"""The controls of a form, made from a configuration's fields, and what is typed into them read as strictly as a command line.

python -c "from sftlab import form_fields; print(form_fields.describe()[0])"
"""

import dataclasses
import re
import types
import typing
from pathlib import Path

from sftlab import catalog, conflicts, zero
from sftlab.config import TrainConfig
from sftlab.options import UserError, check_value

GROUPS = ("model", "data", "LoRA", "optimisation", "hardware", "saving and logging")  # in this order
AUTO = {"": "auto", "true": "yes", "false": "no"}  # of a bool that may be left to the machine
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def describe() -> list[dict]:
    """What a browser needs to draw each control: name, group, kind (text, number, choice, flag), choices, suggestions, help,
    range and default in words."""
    fields = sorted(FIELDS.values(), key=lambda field: GROUPS.index(field.metadata["group"]))
    return [describe_field(field) for field in fields]


def describe_field(field: dataclasses.Field) -> dict:
    kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
    open_bool = kind is bool and isinstance(field.type, types.UnionType)
    choices = AUTO if open_bool else {choice: choice for choice in field.metadata["choices"]}
    shape = "choice" if choices else "flag" if kind is bool else "number" if kind in (int, float) else "text"
    suggestions = {"model_name": [model.hub_id for model in catalog.MODELS], "deepspeed": zero.list_names()}
    return {
        "name": field.name, "group": field.metadata["group"], "kind": shape, "choices": list(choices.items()),
        "suggestions": suggestions.get(field.name, []), "help": field.metadata["help"], "range": tell_range(field, kind),
        "default": choices.get(to_text(field.default)) or tell(field.default),
    }  # fmt: skip


def tell_range(field: dataclasses.Field, kind: type) -> str:
    """What a number may be, in words: `a whole number, at least 1`."""
    if kind not in (int, float):
        return ""
    low, high = field.metadata["low"], field.metadata["high"]
    sort = "a whole number" if kind is int else "a number"
    limits = [f"at least {low:.10g}"] if low is not None else []
    return ", ".join([sort, *(limits if high is None else [f"{low:.10g} to {high:.10g}"])])


def tell(value: object) -> str:
    """A default in words."""
    return {None: "empty", True: "on", False: "off"}[value] if value is None or value is True or value is False else to_text(value)  # fmt: skip


def to_text(value: object) -> str:
    """A value as it's typed; `check_value` reads it back as the same."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_texts(config: TrainConfig) -> dict[str, str]:
    return {name: to_text(getattr(config, name)) for name in FIELDS}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was typed, read: the configuration, or None where something is refused; the reason for each option concerned;
    and the options that are not at their default."""

    config: TrainConfig | None
    problems: dict[str, str]
    changed: list[str]


def read(texts: dict[str, str], last: TrainConfig) -> Reading:
    """Read all that is typed. last: the last valid configuration, which stands in for what is refused when conflicts are sought."""
    values, problems = {}, {}
    for name, field in FIELDS.items():
        try:
            values[name] = check_value(field, texts[name])
        except UserError as error:
            problems[name] = str(error)
    refused = set(problems)
    changed = [name for name in FIELDS if name in refused or values[name] != FIELDS[name].default]
    stand_in = types.SimpleNamespace(**dataclasses.asdict(last) | values)
    try:
        for conflict in conflicts.find(stand_in):
            named = find_options(" ".join(conflict.options), str(conflict))
            concerned = [
                name for name in named if name in changed or f"no {name}" in conflict.options
            ]  # not: A of `A or B`
            problems = {name: str(conflict) for name in concerned or named} | problems
        config = TrainConfig(**values) if not problems else None
    except UserError as error:
        config, problems = None, problems | {name: str(error) for name in find_options(str(error).split(":")[0], "")}
    return Reading(config, problems, changed)


def find_options(words: str, others: str) -> list[str]:
    """The options that are named in `words`; if there are none in them, those in `others`, else the first one of all."""
    for text in (words, others):
        if found := [name for name in re.findall(r"\w+", text) if name in FIELDS]:
            return found
    return ["model_name"]


def find_free(folder: str) -> str | None:
    """Another name for a run folder that exists and holds something: the next one with a number; None for one that is free."""

    def is_free(path: Path) -> bool:
        return not path.exists() or path.is_dir() and not any(path.iterdir())

    if is_free(Path(folder)):
        return None
    stem, number = re.fullmatch(r"(.*?)(?:-(\d+))?", folder.rstrip("/"), re.DOTALL).groups()
    count = int(number or 1) + 1
    while not is_free(Path(f"{stem}-{count}")):
        count += 1
    return f"{stem}-{count}"
