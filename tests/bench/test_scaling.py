"""Speed-up and efficiency with the interval of the repeats; what devices send; and two bounds of a step."""

import math
from dataclasses import replace
from statistics import mean

import pytest
from made_up import GRID, MACHINE, make_result

from sftlab import plots
from sftlab.bench import scaling
from sftlab.bench.scaling import BOUNDS, Job, Speed, compare, count_sent, project

METHODS = ("ddp", "zero1", "zero2", "zero3")
JOB = Job("ddp", 4e8, 4e8)
BASE = Speed(1, 1, 16, 1600, (1000.0,), micro_batches=4)  # 1.6 s a step
OTHERS = [{"machine": MACHINE | {"cpu": "another"}}, {"config": {"use_lora": True}}, {"versions": {"torch": "9.9"}}]
OTHERS += [{"batch": 8}, {"data": {"fingerprint": "g"}}, {"choices": {"precision": "bfloat16: why"}}]


def test_speed_up_and_efficiency_are_ratios_of_rates_with_an_interval_of_the_repeats_where_there_are_some():
    base = Speed(2, 1, 8, 1000, (90.0, 100.0, 110.0))
    gain = compare(base, Speed(8, 1, 32, 4000, (270.0, 310.0, 341.0)))
    logs = [math.log(ratio) for ratio in (3.0, 3.1, 3.1)]
    spread = math.sqrt(sum((x - mean(logs)) ** 2 for x in logs) / 2)
    half = 4.302653 * spread / math.sqrt(3)  # Student's t for 2 degrees of freedom
    assert gain.ideal == 4 and gain.kind == "measured"
    assert gain.speedup == pytest.approx(math.exp(mean(logs)))
    assert (gain.low, gain.high) == pytest.approx((math.exp(mean(logs) - half), math.exp(mean(logs) + half)), rel=1e-6)
    assert gain.efficiency == pytest.approx(tuple(part / 4 for part in (gain.speedup, gain.low, gain.high)))
    assert compare(base, base).efficiency == (1, None, None)
    for rate, kind in ((180.0, "measured"), (200.0, BOUNDS[0])):
        assert compare(base, Speed(8, 1, 32, 4000, (rate,), kind=kind)).efficiency == (0.5, None, None)


