"""`sftlab doctor RUN`: what happened to a run, why, and what to do; from its files, its logs, and the table of known errors.

An error that isn't in the table is printed as it is, and called unknown.

    sftlab doctor runs/first
    sftlab train … 2> error.log; sftlab doctor error.log
"""

import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sftlab import files
from sftlab.doctor import known_errors, slowness
from sftlab.doctor.known_errors import KnownError
from sftlab.errors import UserError
from sftlab.runs import logs, state
from sftlab.runs.logs import TRACEBACK
from sftlab.train import folder as run_folder

IN_FULL = 3  # findings that are printed in full
TAIL = 8  # lines before an unknown error, and from it on
LAST_BYTES = 2_000_000  # of a log are read
NOTHING = {  # what is said where no error was found, by status
    "completed": "Nothing is wrong with it.",
    "starting": "It is at work, and nothing is wrong so far.",
    "running": "It is at work, and nothing is wrong so far.",
    "interrupted": "It was stopped; give the same command with --resume, or, before its first checkpoint, with --overwrite.",
    "log": "No error is known or seen in it.",
}
ADVICE = (
    "What to do: read the last line, then the last place of your own code above it; make it small (4 rows, 1 step, "
    "--model-name tiny-base); if it stays, it's a question that others can answer, with `sftlab doctor`'s report."
)


class Text(NamedTuple):
    """A text that may hold an error, its file, and how many lines of the file are before it; None: that isn't known."""

    file: Path | str
    text: str
    before: int | None = None


