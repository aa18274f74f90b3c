"""`sftlab metrics`: processes are counted in full, a command runs as if unwatched, a killed monitor leaves readable lines."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from sftlab import files, machine, plots
from sftlab.bench import monitor, report

METRICS = [sys.executable, "-m", "sftlab.cli", "metrics"]
BURN = "import time\nwhile time.process_time() < 0.6: pass"


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
    script = f"read line; '{sys.executable}' -c '{BURN}'; '{sys.executable}' -c '{BURN}'; read line"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as shell:
        first = last = monitor.take_sample(shell.pid)
        shell.stdin.write(b"go\n")
        shell.stdin.flush()
        seconds, most = 0.0, 0
        while seconds < 1.1 and time.time() - first["time"] < 60:
            time.sleep(0.25)
            last = monitor.take_sample(shell.pid, last)
            seconds += last["since"] * last["process"]["cpu_percent"] / 100
            most = max(most, last["process"]["processes"])
        time.sleep(0.2)
        last = monitor.take_sample(shell.pid, last)
        shell.communicate(b"\n")
    assert 1.1 <= seconds < 1.5 and most == 2  # counted in hundredths
    assert last["machine"]["cpu_percent"] is not None and last["process"]["memory_bytes"] > 500_000
    nothing = {"cpu_percent": None, "memory_bytes": None, "processes": 0}
    assert monitor.take_sample(shell.pid, last)["process"] == nothing  # it has ended
    assert monitor.take_sample(os.getpid())["process"] == nothing  # the sampler itself is left out


def test_the_summary_of_known_samples():
    samples = [
        make_sample(0, None, None, 0, 100.0),
        make_sample(1, 1.0, 40.0, 100, 300.0),
        make_sample(3, 2.0, 95.0, 90, 500.0),
        make_sample(9, None, None, 80, 500.0),
    ]
    found = monitor.summarise(samples)
    assert (found["samples"], found["seconds"]) == (4, 3.0)  # without the gap before a second session
    assert found["machine"]["cpu_percent"] == {"mean": 67.5, "median": 67.5, "peak": 95.0}
    idle, busy = found["gpus"]
    assert busy["use_percent"] == {"mean": 67.5, "median": 85, "peak": 100} and busy["power_watts"]["peak"] == 500
    assert busy["busy_share"] == 0.5 and busy["energy_joules"] == 1 * 300 + 2 * 500
    assert idle["energy_joules"] is None and idle["busy_share"] == 0
    assert found["busy"] == {"of": "gpu", "at_percent": 90, "share": 0.5}  # the idle GPU doesn't count
    assert found["energy_joules"] == 1300
    words = monitor.format_summary(found)
    assert "4 samples over 3 s" in words and "GPU at 90 % or more: 50% of the samples" in words and "0.4 Wh" in words
    without = monitor.summarise([make_sample(0, None, None), make_sample(1, 1.0, 95.0), make_sample(2, 1.0, 10.0)])
    assert without["busy"] == {"of": "cpu", "at_percent": 90, "share": 0.5} and without["energy_joules"] is None
    alone = monitor.summarise([make_sample(0, None, None)])
    assert alone["machine"]["cpu_percent"] is None and alone["busy"]["share"] is None
    assert "unknown" in monitor.format_summary(alone)


def test_half_a_line_and_other_lines_are_read_past(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = monitor.format_line(monitor.take_sample())
    path.write_text(f'{{"started": 1}}\n{line}\nnull\n{{"time": 3}}\n{line}\n{line[:40]}', encoding="utf-8")
    samples, broken = monitor.read_samples(path)
    assert len(samples) == 2 and broken == 3 and samples[0]["machine"]["memory_bytes"] > 0


def test_the_figures_show_gaps_and_stay_small():
    samples = [make_sample(number, 1.0, 50.0 if number != 50 else None, 90) for number in range(5000)]
    fig = report.use_over_time(samples)
    assert [trace.name for trace in fig.data] == ["machine: processor", "GPU 1", "GPU 0"]
    assert len(fig.data[0].x) <= 1001 and set(fig.data[2].y) == {90.0}
    assert plots.draw_static(report.memory_over_time(samples[:60])).startswith(b"\x89PNG")
    assert None in report.use_over_time(samples[:60]).data[0].y


@pytest.fixture
def nvml(monkeypatch):
    """Lets a made-up pynvml answer, to test what is decided from its answers; no driver or GPU takes part."""

    class NVMLError(Exception):
        pass

    def refuse(*_):
        raise NVMLError("Not Supported")

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: "handle",
        nvmlDeviceGetName=lambda handle: b"GPU \xc3\xa9",
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=3, total=8),
        nvmlDeviceGetPowerUsage=lambda handle: 250_500,
        nvmlDeviceGetUtilizationRates=refuse,
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
    )

    def answer(missing=False, **changes):
        vars(fake).update(changes)
        monkeypatch.setitem(sys.modules, "pynvml", None if missing else fake)
        machine.find_gpus.cache_clear()
        return refuse

    yield answer
    machine.find_gpus.cache_clear()


def test_what_a_gpu_does_not_answer_is_none(nvml):
    nvml()
    [gpu] = monitor.take_sample()["gpus"]
    assert gpu == {"index": 0, "use_percent": None, "memory_bytes": 3, "power_watts": 250.5, "celsius": 61}
    assert machine.describe_gpus() == [{"index": 0, "name": "GPU é", "memory_total_bytes": 8}]


def test_without_package_driver_or_gpu_there_are_none_and_a_reason(nvml):
    refuse = nvml(missing=True)
    assert machine.find_gpus() == ([], "the package nvidia-ml-py is not installed") and machine.read_gpus() == []
    nvml(nvmlDeviceGetCount=lambda: 0)
    assert machine.find_gpus() == ([], "NVML: no GPU")
    nvml(nvmlInit=refuse)
    assert machine.find_gpus() == ([], "NVML: Not Supported")


def test_a_command_keeps_its_output_its_arguments_and_its_exit_code(sftlab_command, tmp_path):
    script = "import sys; print(sys.argv[1:], input()); sys.exit(7)"
    command = [*METRICS, str(tmp_path), "--every", "0.2", "--", sys.executable, "-c", script, "--every", "--", "日本"]
    done = subprocess.run(command, input="typed\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and done.stdout == "['--every', '--', '日本'] typed\n", done.stderr
    assert "samples over" in done.stderr and "no GPU values" in done.stderr
    found = files.read_json(tmp_path / "summary.json")
    assert found["samples"] >= 2 and found["process"]["memory_bytes"]["peak"] > 1e6
    first, *lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["watched"] == os.path.basename(sys.executable)  # its arguments may hold a secret
    code, out, error = sftlab_command("metrics", tmp_path)
    assert code == 2 and "exists. Add --append" in error and len(error.splitlines()) == 1
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [first, *lines]
    code, out, _ = sftlab_command("metrics", tmp_path, "--append", "--every", "0.2", "--", "true")
    again, _ = monitor.read_samples(tmp_path / "metrics.jsonl")
    assert code == 0 and out == "" and len(again) > len(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "nonesuch-program"], "nonesuch-program: no such program"),
        (["--pid", "4194305"], "no process 4194305 runs here"),
        (["--summary"], "metrics.jsonl: No such file"),
        (["--pid", "1", "--", "true"], "Leave out --pid"),
    ],
)
def test_what_can_be_fixed_is_one_line(arguments, message, sftlab_command, tmp_path):
    code, out, error = sftlab_command("metrics", tmp_path / "new", *arguments)
    assert code == 2 and out == "" and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_sigterm_ends_the_command_and_the_exit_code_says_so(tmp_path):
    script = "import time; print('ready', flush=True)\nwhile True: time.sleep(0.1)"
    command = [*METRICS, str(tmp_path), "--", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        wait_for_lines(tmp_path / "metrics.jsonl", 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert (tmp_path / "summary.json").exists()


def test_ctrl_c_at_a_terminal_reaches_the_command_once(tmp_path):
    script = "import signal, time; count = []; signal.signal(signal.SIGINT, lambda *_: count.append(1)); print('up', flush=True)\n"
    script += "while not count: time.sleep(0.05)\ntime.sleep(1); print('heard', len(count), flush=True)"
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", spawn, *METRICS, str(tmp_path), "--", sys.executable, "-c", script]
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


def test_a_killed_monitor_leaves_lines_that_a_summary_reads(sftlab_command, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([*METRICS, str(tmp_path), "--every", "0.1"], stdout=subprocess.DEVNULL) as process:
        wait_for_lines(path, 5)
        process.kill()
    assert not (tmp_path / "summary.json").exists()
    samples, broken = monitor.read_samples(path)
    assert len(samples) >= 4 and broken == 0
    path.write_bytes(path.read_bytes()[:-30])  # the kernel may not have taken the last line whole
    code, out, _ = sftlab_command("metrics", tmp_path, "--summary")
    found = files.read_json(tmp_path / "summary.json")
    assert code == 0 and f"{len(samples) - 1} samples over" in out and found["broken_lines"] == 1
    code, _, _ = sftlab_command("metrics", tmp_path, "--append", "--every", "0.1", "--", "true")
    assert code == 0 and monitor.read_samples(path)[1] == 1  # the half line stays one, and harms none after it


def test_a_watched_process_may_end(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as program:
        command = [*METRICS, str(tmp_path), "--pid", str(program.pid), "--every", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            wait_for_lines(tmp_path / "metrics.jsonl", 4)
            program.communicate(b"\n")
            out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "watched: memory" in out and "\r" not in out + error
    assert files.read_json(tmp_path / "summary.json")["process"]["processes"]["peak"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_the_watch_of_the_machine_with_a_summary(number, tmp_path):
    with subprocess.Popen([*METRICS, str(tmp_path), "--every", "0.1"], stdout=subprocess.PIPE, text=True) as process:
        wait_for_lines(tmp_path / "metrics.jsonl", 4)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "machine: processor" in out and "watched: memory" not in out


def test_a_file_that_can_not_grow_is_one_line_and_ends_no_command(tmp_path):
    """As on a full disk: no file of the monitor may be larger than a block of 512 bytes, or 1024 in some shells."""
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *METRICS]
    pipes = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([*limited, str(tmp_path / "a"), "--every", "0.1"], **pipes)
    assert done.returncode == 2 and "metrics.jsonl: File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    path = tmp_path / "b" / "metrics.jsonl"
    script = f'until [ "$(wc -c < {path})" -gt 400 ]; do sleep 0.1; done; sleep 2; echo on; exit 5'
    command = [*limited, str(path.parent), "--every", "0.1", "--", "sh", "-c", script]
    done = subprocess.run(command, **pipes)
    assert done.returncode == 5 and done.stdout == "on\n" and "Traceback" not in done.stderr
    assert "the command continues, unwatched" in done.stderr
    assert monitor.read_samples(path)[0]
