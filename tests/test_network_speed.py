"""Alpha and beta of a network: the line through all-reduces, and a measurement between two real processes."""

import json
import os
import random
import subprocess
import sys

import pytest

from sftlab import network_speed
from sftlab.communication import Job, count_step
from sftlab.options import UserError


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (8, 1), (16, 2)])
def test_the_line_finds_the_alpha_and_beta_that_made_the_times(devices, nodes):
    rng, alpha, beta = random.Random(0), 2e-5, 1e-9
    measured = []
    for size in network_speed.SIZES:
        sent = count_step(Job("ddp", size, size, size), devices, nodes)
        messages, amount = sent.messages_inside + sent.messages_between, sent.bytes_inside + sent.bytes_between
        measured.append([size, (alpha * messages + beta * amount) * (1 + 0.02 * rng.uniform(-1, 1))])
    link = network_speed.fit_link(measured, devices, nodes)
    assert (link.alpha, link.beta) == pytest.approx((alpha, beta), rel=0.03)


def test_too_few_sizes_or_processes_are_refused(tmp_path):
    with pytest.raises(UserError, match="three sizes"):
        network_speed.fit_link([[1024, 1.0], [2048, 2.0]], 2)
    with pytest.raises(UserError, match="two processes"):
        network_speed.fit_link([[1024, 1.0]] * 5, 1)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="other.json: not written by"):
        network_speed.read_network(tmp_path / "other.json")
    good = {"devices": 2, "nodes": 1, "measured": [[4**n, 1e-6 * 4**n] for n in range(5, 9)]}
    for name, value in (
        ("devices", None),
        ("nodes", "one"),
        ("measured", [1, 2, 3]),
        ("measured", [[1, 0]] * 3),
        ("devices", []),
    ):
        content = {key: part for key, part in (good | {name: value}).items() if part is not None}
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="other.json: a value is missing or wrong"):
            network_speed.read_network(tmp_path / "other.json")


def test_two_processes_measure_what_lies_between_them(tmp_path):
    path = tmp_path / "測定.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sftlab.network_speed",
    ]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["backend"], content["devices"], content["nodes"]) == ("gloo", 2, 1)
    assert [size for size, _ in content["measured"]] == list(network_speed.SIZES)
    network = network_speed.read_network(path)
    assert network.inside == network.between and 1e-11 < network.inside.beta < 1e-6
