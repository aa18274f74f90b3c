"""One training run: a configuration in, a run folder out.

sftlab train --model-name tiny-base --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/a --use-lora
python -m sftlab.train …the same options…
"""

import contextlib
import dataclasses
import importlib.util
import os
import platform
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from sftlab import machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import TrainConfig
from sftlab.data import dataset, formats
from sftlab.data.dataset import check_tokens
from sftlab.errors import UserError
from sftlab.memory import duration
from sftlab.models import load, quantise
from sftlab.train import distributed, forecast
from sftlab.train import folder as run_folder

TRACED = 40  # lines of an unforeseen error's traceback that result.json keeps


def sft_config(config: TrainConfig, bf16: bool):
    """TRL's SFTConfig of a run: every option that differs from TRL's own default stands here.

    With ZeRO-3 it must be made before the model: transformers then builds each device its piece of it.
    """
    import torch
    from trl import SFTConfig

    by_steps = "steps" if config.eval_steps else "epoch"
    args = SFTConfig(
        output_dir=config.output_dir, num_train_epochs=config.num_epochs, max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=2 * config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps, learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type, warmup_steps=config.warmup_steps, optim=config.optim,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, bf16=bf16,
        max_length=config.max_length if config.packing else None, packing=config.packing, eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": not config.packing},
        gradient_checkpointing=config.gradient_checkpointing, logging_steps=config.logging_steps, logging_first_step=True,
        log_on_each_node=False, ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False, save_steps=config.save_steps, save_total_limit=config.save_total_limit,
        eval_strategy=by_steps, eval_steps=config.eval_steps or None, metric_for_best_model="loss", greater_is_better=False,
        seed=config.seed, report_to=config.report_to, run_name=Path(config.output_dir).name, project="sftlab",
        dataloader_num_workers=config.dataloader_num_workers, dataloader_pin_memory=torch.cuda.is_available(),
        restore_callback_states_from_checkpoint=True, deepspeed=str(deepspeed_configs.find_config(config.deepspeed)) if config.deepspeed else None, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    # set late, because TRL would ask for checkpoints at each evaluation: SaveBest writes the best ones, and no more
    args.load_best_model_at_end = config.load_best_model_at_end
    return args


@dataclass
class Rows:
    """The rows of a run: the tokenizer with the set's format, its new tokens, each split with its lengths in tokens; shared: tokens
    that all rows begin with; in_loss: the share of tokens that are in the loss."""

    tokenizer: object
    new_tokens: list[str]
    train: object
    lengths: list[int]
    held_out: object
    held_out_lengths: list[int]
    shared: int
    in_loss: float


def make_trainer(config: TrainConfig):
    """The trainer (TRL's, with our way to the loss), with the model, data set and tokenizer of a run, ready to train.

    `trainer.choices` says what was chosen for this machine and why: precision, attention, batches, loss.
    """
    with machine.importing():
        from transformers import set_seed

        from sftlab.train.trainer import LabTrainer

    check_machine(config)
    rows = read_rows(config)
    bf16, precision = choose_precision(config)
    new_rows = bool(rows.new_tokens and config.use_lora and config.train_new_tokens)
    memory, fits = forecast.expect(config, rows.lengths, rows.in_loss, bf16, new_rows, rows.shared)
    small = build_small(config)  # before sft_config, with which transformers shards each model
    args = sft_config(config, bf16)
    set_seed(config.seed)  # before the model: random weights and the adapters' first values are part of the run
    model = build_model(config, rows.tokenizer, bf16)
    lora = add_adapters(config, model, rows)
    chosen = set_attention(config, model, small, bf16)
    args.padding_free = in_rows = knows_bounds(config, small or model, bf16)
    trainer = LabTrainer(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=rows.tokenizer,
        peft_config=lora,
        lengths=None if in_rows else rows.lengths,
    )
    shared, batches = set_batches(config, trainer, small or model, rows.shared, in_rows, bf16)
    add_callbacks(config, trainer)
    time, words = duration.expect(
        config,
        trainer.model,
        rows.lengths,
        rows.held_out_lengths,
        bf16,
        shared=shared,
        processes=distributed.read_world().size,
    )
    trainer.expected = {"memory": memory, "time": time}
    trainer.choices = {
        "precision": precision,
        "memory": fits,
        "attention": chosen,
        "batches": batches,
        "loss": "completion tokens only" if trainer.uses_answer_head else "TRL's fused loss",
        "time": words,
    }
    return trainer


def read_rows(config: TrainConfig) -> Rows:
    """The prepared set, cut to max_length, and the tokenizer in its format. Raises UserError where they don't fit each other."""
    splits, report = dataset.load_prepared(config.dataset_path)
    if (Path(config.model_name) / "adapter_config.json").is_file():
        raise UserError(
            f"model_name: {config.model_name} holds an adapter. Go on with --resume there, or start from its base."
        )
    tokenizer = load.load_tokenizer(config.model_name, config.trust_remote_code)
    new_tokens = formats.set_format(tokenizer, report["format"])
    tokenizer.chat_template = report["chat_template"]
    check_tokens(splits["train"], tokenizer, report, config)
    train_split, lengths, held_out, held_out_lengths = dataset.cut_splits(config, splits)
    shared = dataset.find_shared(config, train_split, held_out)
    counts = report["splits"]["train"]
    in_loss = counts["trained_tokens"] / counts["tokens"]
    return Rows(tokenizer, new_tokens, train_split, lengths, held_out, held_out_lengths, shared, in_loss)


def choose_precision(config: TrainConfig) -> tuple[bool, str]:
    """Whether a run computes in bfloat16, the same for all processes and on resuming, and why."""
    bf16, why = distributed.from_main(lambda: run_folder.read_precision(config) or load.choose_precision(config))
    return bf16, f"{'bfloat16' if bf16 else 'float32'}: {why}"


def build_small(config: TrainConfig):
    """A small model of the same kind to try things out on, for ZeRO-3, where no device holds a whole one; else None."""
    if deepspeed_configs.find_stage(config.deepspeed) == 3:
        return load.build_small(config.model_name, config.trust_remote_code)
    return None


def build_model(config: TrainConfig, tokenizer, bf16: bool):
    """The model with an embedding for each token; what ends an answer is the format's EOS token."""
    model = load.load_model(config.model_name, dataclasses.replace(config, bf16=bf16))
    load.fit_vocabulary(model, tokenizer)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def add_adapters(config: TrainConfig, model, rows: Rows):
    """PEFT's LoraConfig of a run, or None; a quantized model is made ready for it. Raises UserError for what can't be trained."""
    import torch

    lora = load.lora_config(config)
    if lora:
        zero3 = deepspeed_configs.find_stage(config.deepspeed) == 3
        if rows.new_tokens and config.train_new_tokens and zero3 and not torch.cuda.is_available():
            raise UserError(
                f"deepspeed: {', '.join(rows.new_tokens)} are new tokens, whose rows PEFT can't train under ZeRO-3 on a CPU. "
                "Take --deepspeed zero2, or --no-train-new-tokens."
            )
        load.check_targets(model, lora.target_modules)
        if rows.new_tokens:
            load.train_tokens(lora, model, rows.tokenizer, rows.new_tokens, config.train_new_tokens)
    if config.use_4bit or config.use_8bit:
        quantise.prepare_quantised(model, config)
    return lora


def set_attention(config: TrainConfig, model, small, bf16: bool) -> str:
    """Choose the attention of the model, and of the small one if there is one; the choice, and why."""
    from sftlab.models import attention

    if small is not None:
        attention.set_attention(small, config.use_flash_attention, bf16)
    return attention.set_attention(model, config.use_flash_attention, bf16)


def set_batches(config: TrainConfig, trainer, model, shared: int, in_rows: bool, bf16: bool) -> tuple[int, str]:
    """Choose how batches are made; the tokens that all rows begin with if a batch computes them once, and the choice in words."""
    from sftlab.models import attention
    from sftlab.train.trainer import MULTIPLE, InRows

    in_short_rows = in_rows and trainer.uses_answer_head and not config.packing
    shared = shared if in_short_rows and attention.shares_prefix(model, bf16) else 0
    if in_short_rows:
        trainer.data_collator = InRows(trainer.data_collator, shared, MULTIPLE[bf16])
    if config.packing:
        return shared, "packed into rows of max_length"
    words = "in one row each, without padding" if in_rows else "of like length, padded"
    if shared:
        words += f"; the {shared} tokens that all rows begin with are computed once a batch"
    return shared, words


def add_callbacks(config: TrainConfig, trainer) -> None:
    from transformers import EarlyStoppingCallback

    from sftlab.train import callbacks

    if config.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    if config.load_best_model_at_end:
        trainer.add_callback(callbacks.SaveBest())
    load.expose_bias(trainer.model)


def check_machine(config: TrainConfig) -> None:
    """Raises UserError for what this machine can't do, or has no package for."""
    import torch

    if config.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("bf16: this GPU does not compute in bfloat16; leave --bf16 out.")
    if (gpus := torch.cuda.device_count()) > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(f"this machine has {gpus} GPUs, and one process uses one: start with `sftlab launch --gpus-per-node {gpus} "
                        "train …`, or set CUDA_VISIBLE_DEVICES=0.")  # fmt: skip
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"report_to: {config.report_to} is not installed. Add it: pip install {config.report_to}.")


