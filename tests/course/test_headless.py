"""Headless runs through the real papermill and real kernels: what is refused, coerced, skipped, and how runs end."""

import nbformat
from course_notebooks import stop_when, write_notebook

from sftlab import files
from sftlab.course import headless

PARAMETERS = (
    'from typing import List, Optional\nprofile: str = "cpu"\nlora_r: int = 16  # rank\nlearning_rate: float = 2e-4\npacking: bool = True\n'
    "name: Optional[str] = None\nranks: List[int] = [1]\nlimit = 3"
)
NAMES = "profile, lora_r, learning_rate, packing, name, ranks, limit"


def test_a_notebook_that_takes_too_long_is_stopped(sftlab_command, tmp_path):
    book, out = write_notebook(tmp_path / "a.ipynb", "import time\ntime.sleep(600)"), tmp_path / "out"
    assert sftlab_command("run", book, "--output-dir", out, "--timeout", 3)[0] == 4
    found = files.read_json(out / "a.json")
    assert (found["status"], found["cell"]) == ("timed out", 0) and "longer than the 3 seconds" in found["error"]


def test_what_can_not_work_is_refused_in_one_line_and_nothing_is_written(sftlab_command, tmp_path):
    book = write_notebook(tmp_path / "books" / "04_first.ipynb", "1", parameters=PARAMETERS)
    mine = write_notebook(tmp_path / "full" / "04_first.ipynb", "my = 'work'")
    (tmp_path / "broken.ipynb").write_text("{")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for message, *given in (
        ("no parameter 'lora_rr'. Did you mean 'lora_r'? Declared: learning_rate, limit", book, "-p", "lora_rr", "4"),
        ("lora_r: '1.5' is no int", book, "-p", "lora_r", "1.5"),
        ("packing: 'maybe' is no bool", book, "-p", "packing", "maybe"),
        ("profile: 'gqu' is not one of smoke, cpu, gpu. Did you mean 'gpu'?", book, "--profile", "gqu"),
        ("Did you mean '04_first.ipynb'?", book.with_name("04_fist.ipynb")),
        ("no notebook there", tmp_path / "empty"),
        ("can't be read", tmp_path / "broken.ipynb"),
        ("is there and not empty", book, "--output-dir", mine.parent),
        ("a name of its own", book, mine),
    ):
        code, _, error = sftlab_command("run", "--output-dir", tmp_path / "out", *given)
        assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_parameters_arrive_as_declared_and_results_are_collected(sftlab_command, tmp_path):
    check = f"import os\nprint([{NAMES}], os.environ['SFTLAB_PROFILE'], os.environ['HF_HUB_OFFLINE'])"
    keep = "from sftlab.course import record\nrecord('b', before={'facts': 0.1}, after={'facts': (0.5, 0.4, 0.6)})"
    draw = "from sftlab import plots\nplots.show(plots.lines([1, 2], {'a': [3, 4]}, 'x', 'y', 'A'))"
    book = write_notebook(tmp_path / "books {x}" / "a.ipynb", check, keep, draw, parameters=PARAMETERS)
    out = tmp_path / "out {y}"
    pairs = "-p lora_r 4 -p learning_rate 2e-5 -p packing false -p name null -p ranks [4,16] -p limit 7".split()
    assert sftlab_command("run", book.parent, "--output-dir", out, "--profile", "smoke", *pairs)[0] == 0
    *_, checked, _, drawn = nbformat.read(out / "a.ipynb", 4).cells
    assert checked.outputs[0].text == "['smoke', 4, 2e-05, False, None, [4, 16], 7] smoke 1\n"
    assert list(drawn.outputs[0].data) == ["application/vnd.plotly.v1+json", "image/png", "text/plain"]
    assert files.read_json(out / "a.json")["parameters"]["ranks"] == [4, 16]
    assert {"index.html", "a.html", "a.ipynb"} <= {path.name for path in out.iterdir()}
    assert "50.0 % (40.0 to 60.0)" in (out / "index.html").read_text()


def test_each_way_to_end_has_its_status_and_the_rest_still_runs(sftlab_command, tmp_path):
    books = tmp_path / "books"
    write_notebook(books / "a_failed.ipynb", "import socket", "socket.getaddrinfo('huggingface.co', 443)", "x = 2")
    write_notebook(books / "b_dead.ipynb", "import os\nos.kill(os.getpid(), 9)", "print('never')")
    write_notebook(books / "c_quit.ipynb", "import sys\nsys.exit(0)", "print('never')")
    write_notebook(books / "d_fine.ipynb", "1 / 0  # wanted", "print('reached')")
    out = tmp_path / "out"
    code, printed, bars = sftlab_command("run", books, "--output-dir", out)
    found = [files.read_json(out / f"{name}.json") for name in ("a_failed", "b_dead", "c_quit", "d_fine")]
    ends = [("failed", 1), ("dead kernel", 0), ("failed", 0), ("completed", None)]
    assert code == 3 and [(one["status"], one["cell"]) for one in found] == ends
    # the network is cut in kernels, too
    assert "without a network" in found[0]["error"] and "sys.exit" in found[2]["error"]
    assert "4/4 d_fine" in bars and "2/2" in bars  # a progress bar for each notebook
    assert "a_failed: failed in cell 2\n    socket.getaddrinfo" in printed and "ran out of memory" in printed
    assert f"1 completed, 3 not. Report: {out / 'index.html'}" in printed
    assert "An Exception" not in (out / "d_fine.html").read_text()


def test_a_job_is_its_parameters_and_its_source(tmp_path):
    book = write_notebook(tmp_path / "a.ipynb", "1", parameters="limit: int = 3")
    jobs = headless.plan_jobs([book], {"limit": "4"}, "cpu")
    assert jobs == headless.plan_jobs([book], {"limit": 4}, "cpu") != headless.plan_jobs([book], {"limit": 5}, "cpu")
    write_notebook(book, "limit", parameters="limit: int = 3")
    assert jobs != headless.plan_jobs([book], {"limit": 4}, "cpu")


def test_an_interrupt_stops_all_and_leaves_status_and_index(tmp_path):
    flag, out = tmp_path / "running", tmp_path / "out"
    write_notebook(tmp_path / "books" / "a.ipynb", f"import time\nopen({str(flag)!r}, 'w').close()\ntime.sleep(600)")
    write_notebook(tmp_path / "books" / "b.ipynb", "1")
    assert stop_when(flag, "run", tmp_path / "books", "--output-dir", out)[0] == 130
    assert files.read_json(out / "a.json")["status"] == "interrupted" and not (out / "b.json").exists()
    assert "interrupted" in (out / "index.html").read_text()
