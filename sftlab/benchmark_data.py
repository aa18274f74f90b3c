"""The data sets of a benchmark: one preparation, and of it a set for each size. Where rows repeat, that is said.

python -c "from sftlab import benchmark_data; print(benchmark_data.spread(3, 8))"
"""

import contextlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path

from sftlab import data, data_report, files, hub, models, sources
from sftlab.config import DataConfig
from sftlab.prepared import FACTS, put_in_place


def spread(rows: int, size: int) -> list[int]:
    """Which of so many rows make a set of `size`: the first ones, or all of them again and again."""
    return [number % rows for number in range(size)]


def prepare_sizes(config: DataConfig, sizes: list[int]) -> dict[int, dict]:
    """A prepared folder for each size: {size: path, source, rows, distinct_rows, fingerprint}.

    A smaller set is the beginning of a larger one, and the rows are in random order. Raises UserError as `prepare` does.
    """
    if config.source in sources.HUB_IDS and not config.hub_id and not hub.reach():
        config = replace(config, offline=True)  # so that a grid that goes on finds the set again
    told = io.StringIO()
    with contextlib.redirect_stdout(told):  # a report of pages would hide the plan of the grid
        whole = data.prepare(replace(config, num_samples=max(sizes)))
    splits, report = data.load_prepared(whole)
    if config.offline and config.source in sources.HUB_IDS:
        print(f"offline: the bundled sample {report['source']} stands in for {sources.HUB_IDS[config.source]}")
    tokenizer = models.load_tokenizer(config.model, config.trust_remote_code)
    return {size: make_set(whole, splits, report, tokenizer, size) for size in sizes}


def make_set(whole: Path, splits, report: dict, tokenizer, size: int) -> dict:
    """The set of one size beside the folder that it is taken from, made unless it is there."""
    rows = len(splits["train"])
    about = {"source": report["source"], "rows": size, "distinct_rows": min(rows, size),
             "fingerprint": f"{report['fingerprint']}-{size}"}  # fmt: skip
    folder = whole.with_name(f"{whole.name.rpartition('_')[0]}_{size}")
    if size == rows:
        return about | {"path": str(whole), "fingerprint": report["fingerprint"]}
    if files.read_json(folder / FACTS).get("fingerprint") != about["fingerprint"]:
        train = splits["train"].select(spread(rows, size))
        counts = data_report.measure(train, tokenizer, report["max_length"])
        del counts["lengths"]
        made = report | about | {"name": folder.name, "splits": report["splits"] | {"train": counts}}
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
            data.save(Path(aside) / "new", {"train": train, "test": splits["test"]}, made)
            put_in_place(Path(aside) / "new", folder, Path(aside) / "old")
    return about | {"path": str(folder)}
