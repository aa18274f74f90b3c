"""What a sweep leaves beside its points: sweep.json, sweep.csv and index.html, which opens offline.

All three are written whole while a sweep runs, so that it can be looked at, also after it was killed: the tables after each
point, the page, whose charts take a second, every few seconds.

python -c "from sftlab import sweep_page; help(sweep_page.write_all)"
"""

import csv
import io
import time
from pathlib import Path
from urllib.parse import quote

from sftlab import files, pages, report, run_time, sweep_plots, sweep_table
from sftlab.config import SweepConfig
from sftlab.pages import table, text
from sftlab.sweep_points import Point, name_values, write_value
from sftlab.sweep_table import Setting, Summary, tell, write_number

SHOWN = ("steps", "trained_parameters")  # the cost of a setting stands beside its score
STYLE = "<style>.settings td{white-space:nowrap}</style>"
FRESH = 15  # seconds for which a page is left as it is between two points
CUT = 200  # letters of an error in the list of points


def write_all(folder: Path, config: SweepConfig, direction: str, points: list[Point], page: bool = True) -> Summary:
    """Write the table as JSON and CSV, and the page, unless it shall wait; returns what the points come to."""
    summary = sweep_table.summarise(points, config.metric, direction)
    first = points[0].job
    about = {"notebook": first["notebook"], "source_sha256": first["source_sha256"], "profile": first["profile"],
             "parameters": dict(config.parameters or []), "metric": config.metric, "direction": direction,
             "behind": "multiples of the best" if summary.relative else "differences", "verdict": summary.verdict, "warnings": summary.warnings, "seeds_compared": summary.seeds}  # fmt: skip
    about["settings"] = [
        {"setting": one.values, "mean": one.mean, "interval": one.interval, "behind": one.behind, "seconds": one.seconds,
         "points": len(one.points), "failed": len(one.failed), "place": place(one, summary)} for one in summary.settings
    ]  # fmt: skip
    about["points"] = [
        {"name": one.name, "setting": one.setting, "seed": one.seed, "status": one.status, "seconds": one.seconds,
         "metrics": one.metrics, "cell": one.cell, "error": one.error} for one in points
    ]  # fmt: skip
    files.write_json(folder / "sweep.json", about)
    files.write_text(folder / "sweep.csv", make_csv(points))
    index = folder / "index.html"
    if page or not index.exists() or time.time() - index.stat().st_mtime > FRESH:
        write_page(folder, config, direction, points, summary)
    return summary


def write_page(folder: Path, config: SweepConfig, direction: str, points: list[Point], summary: Summary) -> None:
    """Write index.html, and the plotly.js that it shares with the points' pages."""
    report.write_plotly(folder)
    pages.write(folder / "index.html", f"Sweep of {points[0].job['notebook']}", make_page(config, direction, points, summary, folder),
                script="plotly.min.js")  # fmt: skip


def make_csv(points: list[Point]) -> str:
    """A line for each point: parameters, seed, status, seconds, metrics. The first sign tells a spreadsheet that it's UTF-8."""
    metrics = list(dict.fromkeys(name for one in points for name in one.metrics))
    seeds = ["seed"] if points[0].seed is not None else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*points[0].setting, *seeds, "status", "seconds", *metrics])
    for one in points:
        values = [*one.setting.values(), *([one.seed] if seeds else [])]
        writer.writerow([*values, one.status, one.seconds, *(one.metrics.get(name, "") for name in metrics)])
    return "\ufeff" + out.getvalue()


def place(one: Setting, summary: Summary) -> str:
    """What the verdict made of a setting, in a word or two."""
    if one.failed and one.mean is None:
        return "out: failed"
    if one.mean is None:
        return "to come"
    if one is summary.settings[0]:
        return "best" if len(summary.seeds) > 1 else "first"
    if len(summary.seeds) < 2:
        return ""
    return "no measurable difference" if one in summary.alike else "worse"


