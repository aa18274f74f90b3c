"""How an option is declared, read and checked: the dataclasses in `config` are made of these.

python -c "from sftlab.config.options import coerce; print(coerce('learning_rate', '2e-4', float))"
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import types
import typing

from sftlab.errors import UserError, near_match, refuse_token


def coerce(name: str, value: object, kind: object) -> object:
    """The value as the declared type: "false" -> False, "2e-4" -> 0.0002, "null" -> None where None is allowed.

    `kind` is bool, int, float, str, list, or a union of one of them with None. Raises UserError for anything that
    would lose or change meaning: 1.5 for an int, "yes" for a bool, True for a number.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options:
        if value is None or value in ("null", "None", "~", ""):
            return None
        kind = next(option for option in options if option is not type(None))
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if math.isfinite(number) and (kind is float or number.is_integer()):
                return kind(number)
    elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise UserError(f"{name}: {value!r} is no {kind.__name__}. Write it like {EXAMPLES[kind]}.")


EXAMPLES = {bool: "true or false", int: "16", float: "2e-4 or 0.0002", str: "text", list: "4,16,64"}


def option(default: object, help: str, *, choices=(), low=None, high=None, commas: bool = False, group: str = ""):
    """A dataclass field with its help text; without one it is no flag.

    choices, or low and high: what is allowed; commas: texts of a list keep theirs, as paths may hold them; group: where --help and a form show it.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "commas": commas, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def check_value(field: dataclasses.Field, value: object) -> object:
    """The value as the type of an option, or UserError if it is not among its choices or not in its range."""
    refuse_token(value, field.name)
    if field.metadata["commas"]:
        value = [value] if isinstance(value, str) else value
    elif isinstance(value, list):
        value = [one for part in value for one in (coerce(field.name, part, list) if isinstance(part, str) else [part])]
    value = coerce(field.name, value, field.type)
    choices, low, high = (field.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        hint = near_match(str(value), choices)
        raise UserError(f"{field.name}: {value!r} is not one of {', '.join(choices)}.{hint}")
    if value is not None and (low is not None and value < low or high is not None and value > high):
        limit = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise UserError(f"{field.name}: {value:g} is out of range; it must be {limit}.")
    return value


class Options:
    """What all configurations can do: be built from loose values, strictly, and be hashed."""

    @classmethod
    def build(cls, **values: object) -> typing.Self:
        """The configuration from values that may be strings; unknown names and wrong values raise UserError."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise UserError(f"{cls.__name__} has no option {name!r}.{near_match(name, fields)}")
        return cls(**values)

    @classmethod
    def keep_known(cls, values: dict) -> dict:
        """Of some values by name those that are options here: a file of another version, a parser's result may hold more."""
        names = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in values.items() if name in names}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, check_value(field, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Refuse what can't work together, with the fix in the message."""

    def hash(self) -> str:
        """12 hex digits that are equal for equal configurations, wherever they were written down."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
