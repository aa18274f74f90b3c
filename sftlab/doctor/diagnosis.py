"""`sftlab doctor RUN`: what happened to a run, why, and what to do; from its files, its logs, and the table of known errors.

An error that isn't in the table is shown as it is, and said to be unknown.

    sftlab doctor runs/first
    sftlab train … 2> error.log; sftlab doctor error.log
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from sftlab import files, machine
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.doctor import known_errors
from sftlab.doctor.known_errors import Finding
from sftlab.errors import UserError
from sftlab.runs import state
from sftlab.train import checkpoints
from sftlab.train import folder as run_folder
from sftlab.train.trainer import LikeLengths

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
    return [judge(case, slow) for case in read(target)]


@dataclass(frozen=True)
class Text:
    """A text that may hold an error, its file, and how many lines of the file stand before it."""

    file: str
    text: str = field(repr=False)
    before: int = 0


@dataclass(frozen=True)
class Case:
    """What is known. `status` as in `runs.Run` or as `sftlab run` says it, or "log"; `texts`: the most telling first."""

    name: str
    status: str
    summary: str
    texts: list[Text] = field(default_factory=list)
    run: state.Run | None = None


def judge(case: Case, slow: bool) -> Diagnosis:
    texts = list(case.texts)
    if slow and case.status == "completed" and case.run is not None:
        texts += [Text(str(case.run.folder), line, NO_LINE) for line in find_slow(case.run)]
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


def find_last_words(texts: list[Text]) -> list[str]:
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


MOST = 2_000_000  # bytes of a log that are read, from its end
FLAT = 0.02  # a loss that falls by less than this share has not fallen
NO_LINE = -1  # before a line that stands in no file
RISEN = 0.1
FEWEST = 8  # logged losses from which on a curve is judged


def read(target: str | Path) -> list[Case]:
    """The cases behind a path: one run folder, each notebook of a headless run, a log file, or - for standard input.

    Raises UserError for a path that is none of these.
    """
    path = Path(target)
    if str(target) == "-":
        return [Case("standard input", "log", "a log", [Text("standard input", sys.stdin.read())])]
    if path.is_file() and path.suffix in (".json", ".ipynb") and (facts := read_notebook(path)):
        return [facts]
    if path.is_file():
        return [Case(path.name, "log", "a log", [read_log(path)])]
    if path.name.endswith("-logs") and not (path / "run.json").is_file():
        path = path.with_name(path.name.removesuffix("-logs"))
    if state.read(path).status != "none" or state.find_logs(path).is_dir():
        return [read_run(path)]
    if notebooks := [case for facts in sorted(path.glob("*.json")) if (case := read_notebook(facts))]:
        return notebooks
    if (path / run_folder.LOG).is_file() or (path / "trainer_state.json").is_file() or checkpoints.list_whole(path):
        return [read_foreign(path)]
    if logs := sorted([*path.glob("*.log"), *path.glob("*.out"), *path.glob("*.err")]):
        return [Case(path.name, "log", "logs", [read_log(log) for log in logs])]
    raise UserError(f"{target}: no run folder, no results of `sftlab run`, and no log. If a run failed before it made its folder, start it "
                    "once more with `2> error.log` at the end, then `sftlab doctor error.log`.")  # fmt: skip


def read_log(path: Path, offset: int = 0) -> Text:
    """A log from `offset` bytes on; of a very long one its end. Progress bars are cut to what stood last in their line."""
    with path.open("rb") as log:
        size = path.stat().st_size
        start = max(offset, size - MOST)
        before = sum(block.count(b"\n") for block in iter(lambda: log.read(min(2**20, start - log.tell())), b""))
        text = log.read().decode("utf-8", "replace").replace("\r\n", "\n")
    return Text(str(path), "\n".join(line.rpartition("\r")[2] for line in text.split("\n")), before)


def read_notebook(path: Path) -> Case | None:
    """What `sftlab run` says of a notebook, from NAME.json or the executed NAME.ipynb beside it; None for another file."""
    facts = files.read_json(path.with_suffix(".json"))
    if not {"notebook", "status", "error"} <= facts.keys():
        return None
    where = "" if facts["cell"] is None else f", cell {facts['cell'] + 1}"
    summary = f"notebook {facts['status']} after {facts['seconds']:.0f} s{where}"
    texts = [Text(f"{path.with_suffix('.ipynb')}{where}", facts["error"])] if facts["error"] else []
    return Case(facts["notebook"], facts["status"], summary, texts)


def read_run(folder: Path) -> Case:
    """A run folder with the logs beside it."""
    run, logs = state.read(folder), state.find_logs(folder)
    texts, summary = [], f"{run.status} at step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")
    if run.status == "none":
        summary = "failed before it began"
    result = folder / "result.json"
    if run.status not in ("completed", *state.ACTIVE):
        if run.said:
            told = result if result.is_file() else folder
            texts.append(Text(str(told), run.said, find_line(result, '"error"')))
        if traced := files.read_json(result).get("traceback"):
            begins = "Traceback (most recent call last):"
            lines = traced if begins in traced else [begins, *traced]  # a long one has only its end
            texts.append(Text(str(result), "\n".join(lines), find_line(result, '"traceback"')))
        if run.status == "killed":
            last = checkpoints.find_last(folder)
            texts.append(
                Text(
                    str(folder),
                    f"run: killed: no result.json was written; the last whole checkpoint: {last.name if last else 'none'}",
                    NO_LINE,
                )
            )
        texts += list_logs(logs, run)
    told = judge_losses(run.history)
    texts += [Text(str(folder / run_folder.LOG), line, NO_LINE) for line in told]
    return Case(folder.name, "failed" if run.status == "none" else run.status, summary, texts, run)


def list_logs(logs: Path, run: state.Run) -> list[Text]:
    """The logs beside a run: first that of the process that failed first, then the others, last the launchers'."""
    found, ranks = [], state.list_rank_logs(logs)
    if ranks:
        failed = state.find_failed(logs)
        if failed.words or failed.signal:
            found.append(Text(str(failed.log), f"sftlab saw: {failed}", NO_LINE))
        ranks = {failed.rank: ranks.pop(failed.rank), **ranks} if failed.rank in ranks else ranks
    paths = [*(log for own in ranks.values() for log in reversed(own)), *sorted(logs.glob("ranks-*/launcher.log"))]
    if (logs / state.LOG).is_file():
        found.append(read_log(logs / state.LOG, run.attempt.get("offset", 0)))
    return found + [read_log(path) for path in paths]


