"""Training: what should move moves, what is frozen stays, run folders are whole and never lost."""

import json

import pytest
import torch

from sftlab.config.configs import DataConfig, TrainConfig
from sftlab.data import dataset as data_set
from sftlab.errors import UserError
from sftlab.evaluate import scores
from sftlab.models import load
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

SHORT = {"max_steps": 3, "batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1, "eval_samples": 16, "bf16": False}
QUESTIONS = scores.read_facts("test", 2)
METHODS = {
    "full": {},
    "lora": {"use_lora": True},
    "lora with checkpointing": {"use_lora": True, "gradient_checkpointing": True},
    "rsLoRA": {"use_lora": True, "use_rslora": True},
    "DoRA": {"use_lora": True, "use_dora": True},
    "packing": {"use_lora": True, "packing": True, "batch_size": 1, "max_length": 256},
    "8-bit": {"use_lora": True, "use_8bit": True},
    "4-bit": {"use_lora": True, "use_4bit": True},
    "8-bit DoRA": {"use_lora": True, "use_8bit": True, "use_dora": True},
    "4-bit DoRA with checkpointing": {
        "use_lora": True,
        "use_4bit": True,
        "use_dora": True,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_moves_no_frozen_one_and_the_model_answers(method, bf16, dataset, tmp_path):
    options = SHORT | METHODS[method] | {"bf16": bf16}
    trainer = train_run.make_trainer(
        TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run"), **options)
    )
    before = {name: (w.requires_grad, w.detach().clone()) for name, w in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: not torch.equal(weight, before[name][1]) for name, weight in trainer.model.named_parameters()}
    trained = {name for name, (trains, _) in before.items() if trains}
    assert trained and {name for name, changed in moved.items() if changed} == trained
    assert any("lora" in name for name in trained) == ("lora" in str(METHODS[method]))
    asked = scores.ask(trainer.model, trainer.processing_class, QUESTIONS, max_new_tokens=3)  # outside autocast
    assert len(asked.answers) == 2


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


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    config = TrainConfig(dataset_path=str(dataset), output_dir=str(folder), use_lora=True, save_steps=2, **SHORT)
    return config, folder, train_run.train(config)


def test_a_run_folder_is_whole_and_loads(finished):
    config, folder, result = finished
    for name in (
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "trainer_state.json",
        "run.json",
    ):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["status"] == "completed" and result["config_hash"] == config.hash()
    assert result["metrics"]["steps"] == 3 and result["metrics"]["last_loss"] < result["metrics"]["first_loss"]
    model, tokenizer = load.load_model(str(folder)), load.load_tokenizer(str(folder))
    assert len(scores.ask(model, tokenizer, scores.read_facts("test", 2)).answers) == 2


def test_an_existing_run_is_never_lost_unasked(finished):
    config, folder, _ = finished
    with pytest.raises(UserError, match="--resume to go on, or --overwrite to delete"):
        train_run.train(config)
    assert (folder / "result.json").is_file()
    somebody = folder.parent / "thesis"
    somebody.mkdir()
    (somebody / "result.json").write_text("{}")
    (somebody / "chapter1.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="not a run folder"):
        run_folder.claim_folder(TrainConfig(output_dir=str(somebody), overwrite=True), 1)
    assert (somebody / "chapter1.txt").exists()


def test_resumed_equals_uninterrupted(bf16, dataset, tmp_path):
    losses = {}
    for name, stops in {"whole": [6], "stopped": [4, 6]}.items():
        for number, stop in enumerate(stops):
            run = TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / name), use_lora=True, save_steps=4,
                              lr_scheduler_type="constant", resume=number > 0, **SHORT | {"max_steps": stop, "bf16": bf16})  # fmt: skip
            train_run.train(run)
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    assert losses["stopped"] == pytest.approx(losses["whole"], rel=1e-5) and len(losses["whole"]) == 6


def test_a_set_made_for_another_tokenizer_is_refused(dataset, tmp_path):
    other = tmp_path / "other"
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    tokenizer.add_tokens(["capital"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="was made for tiny-base"):
        train_run.train(TrainConfig(model_name=str(other), dataset_path=str(dataset), output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_overwrite_deletes_nothing_before_the_new_run_can_start(finished, tmp_path):
    config, folder, _ = finished
    for wrong in ({"dataset_path": str(tmp_path)}, {"lora_target_modules": "q_prj"}, {"model_name": str(tmp_path)}):
        with pytest.raises(UserError):
            train_run.train(TrainConfig(**vars(config) | wrong | {"overwrite": True}))
        assert (folder / "result.json").is_file()
    with pytest.raises(UserError, match="holds what is in model_name"):
        train_run.train(TrainConfig(**vars(config) | {"model_name": str(folder), "overwrite": True}))
    with pytest.raises(UserError, match="holds what is the folder you work in"):
        train_run.train(TrainConfig(output_dir=".", overwrite=True))
    with pytest.raises(UserError, match="holds an adapter"):
        train_run.train(TrainConfig(**vars(config) | {"model_name": str(folder), "output_dir": str(tmp_path / "run")}))


def test_the_trainer_learns_the_prepared_labels(dataset, tmp_path):
    config = TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run"), **SHORT)
    trainer = train_run.make_trainer(config)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    kept = batch["labels"][0] != -100
    answer = data_set.load_prepared(dataset)[0]["train"][0]["messages"][1]["content"]
    assert kept.sum() and trainer.processing_class.decode(batch["input_ids"][0][kept]) == answer + "</s>"


def test_adapters_that_never_moved_end_the_run(dataset, tmp_path):
    config = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "run"), use_lora=True, **SHORT | {"learning_rate": 0}
    )
    with pytest.raises(UserError, match="moved nothing"):
        train_run.train(config)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed" and "moved nothing" in result["error"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_what_is_no_prepared_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="sftlab prepare"):
        train_run.train(TrainConfig(dataset_path=str(tmp_path), output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def chatml_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    return data_set.prepare(DataConfig(format="chatml", num_samples=32, output_dir=str(folder)))


@pytest.mark.parametrize("name", ["tiny-base", "random-tiny:Llama-2-7b-hf", "random-tiny:phi-2", "random-tiny:gpt2"])
def test_of_the_embeddings_only_the_new_tokens_rows_are_trained(name, bf16, chatml_dataset, tmp_path, capsys):
    from transformers import set_seed

    config = TrainConfig(model_name=name, dataset_path=str(chatml_dataset), output_dir=str(tmp_path / "run"), use_lora=True,
                         lora_r=2, max_steps=2, batch_size=32, learning_rate=1e-2, logging_steps=1, bf16=bf16)  # fmt: skip
    result = train_run.train(config)  # a step is all rows, so that the losses can be compared
    assert "their embeddings are trained" in capsys.readouterr().out
    set_seed(config.seed)
    base = load.load_model(name, config)
    tuned = load.load_model(str(tmp_path / "run"), config) if name == "tiny-base" else None
    if tuned is None:  # an adapter of random weights has no base to load: put it on one made from the same seed
        from peft import PeftModel

        set_seed(config.seed)
        tuned = PeftModel.from_pretrained(load.load_model(name, config), str(tmp_path / "run"))
    tuned = tuned.merge_and_unload()
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    for embeddings in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, embeddings)().weight for model in (base, tuned))
        assert (before != after).any(dim=1).nonzero().flatten().tolist() == [3, 4], f"{embeddings}, tied: {tied}"
    assert result["metrics"]["last_loss"] < result["metrics"]["first_loss"]


def test_tokens_that_the_tokenizer_lacks_are_added_and_saved_with_the_adapter(bf16, tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = load.load_tokenizer("tiny-base")
    folder = tmp_path / "plain"  # tiny-base without its reserved tokens, as most base models are
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if "im_" not in token["content"]]
    for old, new in (("<|im_start|>", "<unused0>"), ("<|im_end|>", "<unused1>")):
        state["model"]["vocab"][new] = state["model"]["vocab"].pop(old)
    AutoModelForCausalLM.from_pretrained(load.TINY_BASE).save_pretrained(folder)
    for file in load.TINY_BASE.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": []}))

    made = data_set.prepare(
        DataConfig(model=str(folder), format="chatml", num_samples=32, output_dir=str(tmp_path / "sets"))
    )
    config = TrainConfig(model_name=str(folder), dataset_path=str(made), output_dir=str(tmp_path / "run"), use_lora=True,
                         max_steps=2, batch_size=4, learning_rate=1e-2, bf16=bf16)  # fmt: skip
    train_run.train(config)
    tuned, again = load.load_model(str(tmp_path / "run")), load.load_tokenizer(str(tmp_path / "run"))
    assert len(again) == tuned.get_input_embeddings().weight.shape[0] == len(tokenizer) + 2
    assert again.eos_token == "<|im_end|>" and again.convert_tokens_to_ids("<|im_end|>") == len(tokenizer) + 1
    assert scores.ask(tuned, again, [{"instruction": "日本の首都は？", "output": "東京"}], "chatml").answers
