"""`sftlab metrics`: it samples until it is ended, leaves a summary, and a killed monitor leaves readable lines."""

import os
import signal
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest

from sftlab import cli, machine
from sftlab.bench import monitor


@pytest.mark.parametrize("gpus", [True, False])
def test_the_summary_of_known_samples(gpus, tmp_path):
    for time_, cpu, use in ((0, 30.0, 0), (1, 40.0, 100), (3, 95.0, 90), (9, 45.0, None)):
        gpu = {"GPU 0: use, %": use, "GPU 1: use, %": 0, "GPU 1: memory, GB": None} if gpus else {}
        monitor.write_sample(tmp_path / "samples", {"time": 100 + time_, "machine: processor, %": cpu} | gpu)
    with (tmp_path / "samples").open("a") as killed:
        killed.write('{"time": 110, "mach')
    heads, *lines = monitor.summarise(monitor.read_samples(tmp_path / "samples")).splitlines()
    assert f"{heads} {lines[0]}".split() == "mean median peak machine: processor, % 52.5 42.5 95".split()
    share = "GPU at 90 % or more: 67% of the samples" if gpus else "CPU at 90 % or more: 25% of the samples"
    assert lines[-2:] == ["4 samples over 9 s", share]  # an idle GPU doesn't count, nor does what isn't known
    if gpus:
        assert lines[1].split()[-3:] == ["63.33", "90", "100"] and lines[3].split()[-3:] == ["unknown"] * 3


def test_what_a_gpu_does_not_answer_is_none_and_without_a_driver_there_is_a_reason(monkeypatch):
    memory = MagicMock(used=3e9, total=8)
    answers = {"Count": 1, "Name": "GPU é", "MemoryInfo": memory, "PowerUsage": 70500, "Temperature": 41}
    answers = {f"nvmlDeviceGet{name}.return_value": value for name, value in answers.items()}
    nvml = MagicMock(NVMLError=type("NVMLError", (Exception,), {}), **answers)
    nvml.nvmlDeviceGetUtilizationRates.side_effect = nvml.NVMLError("Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine.find_gpus.cache_clear()
    sample = monitor.take_sample()
    assert list(sample.values())[3:] == [None, 3, 70.5, 41] and list(sample)[-1] == "GPU 0: temperature, °C"
    assert machine.describe_gpus() == [{"name": "GPU é", "memory_total_bytes": 8}]
    machine.find_gpus.cache_clear()
    nvml.nvmlInit.side_effect = nvml.NVMLError("Not Supported")
    assert machine.find_gpus() == ([], "NVML: Not Supported") and machine.read_gpus() == []
    machine.find_gpus.cache_clear()


@pytest.fixture
def send_signal(tmp_path):
    """Sends this process a signal once metrics.jsonl has two samples, and again if it is lost, as it may be in a destructor."""
    done, before = threading.Event(), [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def send(number: int) -> None:
        path, end = tmp_path / "metrics.jsonl", time.monotonic() + 60
        while time.monotonic() < end and (not path.exists() or path.read_bytes().count(b"\n{") < 1):
            sum(range(10**5))  # a core is busy
        while not done.is_set():
            os.kill(os.getpid(), number)
            done.wait(20)

    yield lambda number: threading.Thread(target=send, args=(number,), daemon=True).start()
    done.set()
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_ends_with_a_summary_also_in_the_background_of_a_shell(number, send_signal, tmp_path, capsys):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for jobs in the background
    (tmp_path / "metrics.jsonl").write_text("earlier\n")
    assert cli.main(["metrics", str(tmp_path)]) == 2 and "exists. Add --overwrite" in capsys.readouterr().err
    send_signal(number)
    assert cli.main(["metrics", str(tmp_path), "--overwrite", "--every", "0.2"]) == 0
    out, frame = capsys.readouterr().out, monitor.read_samples(tmp_path / "metrics.jsonl")
    assert "no GPU values" in out and f"{len(frame)} samples over" in out and len(frame) >= 2
    assert frame["machine: processor, %"].max() > 10 and frame["machine: memory, GB"].max() > 0.01
