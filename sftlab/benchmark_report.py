"""`sftlab report`: the results of benchmarks as one page that opens offline and prints.

    sftlab report results/ --bandwidth 50               # with two modelled bounds for more nodes, at 50 GB/s a device
    sftlab report results/before results/after          # the same points side by side

What is measured and what is modelled stand in tables of their own. A file that is missing something or broken is named and
left out.
"""

import math
import time
from pathlib import Path

from sftlab import (
    benchmark_plots,
    benchmark_scaling,
    benchmark_tables,
    metrics,
    report_forms,
    results,
    scaling,
)
from sftlab.benchmark_tables import Entry, Section, Table
from sftlab.config import ReportConfig
from sftlab.options import UserError
from sftlab.report_forms import Chart
from sftlab.results import DISTURBED

MACHINE = ("cpu", "cores", "memory_bytes", "gpu", "gpu_bytes")
VARIED = ("gpus", "machines", "node_is", "threads", "oversubscribed")  # from point to point of one machine
LABELS = {"memory_bytes": "memory", "gpu": "GPU", "gpu_bytes": "memory of a GPU", "gpus": "GPUs", "node_is": "a node is",
          "threads": "threads of a process", "oversubscribed": "more processes than cores"}  # fmt: skip
FEW = 30  # timed steps; with fewer, p10 and p90 are hardly known


def write_report(config: ReportConfig) -> Path:
    """Write the report of one or more folders and return its path. Raises UserError where there is nothing to report."""
    folders = [Path(folder) for folder in config.folders]
    page = Path(config.output) if config.output else folders[0] / "report.html"
    report_forms.check_place(page, config.overwrite)
    entries, problems = read_folders(folders)
    watched, more = read_metrics(folders)
    if not entries and not watched:
        raise UserError(f"{', '.join(map(str, folders))}: no results of `sftlab benchmark`, no metrics.jsonl. "
                        + (f"{len(problems + more)} files were left out: {(problems + more)[0]}" if problems + more else ""))  # fmt: skip
    title = "Benchmark: " + ", ".join(map(str, folders))
    sections = make_sections(config, folders, entries, problems + more) + show_metrics(watched)
    report_forms.write_html(page, title, sections)
    return page


def read_folders(folders: list[Path]) -> tuple[list[Entry], list[str]]:
    """(the points of all folders, what was left out and why)."""
    entries, problems = [], []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder. Name one that `sftlab benchmark` or `sftlab metrics` wrote to.")
        found, wrong = results.read_results(folder)
        ours = f"{folder / 'summary.json'}:"  # of `sftlab metrics`
        problems += [line for line in wrong if not (line.startswith(ours) and (folder / "metrics.jsonl").exists())]
        for result in found:
            where = name_folder(folder, folders) if len(folders) > 1 else ""
            entry = Entry(result.point.name + (f" ({where})" if where else ""), where, result)
            try:
                check_entry(entry)
            except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                problems.append(
                    f"{result.path}: a value is missing or wrong ({type(error).__name__}: {error}); left out"
                )
            else:
                entries.append(entry)
    return entries, problems


def name_folder(folder: Path, folders: list[Path]) -> str:
    """A folder's own name where it tells it from the others, else its whole path."""
    return folder.name if [other.name for other in folders].count(folder.name) == 1 else str(folder)


def check_entry(entry: Entry) -> None:
    """Make all that the report takes from a point, so that a broken one is left out before anything is written."""
    from sftlab import benchmark_tables as tables

    for show in (tables.show_points, tables.show_speed, tables.show_memory, tables.show_loss, tables.show_use):
        for block in show([entry]).blocks:
            report_forms.html_block(block) if isinstance(block, Table) else None
    for run in entry.result.runs:
        math.fsum([*run.losses, *run.peak_bytes])
    scaling.list_series([entry.result])
    show_setups([entry])


def read_metrics(folders: list[Path]) -> tuple[dict[str, list[dict]], list[str]]:
    """(path -> samples of each metrics.jsonl in the folders and one below, what could not be read)."""
    found, problems = {}, []
    for path in sorted(
        {path for folder in folders for form in ("metrics.jsonl", "*/metrics.jsonl") for path in folder.glob(form)}
    ):
        try:
            samples, broken = metrics.read(path)
            metrics.summarise(samples)
        except (OSError, ArithmeticError, AttributeError, KeyError, TypeError) as error:
            problems.append(f"{path}: {error}; left out")
            continue
        problems += [f"{path}: {broken} lines are no samples, and are left out"] if broken else []
        if samples:
            found[str(path)] = samples
        else:
            problems.append(f"{path}: holds no samples; left out")
    return found, problems


