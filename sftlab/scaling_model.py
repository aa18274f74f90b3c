"""A model of how a training run's speed grows with devices: fitted to measured points, checked on points left out, projected.

A step takes

    fixed + work · tokens of a device (of a core, on CPUs) + communication (`communication.count_step`)

seconds, and the unknowns are fitted to the measured steps. What the model is worth is told by points that were left out.

    python -c "from sftlab import scaling_model; help(scaling_model.fit)"
"""

import contextlib
import math
from dataclasses import dataclass, replace

from sftlab import communication
from sftlab.communication import Job, Network
from sftlab.options import UserError
from sftlab.scaling import LEVEL, Speed

SAME_WORK = 1.25  # tokens of a device that vary by less can't tell fixed seconds from those that grow with the work
LIKE = 1e5  # condition number beyond which two unknowns move the points in the same way


@dataclass(frozen=True)
class Fit:
    """A model with its evidence. values: the unknowns, in seconds; errors: for each measured point, how far the model
    fitted without it and its twins (the same devices and rows, measured in another grid) is off, as modelled over measured seconds, less 1; folds: the unknowns of those fits.
    """

    job: Job
    network: Network | None
    speeds: tuple[Speed, ...]
    values: dict[str, float]
    errors: tuple[float, ...]
    folds: tuple[dict[str, float], ...]

    @property
    def error(self) -> float:
        """The largest of the errors on points left out, without its sign."""
        return max(abs(error) for error in self.errors)


def list_terms(speed: Speed, job: Job, network: Network | None) -> dict[str, float]:
    """By what each unknown is multiplied in the seconds of a step."""
    traffic = communication.count_step(job, speed.devices, speed.nodes, speed.micro_batches)
    terms = {"fixed": 1.0, "work": speed.tokens / speed.units}
    return terms | ({"exposed": network.count_seconds(traffic)} if network else vars(traffic))


def predict(values: dict[str, float], speed: Speed, job: Job, network: Network | None = None) -> float:
    """Seconds of a step by the model, of as much work as `speed` has; its rates play no part."""
    terms = list_terms(speed, job, network)
    return sum(value * terms[name] for name, value in values.items())


def fit(speeds: list[Speed], job: Job, network: Network | None = None) -> Fit:
    """The unknowns by non-negative least squares of relative errors (Lawson and Hanson 1974, chapter 23), and the error of
    each point left out.

    Without a network its alpha and beta are unknowns: seconds of a message and of a byte that computing does not hide. With
    a network there is one, `exposed`: the share of its communication that isn't hidden behind computing; more than 1 means
    that the network is slower than given. Fixed seconds are an unknown where the fit is then less wrong on points left out.
    Raises UserError where the points are too few, or too alike to tell the unknowns apart, also with any one left out.
    """
    speeds = tuple(speeds)
    if any(speed.kind != "measured" for speed in speeds):
        raise ValueError("a model is fitted to measured points alone")
    works = [speed.tokens / speed.units for speed in speeds]
    rows = [list_terms(speed, job, network) for speed in speeds]
    names = [name for name in rows[0] if name != "fixed" and any(row[name] for row in rows)] if rows else []
    count = len(set(map(tell_work, speeds)))
    if count <= len(names):
        raise UserError(f"{count} measured points can't settle {len(names)} unknowns ({', '.join(names)}) and show how wrong "
                        f"the model is: it takes {len(names) + 1}; measure more numbers of devices, or batch sizes.")  # fmt: skip
    plain = fit_terms(speeds, names, job, network)
    if count > len(names) + 1 and max(works) / min(works) > SAME_WORK:
        with contextlib.suppress(UserError):  # in strong scaling alone, fixed seconds look like seconds of bytes
            return min(plain, fit_terms(speeds, ["fixed", *names], job, network), key=lambda fit: fit.error)
    return plain


def tell_work(speed: Speed) -> tuple[int, ...]:
    """What twins have in common: the same work on the same devices, measured in more than one grid. They count once."""
    return speed.devices, speed.nodes, speed.rows, speed.micro_batches


