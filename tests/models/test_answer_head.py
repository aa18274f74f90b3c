"""The trainer's own way to the loss: the same loss, gradients and metrics as TRL's, and TRL's way where it must be."""

import inspect

import pytest
import torch

from sftlab.config.configs import TrainConfig
from sftlab.hub.catalog import MODELS
from sftlab.models import load
from sftlab.models.loss import add_answer_head, has_plain_head
from sftlab.train import run as train_run
from sftlab.train.trainer import LabTrainer

SHORT = {
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "eval_samples": 8,
    "bf16": False,
    "lora_dropout": 0,
}


def run(dataset, folder, plain: bool, **options):
    """The log of a short run, with our loss or with TRL's."""
    trainer = train_run.make_trainer(TrainConfig(dataset_path=str(dataset), output_dir=str(folder), **SHORT | options))
    assert isinstance(trainer, LabTrainer) and trainer.uses_answer_head
    if plain:
        trainer.uses_answer_head, trainer.data_collator = False, trainer.data_collator.collate
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize(
    "options",
    [{}, {"use_lora": True}, {"use_lora": True, "gradient_accumulation_steps": 2, "batch_size": 2},
     {"use_lora": True, "gradient_checkpointing": True}, {"use_lora": True, "use_4bit": True}],
    ids=["full", "lora", "accumulation", "checkpointing", "4-bit"],
)  # fmt: skip
def test_losses_gradients_and_metrics_are_those_of_trl_step_by_step(options, dataset, tmp_path):
    ours = run(dataset, tmp_path / "ours", False, **options)
    theirs = run(dataset, tmp_path / "theirs", True, **options)
    names = (
        "loss",
        "eval_loss",
        "grad_norm",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
        "eval_mean_token_accuracy",
    )
    compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        for name in names:
            assert (name in mine) == (name in other)
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), name
                compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", [model.name for model in MODELS if model.name != "tiny-base"])
def test_every_catalogue_model_has_a_plain_head_and_the_same_loss(name, dataset, tmp_path):
    model = load.build_random(f"random-tiny:{name}")
    assert has_plain_head(model)
    trainer = train_run.make_trainer(
        TrainConfig(model_name=f"random-tiny:{name}", dataset_path=str(dataset), output_dir=str(tmp_path), **SHORT)
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, dict(batch))
        whole = (
            trainer.model(**{k: v for k, v in batch.items() if k not in ("labels", "lengths")})
            .logits[:, :-1]
            .transpose(1, 2)
        )
    assert ours.item() == pytest.approx(
        torch.nn.functional.cross_entropy(whole, batch["labels"][:, 1:]).item(), rel=1e-5
    )


def test_a_model_with_a_cap_on_its_logits_goes_trls_way():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gemma2", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=1, head_dim=16, vocab_size=64)  # fmt: skip
    assert config.final_logit_softcapping and not has_plain_head(AutoModelForCausalLM.from_config(config))


def test_a_batch_without_a_trained_token_gives_zero_and_a_gradient(dataset, tmp_path):
    trainer = train_run.make_trainer(TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path), **SHORT))
    ids = torch.tensor([[1, 5, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_generation_finds_the_inputs_that_the_model_knows_by_name():
    model = load.load_model("tiny-base")
    names = set(inspect.signature(model.forward).parameters)
    add_answer_head(model)
    assert "position_ids" in names and set(inspect.signature(model.forward).parameters) == names
