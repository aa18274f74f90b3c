"""`sftlab report`: the results of benchmarks as one page that opens offline and prints.

    sftlab report results/ --bandwidth 50               # with two modelled bounds for more nodes, at 50 GB/s a device
    sftlab report results/before results/after          # the same points side by side

Measured and modelled speeds have tables of their own. A file that is broken is named and left out.
"""

import contextlib
import math
import time
from collections import Counter
from pathlib import Path
from statistics import mean, median

from sftlab import pages, plots
from sftlab.bench import monitor, results, sections
from sftlab.bench.results import DISTURBED, Result
from sftlab.bench.scaling import LEVEL
from sftlab.bench.sections import Entry
from sftlab.config.configs import ReportConfig
from sftlab.errors import UserError
from sftlab.pages import Chart, Section, Table

MACHINE = ("cpu", "cores", "memory_bytes", "gpu", "gpu_bytes")
VARIED = ("gpus", "machines", "node_is", "threads", "oversubscribed")  # from point to point of one machine
LABELS = {
    "memory_bytes": "memory",
    "gpu": "GPU",
    "gpu_bytes": "memory of a GPU",
    "gpus": "GPUs",
    "node_is": "a node is",
    "threads": "threads of a process",
    "oversubscribed": "more processes than cores",
}
MOST_POINTS = 1000  # of a line over time
FEW = 30  # timed steps; with fewer, p10 and p90 are hardly known
# Options that name places, and choices of how, not of what.
NOT_THE_WORK = ("output_dir", "dataset_path", "overwrite", "resume", "memory", "time")


def write_report(config: ReportConfig) -> Path:
    """Write the report of one or more folders and return its path. Raises UserError where there is nothing to report."""
    folders = [Path(folder) for folder in config.folders]
    page = Path(config.output) if config.output else folders[0] / "report.html"
    pages.check_place(page, config.overwrite)
    entries, problems = read_folders(folders)
    watched, more = read_metrics(folders)
    problems += more
    names = ", ".join(map(str, folders))
    if not entries and not watched:
        left_out = f" {len(problems)} files were left out: {problems[0]}" if problems else ""
        raise UserError(f"folders: {names}: no results of `sftlab benchmark`, no metrics.jsonl.{left_out} Name others.")
    parts = make_sections(config, folders, entries, problems) + [make_watched(*one) for one in watched.items()]
    pages.write_html(page, f"Benchmark: {names}", parts)
    return page


def read_folders(folders: list[Path]) -> tuple[list[Entry], list[str]]:
    """Return (the points of all folders, what was left out and why)."""
    entries, problems = [], []
    for folder, name in zip(folders, name_folders(folders), strict=True):
        if not folder.is_dir():
            raise UserError(f"folders: {folder}: no such folder. Name one of `sftlab benchmark` or `sftlab metrics`.")
        found, wrong = results.read_results(folder)
        entries += [Entry(result, name if len(folders) > 1 else "") for result in found]
        ours = f"{folder / 'summary.json'}:"  # of `sftlab metrics`
        problems += [line for line in wrong if not (line.startswith(ours) and (folder / "metrics.jsonl").exists())]
    return entries, problems


def name_folders(folders: list[Path]) -> list[str]:
    """Return each folder's own name where no other has it, else its whole path."""
    counts = Counter(folder.name for folder in folders)
    return [folder.name if counts[folder.name] == 1 else str(folder) for folder in folders]


def read_metrics(folders: list[Path]) -> tuple[dict[str, list[dict]], list[str]]:
    """Return (path -> samples of each metrics.jsonl in the folders and one below, what could not be read)."""
    found, problems = {}, []
    patterns = ("metrics.jsonl", "*/metrics.jsonl")
    for path in sorted({path for folder in folders for pattern in patterns for path in folder.glob(pattern)}):
        try:
            samples, broken = monitor.read_samples(path)
            monitor.summarise(samples)
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
    """Make the sections on the points, with what matters most at the top."""
    top = [f"Made {time.strftime('%Y-%m-%d %H:%M')} from {len(entries)} points in {', '.join(map(str, folders))}."]
    left_out = [Section("Left out", [problems])] if problems else []
    if not entries:
        return [Section("What this is", top), *left_out]
    first, *others = name_folders(folders)
    groups = {name: [entry.result for entry in entries if entry.folder == name] for name in (first, *others)}
    compared = [compare_folders((first, name), groups[first], groups[name]) for name in others]
    growth, facts = sections.make_scaling(config, entries)
    facts += list_warnings(entries) + [line for _, lines in compared for line in lines]
    top += [facts] if facts else []
    top += [f"Files that were left out or are incomplete: {len(problems)}, named under Left out."] if problems else []
    measured = [
        sections.make_points(entries),
        sections.make_speed(entries),
        growth,
        *(section for section, _ in compared),
    ]
    measured += [sections.make_memory(entries), sections.make_loss(entries), sections.make_use(entries)]
    return [Section("In short", top), make_setups(entries), *left_out, *measured]


