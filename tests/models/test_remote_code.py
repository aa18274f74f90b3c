"""Code that a model brings along: never run unasked, and told where it is asked for."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from sftlab.models import load

CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

open(os.environ["CODE_RAN"], "a").close()

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_model(tmp_path):
    """tiny-base as a model whose classes come with it."""
    folder = tmp_path / "own"
    shutil.copytree(load.TINY_BASE, folder)
    (folder / "own.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def modules(tmp_path):
    """The environment of a command: where the code says that it ran, and where transformers copies it."""
    return {"CODE_RAN": str(tmp_path / "ran"), "HF_MODULES_CACHE": str(tmp_path / "modules")}


def test_refused_then_told(own_model, modules, dataset, tmp_path, sftlab_command):
    run = ["train", "--model-name", own_model, "--dataset-path", dataset, "--output-dir", tmp_path / "run", "--use-lora",
           "--max-steps", 1, "--max-length", 64, "--eval-samples", 4, "--no-bf16", "--lora-target-modules", "q_proj"]  # fmt: skip
    code, _, errors = sftlab_command(*run, **modules)
    assert code == 2 and "--trust-remote-code" in errors and str(own_model) in errors
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()
    code, _, errors = sftlab_command(*run, "--trust-remote-code", **modules)
    assert code == 0, errors
    assert (tmp_path / "ran").exists() and "own.OwnModel" in errors
    (tmp_path / "ran").unlink()
    # a run that says yes doesn't say so for those who read it
    code, _, errors = sftlab_command("evaluate", tmp_path / "run", "--num-questions", 4, **modules)
    assert code == 2 and "--trust-remote-code" in errors and not (tmp_path / "ran").exists()


def test_nothing_is_asked_in_a_terminal(own_model, modules, dataset, tmp_path):
    here, there = pty.openpty()
    os.write(here, b"y\ny\ny\n")
    done = subprocess.run(
        [sys.executable, "-m", "sftlab.cli", "chat", str(own_model)], stdin=there, capture_output=True, text=True,
        env=os.environ | modules, timeout=120,
    )  # fmt: skip
    os.close(here)
    os.close(there)
    assert done.returncode == 2 and "[y/N]" not in done.stdout and not (tmp_path / "ran").exists()


def test_other_models_need_no_trust(capsys):
    load.load_tokenizer("tiny-base", trust_remote_code=True)
    assert "warning" not in capsys.readouterr().err
