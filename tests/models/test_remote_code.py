"""Code that a model brings along is never run unasked, and nobody is asked in between."""

import builtins
import json
import shutil

import pytest

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.models import load
from sftlab.train import run, saved

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
def own_model(tmp_path, monkeypatch):
    """tiny-base as a model whose classes come with it; where its code runs, it leaves the file `ran`."""
    monkeypatch.setenv("CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("somebody was asked"))
    folder = tmp_path / "own"
    shutil.copytree(load.TINY_BASE, folder)
    (folder / "own.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings["model_type"] = "own_llama"
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_it_runs_only_where_it_is_asked_for(own_model, dataset, tmp_path):
    options = {"dataset_path": str(dataset), "output_dir": str(tmp_path / "run"), "max_steps": 1, "max_length": 64}
    options |= {"use_lora": True, "lora_target_modules": "q_proj", "batch_size": 2, "eval_samples": 2, "bf16": False}
    config = TrainConfig(model_name=str(own_model), **options)
    for refused in (run.train, lambda config: saved.load_any(config.model_name)):
        with pytest.raises(UserError, match=rf"Read it in {own_model}; .* add --trust-remote-code"):
            refused(config)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()
    run.train(TrainConfig(model_name=str(own_model), trust_remote_code=True, **options))
    assert (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="--trust-remote-code"):  # a run that was trusted isn't so for those who read it
        saved.load_run(saved.open_run(tmp_path / "run"))


def test_other_models_need_no_trust():
    assert load.load_tokenizer("tiny-base", trust_remote_code=True).is_fast
