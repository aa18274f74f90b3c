"""What a run, a headless notebook or a log tells of how it ended: texts to look for errors in, and losses.

python -c "from sftlab import evidence; print(evidence.read('runs/first'))"
"""

import itertools
import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import checkpoints, files, run_log, run_process, runs
from sftlab.options import UserError

MOST = 2_000_000  # bytes of a log that are read, from its end
FLAT = 0.02  # a loss that falls by less than this share has not fallen
NO_LINE = -1  # before a line that stands in no file
RISEN = 0.1
FEWEST = 8  # logged losses from which on a curve is judged


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
    run: runs.Run | None = None


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
    if runs.read(path).status != "none" or run_process.find_logs(path).is_dir():
        return [read_run(path)]
    if notebooks := [case for facts in sorted(path.glob("*.json")) if (case := read_notebook(facts))]:
        return notebooks
    if (path / run_log.LOG).is_file() or (path / "trainer_state.json").is_file() or checkpoints.list_whole(path):
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
    run, logs = runs.read(folder), run_process.find_logs(folder)
    texts, summary = [], f"{run.status} at step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")
    if run.status == "none":
        summary = "failed before it began"
    result = folder / "result.json"
    if run.status not in ("completed", *runs.ACTIVE):
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
    texts += [Text(str(folder / run_log.LOG), line, NO_LINE) for line in told]
    return Case(folder.name, "failed" if run.status == "none" else run.status, summary, texts, run)


def list_logs(logs: Path, run: runs.Run) -> list[Text]:
    """The logs beside a run: first that of the process that failed first, then the others, last the launchers'."""
    found, ranks = [], run_process.list_rank_logs(logs)
    if ranks:
        failed = run_process.find_failed(logs)
        if failed.words or failed.signal:
            found.append(Text(str(failed.log), f"sftlab saw: {failed}", NO_LINE))
        ranks = {failed.rank: ranks.pop(failed.rank), **ranks} if failed.rank in ranks else ranks
    paths = [*(log for own in ranks.values() for log in reversed(own)), *sorted(logs.glob("ranks-*/launcher.log"))]
    if (logs / run_process.LOG).is_file():
        found.append(read_log(logs / run_process.LOG, run.attempt.get("offset", 0)))
    return found + [read_log(path) for path in paths]


def read_foreign(folder: Path) -> Case:
    """The output folder of any Trainer: its log, from the last checkpoint where there is no other."""
    last = checkpoints.find_last(folder)
    history = run_log.read(folder) or run_log.read(last or folder)
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
