"""From the results of a benchmark to its scaling: series, what their devices exchange, and the model beside them."""

import dataclasses
import math

import pytest

from sftlab import plots, results, scaling_series
from sftlab.config import TrainConfig
from sftlab.results import Point, Result, Run
from sftlab.scaling import compare
from sftlab.scaling_model import predict

TRUE = {"work": 1e-4, "messages_between": 2e-3, "bytes_between": 2e-9}
MACHINE = {"cpu": "a processor", "cores": 8, "memory_bytes": 2**34, "gpu": None, "gpus": 0, "node_is": "a process of one machine",
           "threads": 1, "oversubscribed": False}  # fmt: skip


def make_result(
    devices: int, scaling="weak", machine=MACHINE, repeats=3, config=None, batch=4, data="f", precision="float32: said"
) -> Result:
    """A point as `sftlab benchmark` would write it, where TRUE is the truth, and repeats are 1 % apart."""
    accumulation = 8 // devices if scaling == "strong" else 1
    point = Point("tiny-base", 1000, devices, devices, scaling, batch * accumulation * devices, batch, accumulation)
    own = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    settings, chosen = dataclasses.asdict(TrainConfig()) | own | (config or {}), {"precision": precision}
    empty = Result(
        point, settings, "0" * 12, repeats, machine, {"torch": "2"}, "sdpa", chosen, {"fingerprint": data}, []
    )
    tokens, cores, job = 50 * point.global_batch, scaling_series.count_cores(empty), scaling_series.read_job(empty)
    blank = scaling_series.Speed(devices, devices, point.global_batch, tokens, (), accumulation, cores)
    runs = []
    for repeat in range(repeats):
        seconds = predict(TRUE, blank, job) * (1 + 0.01 * ((repeat + devices) % 3))
        said = {name: 1.0 for name in (part.name for part in dataclasses.fields(Run))}  # what scaling doesn't read
        said |= {
            "tokens": 30 * tokens,
            "trained_tokens": 1,
            "samples": 30 * point.global_batch,
            "window_seconds": 30 * seconds,
        }
        said |= {
            "tokens_per_second": tokens / seconds,
            "peak_bytes": [1],
            "memory": [],
            "losses": [3.0, 2.0],
            "started": "",
        }
        steps = {"median": seconds, "p10": seconds, "p90": seconds, "steps": 30, "warmup": 5, "all": [seconds] * 30}
        runs.append(Run(**said | {"step_seconds": steps}))
    return dataclasses.replace(empty, runs=runs)


GRID = [make_result(devices, scaling) for scaling in ("strong", "weak") for devices in (1, 2, 4, 8)]


def test_points_become_series_that_differ_in_devices_alone(tmp_path):
    for result in [*GRID, make_result(2, machine=MACHINE | {"cpu": "another"})]:
        results.write_result(tmp_path / str(result.machine["cpu"]), result)
    found, problems = results.read_results(tmp_path / MACHINE["cpu"])
    assert not problems
    strong, weak = scaling_series.list_series(found)
    assert (strong.scaling, weak.scaling) == ("strong", "weak")
    assert [speed.devices for speed in weak.speeds] == [1, 2, 4, 8] and {speed.tokens for speed in strong.speeds} == {
        1600
    }
    assert [speed.micro_batches for speed in strong.speeds] == [8, 4, 2, 1] and len(strong.speeds[0].rates) == 3
    other, _ = results.read_results(tmp_path / "another")
    lora = make_result(2, config={"use_lora": True})
    assert len(scaling_series.list_series([*found, *other, lora])) == 4  # another machine, other options: no pair


@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_other_batches_data_and_precisions_are_no_series(scaling):
    own = make_result(1, scaling)
    others = [
        make_result(2, scaling, batch=8),
        make_result(2, scaling, data="g"),
        make_result(2, scaling, precision="bfloat16: said"),
    ]
    for other in others:
        assert [len(series.results) for series in scaling_series.list_series([own, other])] == [1, 1]
    [series] = scaling_series.list_series([own, make_result(2, scaling, precision="float32: said at another time")])
    assert len(series.results) == 2


