"""`sftlab doctor`: is this machine and this installation fit for the course, line by line, with the next step for what isn't.

Nothing is a failure that a laptop without a GPU needn't have. The report holds no token and no name of a home folder, so that it
can be put into a question. `sftlab doctor RUN` is in `diagnose`.

    sftlab doctor
"""

import dataclasses
import json
import logging
import platform
import textwrap
import time
import warnings
from dataclasses import dataclass

from sftlab import __version__, known_errors
from sftlab.config import DoctorConfig


@dataclass(frozen=True)
class Line:
    """One check: ok, note or fails; what was found; the next step, or nothing."""

    name: str
    state: str
    found: str
    step: str
    seconds: float


def examine() -> list[Line]:
    """All checks, each by itself: one that raises is a line that fails, with its error."""
    from sftlab import doctor_checks

    lines = []
    for name, check in doctor_checks.CHECKS.items():
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, found, step = check()
        except Exception as error:  # whatever a broken installation may raise is what is looked for
            state, step = doctor_checks.FAILS, doctor_checks.REINSTALL
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if known := known_errors.match(f"{type(error).__name__}: {error}", name):
                step = known[0].mend[0]
        lines.append(Line(name, state, known_errors.hide(found), known_errors.hide(step),
                          round(time.perf_counter() - started, 2)))  # fmt: skip
    return lines


def format_report(lines: list[Line]) -> str:
    """The report for a terminal, 110 columns wide."""
    out = [f"SFT Lab {__version__} on {platform.system()} {platform.release()}, {platform.machine()}"]
    for line in lines:
        lead = f"{line.state:6} {line.name:13} "
        out += textwrap.wrap(line.found, 110, initial_indent=lead, subsequent_indent=" " * len(lead),
                             break_long_words=False, break_on_hyphens=False)  # fmt: skip
        if line.step:
            out.append(f"{'':{len(lead)}}-> {line.step}")
    failing = [line.name for line in lines if line.state == "fails"]
    out.append(f"\n{len(failing)} of {len(lines)} fail: {', '.join(failing)}" if failing else "\nnothing fails")
    return "\n".join(out)


def run(config: DoctorConfig) -> int:
    """`sftlab doctor`: 0 if nothing fails or went wrong, else 1."""
    if config.target:
        from sftlab import diagnose, models

        models.quiet_libraries()
        found = diagnose.diagnose(config.target, config.slow)
        lines = [line for one in found for line in [*diagnose.format_lines(one), ""]]
        print(
            json.dumps(diagnose.to_json(found), ensure_ascii=False, indent=2) if config.json else "\n".join(lines[:-1])
        )
        return 0 if all(one.healthy for one in found) else 1
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which optional kernels were not found
    lines = examine()
    healthy = all(line.state != "fails" for line in lines)
    if config.json:
        from sftlab import hardware

        checks = [dataclasses.asdict(line) for line in lines]
        print(
            json.dumps(
                {"healthy": healthy, "checks": checks, "versions": hardware.list_versions("flash-attn")}, indent=2
            )
        )
    else:
        print(format_report(lines))
    return 0 if healthy else 1
