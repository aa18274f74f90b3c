"""Static checks of the notebooks and their drawings: stored outputs, the fixed order, exercises, parameters that agree with the configuration."""

import ast
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from sftlab.config.configs import FIELDS
from sftlab.config.options import check_value
from sftlab.course import exercises, headless, stored

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURES = sorted((FOLDER / "figures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
FORBIDDEN = {"script", "foreignObject", "image", "use", "a", "animate"}
# Knobs of a lesson that are no option of the lab; profile is the same everywhere.
OWN_KNOBS = {"profile", "ranks", "question", "max_answer", "long_epochs", "questions", "samples", "block_size", "seeds",
             "wanted_model", "rounds", "options", "my_file", "my_test_file"}  # fmt: skip
CHAPTERS = {number.partition(".")[0] for number in exercises.list_exercises()}
# An appendix may do without exercises.
LESSONS = [path for path in NOTEBOOKS if path.stem[0] != "A" or path.stem[:2] in CHAPTERS]
# A number of a run stands in a computed sentence, never in the prose.
OF_A_RUN = re.compile(
    r"\b(?:our machine|here it|took|fell|rose|scored|printed|measured|reached|came out)\b[^.|?]{0,40}?\d"
    r"|\d[^.|?]{0,30}\b(?:our machine|took|fell|scored|printed)\b"
)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8")) | {"stem": request.param.stem}


def sources(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_course_is_there():
    names = [path.stem.split("_")[0] for path in NOTEBOOKS]
    assert names[:15] == [f"{number:02}" for number in range(15)]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"A[1-9]", name) for name in names[15:])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_the_outputs_of_its_sources(path):
    assert stored.find_faults(path) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_gpu_profile_runs_on_any_machine_with_a_model_of_random_weights(path, tmp_path):
    """So that what has not met a GPU has at least met an interpreter."""
    declared, _ = headless.read_notebook(path)
    parameters = {"model_name": "random-tiny:Qwen3-8B"} if "model_name" in declared else {}
    [found] = headless.run_notebooks([path], parameters, tmp_path / "out", "gpu")
    assert found["status"] == "completed", found["error"]


def test_short_and_without_numbers_of_a_run(notebook):
    prose = sources(notebook, "markdown")
    assert sum(len(text.split()) for text in prose) <= 3000 and len(prose) <= 60
    for text in prose:
        text = re.sub(r"<details>.*?</details>|```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        assert not any(map(OF_A_RUN.search, text.split("\n\n"))), text


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_exercises_have_a_cell_a_solution_and_wrong_answers(path):
    chapter, notebook = path.stem.partition("_")[0], json.loads(path.read_text(encoding="utf-8"))
    own = {number: facts for number, facts in exercises.list_exercises().items() if number.startswith(f"{chapter}.")}
    code = "\n".join(sources(notebook, "code"))
    asked = {number: facts for number, facts in own.items() if "right" in facts}
    assert len(asked) >= 2 and len(own) > len(asked)
    for number, facts in own.items():
        calls = ("exercise", "check") if number in asked else ("predict", "compare")
        assert all(code.count(f'course.{call}("{number}"') == 1 for call in calls), number
        if number in asked:
            assert f"# Your turn {number}\n" in code and exercises.find_solution(number)
            assert len(facts["wrong"]) >= 2 and len(facts["hints"]) >= 2 and facts["level"] in (1, 2, 3)


def test_prose_carries_the_code(notebook):
    code, prose = sources(notebook, "code"), sources(notebook, "markdown")
    lengths = sorted(len(text.splitlines()) for text in code)
    assert len(prose) >= len(code) and lengths[-1] <= 25 and lengths[len(lengths) // 2] <= 8


def test_the_fixed_order(notebook):
    text = "\n".join(sources(notebook, "markdown"))
    order = ["# ", "**You will be able to**", "**Needs**", "## Check yourself", "## Exercises", "## Summary"]
    if notebook["stem"].startswith("A"):
        order.remove("## Exercises")
    else:
        order = [*order[:3], "## Your turn", *order[3:], "## On a real model"]
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


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_plain_svg_safe_to_embed_and_reads_in_light_and_dark(path):
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg" and root.get("viewBox")
    for name in ("title", "desc"):
        assert (root.findtext(f"{SVG}{name}") or "").strip(), f"no <{name}>"
    assert not FORBIDDEN & {element.tag.removeprefix(SVG) for element in root.iter()}
    attributes = [(key, value) for element in root.iter() for key, value in element.attrib.items()]
    assert not [key for key, _ in attributes if key.startswith("on") or key.endswith("href")]
    assert not re.search(r"@import|url\((?!#)", text), "something outside the file"
    assert "@media (prefers-color-scheme: dark)" in text
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:[^;}]*?(\d+)px", text)]
    assert sizes and min(sizes) >= 12 and len(text.encode()) <= 12 * 1024