def test_what_is_exchanged_is_read_off_the_configuration():
    full = scaling_series.read_job(GRID[0])
    assert full.method == "ddp" and full.gradients == full.weights == 16_000_000  # 4.0 million numbers of 4 bytes
    lora = scaling_series.read_job(make_result(1, config={"use_lora": True, "lora_r": 8}))
    assert lora.gradients < full.gradients / 20 and lora.weights == full.weights + lora.gradients
    sharded = scaling_series.read_job(make_result(1, config={"deepspeed": "zero3"}))
    assert (sharded.method, sharded.pieces) == ("zero3", 4)  # layers


def test_the_model_goes_on_beyond_the_points_and_stays_apart_from_them():
    strong, weak = scaling_series.list_series(GRID)
    for series in (strong, weak):
        far = scaling_series.extend(series, [strong, weak])
        assert far.fit.error < 0.1 and far.fit.values["bytes_between"] == pytest.approx(2e-9, rel=0.3)
        assert {gain.kind for gain in far.gains} == {"modelled"} and {gain.kind for gain in series.gains} == {
            "measured"
        }
        assert [gain.devices for gain in far.gains] == ([1, 2, 4, 8] if series is strong else [1, 2, 4, 8, 64, 512])
        assert (far.dropped == "") == (series is weak)
        truth = [predict(TRUE, speed, far.fit.job) for speed in far.speeds]
        for speed, seconds in zip(far.speeds, truth, strict=True):
            assert speed.low <= speed.tokens / (1.01 * seconds) <= speed.high
    assert scaling_series.extend(strong, [weak]).dropped.startswith(
        "64, 512: a step of 32 rows can't be shared out over so many; "
    )
    fig = plots.scaling({"weak": [*weak.gains, *far.gains]})
    modelled, measured = fig.data
    assert (measured.name, measured.line.dash, measured.marker.symbol) == ("weak, measured", "solid", "circle")
    assert (modelled.name, modelled.line.dash, modelled.marker.symbol) == ("weak, modelled", "dash", "circle-open")
    assert list(measured.x) == [1, 2, 4, 8] and list(modelled.x) == [1, 2, 4, 8, 64, 512]
    assert measured.y[1] == pytest.approx(100 * compare(weak.speeds[0], weak.speeds[1]).efficiency[0])
    assert plots.draw_static(fig).startswith(b"\x89PNG") and "weak, modelled, 512: " in plots.summarise(fig)


def test_two_points_are_told_as_they_are_and_not_modelled():
    series = scaling_series.list_series([make_result(1), make_result(2)])
    far = scaling_series.extend(series[0])
    assert [gain.kind for gain in series[0].gains] == ["measured"] * 2 and far.fit is None and not far.speeds
    assert "2 measured points can't settle 3 unknowns" in far.why and "it takes 4" in far.why
    ratio = math.exp(
        sum(math.log(b / a) for a, b in zip(*(speed.rates for speed in series[0].speeds), strict=True)) / 3
    )
    assert series[0].gains[1].speedup == pytest.approx(ratio)
    assert series[0].gains[1].efficiency[0] == pytest.approx(ratio / 2)


def test_a_model_that_is_wrong_projects_nothing():
    slow = make_result(4)
    slow = dataclasses.replace(
        slow, runs=[dataclasses.replace(run, tokens_per_second=run.tokens_per_second / 5) for run in slow.runs]
    )
    far = scaling_series.extend(scaling_series.list_series([make_result(1), make_result(2), slow, make_result(8)])[0])
    assert far.fit.error > scaling_series.WRONG and not far.speeds and not far.gains
    assert "on points left out of the fit; nothing is projected" in far.why


def test_devices_that_are_not_the_same_thing_are_named():
    plain = scaling_series.list_series(GRID)[0]
    assert len(plain.notes) == 1 and "share one machine's memory" in plain.notes[0]
    found = [
        make_result(1, machine=MACHINE | {"threads": 2}),
        make_result(2, machine=MACHINE | {"oversubscribed": True}),
    ]
    [series] = scaling_series.list_series(found)
    assert "1: 2, 2: 1;" in series.notes[0] and [gain.ideal for gain in series.gains] == [1, 1]  # the same two cores
    assert any("more processes than cores" in note for note in series.notes)
    gpus = [make_result(devices, machine=MACHINE | {"gpu": "a GPU", "threads": 8 // devices}) for devices in (1, 2)]
    assert scaling_series.list_series(gpus)[0].notes == ()
