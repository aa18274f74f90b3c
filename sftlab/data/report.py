"""What a set holds and what a model would learn from it: the report of `sftlab prepare`, as text, JSON and HTML.

sftlab prepare --source json --source-path data_samples/raw/quiz.json
"""

import json
from collections import Counter
from pathlib import Path

import numpy

from sftlab import plots
from sftlab.config.configs import DataConfig
from sftlab.data import cleaning, masking, templates
from sftlab.data.readers import group_reasons
from sftlab.data.rows import get_answer, get_prompt
from sftlab.models.load import IGNORED
from sftlab.pages import Chart, Html, Section, Table, write_page

MARKS = (50, 95, 99)  # percentiles of the lengths
NEAR_LIMIT = 20_000  # rows: beyond it the search for near duplicates, about 10 seconds here, is only made if asked for
SHOWN = 5  # rows of each kind that the text names
NOTED = 20  # keys
LISTED = 100  # and that the page lists, cut to so many letters:
CUT = 400


def inspect_rows(rows: list[dict], config: DataConfig) -> dict:
    """What stands out in rows that were read: repeats, contradictions, broken text, languages. Places, not contents.

    `near_duplicates` lists (row, the earlier row, similarity); in a large set it is None unless `--dedupe near` asks.
    """
    repeats = cleaning.find_exact(rows)
    distinct = [row for index, row in enumerate(rows) if index not in repeats]
    near = None
    if config.dedupe == "near" or len(distinct) <= NEAR_LIMIT:
        near = [
            (distinct[index]["place"], distinct[first]["place"], round(similarity, 3))
            for index, (first, similarity) in cleaning.find_near(distinct, config.near_threshold).items()
        ]
    places = [row["place"] for row in rows]
    answers = {row["place"]: get_answer(row) for row in rows}
    texts = {row["place"]: f"{get_prompt(row)}\n{answers[row['place']]}" for row in rows}
    return {
        "exact_duplicates": [(places[index], places[first]) for index, first in repeats.items()],
        "near_duplicates": near,
        "conflicting_answers": [[places[index] for index in group] for group in cleaning.find_conflicts(rows)],
        "tiny_answers": [place for place, answer in answers.items() if len(answer.strip()) < 2],
        "answers_with_space_first": [place for place, answer in answers.items() if answer[:1].isspace()],
        "control_characters": [place for place, text in texts.items() if cleaning.has_controls(text)],
        "mojibake": cleaning.find_mojibake(rows),
        "languages": dict(Counter(map(cleaning.find_language, texts.values())).most_common()),
    }


def count_tokens(dataset, tokenizer, max_length: int) -> dict:
    """Counts over a tokenised split at a length limit: rows, tokens, trained_tokens, cut_rows and so on.

    `lengths`: a list of (prompt tokens, answer tokens), uncut, one entry per row.
    """
    labels, rows, places, lengths = masking.read_labels(dataset)

    def count_in_rows(chosen):
        return numpy.bincount(rows[chosen], minlength=len(lengths))

    answers, inside = count_in_rows(labels != IGNORED), places < max_length
    trained = count_in_rows(inside & (labels != IGNORED))
    closing = [tokenizer.eos_token_id, *templates.find_traits(tokenizer).ends]
    ends = count_in_rows(inside & numpy.isin(labels, [token for token in closing if token is not None]))
    return {
        "rows": len(lengths),
        "tokens": int(inside.sum()),
        "trained_tokens": int(trained.sum()),
        "cut_rows": int((lengths > max_length).sum()),
        "rows_that_teach_nothing": int((trained == 0).sum()),
        "rows_without_trained_eos": int((ends == 0).sum()),
        "lengths": list(zip((lengths - answers).tolist(), answers.tolist(), strict=True)),
    }


def find_percentiles(lengths: list[tuple[int, int]]) -> dict[str, int]:
    """Percentile in percent -> length of rows in tokens."""
    values = numpy.percentile(list(map(sum, lengths)), MARKS, method="higher").tolist()
    return dict(zip(map(str, MARKS), values, strict=True))