def read_foreign(folder: Path) -> Case:
    """The output folder of any Trainer: its log, from the last checkpoint where there is no other."""
    last = checkpoints.find_last(folder)
    history = run_folder.read(folder) or run_folder.read(last or folder)
    told = [Text(str(folder), line, NO_LINE) for line in judge_losses(history)]
    steps = max((entry.get("step", 0) for entry in history), default=0)
    return Case(folder.name, "unknown", f"a Trainer's folder, at step {steps}", told)


def find_line(path: Path, words: str) -> int:
    """How many lines stand before the first one with these words."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((number for number, line in enumerate(lines) if words in line), 0)


def judge_losses(history: list[dict]) -> list[str]:
    """What is wrong with a curve, as lines for the table: no number, exactly zero, rising, flat. Empty where it's as it should be.

    A curve that ends above its beginning rose; flat is one that fell by less than 2 %, or than chance explains, while the
    held-out loss has not fallen either.
    """
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    held_out = [float(entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    broken = next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if broken is not None:
        before = ", ".join(f"{loss:.4g}" for loss in losses[max(0, broken - 3) : broken]) or "nothing"
        return [f"losses: {losses[broken]} at logged step {broken + 1}, before it {before}"]
    if len(losses) > 1 and not any(losses):
        return [f"losses: 0.0 at each of {len(losses)} logged steps"]
    if len(losses) >= FEWEST:
        return judge_slope(losses, held_out)
    return []


def judge_slope(losses: list[float], held_out: list[float]) -> list[str]:
    """Whether a curve rose, or stayed where it was, by more than chance (twice what the mean of a quarter varies by, from the
    differences of neighbours in the second half)."""
    quarter, late = len(losses) // 4, losses[len(losses) // 2 :]
    first, last, begin = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:]), min(losses[:2])
    noise = 2 * statistics.median(abs(one - next) for one, next in itertools.pairwise(late)) / quarter**0.5
    if last - begin > max(RISEN * begin, noise):
        return [f"losses: rising: {begin:.3g} at the beginning, {last:.3g} at the end of {len(losses)} logged steps"]
    fell = len(held_out) > 1 and min(held_out) < (1 - FLAT) * held_out[0]
    if first > 0.1 and first - last < max(FLAT * first, noise) and not fell:
        return [f"losses: flat: {first:.3g} at the beginning, {last:.3g} at the end of {len(losses)} logged steps"]
    return []


if __name__ == "__main__":
    for case in read(sys.argv[1]):
        print(json.dumps({"name": case.name, "status": case.status, "summary": case.summary}, ensure_ascii=False))


# Where the time of a complete run went: checks, each a measurement and a threshold.
#
# What a check finds is a line that the table of known errors has a row for (`slow-NAME`), with the advice.


@dataclass(frozen=True)
class Check:
    """measure: a run and its result.json -> a number, or None where it can't be known; worth telling beyond the threshold."""

    name: str
    measure: Callable
    threshold: float
    sentence: str
    below: bool = False


