"""`sftlab report`: the results of benchmarks as one page that opens offline and prints.

    sftlab report results/ --bandwidth 50               # with two modelled bounds for more nodes, at 50 GB/s a device
    sftlab report results/before results/after          # the same points side by side

What is measured and what is modelled stand in tables of their own. A file that is missing something or broken is named and
left out.
"""

import contextlib
import math
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from sftlab import pages, plots
from sftlab.bench import monitor, projection, report, results, scaling
from sftlab.bench.results import DISTURBED, Result
from sftlab.bench.scaling import LEVEL, Gain, Series, Speed
from sftlab.config.configs import ReportConfig
from sftlab.errors import UserError
from sftlab.pages import Chart, Section, Table

MACHINE = ("cpu", "cores", "memory_bytes", "gpu", "gpu_bytes")
VARIED = ("gpus", "machines", "node_is", "threads", "oversubscribed")  # from point to point of one machine
LABELS = {"memory_bytes": "memory", "gpu": "GPU", "gpu_bytes": "memory of a GPU", "gpus": "GPUs", "node_is": "a node is",
          "threads": "threads of a process", "oversubscribed": "more processes than cores"}  # fmt: skip
FEW = 30  # timed steps; with fewer, p10 and p90 are hardly known


def write_report(config: ReportConfig) -> Path:
    """Write the report of one or more folders and return its path. Raises UserError where there is nothing to report."""
    folders = [Path(folder) for folder in config.folders]
    page = Path(config.output) if config.output else folders[0] / "report.html"
    pages.check_place(page, config.overwrite)
    entries, problems = read_folders(folders)
    watched, more = read_metrics(folders)
    if not entries and not watched:
        raise UserError(f"{', '.join(map(str, folders))}: no results of `sftlab benchmark`, no metrics.jsonl. "
                        + (f"{len(problems + more)} files were left out: {(problems + more)[0]}" if problems + more else ""))  # fmt: skip
    title = "Benchmark: " + ", ".join(map(str, folders))
    sections = make_sections(config, folders, entries, problems + more) + show_metrics(watched)
    pages.write_html(page, title, sections)
    return page


@dataclass(frozen=True)
class Entry:
    """A result with the name it has in the report: the point's, and the folder's where there are several."""

    name: str
    folder: str
    result: Result

    @property
    def series(self) -> str:
        """What it shares with the same work on other numbers of devices."""
        point = self.result.point
        return f"{point.model}, {point.samples} rows, {point.scaling}" + (f", {self.folder}" if self.folder else "")

    def take(self, name: str) -> list:
        """A number of each repeat."""
        return [getattr(run, name) for run in self.result.runs]


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
    for show in (show_points, show_speed, show_memory, show_loss, show_use):
        for block in show([entry]).blocks:
            pages.html_block(block) if isinstance(block, Table) else None
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
            samples, broken = monitor.read(path)
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
    """The sections on the points, with what matters most at the top."""
    names = [name_folder(folder, folders) for folder in folders]
    groups = {name: [entry.result for entry in entries if entry.folder == name] for name in names}
    compared = [show_ratios((names[0], name), groups[names[0]], groups[name]) for name in names[1:]]
    told = [line for _, lines in compared for line in lines]
    top = [f"Made {time.strftime('%Y-%m-%d %H:%M')} from {len(entries)} points in {', '.join(map(str, folders))}."]
    if not entries:
        return [Section("What this is", top), *show_problems(problems)]
    growth, facts = show_scaling(config, entries)
    facts += find_disturbed(entries) + find_few(entries)
    top += [facts + told] if facts + told else []
    top += [f"Files that were left out, or need a word: {len(problems)}, named under Left out."] if problems else []
    tables = report
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
        found = monitor.summarise(samples)
        charts = [Chart(use_over_time(samples)), Chart(memory_over_time(samples))]
        table = Table(("", *monitor.AVERAGES), monitor.list_rows(found), "Watched, measured")
        sections.append(Section(f"Watched: {path}", [*charts, table, monitor.list_facts(found)], page=True))
    return sections


