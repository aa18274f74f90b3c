"""Training: what should move moves, what is frozen stays, run folders are whole and never lost."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sftlab import files
from sftlab.config.configs import DataConfig, TrainConfig
from sftlab.data import dataset as data_set
from sftlab.errors import UserError
from sftlab.evaluate import scores
from sftlab.models import load
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run
from sftlab.train import saved

SHORT = {"max_steps": 2, "batch_size": 8, "logging_steps": 1}
BF16 = {"bf16": True}
FULL = {"use_lora": False}
METHODS = {"full": FULL, "full in bfloat16": FULL | BF16, "lora": {}, "lora in bfloat16": BF16}
METHODS |= {"lora with checkpointing": {"gradient_checkpointing": True}, "rsLoRA": {"use_rslora": True}}
METHODS |= {"DoRA in bfloat16": BF16 | {"use_dora": True}, "8-bit in bfloat16": BF16 | {"use_8bit": True}}
METHODS |= {"packing in bfloat16": BF16 | {"packing": True, "batch_size": 1, "max_length": 256}}
CHECKPOINTED = {"use_4bit": True, "use_dora": True, "gradient_checkpointing": True}
METHODS |= {"4-bit": {"use_4bit": True}, "4-bit DoRA with checkpointing": BF16 | CHECKPOINTED}
NEW_TOKENS = SHORT | {"lora_r": 2, "learning_rate": 1e-2, "batch_size": 32}
BASES = [("tiny-base", False), ("random-tiny:phi-2", False), ("random-tiny:gpt2", True)]  # and whether in bfloat16
NO_GPU, NOT_THERE = "Liger's kernels need an NVIDIA GPU", "liger-kernel isn't installed"
LIGER = [(False, True, None, f"transformers': {NO_GPU}"), (False, True, True, f"use_liger_kernel: {NO_GPU}. Leave it")]
LIGER += [(True, False, None, f"transformers': {NOT_THERE}"), (True, False, True, f"use_liger_kernel: {NOT_THERE}")]
LIGER += [(True, True, False, "transformers', as asked"), (True, True, None, "Liger's"), (True, True, True, "Liger's")]
LIGER += [(True, True, "gpt2", "transformers': liger-kernel has none for gpt2")]


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_moves_no_frozen_one_and_the_model_answers(method, short_run):
    config = short_run(**SHORT | METHODS[method])
    trainer = train_run.make_trainer(config)
    before = {name: (w.requires_grad, w.detach().clone()) for name, w in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name][1])}
    trained = {name for name, (trains, _) in before.items() if trains}
    assert trained and moved == trained
    assert any("lora" in name for name in trained) == config.use_lora
    questions = scores.read_facts("test", 2)  # asked outside autocast
    assert len(scores.ask(trainer.model, trainer.processing_class, questions, max_new_tokens=3).answers) == 2


def test_four_bit_layers_pass_gradients_after_an_evaluation_too(bf16):
    """bitsandbytes packs 4-bit weights for fast inference on some CPUs, and packed ones pass none."""
    model = load.load_model("tiny-base", TrainConfig(use_lora=True, use_4bit=True, bf16=bf16))
    ids = torch.tensor([[1, 5, 9, 700]])
    gradients = []
    for _ in range(2):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.train()(inputs_embeds=embedded, labels=ids).loss.backward()
        gradients.append(embedded.grad)
        with torch.no_grad():
            model.eval()(ids)
    assert torch.equal(*gradients) and gradients[0].norm() > 0


@pytest.fixture
def finished(tuned_run) -> TrainConfig:
    """The configuration of a complete run, which no test may change."""
    return TrainConfig(**files.read_json(tuned_run / "run.json")["config"])


def test_a_run_with_its_result_is_never_lost_unasked(finished, tmp_path):
    with pytest.raises(UserError, match="--resume to continue it, or --overwrite to delete"):
        train_run.train(finished)
    result = files.read_json(Path(finished.output_dir) / "result.json")
    assert result["status"] == "completed" and result["config_hash"] == finished.hash()
    assert result["metrics"]["steps"] == 3 and result["metrics"]["eval_loss"] < 8 and result["versions"]["torch"]
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "chapter1.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="not a run folder"):
        run_folder.claim_folder(TrainConfig(output_dir=str(tmp_path), overwrite=True), 1)
    assert (tmp_path / "chapter1.txt").exists()


def test_overwrite_deletes_nothing_before_the_new_run_can_start(finished, tmp_path):
    folder, empty, new, other = finished.output_dir, str(tmp_path), str(tmp_path / "run"), str(tmp_path / "other")
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.add_tokens(["capital"])
    tokenizer.save_pretrained(other)
    load.load_model("tiny-base").config.save_pretrained(other)
    errors = {"sftlab prepare": {"dataset_path": empty}, "holds no config.json": {"model_name": empty}}
    errors |= {"no layer 'q_prj'. Did you mean 'q_proj'.*down_proj": {"lora_target_modules": "q_prj"}}
    errors |= {"holds what is in model_name": {"model_name": folder}, "was made for tiny-base": {"model_name": other}}
    errors |= {"holds what is the folder you work in": {"output_dir": "."}}
    errors |= {"holds an adapter": {"model_name": folder, "output_dir": new}}
    for error, changes in errors.items():
        with pytest.raises(UserError, match=error):
            train_run.train(TrainConfig(**vars(finished) | changes | {"overwrite": True}))
        assert (Path(folder) / "result.json").is_file() and not Path(new).exists()


def test_training_on_begins_with_the_adapter_and_its_options(finished, short_run):
    config = short_run(**SHORT | {"learning_rate": 0, "lora_r": 4, "init_adapter": finished.output_dir})
    result = train_run.train(config)
    before, after = (load_file(Path(one.output_dir) / "adapter_model.safetensors") for one in (finished, config))
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert result["metrics"]["steps"] == 2 and result["config"]["lora_r"] == finished.lora_r


@pytest.fixture(scope="module")
def chatml_dataset(tmp_path_factory) -> Path:
    folder = str(tmp_path_factory.mktemp("chatml"))
    return data_set.prepare(DataConfig(format="chatml", num_samples=32, output_dir=folder))


@pytest.mark.parametrize(("name", "bf16"), BASES)
def test_of_the_embeddings_only_the_new_tokens_rows_are_trained(name, bf16, chatml_dataset, short_run, capsys):
    config = short_run(**NEW_TOKENS, dataset_path=str(chatml_dataset), bf16=bf16, model_name=name)
    result = train_run.train(config)  # a step is all rows, so that the losses can be compared
    assert "their embeddings are trained" in capsys.readouterr().out
    weights = []
    for kind, model in saved.load_models(saved.read_run(config.output_dir)):
        model = model.merge_and_unload() if kind == "tuned" else model
        weights.append([part.weight.clone() for part in (model.get_input_embeddings(), model.get_output_embeddings())])
    for before, after in zip(*weights, strict=True):
        assert (before != after).any(dim=1).nonzero().flatten().tolist() == [3, 4]
    assert result["metrics"]["last_loss"] < result["metrics"]["first_loss"]


def test_tokens_that_the_tokenizer_lacks_are_added_and_saved_with_the_adapter(short_run, tmp_path):
    folder = tmp_path / "plain"  # tiny-base without its reserved tokens, as most base models are
    shutil.copytree(load.TINY_BASE, folder)
    for path in folder.glob("tokenizer*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("<|im_", "<|unused_"), encoding="utf-8")
    size = len(load.load_tokenizer(str(folder)))
    data = DataConfig(model=str(folder), format="chatml", num_samples=32, output_dir=str(tmp_path / "sets"))
    train_run.train(short_run(**NEW_TOKENS | BF16, model_name=str(folder), dataset_path=str(data_set.prepare(data))))
    tuned, again = load.load_model(str(tmp_path / "run")), load.load_tokenizer(str(tmp_path / "run"))
    assert len(again) == tuned.get_input_embeddings().weight.shape[0] == size + 2
    assert again.eos_token == "<|im_end|>" and again.convert_tokens_to_ids("<|im_end|>") == size + 1
    assert scores.ask(tuned, again, [{"instruction": "日本の首都は？", "output": "東京"}], "chatml").answers


@pytest.mark.parametrize(("gpu", "installed", "asked", "outcome"), LIGER)
def test_liger_kernels_are_taken_where_they_can_run(gpu, installed, asked, outcome, monkeypatch):
    table = types.ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for name in ("liger_kernel", "liger_kernel.transformers", table.__name__):
        monkeypatch.setitem(sys.modules, name, table)
    applied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(train_run, "is_liger_kernel_available", lambda: installed)
    monkeypatch.setattr(train_run, "apply_liger_kernel", lambda model, how: applied.append(how))
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type="gpt2" if asked == "gpt2" else "llama"))
    try:
        said = train_run.choose_kernels(None if asked == "gpt2" else asked, model)
    except UserError as error:
        said = str(error)
    assert said.startswith(outcome)
    assert applied == ([{"fused_linear_cross_entropy": False}] if outcome == "Liger's" else [])