def fit_terms(speeds: tuple[Speed, ...], names: list[str], job: Job, network: Network | None) -> Fit:
    """`fit`, of these unknowns."""
    values = solve(speeds, names, job, network)
    folds = tuple(
        solve([speed for speed in speeds if tell_work(speed) != tell_work(left)], names, job, network)
        for left in speeds
    )
    errors = tuple(
        predict(fold, speed, job, network) / speed.seconds - 1 for fold, speed in zip(folds, speeds, strict=True)
    )
    return Fit(job, network, speeds, values, errors, folds)


def make_matrix(speeds, names: list[str], job: Job, network: Network | None):
    """(a row for each speed and a column for each unknown, over the seconds measured, columns scaled to 1; the scales)."""
    import numpy

    terms = [list_terms(speed, job, network) for speed in speeds]
    matrix = numpy.array(
        [[row[name] / speed.seconds for name in names] for row, speed in zip(terms, speeds, strict=True)]
    )
    scales = numpy.abs(matrix).max(axis=0)
    if (scales == 0).any() or numpy.linalg.cond(matrix / scales) > LIKE:
        raise UserError(f"the measured points can't tell these unknowns apart: {', '.join(names)}; measure more numbers of devices, "
                        "or batch sizes.")  # fmt: skip
    return matrix / scales, scales


def solve(speeds, names: list[str], job: Job, network: Network | None) -> dict[str, float]:
    """The unknowns that fit these speeds best. Raises UserError where they can't be told apart."""
    import numpy
    from scipy.optimize import nnls

    matrix, scales = make_matrix(speeds, names, job, network)
    found, _ = nnls(matrix, numpy.ones(len(matrix)))
    return dict(zip(names, (found / scales).tolist(), strict=True))


def find_spread(fit: Fit, speed: Speed) -> float:
    """Half of Student's interval for the seconds of a step by a least-squares fit, as a share of the seconds modelled.

    The scatter of the measured points around the model, through the covariance of the unknowns (Draper and Smith 1998,
    section 5.2). With one point more than unknowns it is very wide: so little is known then.
    """
    import numpy
    from scipy.stats import t

    names = list(fit.values)
    matrix, scales = make_matrix(fit.speeds, names, fit.job, fit.network)
    rest = 1 - matrix @ (numpy.array([fit.values[name] for name in names]) * scales)
    free = len(matrix) - len(names)
    terms = list_terms(speed, fit.job, fit.network)
    row = numpy.array([terms[name] for name in names]) / scales
    variance = row @ numpy.linalg.inv(matrix.T @ matrix) @ row * (rest @ rest) / free
    return float(t.ppf((1 + LEVEL) / 2, free) * variance**0.5 / predict(fit.values, speed, fit.job, fit.network))


def project(fit: Fit, base: Speed, devices: list[int], per_node: int, scaling: str) -> list[Speed]:
    """Modelled speeds on other numbers of devices: strong, of the base's step, or weak, of its work per device.

    A number is passed over that does not fill its nodes, or into which a strong step's rows can't be divided. The interval
    is the widest of Student's (`find_spread`) and of what the fits with a point left out say, with the largest error of
    them beyond. It tells how firmly the measured points hold the model. That far devices behave as near ones did, it can't
    tell.
    """
    out, off = [], max(max(1 + error, 1 / (1 + error)) for error in fit.errors)
    for count in devices:
        nodes = max(1, count // per_node)
        if count % nodes or (count > per_node and count % per_node) or (scaling == "strong" and base.rows % count):
            continue
        grown = count / base.devices if scaling == "weak" else 1
        micro = base.micro_batches if scaling == "weak" else max(1, base.micro_batches * base.devices // count)
        speed = Speed(
            count,
            nodes,
            round(base.rows * grown),
            base.tokens * grown,
            (),
            micro,
            base.cores * count // base.devices,
            "modelled",
        )
        guess, *others = (predict(values, speed, fit.job, fit.network) for values in (fit.values, *fit.folds))
        spread = math.exp(min(100, find_spread(fit, speed)))  # where nothing is known, still a number
        slow, fast = max(guess * spread, max(others) * off), min(guess / spread, min(others) / off)
        out.append(replace(speed, rates=(speed.tokens / guess,), low=speed.tokens / slow, high=speed.tokens / fast))
    return out
