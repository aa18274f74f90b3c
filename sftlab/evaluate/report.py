"""The page of an evaluated run: whether it is better, how sure that is, what it forgot, what was trained and how.

python -c "from sftlab.evaluate import report; print(report.write_report('runs/first'))"
"""

from pathlib import Path

from sftlab import files, plots
from sftlab.pages import Chart, Html, Section, Table, format_score, write_page

SHOWN = 100  # rows side by side on the page; result.json has all
CUT = 600  # letters of a text
HEADS = ("", "base", "tuned", "difference")
BOTH = ("base", "tuned")


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder, from its result.json and trainer_state.json; whole or not at all."""
    folder = Path(folder)
    result = files.read_json(folder / "result.json")
    history = files.read_json(folder / "trainer_state.json").get("log_history", [])
    found = result["evaluation"]
    sections = [
        Section("Is it better?", list_scores(found)),
        Section("What did it forget?", list_forgetting(found["forgetting"])),
        Section("Did it see the questions?", list_leaks(found)),
        Section("Side by side", list_answers(found["answers"])),
        Section("The training", list_training(result, history)),
    ]
    intro = [Html('<p class="verdict">{}</p>').format(found["verdict"])]
    write_page(folder / "report.html", f"Run {folder.resolve().name}", sections, intro)
    return folder / "report.html"


def format_change(values: list[float], scale: float = 1, digits: int = 4) -> str:
    """A difference with its interval, each with its sign."""
    return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*(scale * value + 0.0 for value in values), d=digits)


def row_of_shares(label: str, part: dict) -> tuple:
    return label, *(format_score(part[which]) for which in BOTH), format_change(part["difference"], 100, 1) + " points"


def row_of_losses(label: str, part: dict) -> tuple:
    return label, *(f"{part[which]:.4f}" for which in BOTH), format_change(part["difference"])


def list_scores(found: dict) -> list:
    """Exact match, loss, perplexity and the share that ended, for both models, as a chart and a table."""
    bars = {which: tuple(found["exact_match"][which]) for which in BOTH}
    rows = [
        row_of_shares("exact match", found["exact_match"]),
        row_of_losses("loss on the answers, nats per token", found["held_out_loss"]),
        ("perplexity", *(f"{found['perplexity'][which]:.4g}" for which in BOTH), ""),
        ("answers that ended by themselves", *(f"{found['ended'][which]:.1%}" for which in BOTH), ""),
    ]
    uneven = found["exact_match"]["mcnemar"]
    chance = f"{100 * uneven['p']:.3g} %" if uneven["p"] > 1e-6 else "less than a millionth"
    return [
        Chart(plots.score_bars(bars, title="Exact match on held-out questions"), live=False),
        Table(HEADS, rows),
        f"{found['questions']} of {found['held_out_rows']} held-out questions, asked of both models; "
        f"{found['held_out_loss']['tokens']} answer tokens were scored. Only the base is right on {uneven['only_base']}, "
        f"only the tuned model on {uneven['only_tuned']}; a fair coin falls so unevenly in {chance} of cases (McNemar's "
        f"exact test). Intervals of {found['config']['level']:.0%}: Wilson's of scores, the paired bootstrap's of "
        "differences (where all rows changed alike, or none did, Wilson's for 0 of so many). The verdict rests on "
        f"{found['judged_by'].replace('_', ' ')}.",
    ]


def list_forgetting(found: dict) -> list:
    parts = {"nats per token": found["loss"]} | found["languages"]
    rows = [row_of_losses(f"loss, {name}", part) for name, part in parts.items()]
    if "completed" in found:
        rows.append(row_of_shares("facts completed", found["completed"]))
    about = f"{found['texts']} texts, {found['loss']['tokens']} tokens, none of them trained on"
    return [found["verdict"], Table(HEADS, rows), f"Looked for in {found['probe']}: {about}."]


def list_leaks(found: dict) -> list:
    leaks = found["leakage"]
    words = "questions are given away by training rows; the verdict leaves them out."
    rows = [
        (one["row"], shorten(one["question"]), one["why"], one["training_row"], shorten(one["training_prompt"]))
        for one in leaks["found"][:SHOWN]
    ]
    table = Table(("held-out row", "question", "why", "training row", "its prompt"), rows, words=(1, 2, 4))
    return [f"{leaks['rows']} of {found['questions']} {words}", *([table] if rows else [])]


def list_answers(answers: list[dict]) -> list:
    """The answers side by side, those on which the models differ first; ✓ and ✗ say which are right."""

    def mark(one: dict, which: str) -> str:
        return f"{'✓ right' if one[f'{which}_right'] else '✗ not exact'}: {shorten(one[which])}"

    order = sorted(enumerate(answers, 1), key=lambda one: one[1]["base_right"] == one[1]["tuned_right"])
    rows = [
        (number, shorten(one["question"]), shorten(one["expected"]), *(mark(one, which) for which in BOTH))
        for number, one in order[:SHOWN]
    ]
    table = Table(("", "question", "expected", "base", "tuned"), rows, words=range(1, 5))
    return [table, f"{len(answers) - SHOWN} more stand in result.json."] if len(answers) > SHOWN else [table]


def list_training(result: dict, history: list[dict]) -> list:
    """The loss curve, the run's metrics, and with which versions they came about."""
    losses = any("loss" in entry or "eval_loss" in entry for entry in history)
    metrics = {name.replace("_", " "): f"{value:.6g}" for name, value in result["metrics"].items() if value is not None}
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        *([Chart(plots.loss_curve(history), live=False)] if losses else []),
        Table(("", ""), list(metrics.items())),
        f"Trained with {versions}; hash of the configuration, which is in result.json: {result['config_hash']}.",
    ]


def shorten(words: str) -> str:
    return words if len(words) <= CUT else words[:CUT] + " …"
