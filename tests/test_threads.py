"""Before torch is loaded, OpenMP's threads are told to spin less; what the user has set stays."""

import os
import subprocess
import sys

import pytest

from sftlab import machine


@pytest.mark.parametrize(
    ("before", "running", "expected"),
    [
        ({}, 0, machine.QUIET),
        ({}, 64, machine.BUSY),
        ({"GOMP_SPINCOUNT": machine.BUSY}, 0, machine.QUIET),  # of a process that started this one
        ({"GOMP_SPINCOUNT": "7"}, 64, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 64, None),
    ],
)
def test_spinning_is_limited_by_what_runs_beside_unless_it_is_set(before, running, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "count_running", lambda: running)
    machine.limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_it_is_set_in_every_process_before_torch_is_loaded():
    code = "import os, sys, sftlab; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() in (["False", machine.QUIET], ["False", machine.BUSY])
