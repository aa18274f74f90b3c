"""`sftlab metrics`: it samples until it is ended, leaves a summary, and a killed monitor leaves readable lines."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest

from sftlab import cli, files, machine
from sftlab.bench import monitor


@pytest.fixture(autouse=True)
def keep_signals():
    """What a watch does on signals ends with its test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_sample(time, cpu, use=None, watts=None):
    gpu = {"index": 0, "use_percent": use, "memory_bytes": 10, "power_watts": watts, "celsius": 50}
    gpus = [gpu | {"index": 1, "use_percent": 0, "power_watts": None}, gpu] if use is not None else []
    return {"time": time, "machine": {"cpu_percent": cpu, "memory_bytes": 100}, "gpus": gpus}


def test_the_summary_of_known_samples():
    uses = ((0, 30.0, 0, 100.0), (1, 40.0, 100, 300.0), (3, 95.0, 90, 500.0), (9, 45.0, 80, 500.0))
    table, facts = monitor.summarise([make_sample(*use) for use in uses])
    assert [*table.loc["machine: processor, %"]] == [52.5, 42.5, 95.0] and [*table] == ["mean", "median", "peak"]
    assert [*table.loc["GPU 0: use, %"]] == [67.5, 85, 100] and table.peak["GPU 0: power, W"] == 500
    assert facts == ["4 samples over 9 s", "GPU at 90 % or more: 50% of the samples"]  # the idle GPU doesn't count
    assert [*monitor.format_values(table).loc["GPU 1: power, W"]] == ["unknown"] * 3
    _, facts = monitor.summarise([make_sample(1, 95.0), make_sample(2, 10.0)])
    assert facts[1] == "CPU at 90 % or more: 50% of the samples"


@pytest.fixture
def nvml(monkeypatch):
    """A made-up pynvml, to test what is decided from its answers; no driver or GPU takes part."""
    fake = MagicMock(NVMLError=type("NVMLError", (Exception,), {}))
    fake.nvmlDeviceGetCount.return_value = 1
    fake.nvmlDeviceGetName.return_value = b"GPU \xc3\xa9"
    fake.nvmlDeviceGetMemoryInfo.return_value = MagicMock(used=3, total=8)
    fake.nvmlDeviceGetPowerUsage.return_value = 250_500
    fake.nvmlDeviceGetTemperature.return_value = 61
    fake.nvmlDeviceGetUtilizationRates.side_effect = fake.NVMLError("Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    machine.find_gpus.cache_clear()
    yield fake
    machine.find_gpus.cache_clear()


def test_what_a_gpu_does_not_answer_is_none_and_without_a_driver_there_is_a_reason(nvml):
    [gpu] = monitor.take_sample()["gpus"]
    assert gpu == {"index": 0, "use_percent": None, "memory_bytes": 3, "power_watts": 250.5, "celsius": 61}
    assert machine.describe_gpus() == [{"name": "GPU é", "memory_total_bytes": 8}]
    machine.find_gpus.cache_clear()
    nvml.nvmlInit.side_effect = nvml.NVMLError("Not Supported")
    assert machine.find_gpus() == ([], "NVML: Not Supported") and machine.read_gpus() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_the_watch_with_a_summary(number, tmp_path):
    """Of a monitor in the background of a shell, which has such jobs ignore Ctrl-C; beside it a core is busy."""
    path, end = tmp_path / "metrics.jsonl", time.monotonic() + 60
    command = [sys.executable, "-m", "sftlab.cli", "metrics", str(tmp_path), "--every", "0.2"]
    script = f"trap '' INT; exec {' '.join(command)}"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < end and process.poll() is None
        process.send_signal(number)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "no GPU values" in out and "samples over" in out
    values = files.read_json(tmp_path / "summary.json")["values"]
    assert values["machine: processor, %"]["peak"] > 10 and values["machine: memory, GB"]["peak"] > 0.01


def test_half_a_line_is_read_past_and_a_file_is_replaced_only_when_asked(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for _ in range(3):
        monitor.write_sample(path, monitor.take_sample())
    path.write_bytes(b'null\n{"time": 3}\n' + path.read_bytes()[:-30])  # a monitor that was killed
    assert len(monitor.read_samples(path)) == 2
    assert cli.main(["metrics", str(tmp_path)]) == 2 and "exists. Add --overwrite" in capsys.readouterr().err
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert cli.main(["metrics", str(tmp_path), "--overwrite", "--every", "0.4"]) == 0
    assert len(monitor.read_samples(path)) in (1, 2)


def test_a_file_that_can_not_grow_is_one_line(tmp_path, monkeypatch, capsys):
    def fill_disk(path, sample):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(monitor, "write_sample", fill_disk)
    assert cli.main(["metrics", str(tmp_path), "--every", "0.1"]) == 2
    assert "metrics.jsonl: No space left" in capsys.readouterr().err
