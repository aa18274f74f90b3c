"""`sftlab doctor RUN`: what happened to a run, why, and what to do; from its files, its logs, and the table of known errors.

An error that isn't in the table is printed as it is, and called unknown.

    sftlab doctor runs/first
    sftlab train … 2> error.log; sftlab doctor error.log
"""

import dataclasses
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import files
from sftlab.doctor import curves, known_errors, slowness
from sftlab.doctor.known_errors import Finding
from sftlab.errors import UserError
from sftlab.runs import logs, state
from sftlab.runs.logs import TRACEBACK
from sftlab.train import folder as run_folder

IN_FULL = 3  # findings that are printed in full
TAIL = 8  # lines of an unknown error
NO_ERROR = ("completed", "starting", "running", "interrupted")
LAST_BYTES = 2_000_000  # of a log are read
NO_LINE = -1  # before a line that is in no file
NOTHING = {
    "completed": "Nothing is wrong with it.",
    "starting": "It is at work, and nothing is wrong so far.",
    "running": "It is at work, and nothing is wrong so far.",
    "interrupted": "It was stopped; resume it with the same command and --resume.",
    "log": "No error is known or seen in it.",
    "unknown": "No error is known or seen in it.",
}
ADVICE = (
    "What to do: read the last line, then the last place of your own code above it; make it small (4 rows, 1 step, "
    "--model-name tiny-base); if it stays, it's a question that others can answer, with `sftlab doctor`'s report."
)


@dataclass(frozen=True)
class Text:
    """A text that may hold an error, its file, and how many lines of the file are before it."""

    file: str
    text: str = field(repr=False)
    before: int = 0


@dataclass(frozen=True)
class Case:
    """What there is to diagnose. status: of a run, as `sftlab run` has it, or "log"; texts: the most telling first."""

    name: str
    status: str
    summary: str
    texts: list[Text] = field(default_factory=list)
    run: state.Run | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a case. findings: the likeliest first; unknown: the last lines where nothing is known."""

    name: str
    status: str
    summary: str
    findings: list[Finding] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing went wrong; what was only slow is no error."""
        wrong = [finding for finding in self.findings if not finding.name.startswith("slow-")]
        return not wrong and not self.unknown and self.status in (*NO_ERROR, "log", "unknown")


def diagnose(target: str | Path, slow: bool = True) -> list[Diagnosis]:
    """What happened to a run, to each notebook of a headless run, or in a log. Raises UserError where there is none.

    slow: of a complete run, find where its time went, which takes some seconds of measuring.
    """
    return [diagnose_case(case, slow) for case in read(target)]


def diagnose_case(case: Case, slow: bool) -> Diagnosis:
    texts = list(case.texts)
    if slow and case.status == "completed" and case.run is not None:
        texts += [Text(str(case.run.folder), line, NO_LINE) for line in slowness.find_slow(case.run)]
    found = []
    for order, text in enumerate(texts):
        for rank, finding in enumerate(known_errors.match(text.text, text.file)):
            placed = dataclasses.replace(finding, line=finding.line + text.before)
            found.append(((finding.weak, order, rank), placed))
    findings = {}
    for _, finding in sorted(found, key=lambda one: one[0]):
        findings.setdefault(finding.name, finding)
    findings = list(findings.values())
    if any(not finding.weak for finding in findings):  # warnings with a known error only distract
        findings = [finding for finding in findings if not finding.weak]
    known = bool(findings) or case.status in NO_ERROR
    return Diagnosis(case.name, case.status, case.summary, findings, [] if known else find_last_lines(texts))


def find_last_lines(texts: list[Text]) -> list[str]:
    """The file and the end of an unknown error: of a traceback its last two places and the error, else the last lines."""
    filled = [text for text in texts if text.text.strip()]
    if not filled:
        return []
    text = next((text for text in filled if TRACEBACK in text.text), filled[0])
    end = known_errors.find_end(text.text)
    lines = [line for line in text.text[end:].splitlines() if line.strip()]
    if end or TRACEBACK in text.text:
        error = re.compile(r"(\S+Error|\S+Exception|\w+): |\w+(Error|Exit)$")
        cut = next((at for at, line in enumerate(lines) if at and error.match(line)), len(lines) - 1)
        places = [at for at, line in enumerate(lines[:cut]) if line.lstrip().startswith("File ")]
        lines = lines[places[-2] if len(places) > 1 else max(0, cut - TAIL) : cut + TAIL]
    last = [known_errors.hide(line)[: known_errors.LONGEST] for line in lines[-2 * TAIL :]]
    return [known_errors.hide(text.file), *last]


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


def to_json(found: list[Diagnosis]) -> list[dict]:
    return [dataclasses.asdict(one) | {"healthy": one.healthy} for one in found]


