"""`sftlab doctor RUN`: what happened to a run, why, and what to do; from its files, its logs, and the table of known errors.

An error that isn't in the table is shown as it is, and said to be unknown.

    sftlab doctor runs/first
    sftlab train … 2> error.log; sftlab doctor error.log
"""

import dataclasses
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import evidence, known_errors
from sftlab.known_errors import Finding

SHOWN = 3  # findings that are told at length
TAIL = 8  # lines of an unknown error
WELL = ("completed", "starting", "running", "interrupted")


@dataclass(frozen=True)
class Diagnosis:
    """What is known of one case: `findings` the likeliest first; `unknown`: the last words where nothing is known."""

    name: str
    status: str
    summary: str
    findings: list[Finding] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing went wrong; what was only slow is no error."""
        wrong = [finding for finding in self.findings if not finding.name.startswith("slow-")]
        return not wrong and not self.unknown and self.status in (*WELL, "log", "unknown")


def diagnose(target: str | Path, slow: bool = True) -> list[Diagnosis]:
    """What happened to a run, to each notebook of a headless run, or in a log. Raises UserError where there is none.

    slow: of a complete run, tell where its time went, which takes some seconds of measuring.
    """
    return [judge(case, slow) for case in evidence.read(target)]


def judge(case: evidence.Case, slow: bool) -> Diagnosis:
    texts = list(case.texts)
    if slow and case.status == "completed" and case.run is not None:
        from sftlab import slow_run

        texts += [evidence.Text(str(case.run.folder), line, evidence.NO_LINE) for line in slow_run.find_slow(case.run)]
    found = []
    for order, text in enumerate(texts):
        for rank, finding in enumerate(known_errors.match(text.text, text.file)):
            placed = dataclasses.replace(finding, line=finding.line + text.before)
            found.append(((finding.weak, order, rank), placed))
    findings, seen = [], set()
    for _, finding in sorted(found, key=lambda one: one[0]):
        if finding.name not in seen:
            findings.append(finding)
            seen.add(finding.name)
    if any(not finding.weak for finding in findings):  # warnings beside a known error only distract
        findings = [finding for finding in findings if not finding.weak]
    known = bool(findings) or case.status in WELL
    return Diagnosis(case.name, case.status, case.summary, findings, [] if known else find_last_words(texts))


def find_last_words(texts: list[evidence.Text]) -> list[str]:
    """The end of what is unknown: of a traceback its last two places and the error, else the last lines."""
    told = [text for text in texts if text.text.strip()]
    if not told:
        return []
    text = next((text for text in told if "Traceback (most recent call last):" in text.text), told[0])
    end = known_errors.find_end(text.text)
    lines = [line for line in text.text[end:].splitlines() if line.strip()]
    if end or "Traceback (most recent call last):" in text.text:
        cut = next(
            (
                at
                for at, line in enumerate(lines)
                if at and re.match(r"(\S+Error|\S+Exception|\w+): |\w+(Error|Exit)$", line)
            ),
            len(lines) - 1,
        )
        places = [at for at, line in enumerate(lines[:cut]) if line.lstrip().startswith("File ")]
        lines = lines[places[-2] if len(places) > 1 else max(0, cut - TAIL) : cut + TAIL]
    return [
        known_errors.hide(text.file),
        *(known_errors.hide(line)[: known_errors.LONGEST] for line in lines[-2 * TAIL :]),
    ]


def format_lines(found: Diagnosis) -> list[str]:
    """A diagnosis for the terminal."""
    lines = [f"{found.name}: {found.summary}"]
    if not found.findings and not found.unknown:
        lines.append(tell_quiet(found))
    for number, finding in enumerate(found.findings[:SHOWN], 1):
        lines += ["", *wrap(f"{number}. ", finding.what), *wrap("   seen:   ", finding.symptom),
                  *wrap("   where:  ", f"{finding.file}, line {finding.line}" if finding.line else finding.file), *wrap("   cause:  ", finding.cause)]  # fmt: skip
        for at, mend in enumerate(finding.mend):
            lines += wrap("   mend:   " if not at else "           ", mend)
        if finding.read:
            lines += wrap("   read:   ", finding.read)
    if more := found.findings[SHOWN:]:
        lines += ["", f"also seen: {'; '.join(finding.what for finding in more)}"]
    if found.unknown:
        lines += ["", f"This error is not known here. Its last words, in {found.unknown[0]}:"]
        lines += [f"   {line}" for line in found.unknown[1:]]
        lines += ["", *wrap("", "What to do: read the last line, then the last place of your own code above it; make it small (4 rows, 1 step, "
                                "--model-name tiny-base); if it stays, it's a question that others can answer, with `sftlab doctor`'s report.")]  # fmt: skip
    return lines


def tell_quiet(found: Diagnosis) -> str:
    if found.status == "completed":
        return "Nothing is wrong with it."
    if found.status in ("starting", "running"):
        return "It is at work, and nothing is wrong so far."
    if found.status == "interrupted":
        return "It was stopped; go on with the same command and --resume."
    return "No error is known or seen in it." if found.status in ("log", "unknown") else "It left no word of why."


def wrap(lead: str, text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=lead, subsequent_indent=" " * len(lead), break_long_words=False,
                         break_on_hyphens=False) or [lead]  # fmt: skip


def to_json(found: list[Diagnosis]) -> list[dict]:
    return [dataclasses.asdict(one) | {"healthy": one.healthy} for one in found]
