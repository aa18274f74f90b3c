"""From the results of a benchmark to its scaling: series, speed-up and efficiency with the interval of the repeats."""

import math
from statistics import mean

import pytest
from made_up import GRID, MACHINE, make_result

from sftlab.bench import scaling
from sftlab.bench.scaling import Speed, compare


def test_speed_up_and_efficiency_are_ratios_of_rates_with_an_interval_of_the_repeats():
    base = Speed(2, 1, 8, 1000, (100.0, 90.0, 110.0))
    gain = compare(base, Speed(8, 1, 32, 4000, (300.0, 279.0, 341.0)))
    logs = [math.log(ratio) for ratio in (3.0, 3.1, 3.1)]
    spread = math.sqrt(sum((x - mean(logs)) ** 2 for x in logs) / 2)
    half = 4.302653 * spread / math.sqrt(3)  # Student's t for 2 degrees of freedom
    assert gain.ideal == 4 and gain.kind == "measured"
    assert gain.speedup == pytest.approx(math.exp(mean(logs)))
    assert (gain.low, gain.high) == pytest.approx((math.exp(mean(logs) - half), math.exp(mean(logs) + half)), rel=1e-6)
    assert gain.efficiency == pytest.approx(tuple(part / 4 for part in (gain.speedup, gain.low, gain.high)))


def test_no_interval_is_made_of_one_repeat_for_the_base_itself_or_of_a_model():
    base = Speed(1, 1, 8, 1000, (100.0, 90.0))
    assert compare(base, base).efficiency == (1, None, None)
    assert compare(base, Speed(2, 1, 8, 1000, (150.0,))).efficiency == (0.75, None, None)
    modelled = Speed(2, 1, 8, 1000, (142.5,), kind="modelled, no overlap")
    assert compare(base, modelled).efficiency == (0.75, None, None)
    with pytest.raises(ValueError, match="must be measured"):
        compare(modelled, base)


def test_points_become_series_that_differ_in_devices_alone():
    strong, weak = scaling.list_series(GRID)
    assert (strong.scaling, weak.scaling) == ("strong", "weak")
    assert [speed.devices for speed in weak.speeds] == [1, 2, 4, 8]
    assert {speed.tokens for speed in strong.speeds} == {3200} and len(strong.speeds[0].rates) == 3
    assert [speed.micro_batches for speed in strong.speeds] == [8, 4, 2, 1]


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_other_machines_options_batches_data_and_precisions_are_no_series(kind):
    own = make_result(1, kind)
    others = [
        {"machine": MACHINE | {"cpu": "another"}},
        {"config": {"use_lora": True}},
        {"versions": {"torch": "9.9"}},
        {"batch": 8},
        {"data": {"fingerprint": "g"}},
        {"choices": {"precision": "bfloat16: why"}},
    ]
    for other in others:
        found = scaling.list_series([own, make_result(2, kind, **other)])
        assert [len(series.results) for series in found] == [1, 1], other
    [series] = scaling.list_series([own, make_result(2, kind, choices={"precision": "float32: for another reason"})])
    assert len(series.results) == 2


def test_devices_that_are_not_the_same_thing_are_named():
    plain = scaling.list_series(GRID)[0]
    assert len(plain.notes) == 1 and "share one machine's memory" in plain.notes[0]
    small = MACHINE | {"cores": 2}
    found = [make_result(1, machine=small | {"threads": 2}), make_result(2, machine=small | {"oversubscribed": True})]
    [series] = scaling.list_series(found)
    assert "1: 2, 2: 1;" in series.notes[0] and [gain.ideal for gain in series.gains] == [1, 1]  # the same two cores
    assert any("more processes than cores" in note for note in series.notes)
    gpus = [make_result(devices, machine=MACHINE | {"gpu": "a GPU", "threads": 8 // devices}) for devices in (1, 2)]
    assert scaling.list_series(gpus)[0].notes == ()