def read(target: str | Path) -> list[Case]:
    """The cases at a path: one run folder, each notebook of a headless run, a log file, or - for standard input.

    Raises UserError for a path that is none of these.
    """
    path = Path(target)
    if str(target) == "-":
        return [Case("standard input", "log", "a log", [Text("standard input", sys.stdin.read())])]
    if path.is_file():
        notebook = read_notebook(path) if path.suffix in (".json", ".ipynb") else None
        return [notebook or Case(path.name, "log", "a log", [read_log(path)])]
    if path.name.endswith("-logs") and not (path / "run.json").is_file():
        path = path.with_name(path.name.removesuffix("-logs"))
    if state.read(path).status != "none" or logs.find_logs(path).is_dir():
        return [read_run(path)]
    if notebooks := [case for facts in sorted(path.glob("*.json")) if (case := read_notebook(facts))]:
        return notebooks
    if (path / run_folder.LOG).is_file() or (path / "trainer_state.json").is_file() or run_folder.list_whole(path):
        return [read_foreign(path)]
    if found := sorted([*path.glob("*.log"), *path.glob("*.out"), *path.glob("*.err")]):
        return [Case(path.name, "log", "logs", [read_log(log) for log in found])]
    raise UserError(
        f"{target}: no run folder, no results of `sftlab run`, and no log. If a run failed before it made its folder, start "
        "it once more with `2> error.log` at the end, then `sftlab doctor error.log`."
    )


def read_log(path: Path, offset: int = 0) -> Text:
    """The end of a log, from `offset` bytes on, with the number of lines before it."""
    with path.open("rb") as log:
        lines = sum(block.count(b"\n") for block in iter(lambda: log.read(2**20), b""))
    text = logs.read_end(path, offset, LAST_BYTES)
    return Text(str(path), text, max(0, lines - text.count("\n")))


def read_notebook(path: Path) -> Case | None:
    """What `sftlab run` noted of a notebook, from NAME.json, or NAME.ipynb next to it; None for another file."""
    facts = files.read_json(path.with_suffix(".json"))
    if not {"notebook", "status", "error"} <= facts.keys():
        return None
    where = "" if facts["cell"] is None else f", cell {facts['cell'] + 1}"
    summary = f"notebook {facts['status']} after {facts['seconds']:.0f} s{where}"
    texts = [Text(f"{path.with_suffix('.ipynb')}{where}", facts["error"])] if facts["error"] else []
    return Case(facts["notebook"], facts["status"], summary, texts)


def read_run(folder: Path) -> Case:
    """A run folder with its logs."""
    run, texts = state.read(folder), []
    if run.status not in ("completed", *state.ACTIVE):
        result = folder / "result.json"
        if run.reason:
            file = result if result.is_file() else folder
            texts.append(Text(str(file), run.reason, count_before(result, '"error"')))
        if traced := files.read_json(result).get("traceback"):
            lines = traced if TRACEBACK in traced else [TRACEBACK, *traced]  # a long one has only its end
            texts.append(Text(str(result), "\n".join(lines), count_before(result, '"traceback"')))
        if run.status == "killed":
            last = run_folder.find_last(folder)
            line = (
                f"run: killed: no result.json was written; the last whole checkpoint: {last.name if last else 'none'}"
            )
            texts.append(Text(str(folder), line, NO_LINE))
        texts += list_logs(logs.find_logs(folder), run)
    texts += [Text(str(folder / run_folder.LOG), line, NO_LINE) for line in curves.find_faults(run.history)]
    if run.status == "none":
        return Case(folder.name, "failed", "failed before it began", texts, run)
    summary = f"{run.status} at step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")
    return Case(folder.name, run.status, summary, texts, run)


def list_logs(place: Path, run: state.Run) -> list[Text]:
    """The logs of a run: first that of the process that failed first, then the others, last the launchers'."""
    found, ranks = [], logs.list_rank_logs(place)
    if ranks:
        failed = logs.find_failed(place)
        if failed.reason or failed.signal:
            found.append(Text(str(failed.log), f"sftlab saw: {failed}", NO_LINE))
        ranks = {failed.rank: ranks.pop(failed.rank), **ranks} if failed.rank in ranks else ranks
    paths = [*(log for own in ranks.values() for log in reversed(own)), *sorted(place.glob("ranks-*/launcher.log"))]
    if (place / logs.LOG).is_file():
        found.append(read_log(place / logs.LOG, run.attempt.get("offset", 0)))
    return found + [read_log(path) for path in paths]


def read_foreign(folder: Path) -> Case:
    """The output folder of any Trainer: its log, from the last checkpoint where there is no other."""
    history = run_folder.read_log(folder) or run_folder.read_log(run_folder.find_last(folder) or folder)
    texts = [Text(str(folder), line, NO_LINE) for line in curves.find_faults(history)]
    steps = max((entry.get("step", 0) for entry in history), default=0)
    return Case(folder.name, "unknown", f"a Trainer's folder, at step {steps}", texts)


def count_before(path: Path, words: str) -> int:
    """How many lines are before the first one with these words."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((number for number, line in enumerate(lines) if words in line), 0)
