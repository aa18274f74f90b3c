"""One configuration in four forms that all give it back: YAML, papermill, `sftlab train`, `sftlab launch`.

python -c "from sftlab import form_commands, config; print(form_commands.to_train(config.TrainConfig(lora_r=8)))"
"""

import ast
import shlex
from dataclasses import fields
from pathlib import Path

from sftlab import config_file, files
from sftlab.config import LaunchConfig, TrainConfig
from sftlab.options import Options

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "08_hyperparameters.ipynb"


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

    notebook: one whose configuration is made by `config_file.build(options, …)`; start: what it makes unasked, so that each
    option in which this configuration differs from it is named, and each knob of its own.
    """
    path = Path(notebook or NOTEBOOK)
    differing = [f.name for f in fields(config) if start and getattr(start, f.name) != getattr(config, f.name)]
    chosen = config_file.choose(config, also=(*read_knobs(path), *differing))
    place = path.resolve()
    near = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
    return shlex.join(["papermill", str(near), "out.ipynb", "-p", "options", config_file.to_flow(chosen)])


def read_knobs(notebook: Path) -> list[str]:
    """The options of a training that a notebook's parameters cell sets itself."""
    names = {field.name for field in fields(TrainConfig)}
    cells = [cell for cell in files.read_json(notebook).get("cells", [])
             if "parameters" in cell.get("metadata", {}).get("tags", [])]  # fmt: skip
    targets = [target for cell in cells for line in ast.parse("".join(cell["source"])).body
               for target in ([line.target] if isinstance(line, ast.AnnAssign) else getattr(line, "targets", []))]  # fmt: skip
    return [target.id for target in targets if isinstance(target, ast.Name) and target.id in names]


def list_forms(config: TrainConfig, launch: LaunchConfig, notebook=None, start: TrainConfig | None = None) -> list[dict]:  # fmt: skip
    """The four forms, {name, text}, in the order of a panel."""
    return [
        {"name": "YAML, for --config", "text": config_file.write(config)},
        {"name": "papermill", "text": to_papermill(config, notebook, start)},
        {"name": "sftlab train", "text": to_train(config)},
        {"name": "sftlab launch", "text": to_launch(config, launch)},
    ]