def test_points_become_series_that_differ_in_devices_alone():
    strong, weak = scaling.list_series(GRID)
    assert (strong.name, weak.name) == ("tiny-base, 1000 rows, strong", "tiny-base, 1000 rows, weak")
    assert [speed.devices for speed in weak.speeds] == [1, 2, 4, 8]
    assert {speed.tokens for speed in strong.speeds} == {3200} and len(strong.speeds[0].rates) == 3
    assert [speed.micro_batches for speed in strong.speeds] == [8, 4, 2, 1]
    small = MACHINE | {"cores": 2}  # one process with two threads, two with one: the same two cores
    [series] = scaling.list_series([make_result(n, machine=small | {"threads": 2 // n}) for n in (1, 2)])
    assert [gain.ideal for gain in series.gains] == [1, 1]


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_other_machines_options_batches_data_and_precisions_are_no_series(kind):
    for other in OTHERS:
        found = scaling.list_series([make_result(1, kind), make_result(2, kind, **other)])
        assert [len(series.results) for series in found] == [1, 1], other
    same = make_result(2, kind, choices={"precision": "float32: for another reason"})
    assert len(scaling.list_series([make_result(1, kind), same])) == 1


def test_what_zero_lora_and_micro_batches_change():
    for devices, nodes in ((1, 1), (2, 1), (16, 2), (512, 64)):
        ddp, *one_or_two, three = (count_sent(Job(method, 14e9, 14e9), devices, nodes) for method in METHODS)
        assert one_or_two == [ddp, ddp] and three == pytest.approx(1.5 * ddp) and (ddp == 0) == (devices == 1)
    full, lora = (count_sent(Job("zero2", 14e9, trained), 8) for trained in (14e9, 14e7))
    assert lora == pytest.approx(full / 100)
    assert count_sent(Job("zero3", 14e9, 14e7), 8) == pytest.approx(7 / 8 * (2 * 14e9 + 1.4e8))  # frozen weights, too
    for method, times in zip(METHODS, (1, 1, 4.5, 8), strict=True):
        job = Job(method, 1e9, 1e9)
        assert count_sent(job, 4, micro_batches=8) / count_sent(job, 4) == pytest.approx(times), method


def test_what_is_exchanged_is_read_off_the_configuration():
    full = scaling.read_job(GRID[0])
    assert full == Job("ddp", 16_000_000, 16_000_000)  # 4.0 million numbers of 4 bytes
    lora = scaling.read_job(make_result(1, config={"use_lora": True, "lora_r": 8}))
    assert lora.gradients < full.gradients / 20 and lora.weights == full.weights + lora.gradients
    assert scaling.read_job(make_result(1, config={"deepspeed": "zero3"})).method == "zero3"


def test_the_bounds_by_hand():
    """On 2 nodes DDP sends 4e8 bytes: 0.4 s at 1 GB/s. On 4 it's 6e8, on 2 nodes of 8 devices 7.5e8 over 8 links."""
    node = replace(BASE, devices=8, rows=128, tokens=12800, rates=(8000.0,))  # the links inside a node are in its step
    cases = [(BASE, 2, "weak", 1.6, 0.4), (BASE, 4, "strong", 0.4, 0.6)]
    cases += [(node, 2, "weak", 1.6, 0.09375), (node, 2, "strong", 0.8, 0.09375)]
    for base, nodes, kind, compute, exchange in cases:
        bounds = project(base, JOB, 1e9, nodes, kind)
        assert [speed.seconds for speed in bounds] == pytest.approx([compute + exchange, max(compute, exchange)])
        assert [speed.kind for speed in bounds] == list(BOUNDS) and all("modelled" in kind for kind in BOUNDS)
    assert project(BASE, JOB, 1e9, 3, "strong") == []  # 16 rows on 3 devices


def test_a_series_is_extended_to_eight_nodes_and_stays_apart_from_its_bounds():
    strong, weak = scaling.list_series(GRID[:3] + GRID[4:6])
    speeds, why = scaling.extend(strong, 1.0)
    assert not why and [speed.devices for speed in speeds] == [2, 2, 4, 4, 8, 8]
    four = make_result(1, "strong", batch=2, nodes=1)
    few, _ = scaling.extend(scaling.Series([replace(four, point=replace(four.point, global_batch=4))]), 1.0)
    assert [speed.devices for speed in few] == [2, 2, 4, 4]
    assert "one node" in scaling.extend(scaling.Series(weak.results[1:]), 1.0)[1]
    gone = replace(strong.results[0], config=strong.results[0].config | {"model_name": "gone/model"})
    assert "gone/model" in scaling.extend(scaling.Series([gone]), 1.0)[1]
    gains = [compare(weak.speeds[0], speed) for speed in scaling.extend(weak, 1.0)[0]]
    fast = [compare(weak.speeds[0], speed).efficiency[0] for speed in scaling.extend(weak, 1e9)[0]]
    assert fast == pytest.approx([1] * 6)  # every device counts in full
    assert {gain.kind for gain in gains} == {*BOUNDS} and {gain.kind for gain in weak.gains} == {"measured"}
    fig = plots.scaling({"weak": [*weak.gains, *gains]})
    assert [trace.name for trace in fig.data] == [f"weak, {kind}" for kind in (*BOUNDS, "measured")]
    for trace, dash in zip(fig.data[:2], ("dash", "dot"), strict=True):
        assert (trace.line.dash, trace.marker.symbol, list(trace.x)) == (dash, "circle-open", [2, 4, 8])
    assert (fig.data[2].line.dash, fig.data[2].marker.symbol, list(fig.data[2].x)) == ("solid", "circle", [1, 2])
