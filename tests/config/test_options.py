"""What the options of a training run say is what they do, in every architecture of the catalogue."""

import json

import pytest
import torch

from sftlab.config import conflicts
from sftlab.config.configs import OPTIMIZERS, TrainConfig
from sftlab.errors import UserError
from sftlab.hub import catalog
from sftlab.hub.catalog import MODELS
from sftlab.models import load
from sftlab.train import folder as run_folder
from sftlab.train import run

SHORT = {"max_steps": 2, "batch_size": 4, "learning_rate": 2e-3, "logging_steps": 1, "eval_samples": 8, "bf16": False}
KNOWN = [model.name for model in MODELS if model.name != "tiny-base"]
SHAPES = {model.model_type: model.name for model in MODELS if model.name != "tiny-base"}  # one of each architecture


def log(config: TrainConfig, name: str = "loss") -> list[float]:
    trainer = run.make_trainer(config)
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("name", "bits"),
    [*((name, {}) for name in KNOWN), *((name, {bits: True}) for name in SHAPES.values() for bits in ("use_4bit", "use_8bit"))],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)  # fmt: skip
def test_every_catalogue_model_trains_with_lora_quantised_too(name, bits, dataset, tmp_path):
    config = TrainConfig(model_name=f"random-tiny:{name}", dataset_path=str(dataset), output_dir=str(tmp_path / "run"),
                         use_lora=True, lora_r=2, **SHORT, **bits)  # fmt: skip
    trainer = run.make_trainer(config)
    kinds = {type(part).__name__ for part in trainer.model.modules()}
    assert ("Linear4bit" in kinds, "Linear8bitLt" in kinds) == ("use_4bit" in bits, "use_8bit" in bits)
    trainer.train()
    moved = {
        path.split(".lora_B")[0].rsplit(".", 1)[-1]
        for path, weight in trainer.model.named_parameters()
        if "lora_B" in path and weight.any()
    }
    assert moved == set(catalog.find_model(name).lora_targets)


def test_accumulated_batches_are_the_one_large_batch(dataset, tmp_path):
    options = {"dataset_path": str(dataset), **SHORT, "max_steps": 4}
    large = log(TrainConfig(**options, output_dir=str(tmp_path / "large")), "grad_norm")
    for size, times in ((2, 2), (1, 4)):
        options |= {"batch_size": size, "gradient_accumulation_steps": times}
        config = TrainConfig(**options, output_dir=str(tmp_path / f"by{times}"))
        assert log(config, "grad_norm") == pytest.approx(large, rel=1e-4)


def test_padding_changes_nothing_but_the_time(dataset, tmp_path):
    """Batches without padding, padded ones, and TRL's own padded batches give one loss after the other alike."""
    from trl import SFTTrainer

    losses = []
    for attention in (None, False):
        config = TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run"), use_flash_attention=attention,
                             **SHORT | {"max_steps": 4})  # fmt: skip
        trainer = run.make_trainer(config)
        trainer.lengths = None  # in the usual order of rows
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    fresh = run.make_trainer(config)
    plain = SFTTrainer(model=load.load_model("tiny-base"), args=fresh.args, train_dataset=fresh.train_dataset,
                       eval_dataset=fresh.eval_dataset, processing_class=fresh.processing_class)  # fmt: skip
    plain.train()
    losses.append([entry["loss"] for entry in plain.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5) and losses[2] == pytest.approx(
        losses[0], rel=1e-5, abs=1e-5
    )


def test_a_packed_row_holds_whole_samples_and_learns_their_answers(dataset, tmp_path):
    config = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "run"), packing=True, **SHORT | {"max_length": 300}
    )
    trainer = run.make_trainer(config)
    plain = run.make_trainer(TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run"), **SHORT))
    rows, packed = plain.train_dataset, trainer.train_dataset
    assert len(packed) < len(rows) / 3 and max(sum(lengths) for lengths in packed["seq_lengths"]) <= 300
    assert sum(len(ids) for ids in packed["input_ids"]) == sum(len(ids) for ids in rows["input_ids"])
    batch = trainer.data_collator([packed[0]])
    alone = [trainer.data_collator([{"input_ids": ids, "labels": labels}]) for ids, labels in
             zip(*(torch.tensor(packed[0][name]).split(packed[0]["seq_lengths"]) for name in ("input_ids", "labels")), strict=True)]  # fmt: skip
    count = sum((part["labels"] != -100).sum() for part in alone)
    trainer.model.eval()
    with torch.no_grad():
        whole = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        parts = sum(trainer.compute_loss(trainer.model, part, num_items_in_batch=count) for part in alone)
    assert (batch["labels"] != -100).sum() == count > 10 and whole.item() == pytest.approx(parts.item(), rel=1e-5)


def test_packing_cuts_rows_that_are_longer_than_its_rows(dataset, tmp_path):
    config = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "run"), packing=True, **SHORT | {"max_length": 58}
    )
    trainer = run.make_trainer(config)
    assert max(len(ids) for ids in trainer.train_dataset["input_ids"]) <= 58 and trainer.train()


