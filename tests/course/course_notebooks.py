"""Small notebooks for the tests of headless runs and sweeps."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat


def write_notebook(path: Path, *sources: str, parameters: str = "") -> Path:
    """A notebook of these cells; `parameters` is tagged as such, and a cell that holds `wanted` may raise."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
    for source in sources:
        tags = ["raises-exception"] if "wanted" in source else []
        cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def stop_when(there: Path, *command: object) -> tuple[int, str]:
    """Start `sftlab COMMAND…`, and stop it as a batch system does when a file is there: (exit code, what it printed)."""
    words = [sys.executable, "-m", "sftlab.cli", *map(str, command)]
    process, end = subprocess.Popen(words, stdout=subprocess.PIPE, text=True), time.monotonic() + 120
    while time.monotonic() < end and not there.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    return process.returncode, printed
