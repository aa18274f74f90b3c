"""`sftlab metrics`: processes are counted in full, a command runs as if unwatched, a killed monitor leaves readable lines."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest

from sftlab import cli, files, machine, plots
from sftlab.bench import monitor, report

METRICS = [sys.executable, "-m", "sftlab.cli", "metrics"]
BURN = "import time\nwhile time.process_time() < 0.6: pass"


@pytest.fixture(autouse=True)
def keep_signals():
    """What a watch does on signals ends with its test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_sample(time, since, cpu, use=None, watts=None):
    gpu = {"index": 0, "use_percent": use, "memory_bytes": 10, "power_watts": watts, "celsius": 50}
    process = {"cpu_percent": cpu, "memory_bytes": 5, "processes": 1}
    gpus = [gpu | {"index": 1, "use_percent": 0, "power_watts": None}, gpu] if use is not None else []
    about = {"machine": {"cpu_percent": cpu, "memory_bytes": 100}, "process": process, "gpus": gpus}
    return {"time": time, "since": since} | about


def wait_for_lines(path, count):
    end = time.time() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.time() < end, path
        time.sleep(0.05)


def test_a_process_and_its_children_are_counted_in_full_though_they_end_between_two_samples():
    """Two children of a shell burn 0.6 s of processor each, one after the other, whatever else this machine does."""
    script = f"read line; '{sys.executable}' -S -c '{BURN}'; '{sys.executable}' -S -c '{BURN}'; read line"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as shell:
        first = last = monitor.take_sample(shell.pid)
        shell.stdin.write(b"go\n")
        shell.stdin.flush()
        seconds, most, busiest = 0.0, 0, 0.0
        while seconds < 1.1 and time.time() - first["time"] < 60:
            time.sleep(0.25)
            last = monitor.take_sample(shell.pid, last)
            seconds += last["since"] * last["process"]["cpu_percent"] / 100
            most = max(most, last["process"]["processes"])
            busiest = max(busiest, last["machine"]["cpu_percent"])
        time.sleep(0.2)
        last = monitor.take_sample(shell.pid, last)
        shell.communicate(b"\n")
    assert 1.1 <= seconds < 1.5 and most == 2  # counted in hundredths
    assert busiest > 0 and last["process"]["memory_bytes"] > 500_000
    nothing = {"cpu_percent": None, "memory_bytes": None, "processes": 0}
    assert monitor.take_sample(os.getpid())["process"] == nothing  # the sampler itself is left out


def test_the_summary_of_known_samples():
    samples = [
        make_sample(0, None, None, 0, 100.0),
        make_sample(1, 1.0, 40.0, 100, 300.0),
        make_sample(3, 2.0, 95.0, 90, 500.0),
        make_sample(9, 6.0, None, 80, 500.0),
    ]
    table, facts = monitor.summarise(samples)
    assert [*table.loc["machine: processor, %"]] == [67.5, 67.5, 95.0] and [*table] == ["mean", "median", "peak"]
    assert [*table.loc["GPU 0: use, %"]] == [67.5, 85, 100] and table.peak["GPU 0: power, W"] == 500
    assert facts == ["4 samples over 9 s", "GPU at 90 % or more: 50% of the samples"]  # the idle GPU doesn't count
    assert [*monitor.format_values(table).loc["GPU 1: power, W"]] == ["unknown"] * 3
    _, facts = monitor.summarise([make_sample(0, None, None), make_sample(1, 1.0, 95.0), make_sample(2, 1.0, 10.0)])
    assert facts[1] == "CPU at 90 % or more: 50% of the samples"
    assert monitor.summarise([make_sample(0, None, None)])[1][1].endswith("unknown")


def test_the_figures_show_gaps_and_stay_small():
    samples = [make_sample(number, 1.0, 50.0 if number != 50 else None, 90) for number in range(5000)]
    fig = report.draw_over_time(samples, "%")
    assert [trace.name for trace in fig.data] == ["machine: processor, %", "GPU 1: use, %", "GPU 0: use, %"]
    assert len(fig.data[0].x) <= 1001 and set(fig.data[2].y) == {90.0}
    assert plots.draw_static(report.draw_over_time(samples[:60], "GB")).startswith(b"\x89PNG")
    assert None in report.draw_over_time(samples[:60], "%").data[0].y


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