def list_warnings(entries: list[Entry]) -> list[str]:
    """List points at which other programs took much of the machine, and points of too few timed steps."""
    lines, count = [], len(entries)
    uses = [max(use or 0 for use in entry.take("others_use")) for entry in entries]
    disturbed = [use for use in uses if use > DISTURBED]
    if disturbed:
        share = f"up to {max(disturbed):.0%} of the machine at {len(disturbed)} of {count} points"
        lines.append(f"DISTURBED: other programs took {share}; speeds are those of a busy machine")
    few = [steps for entry in entries if (steps := min(entry.take("step_seconds.steps"))) < FEW]
    if few:
        points = f"at {len(few)} of {count} points fewer than {FEW}"
        lines.append(f"FEW STEPS: {min(few):g} timed steps at least, {points}: a try, and no benchmark")
    return lines


def make_setups(entries: list[Entry]) -> Section:
    """Make the table of hardware and versions, with a column for each set-up that was used."""
    setups = {}
    for entry in entries:
        result = entry.result
        same = {name: result.machine.get(name) for name in MACHINE} | result.versions | {"attention": result.attention}
        key = tuple((name, format_fact(name, value)) for name, value in same.items())
        setups.setdefault(key, []).append(entry)
    columns = []
    for same, group in setups.items():
        facts = {name: [format_fact(name, entry.result.machine.get(name)) for entry in group] for name in VARIED}
        varied = {name: " / ".join(dict.fromkeys(filter(None, found))) for name, found in facts.items()}
        points = f"all {len(group)}" if len(setups) == 1 else ", ".join(entry.name for entry in group)
        columns.append(dict(same) | varied | {"points": points})
    names = list(dict.fromkeys(name for column in columns for name, value in column.items() if value))
    rows = [(LABELS.get(name, name), *(column.get(name, "") for column in columns)) for name in names]
    numbers = range(1, len(columns) + 1)
    heads = ("", *(f"set-up {number}" for number in numbers))
    return Section("Hardware and versions", [Table(heads, rows, "", tuple(numbers))])


