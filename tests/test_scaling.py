"""Speed-up and efficiency, the model's fit, its error on points left out, and its projections."""

import math
import random
from statistics import mean

import pytest

from sftlab import published
from sftlab.communication import Job, Link, Network, count_step
from sftlab.options import UserError
from sftlab.scaling import Speed, compare
from sftlab.scaling_model import fit, predict, project

JOB = Job("ddp", 4e8, 4e8, 4e8)
TRUE = {"fixed": 0.05, "work": 2e-4, "messages_between": 6e-3, "bytes_between": 1e-9}


def make_speed(devices: int, per_device: float, values=TRUE, noise=0.0, seed=0, repeats=3) -> Speed:
    """A point as it would be measured, on nodes of one device, where `values` are the truth."""
    rng, tokens = random.Random(repr((seed, devices, per_device))), per_device * devices
    speed = Speed(devices, devices, round(tokens / 100), tokens, ())
    seconds = predict(values, speed, JOB)
    rates = tuple(tokens / seconds * math.exp(rng.gauss(0, noise)) for _ in range(repeats))
    return Speed(devices, devices, speed.rows, tokens, rates)


def make_grid(**options) -> list[Speed]:
    """Weak points of 1, 2, 4 and 8 devices, and strong ones of the work of eight."""
    return [make_speed(n, 1600, **options) for n in (1, 2, 4, 8)] + [
        make_speed(n, 12800 / n, **options) for n in (1, 2, 4)
    ]


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


def test_no_interval_is_made_of_one_repeat_or_for_the_base_itself():
    base = Speed(1, 1, 8, 1000, (100.0, 90.0))
    assert compare(base, base).efficiency == (1, None, None)
    assert compare(base, Speed(2, 1, 8, 1000, (150.0,))).efficiency == (0.75, None, None)


def test_the_fit_finds_the_true_alpha_and_beta_exactly_without_noise_and_nearly_with_it():
    clean = fit(make_grid(), JOB)
    assert clean.values == pytest.approx(TRUE, rel=1e-6) and clean.error < 1e-9
    off = {name: [] for name in TRUE}
    for seed in range(30):
        found = fit(make_grid(noise=0.01, seed=seed), JOB)
        assert 0.0005 < found.error < 0.15
        for name in found.values:  # `fixed` is left out where its noise would make the fit worse
            off[name].append(found.values[name] / TRUE[name] - 1)
    assert len(off["fixed"]) > 15
    assert (
        abs(mean(off["work"])) < 0.01
        and abs(mean(off["messages_between"])) < 0.1
        and abs(mean(off["bytes_between"])) < 0.02
    )


def test_the_error_of_a_point_left_out_does_not_know_that_point():
    speeds = [make_speed(n, 1600, noise=0.02) for n in (1, 2, 4, 8, 16)]
    before = fit(speeds, JOB)
    wrong = speeds.copy()
    wrong[3] = Speed(8, 8, speeds[3].rows, speeds[3].tokens, tuple(1.1 * rate for rate in speeds[3].rates))
    after = fit(wrong, JOB)
    assert after.folds[3] == before.folds[3] and after.values != before.values
    assert 1 + after.errors[3] == pytest.approx(1.1 * (1 + before.errors[3]))
    others = fit([speed for speed in speeds if speed is not speeds[3]], JOB)
    assert before.errors[3] == pytest.approx(predict(others.values, speeds[3], JOB) / speeds[3].seconds - 1)


def test_twins_are_left_out_together_and_count_once():
    """The point of eight devices is in both grids: its twin must not tell the fold what it is tested on."""
    speeds = [make_speed(n, 1600, noise=0.02) for n in (1, 2, 4, 8, 16)]
    twin = make_speed(8, 1600, noise=0.02, seed=1)
    alone, both = fit(speeds, JOB), fit([*speeds, twin], JOB)
    assert both.folds[3] == both.folds[5] == alone.folds[3]
    assert both.errors[3] == alone.errors[3] and both.values != alone.values
    with pytest.raises(UserError, match=r"3 measured points can't settle 3 unknowns .* it takes 4"):
        fit([*speeds[:3], make_speed(4, 1600, noise=0.02, seed=1)], JOB)


def test_too_few_points_are_refused_with_how_many_it_takes_and_so_are_points_that_are_too_alike():
    weak = [make_speed(n, 1600) for n in (1, 2, 4, 8)]
    assert set(fit(weak, JOB).values) == {"work", "messages_between", "bytes_between"}  # no batch sizes: no fixed part
    with pytest.raises(UserError, match=r"3 measured points can't settle 3 unknowns .* it takes 4"):
        fit(weak[:3], JOB)
    with pytest.raises(UserError, match="can't tell these unknowns apart"):
        fit([make_speed(n, size) for n in (1, 2) for size in (100, 200, 400)], JOB)  # two devices: one alpha and beta
    known = Network(Link(0, 0), Link(3e-4, 1e-9))
    with pytest.raises(UserError, match="apart: work, exposed"):  # left out, the only point that communicates
        fit([make_speed(1, 1600), make_speed(1, 3200), make_speed(2, 1600)], JOB, known)
    with pytest.raises(UserError, match="0 measured points"):
        fit([], JOB)