@dataclass
class Diagnosis:
    """What is known of a run, a notebook or a log.

    status: of a run, as `sftlab run` has it, or "log"; texts: what may hold an error, the most telling first; findings:
    the likeliest first; unknown: the file and its last lines where nothing is known.
    """

    name: str
    status: str
    summary: str
    texts: list[Text] = field(default_factory=list, repr=False)
    findings: list[KnownError] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing went wrong; what was only slow is no error."""
        wrong = [finding for finding in self.findings if not finding.name.startswith("slow-")]
        return not wrong and not self.unknown and self.status in NOTHING


def diagnose(target: str | Path) -> list[Diagnosis]:
    """What happened to a run, to each notebook of a headless run, or in a log. Raises UserError where there is none."""
    found = read(target)
    for one in found:
        by_name = {}
        for text in one.texts:
            for finding in known_errors.match(text.text, str(text.file), text.before):
                by_name.setdefault(finding.name, finding)
        one.findings = [finding for finding in by_name.values() if not finding.weak] or list(by_name.values())
        if not one.findings and (one.status == "log" or one.status not in NOTHING):
            one.unknown = find_last_lines(one.texts)
    return found


def find_last_lines(texts: list[Text]) -> list[str]:
    """The file and the end of an unknown error: of a traceback the lines around its error, else the last lines."""
    filled = [text for text in texts if text.text.strip()]
    if not filled:
        return []
    text = next((text for text in filled if TRACEBACK in text.text), filled[0])
    lines = text.text.rstrip().split("\n")
    errors = [one for one in logs.ERROR.finditer(text.text) if "ChildFailedError" not in one[0]]  # that is a launcher's
    at = text.text.count("\n", 0, errors[-1].end()) if errors else len(lines)
    last = [known_errors.hide(line)[: known_errors.LONGEST] for line in lines[max(0, at - TAIL) : at + TAIL]]
    return [known_errors.hide(str(text.file)), *last]


def format_lines(found: Diagnosis) -> list[str]:
    """A diagnosis for the terminal."""
    lines = [f"{found.name}: {found.summary}"]
    if not found.findings and not found.unknown:
        lines.append(NOTHING.get(found.status, "It left no message that says why."))
    for number, finding in enumerate(found.findings[:IN_FULL], 1):
        where = f"{finding.file}, line {finding.line}" if finding.line else finding.file
        rows = [(f"{number}. ", finding.what), ("   seen:   ", finding.symptom), ("   where:  ", where)]
        rows += [("   cause:  ", finding.cause), ("   fix:    ", finding.fix[0])]
        rows += [("           ", fix) for fix in finding.fix[1:]]
        rows += [("   read:   ", finding.read)] if finding.read else []
        lines += ["", *(line for lead, text in rows for line in wrap(lead, text))]
    if more := found.findings[IN_FULL:]:
        lines += ["", f"also seen: {'; '.join(finding.what for finding in more)}"]
    if found.unknown:
        lines += ["", f"This error is not known here. Its last lines, in {found.unknown[0]}:"]
        lines += [*(f"   {line}" for line in found.unknown[1:]), "", *wrap("", ADVICE)]
    return lines


def wrap(lead: str, text: str) -> list[str]:
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, 110, initial_indent=lead, subsequent_indent=" " * len(lead), **whole) or [lead]


def read(target: str | Path) -> list[Diagnosis]:
    """What there is to diagnose at a path: a run folder, each notebook of a headless run, logs, or - for standard input.

    Raises UserError for a path that is none of these.
    """
    path = Path(target)
    if str(target) == "-":
        return [Diagnosis("standard input", "log", "a log", [Text("standard input", sys.stdin.read(), 0)])]
    if path.is_file():
        notebook = read_notebook(path) if path.suffix in (".json", ".ipynb") else None
        return [notebook or Diagnosis(path.name, "log", "a log", [read_log(path)])]
    if state.read(path).status != "none" or logs.find_logs(path).is_dir():
        return [read_run(path)]
    if notebooks := [one for facts in sorted(path.glob("*.json")) if (one := read_notebook(facts))]:
        return notebooks
    raise UserError(
        f"{target}: no run folder, no results of `sftlab run`, and no log. If a run failed before it made its folder, start "
        "it once more with `2> error.log` at the end, then `sftlab doctor error.log`."
    )


def read_log(path: Path) -> Text:
    """The end of a log; its lines are numbered only where that is all of it."""
    return Text(path, logs.read_end(path, LAST_BYTES), 0 if path.stat().st_size <= LAST_BYTES else None)


def read_notebook(path: Path) -> Diagnosis | None:
    """What `sftlab run` noted of a notebook, from NAME.json, or NAME.ipynb next to it; None for another file."""
    facts = files.read_json(path.with_suffix(".json"))
    if not {"notebook", "status", "error"} <= facts.keys():
        return None
    where = "" if facts["cell"] is None else f", cell {facts['cell'] + 1}"
    summary = f"notebook {facts['status']} after {facts['seconds']:.0f} s{where}"
    texts = [Text(f"{path.with_suffix('.ipynb')}{where}", facts["error"])] if facts["error"] else []
    return Diagnosis(facts["notebook"], facts["status"], summary, texts)


def read_run(folder: Path) -> Diagnosis:
    """A run folder with its logs."""
    run, texts = state.read(folder), []
    if run.status not in ("completed", *state.ACTIVE):
        result = folder / "result.json"
        file = result if result.is_file() else folder
        texts += [Text(file, run.reason)] if run.reason else []
        if traced := files.read_json(result).get("traceback"):
            lines = traced if TRACEBACK in traced else [TRACEBACK, *traced]  # a long one has only its end
            texts.append(Text(file, "\n".join(lines)))
        if run.status == "killed":
            last = run_folder.find_last(folder)
            checkpoint = f"the last whole checkpoint: {last.name if last else 'none'}"
            texts.append(Text(file, f"run: killed: no result.json was written; {checkpoint}"))
        texts += list_logs(logs.find_logs(folder), run)
    texts += [Text(folder / run_folder.LOG, line) for line in slowness.find_faults(run.history)]
    if run.status == "completed":
        texts += [Text(folder, line) for line in slowness.find_slow(run)]
    if run.status == "none":
        return Diagnosis(folder.name, "failed", "failed before it began", texts)
    summary = f"{run.status} at step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")
    return Diagnosis(folder.name, run.status, summary, texts)


def list_logs(place: Path, run: state.Run) -> list[Text]:
    """The logs of a run: first that of the process that failed first, then the others, last the launchers'."""
    found, ranks = [], logs.list_rank_logs(place)
    failed = logs.find_failed(place)
    if ranks and str(failed) != "a launcher failed":
        found.append(Text(failed.log, f"sftlab saw: {failed}"))
    if "start" in run.progress or run.status == "none":
        found += [read_log(path) for path in place.glob(logs.LOG)]
    first = sorted(ranks, key=lambda rank: rank != failed.rank)
    found += [read_log(log) for rank in first for log in reversed(ranks[rank])]
    return found + [read_log(path) for path in sorted(place.glob("ranks-*/launcher.log"))]
