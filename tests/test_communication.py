"""What devices send each other: against rings that are walked through message by message."""

import pytest

from sftlab.communication import Job, Link, Network, Traffic, count_step, make_job, pass_ring


def walk_ring(order: list[int], inputs: list[list[int]]) -> tuple[list[list[int]], dict[tuple[int, int], int]]:
    """An all-reduce of each device's list of numbers, as many as devices, around a ring: (results, numbers sent by link)."""
    count, held, sent = len(order), [list(numbers) for numbers in inputs], {}
    for turn in range(2 * (count - 1)):
        moves = []
        for place, device in enumerate(order):
            chunk = (place - turn) % count
            moves.append((device, order[(place + 1) % count], chunk, held[device][chunk]))
        for device, after, chunk, number in moves:
            held[after][chunk] = held[after][chunk] + number if turn < count - 1 else number
            sent[device, after] = sent.get((device, after), 0) + 1
    return held, sent


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_an_all_reduce_sends_what_a_ring_really_sends(devices):
    inputs = [[10**device + chunk for chunk in range(devices)] for device in range(devices)]
    held, sent = walk_ring(list(range(devices)), inputs)
    assert all(numbers == [sum(column) for column in zip(*inputs, strict=True)] for numbers in held)
    size = 8 * devices  # each number 8 bytes
    traffic = count_step(Job("ddp", size, size, size), devices)
    assert traffic == Traffic(messages_inside=2 * (devices - 1), bytes_inside=8 * set(sent.values()).pop())
    assert traffic.bytes_inside == 2 * (devices - 1) / devices * size


@pytest.mark.parametrize(("nodes", "each"), [(2, 1), (2, 4), (3, 2), (4, 1)])
def test_rings_over_nodes_share_their_bytes_out_over_the_links(nodes, each):
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
    assert traffic.messages_between == 2 * (nodes - 1) and traffic.messages_inside + traffic.messages_between == 2 * (
        devices - 1
    )


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (8, 1), (16, 2), (512, 64)])
def test_zero_3_sends_half_as_much_again_as_zero_2_and_ddp(devices, nodes):
    job = make_job("zero3", 7e9, 7e9)
    sent = {}
    for method in ("ddp", "zero1", "zero2", "zero3"):
        traffic = count_step(Job(method, job.gradients, job.trained, job.weights), devices, nodes)
        sent[method] = traffic.bytes_inside + traffic.bytes_between
    assert sent["ddp"] == sent["zero1"] == sent["zero2"] and sent["zero3"] == pytest.approx(1.5 * sent["zero2"])


def test_with_lora_little_is_sent_but_for_the_frozen_weights_under_zero_3():
    full, lora = (count_step(make_job("zero2", 7e9, trained), 8).bytes_inside for trained in (7e9, 7e7))
    assert lora == pytest.approx(full / 100)
    gathered = count_step(make_job("zero3", 7e9, 7e7), 8).bytes_inside
    assert gathered == pytest.approx(7 / 8 * (2 * 14e9 + 1.4e8))


def test_micro_batches_cost_zero_3_everything_again_and_ddp_nothing():
    job = make_job("ddp", 1e9, 1e9)
    assert count_step(job, 4, micro_batches=8) == count_step(job, 4)
    for method, times in (("zero1", 1), ("zero2", 4.5), ("zero3", 8)):
        job = Job(method, 1e9, 1e9, 1e9)
        ratio = count_step(job, 4, micro_batches=8).bytes_inside / count_step(job, 4).bytes_inside
        assert ratio == pytest.approx(times), method


def test_one_device_sends_nothing_and_pieces_add_messages_alone():
    for method in ("ddp", "zero1", "zero2", "zero3"):
        assert count_step(Job(method, 1e9, 1e9, 1e9, 7), 1, micro_batches=3) == Traffic()
    one, many = (count_step(Job("ddp", 1e9, 1e9, 1e9, pieces), 16, 2) for pieces in (1, 5))
    assert many.messages_between == 5 * one.messages_between and many.messages_inside == 5 * one.messages_inside
    assert many.bytes_between == one.bytes_between


def test_seconds_are_messages_and_bytes_at_their_prices():
    network = Network(Link(1e-6, 1e-9), Link(1e-5, 2e-9))
    assert network.count_seconds(Traffic(10, 100, 1000, 10000)) == pytest.approx(1e-5 + 1e-3 + 1e-6 + 2e-5)


def test_what_is_no_job_or_no_cluster_is_refused():
    with pytest.raises(ValueError, match="zero4"):
        Job("zero4", 1, 1, 1)
    with pytest.raises(ValueError, match="not as many on each"):
        pass_ring(1, 6, 4)
