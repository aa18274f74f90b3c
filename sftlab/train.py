"""One training run: a configuration in, a run folder out.

sftlab train --model-name tiny-base --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/a --use-lora
python -m sftlab.train …the same options…
"""

import dataclasses
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

from sftlab import data, data_report, files, formats, masking, models, new_tokens
from sftlab.config import TrainConfig, UserError

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


def sft_config(config: TrainConfig):
    """TRL's SFTConfig of a run: every option that differs from TRL's own default stands here."""
    import torch
    from trl import SFTConfig

    by_steps = "steps" if config.eval_steps else "epoch"
    return SFTConfig(
        output_dir=config.output_dir, num_train_epochs=config.num_epochs, max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=2 * config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps, learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type, warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay, max_length=config.max_length, bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing, logging_steps=config.logging_steps, logging_first_step=True,
        save_steps=config.save_steps, save_total_limit=config.save_total_limit, eval_strategy=by_steps,
        eval_steps=config.eval_steps or None, seed=config.seed, report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def make_trainer(config: TrainConfig):
    """The trainer (TRL's, with our way to the loss), with the model, data set and tokenizer of a run, ready to train."""
    from transformers import set_seed

    from sftlab.answer_head import AnswerTrainer

    splits, report = data.load_prepared(config.dataset_path)
    if (Path(config.model_name) / "adapter_config.json").is_file():
        raise UserError(
            f"model_name: {config.model_name} holds an adapter. Go on with --resume there, or start from its base."
        )
    tokenizer = models.load_tokenizer(config.model_name)
    unseen = formats.set_format(tokenizer, report["format"])
    tokenizer.chat_template = report["chat_template"]
    check_tokens(splits["train"], tokenizer, report, config)
    set_seed(config.seed)  # before the model: random weights and the adapters' first values are part of the run
    model = models.load_model(config.model_name, config)
    new_tokens.fit_vocabulary(model, tokenizer)
    for settings in (
        model.config,
        model.generation_config,
    ):  # what ends an answer is the format's; saved with the model
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    lora = models.lora_config(config)
    if lora:
        models.check_targets(model, lora.target_modules)
        if unseen:
            new_tokens.train_tokens(lora, model, tokenizer, unseen, config.train_new_tokens)
    held_out = splits["test"].select(range(min(config.eval_samples or len(splits["test"]), len(splits["test"]))))
    trainer = AnswerTrainer(model=model, args=sft_config(config), train_dataset=splits["train"], eval_dataset=held_out,
                            processing_class=tokenizer, peft_config=lora)  # fmt: skip
    new_tokens.expose_bias(trainer.model)
    return trainer


def check_tokens(train_split, tokenizer, report: dict, config: TrainConfig) -> None:
    """Raises UserError where the set was made for another tokenizer, or would teach nothing at this max_length."""
    rows = train_split[:64]
    if [ids.tolist() for ids in masking.encode_chats(tokenizer, rows["messages"])["input_ids"]] != rows["input_ids"]:
        raise UserError(f"dataset_path: {config.dataset_path} was made for {report['model']}, whose tokens are not those of "
                        f"{config.model_name}. Run `sftlab prepare --model {config.model_name}`.")  # fmt: skip
    if data_report.measure(train_split, tokenizer, config.max_length)["trained_tokens"] == 0:
        raise UserError(f"max_length: within {config.max_length} tokens no row has an answer left; raise it.")


def claim_folder(config: TrainConfig) -> str | None:
    """Return the checkpoint to resume from, or None; an output folder that exists is refused unasked. Changes nothing."""
    folder = Path(config.output_dir)
    states = folder.glob("checkpoint-*/trainer_state.json")  # the last file of a checkpoint to be written
    whole = [path.parent for path in states if path.parent.name.split("-")[1].isdigit()]
    checkpoints = sorted(whole, key=lambda path: int(path.name.split("-")[1]))
    if config.resume:
        if not checkpoints:
            raise UserError(f"resume: {folder} holds no whole checkpoint; leave out --resume to start anew.")
        return str(checkpoints[-1])
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        if not config.overwrite or folder.is_file():
            raise UserError(
                f"output_dir: {folder} exists. Add --resume to go on, --overwrite to delete it, or name another."
            )
        if not any("config_hash" in files.read_json(folder / name) for name in ("run.json", "result.json")):
            raise UserError(f"overwrite: {folder} is not a run folder of the lab; it stays. Name another --output-dir.")
    return None


def check_moved(model) -> None:
    """Raises UserError if an adapter learned nothing: LoRA's B starts at zero, and one training step moves it."""
    still = [name for name, weight in model.named_parameters() if "lora_B" in name and not weight.any()]
    if still:
        raise UserError(f"training moved nothing: {len(still)} adapters are still zero, {still[0]} first. Raise --learning-rate "
                        "or --max-steps; with --gradient-checkpointing, inputs must require gradients.")  # fmt: skip


def train(config: TrainConfig) -> dict:
    """Run one training and return what `result.json` holds: status, configuration and hash, metrics, versions.

    The run folder holds the adapter or model, the tokenizer with its template, `trainer_state.json`, the checkpoints
    and, written last, `result.json`. `seconds` counts from this start, `steps` all steps of the run, resumed or not.
    Raises UserError for what the user can mend.
    """
    checkpoint = claim_folder(config)
    trainer = make_trainer(config)
    folder = Path(config.output_dir)
    if config.overwrite and folder.exists():  # only now, when the new run has all that it needs
        shutil.rmtree(folder)
    files.write_json(folder / "run.json", {"config": dataclasses.asdict(config), "config_hash": config.hash()})
    (folder / "result.json").unlink(missing_ok=True)
    started = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.time() - started
    trainer.save_model()  # the adapter or the model, and the tokenizer with its template
    trainer.save_state()
    check_moved(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    result = {
        "status": "completed", "config": dataclasses.asdict(config), "config_hash": config.hash(),
        "metrics": {
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None, "eval_loss": held_out[-1] if held_out else None,
            "steps": trainer.state.global_step, "seconds": round(seconds, 2), "trained_parameters": trained,
        },
        "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip
    files.write_json(folder / "result.json", result)
    return result


def main() -> int:
    """`python -m sftlab.train`: what `sftlab train` does."""
    from sftlab.cli import main as cli

    return cli(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