LINES = 12  # of a chart; more can't be told apart
NONE = "no measurable difference"
# Options that say where, and choices whose words are of the run and not of the work.
NOT_THE_WORK = ("output_dir", "dataset_path", "overwrite", "resume", "memory", "time")


def number(value: float) -> str:
    """Whole where it is large, else three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: list[float], form=number) -> str:
    """The median, and the lowest and the highest of the repeats."""
    values = [value for value in values if value is not None]
    if not values:
        return "not known"
    return form(median(values)) + (f" ({form(min(values))} to {form(max(values))})" if len(values) > 1 else "")


def to_gigabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e9


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def cut_short(count: int) -> str:
    """What is said below a chart that has no room for all."""
    return f" Only the first {LINES} of {count} are drawn; the table has all." if count > LINES else ""


def group(entries: list[Entry], take) -> dict:
    """series -> devices -> what `take` makes of the entry, None left out; the first LINES series."""
    found = {}
    for entry in entries:
        value = take(entry)
        if value is not None:
            found.setdefault(entry.series, {})[entry.result.point.devices] = value
    return dict(list(found.items())[:LINES])


def show_points(entries: list[Entry]) -> Section:
    rows = []
    for entry in entries:
        point, result, first = entry.result.point, entry.result, entry.result.runs[0]
        batch = f"{point.global_batch} = {point.devices} × {point.per_device_batch} × {point.accumulation}"
        steps = f"{first.step_seconds['steps']:g} after {first.step_seconds['warmup']:g}"
        data = f"{result.data.get('source', '?')}, {point.samples} ({result.data.get('distinct_rows', '?')})"
        rows.append((entry.name, point.model, data, f"{point.nodes} × {point.devices // max(1, point.nodes)}", batch, steps,
                     f"{len(result.runs)} of {result.repeats}", first.started[:16].replace("T", " ")))  # fmt: skip
    heads = (
        "point",
        "model",
        "data, rows (distinct)",
        "nodes × devices",
        "samples of a step",
        "timed steps",
        "repeats",
        "first started, UTC",
    )
    words = "Samples of a step are devices × batch × accumulation. Timed steps stand after those of the warm-up. A point is called as its file."
    return Section("The points", [Table(heads, rows, "", (1,)), words])


def show_speed(entries: list[Entry]) -> Section:
    rows = [(entry.name, spread(entry.take("tokens_per_second")), spread(entry.take("trained_tokens_per_second")),
             spread(entry.take("tokens_per_second_per_device")), spread(entry.take("samples_per_second"))) for entry in entries]  # fmt: skip
    heads = ("point", "tokens/s", "trained tokens/s", "tokens/s per device", "samples/s")
    steps = [(entry.name, *(spread([run.step_seconds[part] for run in entry.result.runs]) for part in ("p10", "median", "p90")))
             for entry in entries]  # fmt: skip
    times = Table(
        ("point", "10 % are faster than", "median", "90 % are faster than"), steps, "Seconds of a step, measured"
    )
    words = "Tokens are those of the samples, without padding; trained ones bear the loss."
    return Section("Throughput", [Chart(speed_over_devices(group(entries, lambda e: e.take("tokens_per_second"))), words),
                                  Table(heads, rows, "Throughput, measured"), "Median of the repeats (lowest to highest).", times], page=True)  # fmt: skip


def show_memory(entries: list[Entry]) -> Section:
    rows = []
    for entry in entries:
        runs = entry.result.runs
        ranks = [median(run.peak_bytes[rank] for run in runs) / 1e9 for rank in range(len(runs[0].peak_bytes))]
        expected, taken, kept = read_memory(entry)
        error = (
            f"{100 * (taken / expected - 1):+.1f} %"
            if expected and taken and not kept
            else ("freed memory was kept" if kept else "")
        )
        rows.append((entry.name, str(len(ranks)), f"{min(ranks):.3f} to {max(ranks):.3f}" if len(ranks) > 1 else f"{ranks[0]:.3f}",
                     *("not known" if size is None else f"{to_gigabytes(size):.3f}" for size in (expected, taken)), error))  # fmt: skip
    heads = (
        "point",
        "ranks",
        "peak of a rank, GB",
        "estimated beside the libraries, GB",
        "taken beside the libraries, GB",
        "taken over estimate",
    )
    words = ("GB are 10^9 bytes. The peak is what a process held at most, with the libraries; on a GPU, what its allocator held. The estimate is "
             "that of sftlab memory, for the rank that takes most; where a process keeps freed memory for the next step, the two can't be compared.")  # fmt: skip
    expected, taken = (group(entries, lambda e, at=at: to_gigabytes(read_memory(e)[at])) for at in (0, 1))
    expected = {name: by for name, by in expected.items() if name in taken}
    chart = (
        [Chart(memory_over_devices(taken, expected), "Beside the libraries. Measured and estimated.")] if taken else []
    )
    return Section(
        "Memory of each rank", [*chart, Table(heads, rows, "Memory, measured and estimated"), words], page=True
    )


def read_memory(entry: Entry) -> tuple[float | None, float | None, bool]:
    """(bytes expected, bytes taken, whether freed memory was kept), of the rank that took most, medians over the repeats."""
    ranks = [max(run.memory, key=lambda rank: rank.get("taken_bytes") or 0) for run in entry.result.runs if run.memory]
    values = [
        [rank.get(name) for rank in ranks if rank.get(name) is not None] for name in ("expected_bytes", "taken_bytes")
    ]
    return *(median(sizes) if sizes else None for sizes in values), any(rank.get("kept") for rank in ranks)


def show_loss(entries: list[Entry]) -> Section:
    def four(value: float) -> str:
        return f"{value:.4f}"

    rows = [(entry.name, str(len(entry.result.runs[0].losses)), spread(entry.take("first_loss"), four), spread(entry.take("last_loss"), four))
            for entry in entries]  # fmt: skip
    curves = {entry.name: entry.result.runs[0].losses for entry in entries if entry.result.runs[0].losses}
    curves = dict(list(curves.items())[:LINES])
    chart = (
        [
            Chart(
                loss_over_steps(curves),
                f"The first repeat of each point, the warm-up's steps too.{cut_short(len(entries))}",
            )
        ]
        if curves
        else []
    )
    words = ("Points of strong scaling do the same steps on the same rows: there the losses must agree at equal steps, but for dropout, which "
             "draws anew in each process, or the speeds are not of the same work. Points that ran for a time (--seconds) end at steps of "
             "their own: there the last losses can't be compared.")  # fmt: skip
    return Section(
        "Loss", [*chart, Table(("point", "steps", "first loss", "last loss"), rows, "Loss, measured"), words], page=True
    )


def show_use(entries: list[Entry]) -> Section:
    def rate(value: float) -> str:
        return f"{value / 1e12:.3g}"

    rows = [(entry.name, spread(entry.take("flops_per_second_per_device"), rate), spread(entry.take("matrix_rate"), rate),
             spread(entry.take("utilisation_measured"), share), spread(entry.take("utilisation"), share), spread(entry.take("device_use"), share),
             spread(entry.take("padding_share"), share), spread(entry.take("others_use"), share)) for entry in entries]  # fmt: skip
    heads = ("point", "TFLOP/s per device", "TFLOP/s of plain matrix products", "share of that", "share of the data-sheet's peak", "device use",
             "padding", "taken by other programs")  # fmt: skip
    words = ("Operations by formula: full fine-tuning 6N + A per token, LoRA 4N + 6n + A; recomputation and padding don't count. "
             "The output layer counts for every token, though only trained positions go through it: where few are trained and the "
             "vocabulary is large, the real share is lower. The plain matrix "
             "products were measured with all devices at work. Device use is the share of time in which anything ran (on a GPU), or of the "
             "cores' time: a device can be in use and slow.")  # fmt: skip
    return Section("Utilisation", [Table(heads, rows, "Utilisation, measured"), words], page=True)


def compare_rates(first: list[float], second: list[float]) -> tuple[float, float | None, float | None]:
    """(second over first, as the ratio of the geometric means, low, high): Welch's interval of 95 % on the logarithms.

    The repeats of two folders were made at different times and are not pairs. None where the repeats of one don't differ.
    """
    from scipy.stats import ttest_ind

    ones, twos = ([math.log(rate) for rate in rates] for rates in (first, second))
    ends = None, None
    if len({*ones}) > 1 and len({*twos}) > 1:
        ends = map(math.exp, ttest_ind(twos, ones, equal_var=False).confidence_interval(LEVEL))
    return math.exp(mean(twos) - mean(ones)), *ends


def list_differences(pairs: list[tuple[Result, Result]]) -> list[str]:
    """In which hardware, versions, options, data and choices of the trainer the pairs differ, a line each."""
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


def show_ratios(names: tuple[str, str], first: list[Result], second: list[Result]) -> tuple[Section, list[str]]:
    """The section on the points that two folders have in common, and the lines that belong to the top of the report."""
    ones, twos = ({(one.point.name, one.point.global_batch): one for one in each} for each in (first, second))
    title, rows = f"{names[1]} against {names[0]}", []
    pairs = [(ones[key], twos[key]) for key in ones if key in twos]
    for pair in pairs:
        rates = [[run.tokens_per_second for run in one.runs] for one in pair]
        ratio, low, high = compare_rates(*rates)
        clear = (
            "can't be said with one repeat" if low is None else "faster" if low > 1 else "slower" if high < 1 else NONE
        )
        interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
        losses = (f"{median(run.last_loss for run in one.runs):.4f}" for one in pair)
        rows.append(
            (pair[0].point.name, *(number(median(one)) for one in rates), f"{ratio:.3f}{interval}", clear, *losses)
        )
    heads = ("point", "tokens/s, first", "second", "ratio (95 % interval)", "second is", "last loss, first", "second")
    words = f"The first is {names[0]}, the second {names[1]}. The interval knows how much the repeats vary, and nothing else."
    differences = list_differences(pairs)
    blocks = [Table(heads, rows, "The same points in both", (4,)), words] if rows else ["No point is in both."]
    blocks += [["They also differ in " + line for line in differences]] if differences else []
    for name, mine, other in ((names[0], ones, twos), (names[1], twos, ones)):
        alone = [one.point.name for key, one in mine.items() if key not in other]
        blocks += [f"Only in {name}: {', '.join(alone)}."] if alone else []
    counts = ", ".join(f"{clear} at {count}" for clear, count in Counter(row[4] for row in rows).items())
    top = [f"{title}: {counts} of {len(rows)} points" if rows else f"{title}: no point is in both"]
    return Section(title, blocks, page=True), [f"{title}: NOT THE SAME {line}" for line in differences] + top


HEADS = ("series", "devices", "ideal", "tokens/s", "speed-up", "efficiency")
MEASURED = (
    "Speed-up over the smallest number of devices that was measured: the geometric mean of the rounds' ratios, with Student's "
    "interval of 95 %. Efficiency is speed-up over the ideal one."
)
MODELLED = (
    "Not run. The measured step is scaled to the work of a device, and the exchange between nodes takes its bytes over {:g} GB/s "
    "for each device, as --bandwidth says. No overlap: one after the other. Full overlap: the longer one alone. Latency, slow "
    "devices and other users of the network are not in it, so a real run can be slower than both."
)


def show_scaling(config: ReportConfig, entries: list[Entry]) -> tuple[Section, list[str]]:
    """The section on scaling, measured and modelled apart, and its sentences for the top."""
    notes, facts, curves, measured, modelled = {}, [], {}, [], []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        for one in scaling.list_series([entry.result for entry in entries if entry.folder == folder]):
            name = f"{one.model}, {one.samples} rows, {one.scaling}" + (f", {folder}" if folder else "")
            while name in curves:  # the same work with other options, hardware or versions
                name += ", otherwise"
            speeds, why = extend_series(one, config.bandwidth)
            gains = [scaling.compare(one.speeds[0], speed) for speed in speeds]
            measured += list_rows(name, one.speeds, one.gains)
            modelled += [(*row, speed.kind) for row, speed in zip(list_rows(name, speeds, gains), speeds, strict=True)]
            curves[name] = [*one.gains, *gains]
            facts.append(f"{name}: {describe_last(one)}")
            for note in (*one.notes, *([why] if why else [])):
                notes.setdefault(note, []).append(name)
    blocks = []
    if any(len(gains) > 1 for gains in curves.values()):
        drawn = {clean(name): gains for name, gains in list(curves.items())[:LINES]}
        words = "Measured: filled markers, solid lines. Modelled: hollow markers, dashed and dotted lines."
        blocks.append(Chart(plots.scaling(drawn), words + cut_short(len(curves))))
    blocks += [Table(HEADS, measured, "Scaling, measured"), MEASURED]
    if modelled:
        table = Table((*HEADS, "kind"), modelled, "Scaling, MODELLED: two bounds, not runs", (6,), modelled=True)
        blocks += [table, MODELLED.format(config.bandwidth)]
    blocks.append([f"{'; '.join(names)}: {note}" for note, names in notes.items()])
    return Section("Scaling", blocks, page=True), facts


def extend_series(series: Series, bandwidth: float | None) -> tuple[list[Speed], str]:
    """(modelled speeds of a series, what is missing there and why); nothing without a bandwidth."""
    if bandwidth is None:
        return [], ""
    try:
        speeds, why = projection.extend(series, bandwidth)
    except UserError as error:
        return [], f"not modelled: {error}"
    return speeds, why and f"not modelled: {why}"


def list_rows(name: str, speeds: list[Speed], gains: list[Gain]) -> list[tuple[str, ...]]:
    """A row for each number of devices."""
    return [
        (
            name,
            str(speed.devices),
            f"{gain.ideal:g}",
            number(speed.rate),
            format_interval(gain.speedup, gain.low, gain.high),
            format_efficiency(gain),
        )
        for speed, gain in zip(speeds, gains, strict=True)
    ]


def format_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """A number with its interval, as 1.85 (1.71 to 2.01)."""
    return f"{value:.3g}{unit}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def format_efficiency(gain: Gain) -> str:
    return format_interval(*(None if part is None else 100 * part for part in gain.efficiency), " %")


def describe_last(series: Series) -> str:
    """The result of a series in a sentence."""
    gains = series.gains
    first, last = gains[0], gains[-1]
    if len(gains) == 1:
        return f"{number(series.speeds[0].rate)} tokens/s on {first.devices} device{'s' * (first.devices > 1)}"
    speedup = format_interval(last.speedup, last.low, last.high)
    return (
        f"{last.devices} devices are {speedup} times as fast as {first.devices}; efficiency {format_efficiency(last)}"
    )


def use_over_time(samples: list[dict]):
    """How busy processor and GPUs were, in percent over seconds, from the samples of `sftlab metrics` (`monitor.read`)."""
    taken = {"machine: processor": lambda one: one["machine"]["cpu_percent"]}
    for number, gpu in enumerate(samples[0]["gpus"]):
        taken[f"GPU {gpu['index']}"] = lambda one, at=number: one["gpus"][at]["use_percent"]
    fig = _over_time(samples, taken, "percent", "Use over time")
    return fig.update_layout(yaxis_range=[0, 105])


def memory_over_time(samples: list[dict]):
    """Memory in use in GB (10^9 bytes) over seconds: of the machine, of the watched processes, of each GPU."""
    taken = {"machine": lambda one: one["machine"]["memory_bytes"] / 1e9}
    if any(one["process"] for one in samples):
        taken["watched"] = lambda one: one["process"]["memory_bytes"] / 1e9
    for number, gpu in enumerate(samples[0]["gpus"]):
        taken[f"GPU {gpu['index']}"] = lambda one, at=number: one["gpus"][at]["memory_bytes"] / 1e9
    return _over_time(samples, taken, "GB", "Memory over time")


def _over_time(samples, taken, unit, title):
    """Lines over time with a gap where a session ends; many samples are averaged to 1000 points."""
    width = -(-len(samples) // 1000)
    xs, series = [], {name: [] for name in taken}
    for start in range(0, len(samples), width):
        group = samples[start : start + width]
        xs.append(round(group[0]["time"] - samples[0]["time"], 1))
        for name, take in taken.items():
            known = []
            for one in group:
                with contextlib.suppress(TypeError, IndexError):  # not known at that time
                    known.append(take(one))
            known = [value for value in known if value is not None]
            series[name].append(sum(known) / len(known) if known else None)
    return plots.lines(xs, series, "seconds", unit, title)


def speed_over_devices(rates: dict[str, dict[int, list[float]]]):
    """Tokens per second: the median of the repeats, with the lowest and the highest. rates: label -> devices -> repeats."""
    fig = _over_devices({label: {count: median(values) for count, values in by.items()} for label, by in rates.items()},
                        "tokens per second", "Tokens per second, median and range of the repeats")  # fmt: skip
    for trace, by in zip(fig.data, rates.values(), strict=True):
        ups, downs = ([abs(end(by[count]) - median(by[count])) for count in trace.x] for end in (max, min))
        trace.error_y = {"type": "data", "symmetric": False, "array": ups, "arrayminus": downs, "color": plots.GREY}
    return fig


def memory_over_devices(taken: dict[str, dict[int, float]], expected: dict[str, dict[int, float]]):
    """GB of the process or GPU that holds most. taken is measured; expected, by the memory estimate, is dashed and hollow."""
    curves = {f"{label}, measured": by for label, by in taken.items()}
    curves |= {f"{label}, estimated": by for label, by in expected.items()}
    fig = _over_devices(curves, "GB", "Memory of the largest rank")
    colours = dict(zip(taken, plots.COLOURS * len(taken), strict=False))
    for trace, label in zip(fig.data, [*taken, *expected], strict=True):
        trace.line = {"color": colours[label], "dash": "solid"}
    for trace in fig.data[len(taken) :]:
        trace.line.dash, trace.marker = "dash", {"symbol": "circle-open", "size": 13}
    return fig


def _over_devices(curves: dict[str, dict[int, float]], unit: str, title: str):
    """Lines over the number of devices, each with a point where it has one."""
    counts = sorted({count for by in curves.values() for count in by})
    fig = plots.lines(counts, {clean(label): [by.get(count) for count in counts] for label, by in curves.items()},
                      "devices", unit, title)  # fmt: skip
    for trace, by in zip(fig.data, curves.values(), strict=True):
        trace.x, trace.y = zip(*sorted(by.items()), strict=True)
    ticks = {"type": "log", "tickvals": counts, "ticktext": [str(count) for count in counts]}
    top = max(value for by in curves.values() for value in by.values())
    return fig.update_layout(xaxis=ticks, yaxis_range=[0, 1.2 * top])


def loss_over_steps(losses: dict[str, list[float]]):
    """The loss of each step, the steps of the warm-up too. losses: label -> losses."""
    longest = max(map(len, losses.values()))
    series = {clean(label): [*values, *[None] * (longest - len(values))] for label, values in losses.items()}
    return plots.lines(list(range(1, longest + 1)), series, "step", "loss, nats per token", "Loss")


def clean(label: str) -> str:
    """A label without what plotly would take for markup, in lines that leave room for the chart."""
    return "<br>".join(textwrap.wrap(label.replace("<", "‹").replace(">", "›"), 48))
