"""What devices send each other, against rings that are walked through message by message; and two bounds of a step."""

from dataclasses import replace

import pytest
from made_up import GRID, make_result

from sftlab import plots
from sftlab.bench import projection, scaling
from sftlab.bench.projection import BOUNDS, METHODS, Job, Traffic, count_step, make_job, pass_ring, project
from sftlab.bench.scaling import Speed, compare
from sftlab.errors import UserError


def walk_ring(order: list[int], inputs: list[list[int]]) -> tuple[list[list[int]], dict[tuple[int, int], int]]:
    """An all-reduce of each device's list of numbers, as many as devices, around a ring: (results, numbers sent by link)."""
    count, parts, sent = len(order), [list(numbers) for numbers in inputs], {}
    for turn in range(2 * (count - 1)):
        moves = []
        for place, device in enumerate(order):
            chunk = (place - turn) % count
            moves.append((device, order[(place + 1) % count], chunk, parts[device][chunk]))
        for device, after, chunk, number in moves:
            parts[after][chunk] = parts[after][chunk] + number if turn < count - 1 else number
            sent[device, after] = sent.get((device, after), 0) + 1
    return parts, sent


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_an_all_reduce_sends_what_a_ring_really_sends(devices):
    inputs = [[10**device + chunk for chunk in range(devices)] for device in range(devices)]
    parts, sent = walk_ring(list(range(devices)), inputs)
    assert all(numbers == [sum(column) for column in zip(*inputs, strict=True)] for numbers in parts)
    size = 8 * devices  # each number 8 bytes
    traffic = count_step(Job("ddp", size, size, size), devices)
    assert traffic == Traffic(bytes_inside=8 * set(sent.values()).pop())
    assert traffic.bytes_inside == 2 * (devices - 1) / devices * size


@pytest.mark.parametrize(("nodes", "each"), [(2, 1), (2, 4), (3, 2), (4, 1)])
def test_rings_over_nodes_divide_their_bytes_among_the_links(nodes, each):
    """As many rings as a node has devices, each with a share of the bytes and another way out of the node."""
    devices, out = nodes * each, {}
    for ring in range(each):
        order = [node * each + (ring + place) % each for node in range(nodes) for place in range(each)]
        _, sent = walk_ring(order, [[1] * devices for _ in range(devices)])
        for (sender, receiver), count in sent.items():
            if sender // each != receiver // each:
                out[sender] = out.get(sender, 0) + count
    size = 1.0 * devices * each  # a number of each ring's share is one byte
    traffic = pass_ring(size, devices, nodes) + pass_ring(size, devices, nodes)
    assert set(out.values()) == {traffic.bytes_between} and len(out) == devices


def test_what_zero_lora_and_micro_batches_change():
    job = make_job("zero3", 7e9, 7e9)
    for devices, nodes in ((1, 1), (2, 1), (8, 1), (16, 2), (512, 64)):
        sent = {}
        for method in METHODS:
            traffic = count_step(Job(method, job.gradients, job.trained, job.weights), devices, nodes)
            sent[method] = traffic.bytes_inside + traffic.bytes_between
        assert sent["ddp"] == sent["zero1"] == sent["zero2"] and sent["zero3"] == pytest.approx(1.5 * sent["zero2"])
        assert (sent["ddp"] == 0) == (devices == 1)
    full, lora = (count_step(make_job("zero2", 7e9, trained), 8).bytes_inside for trained in (7e9, 7e7))
    assert lora == pytest.approx(full / 100)
    gathered = count_step(make_job("zero3", 7e9, 7e7), 8).bytes_inside  # the frozen weights, too
    assert gathered == pytest.approx(7 / 8 * (2 * 14e9 + 1.4e8))
    for method, times in (("ddp", 1), ("zero1", 1), ("zero2", 4.5), ("zero3", 8)):
        job = Job(method, 1e9, 1e9, 1e9)
        ratio = count_step(job, 4, micro_batches=8).bytes_inside / count_step(job, 4).bytes_inside
        assert ratio == pytest.approx(times), method
    with pytest.raises(ValueError, match="zero4"):
        Job("zero4", 1, 1, 1)
    with pytest.raises(ValueError, match="not as many on each"):
        pass_ring(1, 6, 4)


def test_what_is_exchanged_is_read_off_the_configuration():
    full = projection.read_job(GRID[0])
    assert full.method == "ddp" and full.gradients == full.weights == 16_000_000  # 4.0 million numbers of 4 bytes
    lora = projection.read_job(make_result(1, config={"use_lora": True, "lora_r": 8}))
    assert lora.gradients < full.gradients / 20 and lora.weights == full.weights + lora.gradients
    assert projection.read_job(make_result(1, config={"deepspeed": "zero3"})).method == "zero3"


