"""Static checks of the notebooks: stored clean, in the fixed order, parameters that agree with the configuration."""

import ast
import json
import re
from pathlib import Path

import pytest

from sftlab.config.configs import FIELDS
from sftlab.config.options import check_value

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Knobs of a lesson that are no option of the lab; profile is the same everywhere.
OWN_KNOBS = {"profile", "ranks", "question", "max_answer", "long_epochs", "questions", "samples", "block_size", "seeds",
             "wanted_model", "rounds", "options"}  # fmt: skip


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8")) | {"stem": request.param.stem}


def sources(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_course_is_there():
    assert [path.stem.split("_")[0] for path in NOTEBOOKS] == [f"{number:02}" for number in range(14)]


def test_stored_without_outputs_widget_state_or_a_foreign_kernel(notebook):
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None


def test_prose_carries_the_code(notebook):
    code, prose = sources(notebook, "code"), sources(notebook, "markdown")
    lengths = sorted(len(text.splitlines()) for text in code)
    assert len(prose) >= len(code) and lengths[-1] <= 25 and lengths[len(lengths) // 2] <= 8


def test_the_fixed_order(notebook):
    text = "\n".join(sources(notebook, "markdown"))
    order = ["# ", "**You will be able to**", "**Needs**", "## Check yourself", "## Exercises", "## Summary"]
    places = [text.find(mark) for mark in order]
    assert places[0] == 0 and -1 not in places and places == sorted(places)
    assert sources(notebook, "markdown")[0].startswith(f"# {notebook['stem'][:2]} · ")


def test_links_lead_to_files_that_exist(notebook):
    for target in re.findall(r"\]\(([^)#]+)\)", "\n".join(sources(notebook, "markdown"))):
        assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_parameters_agree_with_the_configuration(notebook):
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(cells) == 1
    for line in "".join(cells[0]["source"]).splitlines():
        assert re.fullmatch(r"\w+: (int|float|str|bool) = [^=]+  # [^=]+", line), line
        statement = ast.parse(line).body[0]
        name, value = statement.target.id, ast.literal_eval(statement.value)
        if name in FIELDS:
            assert FIELDS[name].type is type(value) or type(value) in getattr(FIELDS[name].type, "__args__", ()), line
            check_value(FIELDS[name], value)
        else:
            assert name in OWN_KNOBS, f"{name} is neither an option of the lab nor a knob listed here"
    assert "profile: str" in "".join(cells[0]["source"]) and "model_name: str" in "".join(cells[0]["source"])


def test_no_cell_installs_or_logs_in(notebook):
    for text in sources(notebook, "code"):
        assert not re.search(r"pip install|hf_[A-Za-z0-9]{8}|notebook_login|login\(", text)
