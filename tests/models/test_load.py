"""Loading: true shapes, every architecture with LoRA, clear words for a model that can't be had, and no code unasked."""

import builtins
import json
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import constants
from peft import get_peft_model

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.hub import client as hub_client
from sftlab.models import load
from sftlab.train import run, saved

FAULTS = {"nobody/nothing": "can't be reached", "tiny-bse": "Did you mean 'tiny-base'"}
FAULTS |= {"no spaces allowed": "no valid Hub id", "random:gpt5": "after random: comes a catalogue name"}
CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
open(os.environ["CODE_RAN"], "a").close()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(("name", "message"), FAULTS.items())
def test_a_model_that_cannot_be_had_is_explained(name, message):
    with pytest.raises(UserError, match=message):
        load.load_model(name)


def test_experts_without_adapters_are_named_and_can_be_reached(capsys):
    config = TrainConfig(model_name="random-tiny:gpt-oss-20b", use_lora=True, lora_dropout=0.0)
    model = load.build_random(config.model_name)
    load.report_experts(model, load.lora_config(config))
    assert "get no adapters; --lora-target-parameters " in capsys.readouterr().out
    config.lora_target_parameters = ",".join(load.find_experts(model))
    lora = load.lora_config(config)
    load.check_targets(model, lora)
    load.report_experts(model, lora)
    assert not capsys.readouterr().out
    trained = [name for name, weight in get_peft_model(model, lora).named_parameters() if weight.requires_grad]
    assert sum("experts" in name and "lora_" in name for name in trained) >= 4


def test_a_network_that_comes_back_is_used_again(monkeypatch, hub_address):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub_client.reach() and constants.is_offline_mode()
    monkeypatch.setattr(constants, "ENDPOINT", hub_address)
    assert hub_client.reach() and not constants.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the user said
    assert not hub_client.reach()


def test_of_several_chat_templates_the_default_one_is_taken(tmp_path):
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.chat_template = {"tool_use": "tools", "default": "plain"}
    tokenizer.save_pretrained(shutil.copytree(load.TINY_BASE, tmp_path / "several"))
    assert load.load_tokenizer(str(tmp_path / "several")).chat_template == "plain"


def test_the_code_of_a_model_runs_only_where_it_is_asked_for(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("somebody was asked"))
    folder = shutil.copytree(load.TINY_BASE, tmp_path / "own")  # tiny-base as a model whose classes come with it
    (folder / "own.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "own_llama", "auto_map": classes}))
    config = configure(model_name=str(folder), use_lora=True, lora_target_modules="q_proj", max_steps=1)
    for refused in (run.train, lambda config: saved.load_any(config.model_name)):
        with pytest.raises(UserError, match=rf"Read it in {folder}; .* add --trust-remote-code"):
            refused(config)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()
    run.train(replace(config, trust_remote_code=True))
    assert (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="--trust-remote-code"):  # a run that was trusted isn't so for those who read it
        saved.load_run(saved.open_run(tmp_path / "run"))