def list_lines(report: dict) -> list[str]:
    """The report in lines for a terminal: what was dropped, what stands out, what will be learned."""
    lines, found = list_notes(report), report["found"]
    lines += [f"{label}: {join_some(items)}" for label, items in list_findings(found)]
    if found["near_duplicates"] is None:
        lines.append(f"near duplicates: not searched for in more than {NEAR_LIMIT:,} rows; --dedupe near does")
    total = sum(found["languages"].values())
    lines.append("languages: " + ", ".join(f"{name} {count / total:.0%}" for name, count in found["languages"].items()))
    for split, counts in report["splits"].items():
        share = counts["trained_tokens"] / max(1, counts["tokens"])
        lines.append(f"{split}: {counts['rows']} rows, {counts['tokens']:,} tokens, {share:.0%} of them trained")
        if counts["cut_rows"]:
            lost = f"{counts['rows_that_teach_nothing']} of all lose their whole answer"
            long = f"{counts['cut_rows']} rows are longer than {report['max_length']} tokens and will be cut"
            lines.append(f"  {long}; {lost}")
    marks = [f"{mark} % have {count} or fewer" for mark, count in report["percentiles"].items()]
    return [*lines, f"tokens in a row: {', '.join(marks)}"]


def list_notes(report: dict) -> list[str]:
    """What was dropped, left out and changed of the rows, and settled for the template, in lines."""
    lines = list(report.get("template", {}).values())
    if len(files := report.get("rows_by_file", {})) > 1:
        lines.append("rows read: " + ", ".join(f"{count} of {name}" for name, count in files.items()))
    for key, label in (("dropped", "training"), ("dropped_test", "held-out")):
        if report[key]:
            lines.append(f"{label} rows dropped: {len(report[key])}")
            lines += [f"  {reason}" for reason in group_reasons(report[key])[:SHOWN]]
    for key, label in (("unused", "not used"), ("changed", "changed")):
        notes = list(report.get(key, {}).items())
        for name, (count, example) in notes[:NOTED]:
            lines.append(f"{label}: {name}: {count} row{'s' * (count != 1)}, as {example}")
        if len(notes) > NOTED:
            lines.append(f"{label}: {len(notes) - NOTED} more, which sftlab.json lists")
    return lines


def list_findings(found: dict) -> list[tuple[str, list[str]]]:
    """The findings that are there, each as a label and its rows in words."""
    named = {
        "exact duplicates": [f"{row} = {first}" for row, first in found["exact_duplicates"]],
        "near duplicates": [f"{row} ~ {first} ({value:.0%})" for row, first, value in found["near_duplicates"] or []],
        "one prompt, different answers": [" / ".join(group) for group in found["conflicting_answers"]],
        "answers of one character": found["tiny_answers"],
        "answers that begin with white space": found["answers_with_space_first"],
        "control or lost characters": found["control_characters"],
        "mojibake (--fix-mojibake fixes it)": [f"{row}: {old!r} -> {new!r}" for row, old, new in found["mojibake"]],
    }
    return [(label, items) for label, items in named.items() if items]


def join_some(items: list[str]) -> str:
    return "; ".join(items[:SHOWN]) + (f"; … ({len(items)} in all)" if len(items) > SHOWN else "")


def write_report(
    path: Path, report: dict, lengths: list[tuple[int, int]], views: list[masking.MaskView], read: list[tuple]
) -> None:
    """The report as one page that opens offline: tables, the histogram of lengths, the first rows with their mask.

    read: the raw rows, each after its place, to show those that stand out.
    """
    texts = {place: json.dumps(row, ensure_ascii=False, default=str)[:CUT] for place, row in read}
    histogram = plots.length_histogram(lengths, report["percentiles"], report["max_length"])
    short = [
        f"{report['rows_read']} rows read from {report['source']}, format {report['format']}, model {report['model']}",
        Html("<pre>{}</pre>").format("\n".join(list_lines(report))),
        Chart(histogram),
    ]
    found = report["found"]
    near = found["near_duplicates"] or []
    near = [(row, texts[row], first, texts[first], f"{similarity:.0%}") for row, first, similarity in near]
    groups = [(place, texts[place]) for group in found["conflicting_answers"] for place in group]
    dropped = [(place, why) for key in ("dropped", "dropped_test") for place, why in report[key].items()]
    listed = (
        ("One prompt, different answers: which is right?", ("row", "text"), groups),
        ("Near duplicates: the same, or only alike?", ("row", "text", "earlier row", "text", "similarity"), near),
        ("Dropped; training rows are kept in dropped.jsonl", ("row", "why"), dropped),
    )
    sections = [Section("In short", short)]
    for title, heads, rows in listed:
        more = [f"{len(rows) - LISTED} more"] if len(rows) > LISTED else []
        if rows:
            sections.append(Section(title, [Table(heads, rows[:LISTED]), *more]))
    sections.append(Section("The first rows, as the model sees them", [Html(view._repr_html_()) for view in views]))
    write_page(path, f"Data set {report['name']}", sections)