def list_settings(summary: Summary, metric: str) -> tuple[tuple, list[tuple]]:
    """The table of settings, best first: heads and rows, as texts."""
    axes, extra = list(summary.settings[0].values), [name for name in SHOWN if any(one.average(name) for one in summary.settings)]  # fmt: skip
    others = dict.fromkeys(name for one in summary.settings for point in one.points for name in point.metrics)
    extra = [*(name for name in others if name not in (metric, *extra)), *extra]
    heads = (*axes, f"mean {metric}", "95 % interval", "behind the best (95 % for all)", "", *(name.replace("_", " ") for name in extra),
             "time", "points")  # fmt: skip
    rows = []
    for one in summary.settings:
        done = sum(point.status == "completed" for point in one.points)
        rows.append((
            *(write_value(value) for value in one.values.values()), "" if one.mean is None else f"{one.mean:.4g}",
            "" if one.interval is None else "{:.4g} to {:.4g}".format(*one.interval),
            "" if one.behind is None else tell(one.behind, summary.relative), place(one, summary),
            *("" if one.average(name) is None else write_number(one.average(name)) for name in extra),
            "" if one.seconds is None else run_time.say(one.seconds), f"{done} of {len(one.points)}",
        ))  # fmt: skip
    return heads, rows


def make_page(config: SweepConfig, direction: str, points: list[Point], summary: Summary, folder: Path) -> list[str]:
    """The parts of index.html: verdict, settings, charts, points, failures, how it was judged."""
    done = sum(one.status == "completed" for one in points)
    fixed = name_values(dict(config.parameters or []))
    about = f"{done} of {len(points)} points completed, profile {points[0].job['profile']}. {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    best = summary.settings[0].values if summary.seeds else None
    known = [one for one in points if config.metric in one.metrics]
    charts = [sweep_plots.parallel_coordinates(points, config.metric, direction, best)] if known else []
    charts += [fig for fig in [sweep_plots.loss_curves(points, best)] if fig]
    failed = [one for one in points if one.status not in ("completed", "waiting")]
    return [
        STYLE, f"<h1>Sweep of {text(points[0].job['notebook'])}</h1>", f"<p>{text(about)}</p>",
        f"<p>The same in all: {text(fixed)}.</p>" if fixed else "", f"<p><strong>{text(summary.verdict)}</strong></p>",
        "<ul>" + "".join(f"<li>{text(words)}</li>" for words in summary.warnings) + "</ul>" if summary.warnings else "",
        *[f"<section>{report.show_chart(fig)}</section>" for fig in charts],
        "<h2>Settings</h2>", f'<div class="settings">{table(*list_settings(summary, config.metric))}</div>',
        "<h2>Points</h2>", list_points(points, folder, config.metric),
        *[report.show_failure({"notebook": one.name, "status": one.status, "cell": one.cell, "cell_source": one.cell_source,
                               "error": one.error}) for one in failed],
        "<h2>How it is judged</h2>", f"<pre>{text(sweep_table.__doc__.split('python -c')[0].strip())}</pre>",
        f'<p class="note">{"<br>".join(text(line) for line in report.describe_machine())}</p>',
    ]  # fmt: skip


def list_points(points: list[Point], folder: Path, metric: str) -> str:
    """The table of points in the order in which they run, each with a link to its notebook's page."""
    rows = ""
    for one in points:
        page = folder / "points" / one.name / f"{one.job['notebook']}.html"
        name = text(name_values(one.setting if one.seed is None else one.setting | {"seed": one.seed}))
        link = f'<a href="points/{quote(one.name)}/{quote(page.name)}">{name}</a>' if page.exists() else name
        bad = "" if one.status in ("completed", "waiting") else ' class="bad"'
        why = "" if not one.error else text(one.error.strip().splitlines()[-1][:CUT])
        value = f"{one.metrics[metric]:.4g}" if metric in one.metrics else why
        time_taken = run_time.say(one.seconds) if one.seconds else ""
        rows += f"<tr><td>{link}</td><td{bad}>{text(one.status)}</td><td>{value}</td><td>{time_taken}</td></tr>"
    return table(("point", "status", metric, "time"), rows)