def knows_bounds(config: TrainConfig, model, bf16: bool) -> bool:
    """Whether the model's attention keeps samples in one row apart. Raises UserError where it should and doesn't: it is tried out."""
    from sftlab.models import attention

    in_rows = attention.knows_bounds(model)
    if config.packing and not in_rows:
        raise UserError(f"packing: {config.model_name} has no attention that keeps packed samples apart; leave it out.")
    if in_rows and attention.leaks(model, bf16):
        fix = "Add --no-use-flash-attention" + (", and leave out --packing." if config.packing else ".")
        used = model.config._attn_implementation
        raise UserError(
            f"use_flash_attention: with {used}, samples of {config.model_name} in one row see each other. {fix}"
        )
    return in_rows


def train(config: TrainConfig) -> dict:
    """Run one training and return what `result.json` holds: status, configuration and hash, metrics, versions.

    The run folder holds the adapter or model, the tokenizer with its template, `trainer_state.json`, the checkpoints
    and, written last, `result.json`. Its status is completed, interrupted (by SIGINT or SIGTERM, after a checkpoint) or
    failed (with the error); a run that was killed leaves none. `seconds` counts from this start, `steps` all steps of
    the run, resumed or not. Raises UserError for what the user can fix.
    """
    with distributed.joined(config) as world:
        return train_here(config, world)


