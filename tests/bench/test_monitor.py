"""`sftlab metrics`: it samples until it is ended, leaves a summary, and a killed monitor leaves readable lines."""

import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest

from sftlab import cli, machine
from sftlab.bench import monitor


@pytest.fixture(autouse=True)
def keep_signals():
    """What a watch does on signals ends with its test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("gpus", [True, False])
def test_the_summary_of_known_samples(gpus, tmp_path):
    rows = [(0, 30.0, 0), (1, 40.0, 100), (3, 95.0, 90), (9, 45.0, None)]
    for time_, cpu, use in rows:
        gpu = {"GPU 0: use, %": use, "GPU 1: use, %": 0, "GPU 1: memory, GB": None} if gpus else {}
        monitor.write_sample(tmp_path / "samples", {"time": 100 + time_, "machine: processor, %": cpu} | gpu)
    with (tmp_path / "samples").open("a") as killed:
        killed.write('{"time": 110, "mach')
    heads, *lines = monitor.summarise(monitor.read_samples(tmp_path / "samples")).splitlines()
    assert (
        heads.split() == ["mean", "median", "peak"] and lines[0].split() == "machine: processor, % 52.5 42.5 95".split()
    )
    share = "GPU at 90 % or more: 67% of the samples" if gpus else "CPU at 90 % or more: 25% of the samples"
    assert lines[-2:] == ["4 samples over 9 s", share]  # an idle GPU doesn't count, nor does what isn't known
    if gpus:
        assert lines[1].split()[-3:] == ["63.33", "90", "100"] and lines[3].split()[-3:] == ["unknown"] * 3


def test_what_a_gpu_does_not_answer_is_none_and_without_a_driver_there_is_a_reason(monkeypatch):
    """With a made-up pynvml, to test what is decided from its answers; no driver or GPU takes part."""
    nvml = MagicMock(NVMLError=type("NVMLError", (Exception,), {}))
    nvml.nvmlDeviceGetCount.return_value = 1
    nvml.nvmlDeviceGetName.return_value = "GPU é"
    nvml.nvmlDeviceGetMemoryInfo.return_value = MagicMock(used=3e9, total=8)
    nvml.nvmlDeviceGetUtilizationRates.side_effect = nvml.NVMLError("Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine.find_gpus.cache_clear()
    sample = monitor.take_sample()
    assert (sample["GPU 0: use, %"], sample["GPU 0: memory, GB"]) == (None, 3)
    assert machine.describe_gpus() == [{"name": "GPU é", "memory_total_bytes": 8}]
    machine.find_gpus.cache_clear()
    nvml.nvmlInit.side_effect = nvml.NVMLError("Not Supported")
    assert machine.find_gpus() == ([], "NVML: Not Supported") and machine.read_gpus() == []
    machine.find_gpus.cache_clear()


def test_ctrl_c_ends_the_watch_with_a_summary(tmp_path):
    """Of a monitor in the background of a shell, which has such jobs ignore Ctrl-C; beside it a core is busy."""
    path, end = tmp_path / "metrics.jsonl", time.monotonic() + 60
    command = [sys.executable, "-m", "sftlab.cli", "metrics", str(tmp_path), "--every", "0.2"]
    script = f"trap '' INT; exec {' '.join(command)}"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < end and process.poll() is None
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "no GPU values" in out and "samples over" in out
    peak = monitor.read_samples(path).max()
    assert peak["machine: processor, %"] > 10 and peak["machine: memory, GB"] > 0.01


def test_a_file_is_replaced_only_when_asked_and_sigterm_ends_the_watch(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("earlier\n")
    assert cli.main(["metrics", str(tmp_path)]) == 2 and "exists. Add --overwrite" in capsys.readouterr().err
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert cli.main(["metrics", str(tmp_path), "--overwrite", "--every", "0.4"]) == 0
    assert len(monitor.read_samples(path)) in (1, 2)
