"""Settings to begin with, from presets.yaml: the guide's table by the model's size, its debug mode, a quick real training."""

import functools
from dataclasses import dataclass
from pathlib import Path

from sftlab.config.configs import TrainConfig
from sftlab.config.options import check_value
from sftlab.errors import UserError, near_match


@dataclass(frozen=True)
class Preset:
    """A row of presets.yaml, which says what each field is; `options` as their types."""

    name: str
    title: str
    options: dict
    gpu: int
    batches: list[int]
    nodes: str = ""

    @property
    def about(self) -> str:
        """The preset in a line: what for, on what."""
        needs = f"on {self.nodes}, each GPU with {self.gpu} GB or more" if self.gpu else "it fits any machine"
        return f"{self.title}; {needs}"


@functools.cache
def read_presets() -> dict[str, Preset]:
    """Name -> preset, in the order of the file."""
    import yaml

    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    fields = TrainConfig.__dataclass_fields__
    found = {}
    for name, row in yaml.safe_load(text).items():
        options = {option: check_value(fields[option], value) for option, value in row.pop("options").items()}
        found[name] = Preset(name, options=options, **row)
    return found


def find_preset(name: str) -> Preset:
    """The preset of a name. Raises UserError, with the closest name, where there is none."""
    known = read_presets()
    if name not in known:
        hint = near_match(name, known)
        raise UserError(f"config: no file and no preset {name!r}.{hint} There are: {', '.join(known)}.")
    return known[name]


def list_changes(before: TrainConfig, preset: Preset) -> list[str]:
    """What a preset would change in a configuration, as `option before -> after`."""
    now = {name: getattr(before, name) for name in preset.options}
    return [f"{name} {now[name]} -> {value}" for name, value in preset.options.items() if now[name] != value]