def make_sections(
    config: ReportConfig, folders: list[Path], entries: list[Entry], problems: list[str]
) -> list[Section]:
    """The sections on the points, with what matters most at the top."""
    names = [name_folder(folder, folders) for folder in folders]
    groups = {name: [entry.result for entry in entries if entry.folder == name] for name in names}
    compared = [benchmark_tables.show_ratios((names[0], name), groups[names[0]], groups[name]) for name in names[1:]]
    told = [line for _, lines in compared for line in lines]
    top = [f"Made {time.strftime('%Y-%m-%d %H:%M')} from {len(entries)} points in {', '.join(map(str, folders))}."]
    if not entries:
        return [Section("What this is", top), *show_problems(problems)]
    growth, facts = benchmark_scaling.show_scaling(config, entries)
    facts += find_disturbed(entries) + find_few(entries)
    top += [facts + told] if facts + told else []
    top += [f"Files that were left out, or need a word: {len(problems)}, named under Left out."] if problems else []
    tables = benchmark_tables
    return [Section("In short", top), show_setups(entries), *show_problems(problems), tables.show_points(entries), tables.show_speed(entries), growth,
            *(section for section, _ in compared), tables.show_memory(entries), tables.show_loss(entries), tables.show_use(entries)]  # fmt: skip


def find_disturbed(entries: list[Entry]) -> list[str]:
    """Points at which other programs took more of the machine than goes unsaid."""
    shares = {entry.name: max((use or 0 for use in entry.take("others_use")), default=0) for entry in entries}
    found = {name: share for name, share in shares.items() if share > DISTURBED}
    words = "; speeds are those of a busy machine"
    return (
        [
            f"DISTURBED: other programs took up to {max(found.values()):.0%} of the machine at {len(found)} of {len(entries)} points{words}"
        ]
        if found
        else []
    )


def find_few(entries: list[Entry]) -> list[str]:
    """Points of fewer timed steps than tell how they spread."""
    counts = {entry.name: min(step["steps"] for step in entry.take("step_seconds")) for entry in entries}
    few = {name: count for name, count in counts.items() if count < FEW}
    if not few:
        return []
    return [f"FEW STEPS: {min(few.values()):g} timed steps at least, at {len(few)} of {len(entries)} points fewer than {FEW}: a try, and no "
            "benchmark"]  # fmt: skip


def show_problems(problems: list[str]) -> list[Section]:
    return [Section("Left out", [problems])] if problems else []


def show_setups(entries: list[Entry]) -> Section:
    """Hardware and versions, a column for each that was used."""
    setups = {}
    for entry in entries:
        result = entry.result
        same = {name: result.machine.get(name) for name in MACHINE} | result.versions | {"attention": result.attention}
        setups.setdefault(tuple((name, tell_fact(name, value)) for name, value in same.items()), []).append(entry)
    columns = []
    for same, group in setups.items():
        varied = {
            name: dict.fromkeys(tell_fact(name, entry.result.machine.get(name)) for entry in group) for name in VARIED
        }
        points = f"all {len(group)}" if len(setups) == 1 else ", ".join(entry.name for entry in group)
        columns.append(
            dict(same) | {name: " / ".join(filter(None, found)) for name, found in varied.items()} | {"points": points}
        )
    names = list(dict.fromkeys(name for column in columns for name, value in column.items() if value))
    rows = [(LABELS.get(name, name), *(column.get(name, "") for column in columns)) for name in names]
    heads = ("", *(f"set-up {number}" for number in range(1, len(columns) + 1)))
    return Section("Hardware and versions", [Table(heads, rows, "", tuple(range(1, len(columns) + 1)))])


def tell_fact(name: str, value) -> str:
    """A fact of a machine in words; empty where it isn't known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / 1e9:.1f} GB" if name.endswith("_bytes") else str(value)


def show_metrics(watched: dict[str, list[dict]]) -> list[Section]:
    """What `sftlab metrics` saw meanwhile."""
    sections = []
    for path, samples in watched.items():
        found = metrics.summarise(samples)
        charts = [Chart(benchmark_plots.use_over_time(samples)), Chart(benchmark_plots.memory_over_time(samples))]
        table = Table(("", *metrics.AVERAGES), metrics.list_rows(found), "Watched, measured")
        sections.append(Section(f"Watched: {path}", [*charts, table, metrics.list_facts(found)], page=True))
    return sections
