"""pyproject.toml, constraints.txt and environment.yml tell one story, and `sftlab` is light to import.

The ranges live in pyproject.toml, the exact versions in constraints.txt, the reasons in environment.yml. What one of
them says and another does not is a broken install on somebody's machine.

    pytest tests/test_packaging.py
"""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "plotly", "matplotlib", "papermill", "ipywidgets"}


def read_pins() -> list[Requirement]:
    """The requirements of constraints.txt, in order, with repeats."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def read_conda_environment() -> tuple[list[str], list[str]]:
    """environment.yml's own packages, and the lines of its pip section."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip_sections = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    assert len(pip_sections) == 1, "environment.yml has one pip section"
    return [entry for entry in entries if isinstance(entry, str)], pip_sections[0]


def by_name(requirements: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(text) for text in requirements]
    named = {canonicalize_name(requirement.name): requirement for requirement in parsed}
    assert len(named) == len(parsed), "a package is listed twice"
    return named


def pinned_version(pin: Requirement) -> Version:
    return Version(str(pin.specifier).removeprefix("=="))


DEPENDENCIES = by_name(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
PINS = {canonicalize_name(pin.name): pin for pin in read_pins()}


def test_every_pin_is_one_exact_version_without_a_local_part():
    for pin in read_pins():
        assert re.fullmatch(r"==[0-9][^,*+]*", str(pin.specifier)), f"constraints.txt: {pin}"
        assert not pin.marker and not pin.extras and not pin.url, f"constraints.txt: {pin}"


def test_nothing_is_pinned_twice():
    names = [canonicalize_name(pin.name) for pin in read_pins()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_every_dependency_is_pinned_inside_its_range(name):
    assert name in PINS, f"{name} is in pyproject.toml and not in constraints.txt: run `make constraints`"
    assert pinned_version(PINS[name]) in DEPENDENCIES[name].specifier, f"{PINS[name]} is outside {DEPENDENCIES[name]}"


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_every_dependency_has_a_range_with_both_ends(name):
    operators = {part.operator for part in DEPENDENCIES[name].specifier}
    assert operators == {">=", "<"}, f"pyproject.toml: {DEPENDENCIES[name]}"


@pytest.mark.parametrize("name", PINS)
def test_every_pin_is_the_installed_version(name):
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    assert Version(installed) in PINS[name].specifier, f"{name} {installed} is installed, {PINS[name]} is pinned"


@pytest.mark.parametrize("name", PINS)
def test_every_pin_accepts_every_supported_python(name):
    """A pin that refuses an early 3.11 makes pip give up on Debian 12, whose Python is 3.11.2."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    if Version(metadata["Version"]) not in PINS[name].specifier:
        pytest.skip(f"another version of {name} is installed here")
    accepted = metadata["Requires-Python"]
    for python in ("3.11.0", "3.12.0", "3.13.0"):
        assert python in SpecifierSet(accepted or ""), f"{PINS[name]} wants Python {accepted}"


def test_environment_yml_lists_the_dependencies_of_pyproject():
    packages, pip_lines = read_conda_environment()
    listed = by_name([line for line in pip_lines if not line.startswith("-")])
    assert {name: str(requirement) for name, requirement in listed.items()} == {
        name: str(requirement) for name, requirement in DEPENDENCIES.items()
    }
    assert [line for line in pip_lines if line.startswith("-")] == ["-c constraints.txt", "-e ."]
    assert "python " + PROJECT["requires-python"] in packages


def test_environment_yml_gives_a_reason_for_each_dependency():
    for line in (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines():
        entry = line.strip()
        if entry.startswith("- ") and entry not in ("- conda-forge", "- pip:", "- -c constraints.txt", "- -e ."):
            assert re.search(r"  # \w+", entry), f"environment.yml gives no reason: {entry}"


def test_flash_attn_is_only_an_extra():
    """It needs nvcc and a GPU to build, so a default install with it would fail on most machines."""
    assert [requirement.split(">")[0] for requirement in PROJECT["optional-dependencies"]["flash-attn"]] == [
        "flash-attn"
    ]
    assert not any(name.startswith("flash-attn") for name in DEPENDENCIES | PINS)


def test_version_is_written_the_same_everywhere():
    import sftlab

    assert sftlab.__version__ == PROJECT["version"]


def loaded_after(code: str) -> set[str]:
    """The heavy packages in a new interpreter's memory after `code`."""
    report = f"{code}\nimport sys; print('LOADED', *({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_sftlab_loads_nothing_heavy():
    assert loaded_after("import sftlab") == set()


def test_sftlab_help_loads_nothing_heavy():
    code = """
from sftlab.cli import main
try:
    code = main(["--help"])
except SystemExit as stop:  # argparse leaves this way
    code = stop.code
assert not code, code
"""
    assert loaded_after(code) == set()
