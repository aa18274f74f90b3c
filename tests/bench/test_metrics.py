"""Samples and their summary: real processes are counted in full, known samples give known numbers."""

import os
import subprocess
import sys
import time
import types

import pytest

from sftlab import machine, plots
from sftlab.bench import monitor, report

BURN = "import time\nwhile time.process_time() < 0.6: pass"


def make_sample(time, since, cpu, use=None, watts=None):
    gpu = {"index": 0, "use_percent": use, "memory_bytes": 10, "power_watts": watts, "celsius": 50}
    process = {"cpu_percent": cpu, "memory_bytes": 5, "processes": 1}
    return {"time": time, "since": since, "machine": {"cpu_percent": cpu, "memory_bytes": 100}, "process": process,
            "gpus": [gpu | {"index": 1, "use_percent": 0, "power_watts": None}, gpu] if use is not None else []}  # fmt: skip


def test_a_process_and_its_children_are_counted_in_full_though_they_end_between_two_samples():
    """Two children of a shell burn 0.6 s of processor each, one after the other, whatever else this machine does."""
    script = f"read line; '{sys.executable}' -c '{BURN}'; '{sys.executable}' -c '{BURN}'; read line"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as shell:
        first = last = monitor.sample(shell.pid)
        shell.stdin.write(b"go\n")
        shell.stdin.flush()
        seconds, most = 0.0, 0
        while seconds < 1.1 and time.time() - first["time"] < 60:
            time.sleep(0.25)
            last = monitor.sample(shell.pid, last)
            seconds += last["since"] * last["process"]["cpu_percent"] / 100
            most = max(most, last["process"]["processes"])
        time.sleep(0.2)
        last = monitor.sample(shell.pid, last)
        shell.communicate(b"\n")
    assert 1.1 <= seconds < 1.5 and most == 2  # counted in hundredths
    assert last["machine"]["cpu_percent"] is not None and last["process"]["memory_bytes"] > 500_000
    gone = monitor.sample(shell.pid, last)
    assert gone["process"] == {"cpu_percent": None, "memory_bytes": None, "processes": 0}


def test_a_sample_leaves_the_sampler_out():
    assert monitor.sample(os.getpid())["process"] == {"cpu_percent": None, "memory_bytes": None, "processes": 0}


def test_the_summary_of_known_samples():
    samples = [make_sample(0, None, None, 0, 100.0), make_sample(1, 1.0, 40.0, 100, 300.0),
               make_sample(3, 2.0, 95.0, 90, 500.0), make_sample(9, None, None, 80, 500.0)]  # fmt: skip
    found = monitor.summarise(samples)
    assert (found["samples"], found["seconds"]) == (4, 3.0)  # the gap before a second session is no time of watching
    assert found["machine"]["cpu_percent"] == {"mean": 67.5, "median": 67.5, "peak": 95.0}
    idle, busy = found["gpus"]
    assert busy["use_percent"] == {"mean": 67.5, "median": 85, "peak": 100} and busy["power_watts"]["peak"] == 500
    assert busy["busy_share"] == 0.5 and busy["energy_joules"] == 1 * 300 + 2 * 500
    assert idle["energy_joules"] is None and idle["busy_share"] == 0
    assert found["busy"] == {"of": "gpu", "at_percent": 90, "share": 0.5}  # the idle GPU doesn't count
    assert found["energy_joules"] == 1300
    words = "\n".join(monitor.tell(found))
    assert "4 samples over 3 s" in words and "GPU at 90 % or more: 50% of the samples" in words and "0.4 Wh" in words
    without = monitor.summarise([make_sample(0, None, None), make_sample(1, 1.0, 95.0), make_sample(2, 1.0, 10.0)])
    assert without["busy"] == {"of": "cpu", "at_percent": 90, "share": 0.5} and without["energy_joules"] is None
    alone = monitor.summarise([make_sample(0, None, None)])
    assert alone["machine"]["cpu_percent"] is None and alone["busy"]["share"] is None
    assert "unknown" in "\n".join(monitor.tell(alone))


def test_half_a_line_and_other_lines_are_read_past(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = monitor.to_line(monitor.sample())
    path.write_text(f'{{"started": 1}}\n{line}\nnull\n{{"time": 3}}\n{line}\n{line[:40]}', encoding="utf-8")
    samples, broken = monitor.read(path)
    assert len(samples) == 2 and broken == 3 and samples[0]["machine"]["memory_bytes"] > 0


def test_the_figures_show_gaps_and_stay_small():
    samples = [make_sample(number, 1.0, 50.0 if number != 50 else None, 90) for number in range(5000)]
    fig = report.use_over_time(samples)
    assert [trace.name for trace in fig.data] == ["machine: processor", "GPU 1", "GPU 0"]
    assert len(fig.data[0].x) <= 1001 and set(fig.data[2].y) == {90.0}
    assert plots.draw_static(report.memory_over_time(samples[:60])).startswith(b"\x89PNG")
    assert None in report.use_over_time(samples[:60]).data[0].y


def fake_nvml(**changes):
    """Stands in for pynvml, to test what is decided from its answers; no driver or GPU takes part."""

    def refuse(*_):
        raise fake.NVMLError("Not Supported")

    fake = types.SimpleNamespace(
        NVMLError=type("NVMLError", (Exception,), {}), NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: "handle", nvmlDeviceGetName=lambda handle: b"GPU \xc3\xa9",
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=3, total=8), nvmlDeviceGetPowerUsage=lambda handle: 250_500,
        nvmlDeviceGetUtilizationRates=refuse, nvmlDeviceGetTemperature=lambda handle, kind: 61,
    )  # fmt: skip
    fake.__dict__.update(changes)
    return fake


@pytest.fixture
def ask_anew():
    machine.find_gpus.cache_clear()
    yield
    machine.find_gpus.cache_clear()


def test_what_a_gpu_does_not_tell_is_none(monkeypatch, ask_anew):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    [gpu] = monitor.sample()["gpus"]
    assert gpu == {"index": 0, "use_percent": None, "memory_bytes": 3, "power_watts": 250.5, "celsius": 61}
    assert machine.describe_gpus() == [{"index": 0, "name": "GPU é", "memory_total_bytes": 8}]


def test_without_package_driver_or_gpu_there_are_none_and_a_reason(monkeypatch, ask_anew):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.find_gpus() == ([], "the package nvidia-ml-py is not installed") and machine.read_gpus() == []
    machine.find_gpus.cache_clear()
    fake = fake_nvml()

    def fail():
        raise fake.NVMLError("Driver Not Loaded")

    fake.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert machine.find_gpus() == ([], "NVML: Driver Not Loaded")
    machine.find_gpus.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetCount=lambda: 0))
    assert machine.find_gpus() == ([], "NVML: no GPU")
