"""DeepSpeed's ZeRO: which configuration a name means, and its stage.

ZeRO shards a training's state over the devices: stage 1 the optimizer's, 2 the gradients too, 3 the weights too.
The files that names stand for lie in `sftlab/config/deepspeed`, whose README explains each of their lines.

    python -c "from sftlab.config import deepspeed; print(deepspeed.list_names(), deepspeed.find_stage('zero2'))"
"""

import json
from pathlib import Path

from sftlab.errors import UserError, near_match

CONFIGS = Path(__file__).resolve().parent / "deepspeed"


def list_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def find_config(name: str) -> Path:
    """The file behind --deepspeed: a path, else one of the package's by its name (`zero2`, `configs/ds_config_7b.json`).

    Raises UserError where there is neither.
    """
    path = Path(name)
    if not path.is_file():
        path = CONFIGS / f"{path.name.removesuffix('.json')}.json"
    if not path.is_file():
        known = list_names()
        hint = f"{near_match(name, known)} There are: {', '.join(known)}."
        raise UserError(f"deepspeed: no file {name}, and no configuration of that name.{hint}")
    return path


def read_zero(name: str | None) -> dict:
    """The `zero_optimization` of a configuration; empty without one. Raises UserError for a file that is none."""
    if not name:
        return {}
    path = find_config(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed: {path} is no JSON: {error}.") from error
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f'deepspeed: {path} has no ZeRO options. Write {{"zero_optimization": {{"stage": 2}}}}.')
    return zero


def find_stage(name: str | None) -> int:
    """The ZeRO stage of a configuration: 0 (nothing is sharded) to 3. Raises UserError for one that isn't."""
    stage = read_zero(name).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed: {find_config(name)} asks for ZeRO stage {stage!r}; there are 0, 1, 2 and 3.")
    return stage


def offloads(name: str | None) -> bool:
    """Whether a configuration keeps the optimizer's state in the host's memory."""
    offload = read_zero(name).get("offload_optimizer")
    return isinstance(offload, dict) and offload.get("device", "none") != "none"
