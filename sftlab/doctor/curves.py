"""What is wrong with a curve of losses, as lines that the table of known errors has rows for.

python -c "from sftlab.doctor import curves; print(curves.find_faults([{'loss': 5.0}] * 12))"
"""

import itertools
import math
import statistics

FLAT = 0.02  # a loss that falls by less than this share has not fallen
RISEN = 0.1  # one that ends above its beginning by more has risen
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
    return find_slope(losses, validation) if len(losses) >= FEWEST else []


def find_slope(losses: list[float], validation: list[float]) -> list[str]:
    """Whether a curve rose, or stayed where it was, by more than chance.

    Chance: twice what the mean of a quarter varies by, from the differences of neighbours in the second half.
    """
    quarter, late = len(losses) // 4, losses[len(losses) // 2 :]
    first, last, begin = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:]), min(losses[:2])
    noise = 2 * statistics.median(abs(one - next) for one, next in itertools.pairwise(late)) / quarter**0.5
    ends = f"at the beginning, {last:.3g} at the end of {len(losses)} logged steps"
    if last - begin > max(RISEN * begin, noise):
        return [f"losses: rising: {begin:.3g} {ends}"]
    fell = len(validation) > 1 and min(validation) < (1 - FLAT) * validation[0]
    if first > 0.1 and first - last < max(FLAT * first, noise) and not fell:
        return [f"losses: flat: {first:.3g} {ends}"]
    return []
