"""Where rows come from: your own files, the Hub's public sets, or the bundled samples that stand in for them.

python -c "from sftlab.data import sources; print(len(sources.load_sample('dolly')))"
"""

import contextlib
import random
from pathlib import Path

import yaml

from sftlab.config.configs import FILE_SOURCES, DataConfig
from sftlab.data import readers
from sftlab.errors import UserError
from sftlab.files import ROOT
from sftlab.hub import client as hub_client

SAMPLES = ROOT / "data_samples"
HUB_IDS = {
    "alpaca": "tatsu-lab/alpaca",
    "dolly": "databricks/databricks-dolly-15k",
    "wizardlm": "WizardLMTeam/WizardLM_evol_instruct_V2_196k",
}
SAMPLE_FILES = {
    "facts": "facts_train.json",
    "alpaca": "alpaca.json",
    "dolly": "dolly.jsonl",
    "wizardlm": "wizardlm.json",
}
Found = list[tuple[str, object]]


def load_source(config: DataConfig) -> tuple[Found, Found | None, str]:
    """Rows to train on, held-out rows (None: split some off), each with its place, and a name for messages."""
    held_out = load_file(config.test_path) if config.test_path else None
    if config.source in FILE_SOURCES:
        paths = list_paths(config.source_path)
        return read_mixture(paths, config.source, config.seed), held_out, ", ".join(paths)
    if config.source == "facts":
        return load_sample("facts"), held_out or load_file(SAMPLES / "facts_test.json"), "facts"
    hub_id = config.hub_id or HUB_IDS[config.source]
    if config.offline or not hub_client.reach():
        if config.hub_id:
            fix = "Connect, or leave --hub-id out to work with the bundled sample."
            raise UserError(f"hub_id: {hub_id} can't be had without a network, and nothing stands in for it. {fix}")
        print(f"offline: the bundled sample {SAMPLES.name}/{SAMPLE_FILES[config.source]} stands in for {hub_id}")
        return load_sample(config.source), held_out, SAMPLE_FILES[config.source]
    return load_hub(hub_id), held_out, hub_id


def read_mixture(paths: list[str], kind: str, seed: int) -> Found:
    """The rows of all files; of one with a weight, as `a.json*0.3`, a seeded random sample of this share of its rows."""
    parts = [split_weight(text) for text in paths]
    if all(weight == 1 for _, weight in parts):
        return readers.read_files([path for path, _ in parts], kind)
    found = []
    for path, weight in parts:
        rows = readers.read_files([path], kind)
        taken = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(weight * len(rows)))))
        print(f"{path}: {len(taken)} of {len(rows)} rows taken (weight {weight:g})")
        found += [(f"{path}: {rows[number][0].removeprefix(f'{path}: ')}", rows[number][1]) for number in taken]
    return found


def list_paths(paths: list[str]) -> list[str]:
    """The paths of --source-path; a YAML file stands for the list in it, of `a.json*0.3`."""
    found = []
    for text in paths:
        found += read_list(text) if text.endswith((".yaml", ".yml")) else [text]
    return found


def read_list(path: str) -> list[str]:
    try:
        listed = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        listed = None
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        why = f"{path} is no YAML list of files"
        raise UserError(f"source_path: {why}; write one in each line, as `- a.json*0.3`.")
    return listed


def split_weight(text: str) -> tuple[str, float]:
    """A path, and the share of its rows that are taken: 1 without `*SHARE` behind it. Raises UserError for no share."""
    path, _, weight = text.rpartition("*")
    if not path or Path(text).exists():
        return text, 1.0
    with contextlib.suppress(ValueError):
        if 0 < float(weight) <= 1:
            return path, float(weight)
    raise UserError(f"source_path: {text}: no such file, and behind * no share above 0 and up to 1, as a.json*0.3.")


def load_sample(source: str) -> Found:
    """The bundled rows in the columns of a public set."""
    return load_file(SAMPLES / SAMPLE_FILES[source])


def load_file(path: str | Path) -> Found:
    """The rows of a file whose suffix says what it is."""
    kind = next((kind for kind, suffixes in readers.SUFFIXES.items() if Path(path).suffix.lower() in suffixes), "json")
    return readers.read_files([path], kind)


def load_hub(hub_id: str) -> Found:
    """The `train` rows of a set on the Hub. Raises UserError, in one line, if they can't be had."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(hub_id, split="train").to_list()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise hub_client.explain(hub_id, "data set", error) from error
    rows = [{name: readers.drop_nulls(value) for name, value in row.items()} for row in rows]
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]
