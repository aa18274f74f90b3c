"""Where a model stands for you: public, granted, pending, rejected, not there, out of reach; and what to do about it.

Asks the Hub without fetching a weight: its auth-check says whether files may be read, its page whether there is a gate.

    sftlab access meta-llama/Llama-2-7b-hf google/gemma-7b
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, errors

from sftlab.errors import near_match
from sftlab.hub import catalog, download
from sftlab.hub import client as hub_client


@dataclass(frozen=True)
class Access:
    """How a model stands: the name of its state (`states.yaml`), what that means, and what to do."""

    model: str
    state: str
    usable: bool
    means: str
    what_to_do: str


def check_all(names: list[str] | None = None) -> list[Access]:
    """How models stand, the whole catalogue if none is named. The Hub is looked for once, briefly, for all of them."""
    names = list(names or [model.hub_id for model in catalog.MODELS])
    reached = not all(map(is_here, names)) and hub_client.reach()

    def check_one(name: str) -> Access:
        known = None if is_here(name) else catalog.find_model(name)
        name = known.hub_id if known else name
        state, said = find_state(name, reached)
        means, what_to_do = hub_client.explain_state(state, name, said=said)
        if state == "not found":
            what_to_do += near_match(name, [name for model in catalog.MODELS for name in (model.hub_id, model.name)])
        return Access(name, state, "what_to_do" not in hub_client.STATES[state], means, what_to_do)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(check_one, names))


def is_here(name: str) -> bool:
    """Whether a name needs no Hub: the bundled model, random weights, a folder."""
    return name == "tiny-base" or name.startswith(catalog.RANDOM) or Path(name).is_dir()


def find_state(name: str, reached: bool) -> tuple[str, str]:
    """(the name of a model's state, the Hub's own words)."""
    if is_here(name):
        return ("folder" if Path(name).is_dir() else "bundled"), ""
    try:
        if not reached and download.find_snapshot(name):
            return "cached", ""
        if not reached:
            raise ConnectionError
        page = HfApi().model_info(name, expand=["gated", "private"], timeout=hub_client.WAIT)
        HfApi().auth_check(name)
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        return hub_client.read_state(error)
    return ("private" if page.private else "granted" if page.gated else "public"), ""


def format_table(found: list[Access]) -> str:
    """The states as text: a line per model, and below those that can't be used what to do."""
    width = max(len(access.model) for access in found) + 2
    lines = []
    for access in found:
        lines.append(f"{access.model:<{width}}{access.state:<19}{'' if access.usable else 'NO  '}{access.means}")
        if not access.usable:
            lines.append(f"    {access.what_to_do}")
    return "\n".join([*lines, f"\n{sum(access.usable for access in found)} of {len(found)} can be used"])