def test_with_a_known_network_the_share_that_is_not_hidden_is_fitted():
    network = Network(Link(0, 0), Link(3e-4, 1e-9))
    true = {"work": 2e-4, "exposed": 0.4}
    speeds = []
    for devices in (1, 2, 4):
        blank = Speed(devices, devices, 16 * devices, 1600 * devices, ())
        speeds.append(
            Speed(devices, devices, blank.rows, blank.tokens, (blank.tokens / predict(true, blank, JOB, network),))
        )
    assert fit(speeds, JOB, network).values == pytest.approx(true)


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_without_communication_every_device_counts_in_full(kind):
    values = {"work": 2e-4}
    speeds = [make_speed(n, 1600 if kind == "weak" else 12800 / n, values) for n in (1, 2, 4, 8, 16)]
    base = speeds[0]
    found = fit(speeds, JOB)
    for speed in (*speeds, *project(found, base, [32, 64], 1, kind)):
        assert compare(base, speed).efficiency[0] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_efficiency_falls_with_devices_and_projections_say_that_they_are_modelled(kind):
    speeds = make_grid(noise=0.01)
    base = speeds[0] if kind == "weak" else Speed(1, 1, 4096, 409600, (4000.0, 4000.0))
    far = project(fit(speeds, JOB), base, [1, 2, 4, 8, 64, 512], 1, kind)
    assert [speed.devices for speed in far] == [1, 2, 4, 8, 64, 512] and {speed.kind for speed in far} == {"modelled"}
    gains = [compare(base, speed) for speed in far]
    efficiencies = [gain.efficiency for gain in gains]
    assert all(later[0] < earlier[0] for earlier, later in zip(efficiencies, efficiencies[1:], strict=False))
    assert {gain.kind for gain in gains} == {"modelled"}
    assert all(low <= value <= high for value, low, high in efficiencies)
    widths = [high / low for _, low, high in efficiencies]
    assert widths[-1] > widths[3]  # farther from what was measured, less is known


def test_intervals_of_projections_hold_the_truth_most_of_the_time():
    held = 0
    for seed in range(40):
        speeds = make_grid(noise=0.02, seed=seed)
        [far] = project(fit(speeds, JOB), speeds[0], [64], 1, "weak")
        truth = far.tokens / predict(TRUE, far, JOB)
        held += far.low <= truth <= far.high
    assert held >= 36


def test_what_does_not_divide_is_not_projected():
    speeds = make_grid()
    found = fit(speeds, JOB)
    assert [speed.devices for speed in project(found, speeds[4], [8, 12, 128, 256], 4, "strong")] == [
        8,
        128,
    ]  # of 128 rows
    assert [speed.devices for speed in project(found, speeds[0], [6, 8], 4, "weak")] == [8]  # nodes of 4 are full


def test_modelled_points_are_never_taken_for_measured_ones():
    speeds = make_grid()
    far = project(fit(speeds, JOB), speeds[0], [16], 1, "weak")
    with pytest.raises(ValueError, match="measured points alone"):
        fit([*speeds, *far], JOB)
    with pytest.raises(ValueError, match="must be measured"):
        compare(far[0], speeds[0])


def test_published_runs_are_told_with_what_the_model_says_of_them():
    rows = {row["run"]: row for row in published.check()}
    assert round(100 * rows["Llama 3.1 8B, FSDP"]["published"], 1) == 97.3  # 5,605 of 5,762 tokens per second and GPU
    assert round(100 * rows["Llama 3 70B, LoRA"]["published"], 1) == 90.2  # 984.85 of 1,091.85
    for row in rows.values():
        assert row["modelled"] < row["modelled_all_hidden"] == pytest.approx(1)
        assert abs(row["difference"]) < 0.015 and row["source"].startswith("https://github.com/")
    assert "+0.4" in published.format_check()


def test_the_published_checks_traffic_is_what_their_settings_say():
    """Llama 3 70B, tensor-parallel over 2: on one node, 4 GPUs gather half of the weights twice for each of 4 batches."""
    traffic = count_step(published.LLAMA_70B, 4, 1, 4)
    assert traffic.bytes_inside == pytest.approx(3 / 4 * 4 * (2 * 70.55e9 + 0.207e9))
