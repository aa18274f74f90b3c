"""The lab's way to the loss: the same loss, gradients and metrics as TRL's, and TRL's way where it must be."""

import inspect

import pytest
import torch
from test_attention import KNOWN
from transformers import AutoConfig, AutoModelForCausalLM

from sftlab.models import load
from sftlab.models.loss import add_answer_head, has_plain_head
from sftlab.train import run as train_run

SHORT = {"max_steps": 3, "learning_rate": 1e-3, "lora_dropout": 0}
LORA = {"use_lora": True}
RARE = [LORA | {"gradient_checkpointing": True}, LORA | {"use_4bit": True}]
OPTIONS = [{}, LORA | {"gradient_accumulation_steps": 2, "batch_size": 2}]
OPTIONS += [pytest.param(one, marks=pytest.mark.slow) for one in RARE]
NAMES = {"loss", "eval_loss", "grad_norm", "mean_token_accuracy", "num_tokens", "eval_mean_token_accuracy"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_gradients_and_metrics_are_those_of_trl_step_by_step(options, configure):
    logs = []
    for plain in (False, True):
        trainer = train_run.make_trainer(configure(str(plain), **SHORT | options))
        assert trainer.uses_answer_head
        if plain:
            trainer.uses_answer_head, trainer.data_collator = False, trainer.data_collator.collate
        trainer.train()
        logs.append([{name: entry[name] for name in NAMES & set(entry)} for entry in trainer.state.log_history])
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    assert sum(map(len, logs[0])) > 12


@pytest.mark.parametrize("name", KNOWN)
def test_every_architecture_of_the_catalogue_has_a_plain_head_and_the_same_loss(name):
    model = load.build_random(f"random-tiny:{name}").eval()
    assert has_plain_head(model)
    names = set(inspect.signature(model.forward).parameters)
    add_answer_head(model)
    assert set(inspect.signature(model.forward).parameters) == names  # generation looks for inputs by their names
    ids = torch.arange(40, 80).view(2, 20)
    labels = torch.where(torch.arange(20) < 8, load.IGNORED, ids)
    with torch.no_grad():
        loss, tokens, _ = model(input_ids=ids, answer_labels=labels)
        logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:])
    assert tokens == 24 and torch.allclose(loss / tokens, wanted, rtol=1e-5)


def test_a_model_with_a_cap_on_its_logits_goes_trls_way():
    config = AutoConfig.for_model("gemma2", **load.TINY_SHAPE, head_dim=16, vocab_size=64)
    assert config.final_logit_softcapping and not has_plain_head(AutoModelForCausalLM.from_config(config))


def test_a_batch_without_a_trained_token_gives_zero_and_a_gradient(configure):
    trainer = train_run.make_trainer(configure())
    ids = torch.tensor([[1, 5, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, load.IGNORED)}
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
