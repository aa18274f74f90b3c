"""What the options of a training run say is what they do, in every architecture of the catalogue."""

import json

import pytest
import torch

from sftlab.config.configs import OPTIMIZERS
from sftlab.config.text import to_flags
from sftlab.errors import UserError
from sftlab.hub import catalog
from sftlab.train import folder as run_folder
from sftlab.train import run

SHAPES = {
    model.model_type: model.name for model in catalog.MODELS if model.name != "tiny-base"
}  # one of each architecture
ALIKE = {"grad_norm": {"batch_size": 1, "gradient_accumulation_steps": 4}, "loss": {"use_flash_attention": False}}
QUANTIZED = [
    pytest.param(name, bits, marks=[] if kind in ("gpt2", "falcon", "llama") else pytest.mark.slow)
    for kind, name in SHAPES.items()
    for bits in ("use_4bit", "use_8bit")
]


@pytest.mark.parametrize(("name", "bits"), [*((name, "") for name in SHAPES.values()), *QUANTIZED])
def test_lora_trains_its_layers_in_every_architecture_quantised_too(name, bits, configure):
    options = {bits: True} if bits else {}
    trainer = run.make_trainer(configure(model_name=f"random-tiny:{name}", use_lora=True, lora_r=2, **options))
    kinds = {type(part).__name__ for part in trainer.model.modules()}
    assert ("Linear4bit" in kinds, "Linear8bitLt" in kinds) == (bits == "use_4bit", bits == "use_8bit")
    trainer.train()
    trained = [path for path, weight in trainer.model.named_parameters() if "lora_B" in path and weight.any()]
    moved = {path.split(".lora_B")[0].rsplit(".", 1)[-1] for path in trained}
    assert moved == set(catalog.find_model(name).lora_targets)


@pytest.mark.parametrize(("name", "options"), ALIKE.items(), ids=["accumulated", "padded"])
def test_accumulated_batches_are_one_large_batch_and_padding_changes_nothing_but_the_time(name, options, configure):
    found = []
    for more in ({}, options):
        trainer = run.make_trainer(configure(max_steps=4, **more))
        trainer.lengths = trainer.lengths if name == "grad_norm" else None  # in the usual order of rows
        trainer.train()
        found.append([entry[name] for entry in trainer.state.log_history if name in entry])
    assert found[1] == pytest.approx(found[0], rel=1e-4 if name == "grad_norm" else 1e-5)


def test_a_packed_row_holds_whole_samples_and_learns_their_answers(configure):
    trainer = run.make_trainer(configure(packing=True, max_length=300))
    rows, packed = run.make_trainer(configure()).train_dataset, trainer.train_dataset
    assert len(packed) < len(rows) / 3 and max(sum(lengths) for lengths in packed["seq_lengths"]) <= 300
    assert sum(len(ids) for ids in packed["input_ids"]) == sum(len(ids) for ids in rows["input_ids"])
    batch = trainer.data_collator([packed[0]])
    parts = (torch.tensor(packed[0][name]).split(packed[0]["seq_lengths"]) for name in ("input_ids", "labels"))
    alone = [trainer.data_collator([{"input_ids": ids, "labels": labels}]) for ids, labels in zip(*parts, strict=True)]
    count = sum((part["labels"] != -100).sum() for part in alone)
    model = trainer.model.eval()
    with torch.no_grad():
        whole, *parts = (trainer.compute_loss(model, each, False, count).item() for each in (batch, *alone))
    assert (batch["labels"] != -100).sum() == count > 10 and whole == pytest.approx(sum(parts), rel=1e-5)
    cut = run.make_trainer(configure(packing=True, max_length=58))  # than which some rows are longer
    assert max(len(ids) for ids in cut.train_dataset["input_ids"]) == 58


@pytest.mark.parametrize("name", ["gpt-neo-125M", "falcon-7b"])
def test_packing_is_refused_where_samples_can_t_be_kept_apart(name, configure):
    with pytest.raises(UserError, match="no attention that keeps packed samples apart"):
        run.make_trainer(configure(model_name=f"random-tiny:{name}", packing=True))


def test_the_best_checkpoint_is_kept_beside_the_others_and_a_run_that_gets_worse_ends_with_it(configure, tmp_path):
    """At this learning rate the held-out loss soon rises."""
    kept = {"load_best_model_at_end": True, "eval_steps": 4, "save_steps": 30, "save_total_limit": 20}
    rate = {"lr_scheduler_type": "constant", "learning_rate": 4e-3, "max_steps": 40, "batch_size": 8}
    result = run.train(configure(**kept, **rate))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = min(held_out, key=held_out.get)
    assert best < result["metrics"]["steps"] and result["metrics"]["best_eval_loss"] == held_out[best]
    kept, saved = tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors", tmp_path / "run" / "model.safetensors"
    assert kept.read_bytes() == saved.read_bytes()
    lowest = {step for step in held_out if held_out[step] == min(loss for at, loss in held_out.items() if at <= step)}
    checkpoints = {run_folder.get_step(path) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert checkpoints == lowest | {30, 40} and lowest < held_out.keys()


@pytest.mark.parametrize("name", ["tensorboard", pytest.param("trackio", marks=pytest.mark.slow)])
def test_a_tracker_gets_the_log(name, configure, tmp_path, sftlab_command):
    own = {"TRACKIO_DIR": str(tmp_path)} if name == "trackio" else {}  # read when trackio is imported: another process
    code, _, error = sftlab_command("train", *to_flags(configure(report_to=name)), **own)
    files = list(tmp_path.rglob("*.db*" if own else "events.out.tfevents.*"))
    assert code == 0 and any(b"mean_token_accuracy" in path.read_bytes() for path in files), error


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_moves_the_weights(optim, configure):
    trainer = run.make_trainer(configure(optim=optim, use_lora=True))
    trainer.train()
    assert all(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name)
