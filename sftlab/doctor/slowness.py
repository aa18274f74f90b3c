"""What the numbers of a run say: losses that are wrong, and, of a complete run, where its time went.

What is found is a line for which the table of known errors has a row with the advice.

    python -c "from sftlab import runs; from sftlab.doctor import slowness; print(slowness.find_slow(runs.read('runs/first')))"
"""

import itertools
import math
import statistics

from sftlab import files, machine
from sftlab.runs.state import Run

FLAT = 0.02  # a loss that falls by less than this share has not fallen
RISEN = 0.1  # one that ends above its beginning by more has risen
ROOM = 0.25  # of the memory: a run that takes less with gradient checkpointing may well do without
FEWEST = 8  # logged losses from which on a curve is judged


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


def find_slow(run: Run) -> list[str]:
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