def test_a_command_keeps_its_output_its_arguments_and_its_exit_code_and_gets_sigterm(tmp_path):
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(sys.argv[1:], input(), flush=True)\n"
    script += "while True: time.sleep(0.1)"
    command = [*METRICS, str(tmp_path), "--every", "0.2", "--", sys.executable, "-c", script, "--every", "--", "日本"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write("typed\n")
        process.stdin.flush()
        assert process.stdout.readline() == "['--every', '--', '日本'] typed\n"
        wait_for_lines(tmp_path / "metrics.jsonl", 3)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 7 and not out and "samples over" in error and "no GPU values" in error
    found = files.read_json(tmp_path / "summary.json")
    assert found["values"]["watched: memory, GB"]["peak"] > 1e-3


def test_ctrl_c_at_a_terminal_reaches_the_command_once(tmp_path):
    script = "import signal, time; count = []; signal.signal(signal.SIGINT, lambda *_: count.append(1)); print('up', flush=True)\n"
    script += "while not count: time.sleep(0.05)\ntime.sleep(1); print('heard', len(count), flush=True)"
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-S", "-c", spawn, *METRICS, str(tmp_path), "--", sys.executable, "-S", "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as terminal:
        seen = b""
        while b"up" not in seen:
            seen += os.read(terminal.stdout.fileno(), 1000)
        wait_for_lines(tmp_path / "metrics.jsonl", 2)
        terminal.stdin.write(b"\x03")
        terminal.stdin.flush()
        seen = terminal.stdout.read()
        terminal.stdin.close()
    assert b"heard 1\r\n" in seen and b"samples over" in seen and terminal.wait() == 0


def test_a_command_that_can_not_be_started_is_one_line(tmp_path, capsys):
    script = tmp_path / "script"
    script.write_text("echo no first line that names a shell\n")
    script.chmod(0o755)
    for command, why in (("nonesuch-program", "No such file or directory"), (str(script), "Exec format error")):
        assert cli.main(["metrics", str(tmp_path), "--", command]) == 2
        out, error = capsys.readouterr()
        assert out == "" and f"{command}: can't be run: {why}" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "metrics.jsonl").exists()


def test_half_a_line_is_read_past_and_a_file_is_replaced_only_when_asked(tmp_path, capsys):
    path, command = tmp_path / "metrics.jsonl", ["metrics", str(tmp_path)]
    for _ in range(3):
        monitor.write_sample(path, monitor.take_sample())
    path.write_bytes(b'null\n{"time": 3}\n' + path.read_bytes()[:-30])  # a monitor that was killed
    assert len(monitor.read_samples(path)) == 2
    assert cli.main([*command, "--", "true"]) == 2 and "exists. Add --overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--every", "0.2", "--", "false"]) == 1 and not capsys.readouterr().out
    assert len(monitor.read_samples(path)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_the_watch_of_the_machine_with_a_summary(number, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    threading.Thread(target=lambda: (wait_for_lines(path, 3), os.kill(os.getpid(), number)), daemon=True).start()
    assert cli.main(["metrics", str(tmp_path), "--every", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "machine: processor" in out and "watched: memory" not in out


def test_a_file_that_can_not_grow_is_one_line_and_ends_no_command(tmp_path, monkeypatch, capsys):
    write, count = monitor.write_sample, []

    def fill_disk(path, sample):
        count.append(1)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, sample)

    monkeypatch.setattr(monitor, "write_sample", fill_disk)
    command = ["metrics", str(tmp_path), "--every", "0.1", "--overwrite"]
    assert cli.main(command) == 2 and "metrics.jsonl: No space left" in capsys.readouterr().err
    count.clear()
    assert cli.main([*command, "--", "sh", "-c", "sleep 0.5; exit 5"]) == 5
    assert "the command continues, unwatched" in capsys.readouterr().err
    assert len(monitor.read_samples(tmp_path / "metrics.jsonl")) == 2
