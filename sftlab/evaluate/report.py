"""The page of an evaluated run: whether it is better, how sure that is, what it forgot, and the answers side by side.

python -c "from sftlab.evaluate import report; print(report.write_report('runs/first'))"
"""

from pathlib import Path

from sftlab import files
from sftlab.pages import Html, Section, Table, format_score, write_page

SHOWN = 100  # rows side by side on the page; result.json has all
HEADS = ("", "base", "tuned", "difference")
BOTH = ("base", "tuned")


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder, from its result.json; whole or not at all."""
    page = Path(folder) / "report.html"
    found = files.read_json(page.with_name("result.json"))["evaluation"]
    sections = [
        Section("Is it better?", list_scores(found)),
        Section("What did it forget?", list_forgetting(found["forgetting"])),
        Section("Side by side", list_answers(found)),
    ]
    intro = [Html('<p class="verdict">{}</p>').format(found["verdict"])]
    write_page(page, f"Run {page.parent.resolve().name}", sections, intro)
    return page


def format_change(values: list[float], scale: float = 1, digits: int = 4) -> str:
    """A difference with its interval, each with its sign."""
    return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*(scale * value + 0.0 for value in values), d=digits)


def row_of_shares(label: str, part: dict) -> tuple:
    return label, *(format_score(part[which]) for which in BOTH), format_change(part["difference"], 100, 1) + " points"


def row_of_losses(label: str, part: dict) -> tuple:
    return label, *(f"{part[which]:.4f}" for which in BOTH), format_change(part["difference"])


def list_scores(found: dict) -> list:
    """Exact match, loss, perplexity and the share that ended, for both models, as a table."""
    rows = [
        row_of_shares("exact match", found["exact_match"]),
        row_of_losses("loss on the answers, nats per token", found["held_out_loss"]),
        ("perplexity", *(f"{found['perplexity'][which]:.4g}" for which in BOTH), ""),
        ("answers that ended by themselves", *(f"{found['ended'][which]:.1%}" for which in BOTH), ""),
    ]
    uneven = found["exact_match"]["mcnemar"]
    return [
        Table(HEADS, rows),
        f"{found['questions']} of {found['held_out_rows']} held-out questions, asked of both models; "
        f"{found['held_out_loss']['tokens']} answer tokens were scored. Only the base is right on {uneven['only_base']}, "
        f"only the tuned model on {uneven['only_tuned']} (McNemar's exact test: p = {uneven['p']:.2g}). Intervals of "
        f"{found['config']['level']:.0%}: Wilson's of scores, the paired bootstrap's of differences. The verdict rests on "
        f"{found['judged_by'].replace('_', ' ')}, without the {found['leakage']['rows']} questions that training rows give away.",
    ]


def list_forgetting(found: dict) -> list:
    rows = [row_of_losses("loss, nats per token", found["loss"])]
    if "completed" in found:
        rows.append(row_of_shares("facts completed", found["completed"]))
    about = f"{found['texts']} texts, {found['loss']['tokens']} tokens, none of them trained on"
    return [found["verdict"], Table(HEADS, rows), f"Looked for in {found['probe']}: {about}."]


def list_answers(found: dict) -> list:
    """The answers side by side, those on which the models differ first; ✓ and ✗ say which are right."""

    def mark(one: dict, which: str) -> str:
        return f"{'✓ right' if one[f'{which}_right'] else '✗ not exact'}: {one[which]}"

    leaked = {leak["question"]: leak for leak in found["leakage"]["found"]}
    rows = []
    for one in sorted(found["answers"], key=lambda one: one["base_right"] == one["tuned_right"])[:SHOWN]:
        question = one["question"]
        if leak := leaked.get(one["question"]):
            question += f" (given away by training row {leak['train']}: {leak['why']})"
        rows.append((question, one["expected"], *(mark(one, which) for which in BOTH)))
    more = len(found["answers"]) - len(rows)
    table = Table(("question", "expected", *BOTH), rows)
    return [table, f"{more} more stand in result.json."] if more else [table]
