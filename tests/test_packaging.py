"""pyproject.toml has the ranges, constraints.txt the exact versions, environment.yml the reasons; `sftlab` is light to import."""

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

import sftlab

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "plotly", "matplotlib", "papermill", "ipywidgets"}


def by_name(requirements: list[str]) -> dict[str, Requirement]:
    named = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, requirements)}
    assert len(named) == len(requirements), "a package is listed twice"
    return named


def read_lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


DEPENDENCIES = by_name(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
PINS = by_name(read_lines("constraints.txt"))


def test_every_dependency_has_a_range_with_both_ends_and_an_exact_pin_in_it():
    for pin in PINS.values():
        assert re.fullmatch(r"[\w.-]+==[0-9][^,*+;]*", str(pin)), f"constraints.txt: {pin}"
    for name, dependency in DEPENDENCIES.items():
        assert {part.operator for part in dependency.specifier} == {">=", "<"}, f"pyproject.toml: {dependency}"
        assert name in PINS, f"{name} is in pyproject.toml and not in constraints.txt: run `make constraints`"
        assert str(PINS[name].specifier).removeprefix("==") in dependency.specifier, f"{PINS[name]} is no {dependency}"
    # flash-attn needs nvcc and a GPU to build, so a default install with it would fail on most machines
    assert by_name(PROJECT["optional-dependencies"]["flash-attn"]).keys() == {"flash-attn"}
    assert not any(name.startswith("flash-attn") for name in DEPENDENCIES | PINS)
    assert sftlab.__version__ == PROJECT["version"]


@pytest.mark.parametrize("name", PINS)
def test_every_pin_is_installed_and_accepts_every_supported_python(name):
    """A pin that refuses an early 3.11 makes pip give up on Debian 12, whose Python is 3.11.2."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    assert metadata["Version"] in PINS[name].specifier, f"{metadata['Version']} is installed, {PINS[name]} is pinned"
    accepted = SpecifierSet(metadata["Requires-Python"] or "")
    assert {"3.11.0", "3.12.0", "3.13.0"} == set(accepted.filter(["3.11.0", "3.12.0", "3.13.0"])), accepted


def test_environment_yml_lists_the_dependencies_of_pyproject_each_with_a_reason():
    packages = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (section,) = [entry["pip"] for entry in packages if isinstance(entry, dict)]
    listed = by_name([line for line in section if not line.startswith("-")])
    assert {name: str(one) for name, one in listed.items()} == {name: str(one) for name, one in DEPENDENCIES.items()}
    assert [line for line in section if line.startswith("-")] == ["-c constraints.txt", "-e ."]
    assert "python " + PROJECT["requires-python"] in packages
    for entry in read_lines("environment.yml"):
        if entry.startswith("- ") and entry not in ("- conda-forge", "- pip:", "- -c constraints.txt", "- -e ."):
            assert re.search(r"  # \w+", entry), f"environment.yml gives no reason: {entry}"


def test_help_and_a_look_at_runs_load_nothing_heavy():
    """And how long threads spin is decided by then, before torch is loaded."""
    code = f"""import contextlib, os, sys
from sftlab import cli, runs
with contextlib.suppress(SystemExit):
    cli.main(["--help"])
runs.find("notebooks")
print("LOADED", os.environ["GOMP_SPINCOUNT"].isdigit(), *({HEAVY!r} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "LOADED True", done.stdout + done.stderr
