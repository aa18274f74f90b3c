"""The numbers of a benchmark's points as sections of a report: speed, memory, loss, use, cost. All of it is measured.

python -c "from sftlab import benchmark_tables as t; print(t.count_cost(2.5, 8, 100_000))"
"""

from dataclasses import dataclass
from statistics import median

from sftlab import benchmark_plots
from sftlab.report_forms import Chart, Section, Table
from sftlab.results import Result

LINES = 12  # of a chart; more can't be told apart


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


def count_cost(price: float, devices: int, tokens_per_second: float) -> float:
    """What a million tokens cost at a price per device and hour: price · devices / 3600 / (tokens per second) · 10^6."""
    return price * devices / 3600 / tokens_per_second * 1e6


def count_paid(result: Result) -> int:
    """What the price is for: GPUs; without them machines, since the processes of one share its price."""
    return result.point.devices if result.machine.get("gpu") else result.machine.get("machines") or 1


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
    return Section("Throughput", [Chart(benchmark_plots.speed_over_devices(group(entries, lambda e: e.take("tokens_per_second"))), words),
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
        [Chart(benchmark_plots.memory_over_devices(taken, expected), "Beside the libraries. Measured and estimated.")]
        if taken
        else []
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
                benchmark_plots.loss_over_steps(curves),
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


def show_cost(entries: list[Entry], price: float | None, currency: str) -> Section:
    if price is None:
        return Section(
            "Cost",
            ["Give the price of a device for an hour, and the cost of a million tokens stands here: --price 2.5."],
        )
    rows = [(entry.name, *(spread([count_cost(price, count_paid(entry.result), rate) for rate in entry.take(name)], lambda cost: f"{cost:.4g}")
                           for name in ("tokens_per_second", "trained_tokens_per_second"))) for entry in entries]  # fmt: skip
    words = f"At {price:g} {currency} for a device and hour, while it trains: price × devices / 3600 / (tokens per second) × 10^6."
    if not all(entry.result.machine.get("gpu") for entry in entries):
        words += " Where no GPU computes, a device is a machine, however many processes share it."
    words += " What a device and a node were is said under Hardware and versions."
    heads = ("point", f"{currency} per million tokens", f"{currency} per million trained tokens")
    return Section("Cost", [Table(heads, rows, f"Cost at {price:g} {currency} per device and hour"), words])
