"""How a training run's speed grows with devices, as measured: speed-up and efficiency, with what the repeats say of them.

Measured and modelled speeds are one type that says which it is. The model that makes the others is in `scaling_model`.

    python -c "from sftlab.scaling import *; print(compare(Speed(1, 1, 8, 1e3, (50.,)), Speed(2, 1, 8, 1e3, (90.,))).efficiency)"
"""

import math
from dataclasses import dataclass
from statistics import mean, median, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Speed:
    """How fast a run is on so many devices. kind: `measured`, with the rate of each repeat, or `modelled`.

    rows, tokens: of a step, over all devices; rates: tokens per second of all devices together. cores: on CPUs, how many
    all devices together compute on, which needn't grow with them; 0 on GPUs. low, high: the interval of a modelled rate; a
    measured one has repeats instead.
    """

    devices: int
    nodes: int
    rows: int
    tokens: float
    rates: tuple[float, ...]
    micro_batches: int = 1
    cores: int = 0
    kind: str = "measured"
    low: float | None = None
    high: float | None = None

    @property
    def units(self) -> int:
        """What computes: cores where they are counted, else devices."""
        return self.cores or self.devices

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.tokens / self.rate


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the base: `speedup` with its interval, None where there is none to give."""

    kind: str
    devices: int
    ideal: float  # devices over those of the base; cores where they are counted
    speedup: float
    low: float | None
    high: float | None

    @property
    def efficiency(self) -> tuple[float, float | None, float | None]:
        """Speed-up over the ideal one, with its interval: 1 is all that the devices could give."""
        ends = [None if end is None else end / self.ideal for end in (self.low, self.high)]
        return self.speedup / self.ideal, *ends


def compare(base: Speed, speed: Speed) -> Gain:
    """The speed-up of `speed` over the measured `base`, for strong and weak scaling alike: the ratio of their rates.

    Measured: repeats of the same round were made one after the other, so it's their ratios that are averaged, as logarithms,
    with Student's interval of 95 % (Student 1908, Biometrika 6, p. 1); one round gives no interval. Modelled: the model's
    interval over the base's rate. Raises ValueError where the base isn't measured.
    """
    if base.kind != "measured":
        raise ValueError("the base of a speed-up must be measured")
    ideal = speed.units / base.units
    if speed.kind != "measured":
        ends = [None if end is None else end / base.rate for end in (speed.low, speed.high)]
        return Gain(speed.kind, speed.devices, ideal, speed.rate / base.rate, *ends)
    ratios = [math.log(after / before) for before, after in zip(base.rates, speed.rates, strict=False)]
    middle = mean(ratios)
    if speed is base or len(ratios) < 2:
        return Gain("measured", speed.devices, ideal, math.exp(middle), None, None)
    from scipy.stats import t

    half = t.ppf((1 + LEVEL) / 2, len(ratios) - 1) * stdev(ratios) / math.sqrt(len(ratios))
    return Gain("measured", speed.devices, ideal, *(math.exp(middle + end) for end in (0, -half, half)))