def train_here(config: TrainConfig, world: distributed.World) -> dict:
    """`train`, in a process that has met the others of its run. The first one alone writes, and all return its result."""
    from sftlab.train.callbacks import GoOn, Held, LiveLog, StopOnSignal

    checkpoint = distributed.from_main(run_folder.claim_folder, config, world.size)
    with forecast.advising(config):
        trainer = make_trainer(config)
    folder = Path(config.output_dir)
    about = {"config": dataclasses.asdict(config), "config_hash": config.hash(), "processes": world.size,
             "choices": trainer.choices}  # fmt: skip
    started, begun = time.time(), False
    try:
        distributed.from_main(run_folder.begin, config, about)
        begun = True
        trainer.add_callback(held := Held())
        if checkpoint:
            trainer.add_callback(GoOn(trainer, checkpoint, config.early_stopping_patience))
        trainer.add_callback(LiveLog(trainer))
        with StopOnSignal() as stop, forecast.advising(config, trainer.expected["memory"]):
            trainer.add_callback(stop)
            ended = checkpoint and run_folder.is_at_end(checkpoint, config)
            if ended and not config.deepspeed:
                run_folder.load_end(trainer, checkpoint)
            elif not ended:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            status = {"status": "completed"}
            if stop.received and trainer.state.global_step < trainer.state.max_steps:
                status = {"status": "interrupted", "signal": stop.received.name}
            else:
                about["memory"] = forecast.measure(trainer.expected["memory"])
                about["ranks"] = distributed.gather(
                    {"host": platform.node(), "peak_bytes": about["memory"]["peak_bytes"], "held": held.parts}
                )
                if not checkpoint:
                    about["time"] = duration.measure_run(trainer.expected["time"], started, trainer.state.global_step)
                if ended and config.deepspeed:
                    distributed.from_main(run_folder.copy_end, trainer, checkpoint, folder)
                else:
                    run_folder.save(trainer, folder)
            return distributed.from_main(run_folder.write_result, folder, status | about, trainer, started)
    except BaseException as error:
        words = "stopped at once" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())[:1000]
        status = {"status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"}
        status["error"] = f"{type(error).__name__}: {words}"
        if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
            status["traceback"] = traceback.format_exc().splitlines()[-TRACED:]
        if world.size > 1:
            status["rank"] = world.rank
        first = not (folder / "result.json").exists()  # the first process that fails says why
        if first and begun and not isinstance(error, SystemExit):  # else the folder may hold an earlier run as it was
            with contextlib.suppress(OSError):  # the disk may be full; what happened is raised in any case
                run_folder.write_result(folder, status | about, trainer, started)
        if not isinstance(error, SystemExit):
            run_folder.end(folder, status["status"], status["error"])  # the process may be a notebook's, which lives on
        raise