def format_fact(name: str, value) -> str:
    """Format a fact of a machine; empty where it isn't known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / 1e9:.1f} GB" if name.endswith("_bytes") and not isinstance(value, str) else str(value)


def make_watched(path: str, samples: list[dict]) -> Section:
    """Make the section on what `sftlab metrics` measured meanwhile."""
    found = monitor.summarise(samples)
    drawn = [Chart(use_over_time(samples)), Chart(memory_over_time(samples))]
    table = Table(("", *monitor.AVERAGES), monitor.list_rows(found), "Watched, measured")
    return Section(f"Watched: {path}", [*drawn, table, monitor.list_facts(found)], page=True)


def use_over_time(samples: list[dict]):
    """Draw how busy processor and GPUs were, in percent over seconds, from samples of `bench.monitor`."""
    taken = {"machine: processor": lambda one: one["machine"]["cpu_percent"]}
    for number, gpu in enumerate(samples[0]["gpus"]):
        taken[f"GPU {gpu['index']}"] = lambda one, at=number: one["gpus"][at]["use_percent"]
    return draw_over_time(samples, taken, "percent", "Use over time").update_layout(yaxis_range=[0, 105])


def memory_over_time(samples: list[dict]):
    """Draw memory in use in GB (10^9 bytes) over seconds: of the machine, of the watched processes, of each GPU."""
    taken = {"machine": lambda one: one["machine"]["memory_bytes"] / 1e9}
    if any(one["process"] for one in samples):
        taken["watched"] = lambda one: one["process"]["memory_bytes"] / 1e9
    for number, gpu in enumerate(samples[0]["gpus"]):
        taken[f"GPU {gpu['index']}"] = lambda one, at=number: one["gpus"][at]["memory_bytes"] / 1e9
    return draw_over_time(samples, taken, "GB", "Memory over time")


def draw_over_time(samples: list[dict], taken: dict, unit: str, title: str):
    """Draw lines over time with gaps where nothing is known; many samples are averaged. taken: label -> function of one."""
    width = -(-len(samples) // MOST_POINTS)
    groups = [samples[start : start + width] for start in range(0, len(samples), width)]
    series = {name: [] for name in taken}
    for group in groups:
        for name, take in taken.items():
            known = []
            for one in group:
                with contextlib.suppress(TypeError, IndexError):  # not known at that time
                    known.append(take(one))
            known = [value for value in known if value is not None]
            series[name].append(mean(known) if known else None)
    xs = [round(group[0]["time"] - samples[0]["time"], 1) for group in groups]
    return plots.lines(xs, series, "seconds", unit, title)


def compare_rates(first: list[float], second: list[float]) -> tuple[float, float | None, float | None]:
    """Return (second over first, as the ratio of the geometric means, low, high): Welch's interval of 95 % on the logarithms.

    The repeats of two folders were made at different times and are not pairs. None where the repeats of one don't differ.
    """
    from scipy.stats import ttest_ind

    ones, twos = ([math.log(rate) for rate in rates] for rates in (first, second))
    ends = None, None
    if len({*ones}) > 1 and len({*twos}) > 1:
        ends = map(math.exp, ttest_ind(twos, ones, equal_var=False).confidence_interval(LEVEL))
    return math.exp(mean(twos) - mean(ones)), *ends


def list_differences(pairs: list[tuple[Result, Result]]) -> list[str]:
    """List in which hardware, versions, options, data and choices of the trainer the pairs differ."""
    found = {}
    for pair in pairs:
        sides = []
        for one in pair:
            choices = {name: str(words).split(":")[0] for name, words in one.choices.items()}  # without why
            kinds = {"hardware": one.machine, "version": one.versions, "option": one.config, "data": one.data}
            kinds |= {"choice of": choices, "used": {"attention": one.attention}}
            sides.append({(kind, name): value for kind, values in kinds.items() for name, value in values.items()})
        for kind, name in sorted({*sides[0], *sides[1]}):
            mine, other = (side.get((kind, name)) for side in sides)
            if mine != other and name not in NOT_THE_WORK:
                line = f"{kind} {name.replace('_', ' ')}: {mine} against {other}"
                found.setdefault(line, []).append(pair[0].point.name)
    return [line + (f" (at {', '.join(at)})" if len(at) < len(pairs) else "") for line, at in found.items()]


def compare_folders(names: tuple[str, str], first: list[Result], second: list[Result]) -> tuple[Section, list[str]]:
    """Make the section on the points that two folders have in common, and its lines for the top of the report."""
    ones, twos = ({(one.point.name, one.point.global_batch): one for one in each} for each in (first, second))
    title, rows, verdicts = f"{names[1]} against {names[0]}", [], Counter()
    pairs = [(ones[key], twos[key]) for key in ones if key in twos]
    for pair in pairs:
        rates = [[run.tokens_per_second for run in one.runs] for one in pair]
        ratio, low, high = compare_rates(*rates)
        verdict = "faster" if low and low > 1 else "slower" if high and high < 1 else "no measurable difference"
        verdict = "unknown, with one repeat" if low is None else verdict
        verdicts[verdict] += 1
        losses = (sections.format_four(median(run.last_loss for run in one.runs)) for one in pair)
        interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
        middles = (sections.format_number(median(one)) for one in rates)
        rows.append((pair[0].point.name, *middles, f"{ratio:.3f}{interval}", verdict, *losses))
    heads = ("point", "tokens/s, first", "second", "ratio (95 % interval)", "second is", "last loss, first", "second")
    words = f"The first is {names[0]}, the second {names[1]}. The interval is of how much the repeats vary, and of nothing else."
    differences = list_differences(pairs)
    blocks = [Table(heads, rows, "The same points in both", (4,)), words] if rows else ["No point is in both."]
    blocks += [["They also differ in " + line for line in differences]] if differences else []
    for name, mine, other in ((names[0], ones, twos), (names[1], twos, ones)):
        alone = [one.point.name for key, one in mine.items() if key not in other]
        blocks += [f"Only in {name}: {', '.join(alone)}."] if alone else []
    counts = ", ".join(f"{verdict} at {count}" for verdict, count in verdicts.items())
    top = [f"{title}: {counts} of {len(rows)} points" if rows else f"{title}: no point is in both"]
    return Section(title, blocks, page=True), [f"{title}: NOT THE SAME {line}" for line in differences] + top