JOB = Job("ddp", 4e8, 4e8, 4e8)
BASE = Speed(1, 1, 16, 1600, (1000.0,), micro_batches=4)  # 1.6 s a step


def test_the_bounds_by_hand():
    """On 2 nodes DDP sends 4e8 bytes: 0.4 s at 1 GB/s. On 4 it's 6e8, on 2 nodes of 8 devices 3.75e8 for each."""
    weak = project(BASE, JOB, 1e9, 2, 1, "weak")
    assert [speed.kind for speed in weak] == list(BOUNDS) and all("modelled" in kind for kind in BOUNDS)
    assert [speed.seconds for speed in weak] == pytest.approx([1.6 + 0.4, 1.6])
    assert [speed.seconds for speed in project(BASE, JOB, 1e9, 4, 1, "strong")] == pytest.approx([0.4 + 0.6, 0.6])
    assert [speed.seconds for speed in project(BASE, JOB, 1e9, 2, 8, "strong")] == pytest.approx([0.1 + 0.09375, 0.1])
    node = replace(BASE, devices=8, rows=128, tokens=12800, rates=(8000.0,))  # the links inside a node are in its step
    assert [speed.seconds for speed in project(node, JOB, 1e9, 2, 8, "weak")] == pytest.approx([1.6 + 0.09375, 1.6])
    two = replace(BASE, devices=2, nodes=2)  # has exchanged already: 0.4 of its 1.6 s, if nothing is hidden
    assert [speed.seconds for speed in project(two, JOB, 1e9, 4, 1, "weak")] == pytest.approx([1.2 + 0.6, 1.6])


@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize("hidden", [0.0, 0.3, 1.0])
def test_a_run_that_hides_a_part_of_its_exchange_lies_between_the_bounds(kind, hidden):
    def take(speed: Speed) -> float:
        exchange = count_step(JOB, speed.devices, speed.nodes).bytes_between / 1e9
        computation = 1e-3 * speed.tokens / speed.devices
        return computation + exchange - hidden * min(computation, exchange)

    for base in (BASE, replace(BASE, devices=2, nodes=2, tokens=3200)):
        base = replace(base, rates=(base.tokens / take(base),))
        for nodes in (4, 8):
            slow, fast = project(base, JOB, 1e9, nodes, 1, kind)
            assert fast.seconds <= take(fast) * (1 + 1e-9) and take(slow) <= slow.seconds * (1 + 1e-9)
            assert compare(base, slow).efficiency[0] <= compare(base, fast).efficiency[0] <= 1 + 1e-9


def test_a_fast_network_counts_every_device_in_full_and_the_impossible_is_refused():
    for kind in ("weak", "strong"):
        for speed in project(BASE, JOB, 1e18, 8, 1, kind):
            assert compare(BASE, speed).efficiency[0] == pytest.approx(1)
    assert project(BASE, JOB, 1e9, 3, 8, "strong") == []  # 16 rows on 24 devices
    with pytest.raises(UserError, match="bandwidth: at 0.1 GB/s the exchange of a step takes 4 s, .* Give a larger"):
        project(replace(BASE, devices=2, nodes=2), JOB, 1e8, 4, 1, "weak")


def test_a_series_is_extended_to_eight_nodes_and_stays_apart_from_its_bounds():
    strong, weak = scaling.list_series(GRID[:3] + GRID[4:6])
    speeds, why = projection.extend(strong, 1.0)
    assert not why and [speed.devices for speed in speeds] == [2, 2, 4, 4, 8, 8]
    few, why = projection.extend(replace(strong, speeds=(replace(strong.speeds[0], rows=4),)), 1.0)
    assert [speed.devices for speed in few] == [2, 2, 4, 4] and why.startswith("8 devices: a step of 4 rows can't be")
    speeds, why = projection.extend(weak, 1.0)
    gains = [compare(weak.speeds[0], speed) for speed in speeds]
    assert {gain.kind for gain in gains} == {*BOUNDS} and {gain.kind for gain in weak.gains} == {"measured"}
    assert all(gain.low is gain.high is None for gain in gains)
    fig = plots.scaling({"weak": [*weak.gains, *gains]})
    assert [trace.name for trace in fig.data] == [f"weak, {kind}" for kind in (*BOUNDS, "measured")]
    for trace, dash in zip(fig.data[:2], ("dash", "dot"), strict=True):
        assert (trace.line.dash, trace.marker.symbol, list(trace.x)) == (dash, "circle-open", [2, 4, 8])
    measured = fig.data[2]
    assert (measured.line.dash, measured.marker.symbol, list(measured.x)) == ("solid", "circle", [1, 2])
    assert plots.draw_static(fig).startswith(b"\x89PNG") and "weak, modelled, no overlap: " in plots.summarise(fig)