@pytest.mark.parametrize("name", ["gpt-neo-125M", "falcon-7b"])
def test_packing_is_refused_where_samples_can_t_be_kept_apart(name, dataset, tmp_path):
    config = TrainConfig(
        model_name=f"random-tiny:{name}", dataset_path=str(dataset), output_dir=str(tmp_path / "run"), packing=True
    )
    with pytest.raises(UserError, match="no attention that keeps packed samples apart"):
        run.make_trainer(config)


def test_the_best_checkpoint_is_kept_and_a_run_that_gets_worse_ends_early(dataset, tmp_path):
    """At this learning rate the held-out loss soon rises; two evaluations without a better one end the run."""
    config = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "run"), early_stopping_patience=2, load_best_model_at_end=True,
        eval_steps=4, save_steps=1000, save_total_limit=1, lr_scheduler_type="constant",
        **SHORT | {"max_steps": 80, "batch_size": 8, "learning_rate": 4e-3},
    )  # fmt: skip
    result = run.train(config)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = min(held_out, key=held_out.get)
    assert result["metrics"]["steps"] == best + 8 < 80 and result["metrics"]["best_eval_loss"] == held_out[best]
    kept, saved = tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors", tmp_path / "run" / "model.safetensors"
    assert kept.read_bytes() == saved.read_bytes()
    assert run_folder.get_step(run_folder.find_last(tmp_path / "run")) == best


def test_tensorboard_and_trackio_get_the_log(dataset, tmp_path, sftlab_command):
    for name in ("tensorboard", "trackio"):
        code, _, error = sftlab_command(
            "train", "--dataset-path", dataset, "--output-dir", tmp_path / name, "--max-steps", 2, "--logging-steps", 1,
            "--report-to", name, TRACKIO_DIR=str(tmp_path / "tracked"), OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert code == 0, error
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
    assert any(
        b"mean_token_accuracy" in path.read_bytes() for path in (tmp_path / "tracked").rglob("*") if path.is_file()
    )


def test_a_tracker_that_is_not_installed_is_named(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trackio is not installed. Add it: pip install trackio"):
        run.check_machine(TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run"), report_to="trackio"))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_moves_the_weights(optim, dataset, tmp_path):
    config = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "run"), optim=optim, use_lora=True, **SHORT
    )
    trainer = run.make_trainer(config)
    trainer.train()
    assert all(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name)


EXAMPLES = [
    {"use_4bit": True, "use_8bit": True, "use_lora": True},
    {"use_8bit": True},
    {"use_dora": True},
    {"use_4bit": True, "use_lora": True, "deepspeed": "zero3.json"},
    {"deepspeed": "zero0.json"},
    {"use_dora": True, "use_lora": True, "deepspeed": "zero3.json"},
    {"packing": True, "use_flash_attention": False},
    {"resume": True, "overwrite": True},
]


def test_every_conflict_of_the_table_is_refused_with_its_reason_and_its_mend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "zero0.json").write_text('{"bf16": {"enabled": "auto"}}')
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert len(EXAMPLES) == len(conflicts.CONFLICTS)
    for example, conflict in zip(EXAMPLES, conflicts.CONFLICTS, strict=True):
        with pytest.raises(UserError) as refused:
            TrainConfig(**example)
        assert str(refused.value) == str(conflict) and conflict.fix in str(conflict)
        assert conflict.why in conflicts.format_table()
    TrainConfig(use_4bit=True, use_lora=True, deepspeed="zero2.json")