def find_slow(run) -> list[str]:
    """A line for each thing that took time; empty where none did. run: a complete `runs.Run`."""
    result, found = files.read_json(run.folder / "result.json"), []
    if run.config is None:
        return []
    for check in CHECKS:
        value = check.measure(run, result)
        if value is not None and (value < check.threshold if check.below else value > check.threshold):
            found.append(f"slow: {check.name}: {check.sentence.format(value=value)}")
    return found


def measure_padding(run, result: dict) -> float | None:
    """The share of padding in the first epoch's batches."""
    from datasets import load_from_disk

    if "padded" not in result.get("choices", {}).get("batches", ""):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        rows = load_from_disk(run.config.dataset_path)["train"].select_columns("input_ids").with_format("arrow")
        return share_padding([min(len(ids), run.config.max_length) for ids in rows[:]["input_ids"]], run.config)
    return None


def share_padding(lengths: list[int], config: TrainConfig) -> float:
    """The share of padding in padded batches of like length, in the order of the first epoch. lengths: tokens of each row."""
    order, size = list(LikeLengths(lengths, config.batch_size, config.seed)), config.batch_size
    batches = [[lengths[row] for row in order[at : at + size]] for at in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def measure_precision(run, result: dict) -> float | None:
    """1 where float32 was asked for and bfloat16 is faster on this machine, else 0."""
    from sftlab.models import load

    if run.config.bf16 is not False or not result.get("choices", {}).get("precision", "").startswith("float32"):
        return None
    return float(load.choose_precision(replace(run.config, bf16=None))[0])


def measure_checkpointing(run, result: dict) -> float | None:
    """The share of this machine's memory that the run would need without gradient checkpointing, by the estimate."""
    from sftlab.memory import dry_run, parts

    if not run.config.gradient_checkpointing:
        return None
    gpu = result.get("time", {}).get("device") == "cuda"
    tokens = result.get("memory", {}).get("tokens", run.config.batch_size * run.config.max_length)
    bf16 = result.get("choices", {}).get("precision", "").startswith("bfloat16")
    plain = replace(run.config, gradient_checkpointing=False, bf16=bf16)
    with contextlib.suppress(UserError, dry_run.CantCount):
        plan = MemoryConfig(device="gpu" if gpu else "cpu")
        return parts.estimate(plain, plan, -(-tokens // run.config.batch_size)).total / machine.find_limit(gpu)
    return None


def measure_evaluation(run, result: dict) -> float | None:
    """The share of the time that went into the validation loss."""
    seconds = result.get("time", {}).get("seconds") or result.get("metrics", {}).get("seconds")
    return sum(entry.get("eval_runtime", 0) for entry in run.history) / seconds if seconds else None


def measure_steps(run, result: dict) -> float | None:
    """The share of the rate of matrix products that the run reached, on a CPU."""
    return result["time"].get("share") if result.get("time", {}).get("device") == "cpu" else None


def measure_gpus(run, result: dict) -> float | None:
    """The lowest mean use of a GPU, from what `sftlab metrics` has left in the run's folder of logs."""
    gpus = files.read_json(state.find_logs(run.folder) / "summary.json").get("gpus", [])
    return min((gpu["use_percent"]["mean"] / 100 for gpu in gpus if gpu.get("use_percent")), default=None)


CHECKS = (
    Check("padding", measure_padding, 0.15, "{value:.0%} of the tokens in its batches were padding"),
    Check("precision", measure_precision, 0.5, "float32 was asked for (--no-bf16), and bfloat16 is faster here"),
    Check(
        "checkpointing",
        measure_checkpointing,
        0.5,
        "without it the run needs {value:.0%} of this machine's memory",
        below=True,
    ),
    Check("evaluation", measure_evaluation, 0.15, "{value:.0%} of the time went into the validation loss"),
    Check("small steps", measure_steps, 0.12, "the run reached {value:.0%} of the rate of matrix products", below=True),
    Check("idle GPU", measure_gpus, 0.6, "a GPU was at {value:.0%} on average", below=True),
)
