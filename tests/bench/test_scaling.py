"""From the results of a benchmark to its scaling: series, speed-up and efficiency with the interval of the repeats."""

import dataclasses
import math
from statistics import mean

import pytest

from sftlab.bench import results, scaling
from sftlab.bench.results import Point, Result, Run
from sftlab.bench.scaling import Speed, compare
from sftlab.config.configs import TrainConfig

MACHINE = {"cpu": "a processor", "cores": 8, "memory_bytes": 2**34, "gpu": None, "gpus": 0, "node_is": "a process of one machine",
           "threads": 1, "oversubscribed": False}  # fmt: skip


def make_result(
    devices: int, scaling="weak", machine=MACHINE, repeats=3, config=None, batch=4, data="f", precision="float32: said"
) -> Result:
    """A point as `sftlab benchmark` would write it: a device takes a second for 1000 tokens, repeats are 1 % apart."""
    accumulation = 8 // devices if scaling == "strong" else 1
    point = Point("tiny-base", 1000, devices, devices, scaling, batch * accumulation * devices, batch, accumulation)
    own = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    settings, chosen = dataclasses.asdict(TrainConfig()) | own | (config or {}), {"precision": precision}
    runs, tokens = [], 50 * point.global_batch
    for repeat in range(repeats):
        seconds = tokens / devices / 1000 * (1 + 0.01 * ((repeat + devices) % 3))
        said = {name: 1.0 for name in (part.name for part in dataclasses.fields(Run))}  # what scaling doesn't read
        said |= {"tokens": 30 * tokens, "trained_tokens": 1, "samples": 30 * point.global_batch, "started": ""}
        said |= {"window_seconds": 30 * seconds, "tokens_per_second": tokens / seconds, "peak_bytes": [1], "memory": []}
        steps = {"median": seconds, "p10": seconds, "p90": seconds, "steps": 30, "warmup": 5, "all": [seconds] * 30}
        runs.append(Run(**said | {"losses": [3.0, 2.0], "step_seconds": steps}))
    return Result(
        point, settings, "0" * 12, repeats, machine, {"torch": "2"}, "sdpa", chosen, {"fingerprint": data}, runs
    )


GRID = [make_result(devices, scaling) for scaling in ("strong", "weak") for devices in (1, 2, 4, 8)]


def test_speed_up_and_efficiency_are_ratios_of_rates_with_an_interval_of_the_repeats():
    base = Speed(2, 1, 8, 1000, (100.0, 90.0, 110.0))
    gain = compare(base, Speed(8, 1, 32, 4000, (300.0, 279.0, 341.0)))
    logs = [math.log(ratio) for ratio in (3.0, 3.1, 3.1)]
    half = (
        4.302653 * math.sqrt(sum((x - mean(logs)) ** 2 for x in logs) / 2) / math.sqrt(3)
    )  # Student's t for 2 degrees
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


def test_points_become_series_that_differ_in_devices_alone(tmp_path):
    for result in [*GRID, make_result(2, machine=MACHINE | {"cpu": "another"})]:
        results.write_result(tmp_path / str(result.machine["cpu"]), result)
    found, problems = results.read_results(tmp_path / MACHINE["cpu"])
    assert not problems
    strong, weak = scaling.list_series(found)
    assert (strong.scaling, weak.scaling) == ("strong", "weak")
    assert [speed.devices for speed in weak.speeds] == [1, 2, 4, 8] and {speed.tokens for speed in strong.speeds} == {
        1600
    }
    assert [speed.micro_batches for speed in strong.speeds] == [8, 4, 2, 1] and len(strong.speeds[0].rates) == 3
    other, _ = results.read_results(tmp_path / "another")
    lora = make_result(2, config={"use_lora": True})
    assert len(scaling.list_series([*found, *other, lora])) == 4  # another machine, other options: no pair


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_other_batches_data_and_precisions_are_no_series(kind):
    own = make_result(1, kind)
    others = [
        make_result(2, kind, batch=8),
        make_result(2, kind, data="g"),
        make_result(2, kind, precision="bfloat16: said"),
    ]
    for other in others:
        assert [len(series.results) for series in scaling.list_series([own, other])] == [1, 1]
    [series] = scaling.list_series([own, make_result(2, kind, precision="float32: said at another time")])
    assert len(series.results) == 2


def test_devices_that_are_not_the_same_thing_are_named():
    plain = scaling.list_series(GRID)[0]
    assert len(plain.notes) == 1 and "share one machine's memory" in plain.notes[0]
    found = [
        make_result(1, machine=MACHINE | {"threads": 2}),
        make_result(2, machine=MACHINE | {"oversubscribed": True}),
    ]
    [series] = scaling.list_series(found)
    assert "1: 2, 2: 1;" in series.notes[0] and [gain.ideal for gain in series.gains] == [1, 1]  # the same two cores
    assert any("more processes than cores" in note for note in series.notes)
    gpus = [make_result(devices, machine=MACHINE | {"gpu": "a GPU", "threads": 8 // devices}) for devices in (1, 2)]
    assert scaling.list_series(gpus)[0].notes == ()
