"""`sftlab doctor RUN`: what happened to a run, why, and what to do; from its files, its logs, and the table of known errors.

An error that isn't in the table is printed as it is, and called unknown.

    sftlab doctor runs/first
    sftlab train … 2> error.log; sftlab doctor error.log
"""

import itertools
import math
import statistics
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sftlab import files, machine
from sftlab.doctor import known_errors
from sftlab.errors import UserError
from sftlab.runs import logs, state
from sftlab.train import folder as run_folder

TAIL = 8  # lines before an unknown error, and from it on
LAST_BYTES = 2_000_000  # of a log are read
FLAT = 0.02  # a loss that falls by less than this share has not fallen
RISEN = 0.1  # one that ends above its beginning by more has risen
ROOM = 0.25  # of the memory: a run that takes less with gradient checkpointing may well do without
FEWEST = 8  # logged losses from which on a curve is judged
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
    """What is known of a run or a log.

    status: of a run, or "log"; texts: what may hold an error, the most telling first; findings:
    the likeliest first; unknown: the file and its last lines where nothing is known.
    """

    name: str
    status: str
    summary: str
    texts: list[Text] = field(default_factory=list, repr=False)
    findings: list[known_errors.KnownError] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing went wrong; what was only slow is no error."""
        wrong = [finding for finding in self.findings if not finding.name.startswith("slow-")]
        return not wrong and not self.unknown and self.status in NOTHING


def diagnose(target: str | Path) -> Diagnosis:
    """What happened to a run, or in a log. Raises UserError where there is none."""
    found, by_name = read(target), {}
    for text in found.texts:
        for finding in known_errors.match(text.text, str(text.file), text.before):
            by_name.setdefault(finding.name, finding)
    found.findings = [finding for finding in by_name.values() if not finding.weak] or list(by_name.values())
    if not found.findings and (found.status == "log" or found.status not in NOTHING):
        found.unknown = find_last_lines(found.texts)
    return found


def find_last_lines(texts: list[Text]) -> list[str]:
    """The file and the end of an unknown error: of a traceback the lines around its error, else the last lines."""
    filled = [text for text in texts if text.text.strip()]
    if not filled:
        return []
    text = next((text for text in filled if logs.TRACEBACK in text.text), filled[0])
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
    for number, finding in enumerate(found.findings, 1):
        where = f"{finding.file}, line {finding.line}" if finding.line else finding.file
        rows = [(f"{number}. ", finding.what), ("   seen:   ", finding.symptom), ("   where:  ", where)]
        rows += [("   cause:  ", finding.cause), ("   fix:    ", finding.fix[0])]
        rows += [("           ", fix) for fix in finding.fix[1:]]
        rows += [("   read:   ", finding.read)] if finding.read else []
        lines += ["", *(line for lead, text in rows for line in wrap(lead, text))]
    if found.unknown:
        lines += ["", f"This error is not known here. Its last lines, in {found.unknown[0]}:"]
        lines += [*(f"   {line}" for line in found.unknown[1:]), "", *wrap("", ADVICE)]
    return lines


def wrap(lead: str, text: str) -> list[str]:
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, 110, initial_indent=lead, subsequent_indent=" " * len(lead), **whole) or [lead]


def read(target: str | Path) -> Diagnosis:
    """What there is to diagnose at a path: a run folder, a log, or - for standard input. Raises UserError for another path."""
    path = Path(target)
    if str(target) == "-":
        return Diagnosis("standard input", "log", "a log", [Text("standard input", sys.stdin.read(), 0)])
    if path.is_file():
        return Diagnosis(path.name, "log", "a log", [read_log(path)])
    if state.read(path).status != "none" or logs.find_logs(path).is_dir():
        return read_run(path)
    fix = "start it once more with `2> error.log` at the end, then `sftlab doctor error.log`."
    raise UserError(f"{target}: no run folder and no log. If a run failed before it made its folder, {fix}")


def read_log(path: Path) -> Text:
    """The end of a log; its lines are numbered only where that is all of it."""
    return Text(path, logs.read_end(path, LAST_BYTES), 0 if path.stat().st_size <= LAST_BYTES else None)


def read_run(folder: Path) -> Diagnosis:
    """A run folder with its logs."""
    run, texts = state.read(folder), []
    if run.status not in ("completed", *state.ACTIVE):
        result = folder / "result.json"
        file = result if result.is_file() else folder
        texts += [Text(file, run.reason)] if run.reason else []
        if traced := files.read_json(result).get("traceback"):
            lines = traced if logs.TRACEBACK in traced else [logs.TRACEBACK, *traced]  # a long one has only its end
            texts.append(Text(file, "\n".join(lines)))
        if run.status == "killed":
            last = run_folder.find_last(folder)
            checkpoint = f"the last whole checkpoint: {last.name if last else 'none'}"
            texts.append(Text(file, f"run: killed: no result.json was written; {checkpoint}"))
        texts += list_logs(logs.find_logs(folder), run)
    texts += [Text(folder / run_folder.LOG, line) for line in find_faults(run.history)]
    if run.status == "completed":
        texts += [Text(folder, line) for line in find_slow(run)]
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


def find_faults(history: list[dict]) -> list[str]:
    """The fault of a log's losses: not a number, exactly zero, rising, or flat. Empty where there is none.

    A curve that ends above its beginning rose; a flat one fell by less than 2 %, or than chance explains, while the
    validation loss has not fallen either.
    """
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    validation = [float(entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    broken = next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if broken is not None:
        before = ", ".join(f"{loss:.4g}" for loss in losses[max(0, broken - 3) : broken]) or "nothing"
        return [f"losses: {losses[broken]} at logged step {broken + 1}, before it {before}"]
    if len(losses) > 1 and not any(losses):
        return [f"losses: 0.0 at each of {len(losses)} logged steps"]
    if len(losses) < FEWEST:
        return []
    quarter, late = len(losses) // 4, losses[len(losses) // 2 :]
    first, last, begin = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:]), min(losses[:2])
    # chance: twice what the mean of a quarter varies by, from the differences of neighbours in the second half
    chance = 2 * statistics.median(abs(one - next) for one, next in itertools.pairwise(late)) / quarter**0.5
    ends = f"at the beginning, {last:.3g} at the end of {len(losses)} logged steps"
    if last - begin > max(RISEN * begin, chance):
        return [f"losses: rising: {begin:.3g} {ends}"]
    fell = len(validation) > 1 and min(validation) < (1 - FLAT) * validation[0]
    if first > 0.1 and first - last < max(FLAT * first, chance) and not fell:
        return [f"losses: flat: {first:.3g} {ends}"]
    return []


def find_slow(run: state.Run) -> list[str]:
    """A line for each thing that made a complete run slow; empty where none did."""
    result, found = files.read_json(run.folder / "result.json"), []
    time, peak = result.get("time", {}), result.get("memory", {}).get("peak_bytes")
    limit = machine.find_limit(time.get("device") == "cuda")
    if run.config and run.config.gradient_checkpointing and peak and peak < ROOM * limit:
        found.append(f"checkpointing: with it the run took {peak / limit:.0%} of this machine's memory")
    entries = [entry for entry in run.history if entry.get("time", math.inf) >= (run.started or 0)]  # of the last start
    evaluating = sum(entry.get("eval_runtime", 0) for entry in entries) / time.get("seconds", math.inf)
    if evaluating > 0.15:
        found.append(f"evaluation: {evaluating:.0%} of the time went into the validation loss")
    if time.get("device") == "cpu" and (share := time.get("share") or 1) < 0.12:
        found.append(f"small steps: the run reached {share:.0%} of the rate of matrix products")
    return [f"slow: {line}" for line in found]
