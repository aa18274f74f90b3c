"""`sftlab metrics`: a command runs as if unwatched, what is watched may end, a killed watcher leaves readable lines."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sftlab import files
from sftlab.bench import monitor
from sftlab.errors import UserError

METRICS = [sys.executable, "-m", "sftlab.cli", "metrics"]


def wait_for_lines(path, count):
    end = time.time() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.time() < end, path
        time.sleep(0.05)


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
    again, _ = monitor.read(tmp_path / "metrics.jsonl")
    assert code == 0 and out == "" and len(again) > len(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "nonesuch-program"], "nonesuch-program: no such program"),
        (["--pid", "4194305"], "no process 4194305 runs here"),
        (["--summary"], "metrics.jsonl: No such file"),
        (["--pid", "1", "--", "true"], "leave out --pid"),
    ],
)
def test_what_can_be_mended_is_one_line(arguments, message, sftlab_command, tmp_path):
    code, out, error = sftlab_command("metrics", tmp_path / "new", *arguments)
    assert code == 2 and out == "" and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_signals_go_to_the_command_and_its_end_by_one_is_told(tmp_path):
    script = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
    script += "print('ready', flush=True)\nwhile True: time.sleep(0.1)"
    command = [*METRICS, str(tmp_path), "--", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout.readline() == "ready\n"
        watcher.send_signal(signal.SIGUSR1)
        assert watcher.stdout.readline() == "heard\n"
        watcher.send_signal(signal.SIGTERM)
        assert watcher.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "summary.json").exists()


def test_ctrl_c_at_a_terminal_reaches_the_command_once(tmp_path):
    script = "import signal, time; count = []; signal.signal(signal.SIGINT, lambda *_: count.append(1)); print('up', flush=True)\n"
    script += "while not count: time.sleep(0.05)\ntime.sleep(1); print('heard', len(count), flush=True)"
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", spawn, *METRICS, str(tmp_path), "--", sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as terminal:
        seen = b""
        while b"up" not in seen:
            seen += os.read(terminal.stdout.fileno(), 1000)
        terminal.stdin.write(b"\x03")
        terminal.stdin.flush()
        seen = terminal.stdout.read()
        terminal.stdin.close()
    assert b"heard 1\r\n" in seen and b"samples over" in seen and terminal.wait() == 0


def test_a_watcher_that_is_killed_leaves_lines_that_a_summary_reads(sftlab_command, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([*METRICS, str(tmp_path), "--every", "0.1"], stdout=subprocess.DEVNULL) as watcher:
        wait_for_lines(path, 5)
        watcher.kill()
    assert not (tmp_path / "summary.json").exists()
    samples, broken = monitor.read(path)
    assert len(samples) >= 4 and broken == 0
    path.write_bytes(path.read_bytes()[:-30])  # the kernel may not have taken the last line whole
    code, out, _ = sftlab_command("metrics", tmp_path, "--summary")
    found = files.read_json(tmp_path / "summary.json")
    assert code == 0 and f"{len(samples) - 1} samples over" in out and found["broken_lines"] == 1
    code, _, _ = sftlab_command("metrics", tmp_path, "--append", "--every", "0.1", "--", "true")
    assert code == 0 and monitor.read(path)[1] == 1  # the half line stays one, and harms none after it


def test_the_watched_process_may_end_and_ctrl_c_ends_the_watch_of_the_machine(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as program:
        command = [*METRICS, str(tmp_path / "a"), "--pid", str(program.pid), "--every", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
            wait_for_lines(tmp_path / "a" / "metrics.jsonl", 4)
            program.communicate(b"\n")
            out, error = watcher.communicate(timeout=30)
    assert watcher.returncode == 0 and "watched: memory" in out and "\r" not in out + error
    assert files.read_json(tmp_path / "a" / "summary.json")["process"]["processes"]["peak"] == 1
    with subprocess.Popen(
        [*METRICS, str(tmp_path / "b"), "--every", "0.1"], stdout=subprocess.PIPE, text=True
    ) as watcher:
        wait_for_lines(tmp_path / "b" / "metrics.jsonl", 4)
        watcher.send_signal(signal.SIGINT)
        out, _ = watcher.communicate(timeout=30)
    assert watcher.returncode == 0 and "machine: processor" in out and "watched: memory" not in out


def test_a_file_that_can_not_grow_is_one_line_and_ends_no_command(tmp_path):
    """As on a full disk: no file of the watcher may be larger than a block of 512 bytes, or 1024 in some shells."""
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *METRICS]
    done = subprocess.run([*limited, str(tmp_path / "a"), "--every", "0.1"], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 2 and "metrics.jsonl: File too large" in done.stderr and len(done.stderr.splitlines()) == 1
    )
    command = [*limited, str(tmp_path / "b"), "--every", "0.1", "--", "sh", "-c", "sleep 2; echo on; exit 5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and done.stdout == "on\n" and "Traceback" not in done.stderr
    assert "the command goes on, unwatched" in done.stderr
    assert monitor.read(tmp_path / "b" / "metrics.jsonl")[0]


def test_a_program_watches_itself_and_no_watcher_outlives_it(tmp_path):
    with monitor.watching(tmp_path / "own", every=0.1) as found:
        assert found == {}
        burnt = sum(number * number for number in range(2_000_000))
    assert burnt and found["process"]["cpu_percent"]["peak"] > 10 and found["seconds"] > 0
    with pytest.raises(UserError, match="exists"), monitor.watching(tmp_path / "own"):
        pass
    with monitor.watching(None) as found:
        pass
    assert found == {}
    script = (
        f"import time\nfrom sftlab.bench import monitor\nwith monitor.watching({str(tmp_path / 'killed')!r}, 0.1):\n"
    )
    script += "    print('in', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "in\n"
        program.kill()
    end = time.time() + 30
    while not (tmp_path / "killed" / "summary.json").exists():  # the watcher writes it as its last act
        assert time.time() < end
        time.sleep(0.05)
