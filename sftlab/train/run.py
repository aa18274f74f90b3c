"""One training run: a configuration in, a run folder out.

sftlab train --model-name tiny-base --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/a --use-lora
python -m sftlab.train …the same options…
"""

import contextlib
import gc
import importlib.util
import os
import platform
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_pt_utils import get_model_param_count
from transformers.utils import is_liger_kernel_available

from sftlab import files, machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import TrainConfig
from sftlab.data import dataset, formats, prepared, templates
from sftlab.errors import UserError, is_full
from sftlab.memory import duration
from sftlab.models import attention, load, quantise
from sftlab.train import distributed, forecast, saved
from sftlab.train import folder as run_folder
from sftlab.train.callbacks import CountState, EvaluateEpochs, LiveLog, StopOnSignal

TRACEBACK_LINES = 40  # of an unforeseen error's, that result.json keeps
# Options that TRL's SFTConfig has under the same names.
SAME_NAMES = (
    "max_steps gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps optim weight_decay max_grad_norm "
    "packing gradient_checkpointing logging_steps save_steps save_total_limit seed report_to dataloader_num_workers".split()
)


def sft_config(config: TrainConfig, bf16: bool):
    """Make TRL's SFTConfig of a run: every option that differs from TRL's own default is here.

    With ZeRO-3 it must be made before the model: transformers then builds each device its shard of it.
    """
    from trl import SFTConfig

    args = SFTConfig(
        **{name: getattr(config, name) for name in SAME_NAMES},
        output_dir=config.output_dir,
        run_name=Path(config.output_dir).name,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=str(deepspeed_configs.find_config(config.deepspeed)) if config.deepspeed else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        max_length=config.max_length if config.packing else None,
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": not config.packing},
        eval_strategy="steps" if config.eval_steps else "epoch",
        eval_steps=config.eval_steps or None,
        metric_for_best_model="loss",
        logging_first_step=True,
        logging_nan_inf_filter=False,
        log_on_each_node=False,
    )
    args.load_best_model_at_end = config.load_best_model_at_end  # said to SFTConfig, it would change save_steps
    return args


@dataclass
class Rows:
    """The rows of a run, and the tokenizer with the data set's format.

    lengths: tokens of each row; shared: tokens that all rows begin with; in_loss: the share of tokens that are in the loss.
    """

    tokenizer: object
    new_tokens: list[str]
    train: object
    lengths: list[int]
    held_out: object
    held_out_lengths: list[int]
    shared: int
    in_loss: float


def make_trainer(config: TrainConfig):
    """Make the trainer of a run (TRL's, with our way to the loss), ready to train.

    `trainer.choices`: what was chosen for this machine, and why. `trainer.expected`: what memory and time it will take.
    """
    gc.disable()  # libraries make half a million objects, and all of them stay
    from sftlab.train.trainer import LabTrainer

    gc.enable()
    check_machine(config)
    rows = read_rows(config)
    # the same for all processes, and on resuming
    bf16, why = distributed.run_on_main(lambda: run_folder.read_precision(config) or load.choose_precision(config))
    memory, fits = forecast.expect(config, rows, bf16)
    args = sft_config(config, bf16)
    ends = templates.find_traits(rows.tokenizer).ends
    model = load.load_base(replace(config, bf16=bf16), rows.tokenizer, ends)
    lora = add_adapters(config, model, rows)
    if config.init_adapter:
        model, lora = saved.add_adapter(model, Path(config.init_adapter), is_trainable=True), None
    choice = attention.set_attention(model, config.use_flash_attention, bf16)
    kernels = choose_kernels(config.use_liger_kernel, model)
    args.padding_free = in_rows = knows_bounds(config, model, bf16)
    trainer = LabTrainer(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=rows.tokenizer,
        peft_config=lora,
        lengths=None if in_rows else rows.lengths,
    )
    shared, batches = choose_batches(config, trainer, model, rows.shared, in_rows, bf16)
    trainer.add_callback(EvaluateEpochs())
    load.expose_bias(trainer.model)
    lengths, processes = (rows.lengths, rows.held_out_lengths), distributed.read_world().size
    time, seconds = duration.expect(config, trainer.model, *lengths, bf16, shared=shared, processes=processes)
    trainer.expected = {"memory": memory, "time": time}
    trainer.choices = {
        "precision": f"{'bfloat16' if bf16 else 'float32'}: {why}",
        "memory": fits,
        "attention": choice,
        **({"kernels": kernels} if torch.cuda.is_available() else {}),
        "batches": batches,
        "loss": "completion tokens only" if trainer.uses_answer_head else "TRL's fused loss",
        "time": seconds,
    }
    return trainer


def check_machine(config: TrainConfig) -> None:
    """Raise UserError for what this machine can't do, or has no package for."""
    if config.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("bf16: this GPU does not compute in bfloat16; leave --bf16 out.")
    if (gpus := torch.cuda.device_count()) > 1 and "WORLD_SIZE" not in os.environ:
        start = f"start with `sftlab launch --gpus-per-node {gpus} train …`, or set CUDA_VISIBLE_DEVICES=0."
        raise UserError(f"this machine has {gpus} GPUs, and one process uses one: {start}")
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"report_to: {config.report_to} is not installed. Add it: pip install {config.report_to}.")


def read_rows(config: TrainConfig) -> Rows:
    """Read the prepared set, cut to max_length, and the tokenizer. Raises UserError where they don't fit each other."""
    splits, report = dataset.load_prepared(config.dataset_path)
    if (Path(config.model_name) / "adapter_config.json").is_file():
        fix = f"Train on from it by --init-adapter {config.model_name}, or resume it there with --resume"
        raise UserError(f"model_name: {config.model_name} holds an adapter. {fix}.")
    tokenizer = load.load_tokenizer(config.model_name, config.trust_remote_code)
    new_tokens = formats.set_format(tokenizer, report["format"])
    tokenizer.chat_template = report["chat_template"]
    prepared.check_tokens(splits["train"], tokenizer, report, config)
    positions = load.find_positions(load.read_settings(config.model_name, config.trust_remote_code))
    prepared.check_lengths(config, splits["train"], tokenizer, positions)
    train_split, lengths, held_out, held_out_lengths = prepared.cut_splits(config, splits)
    shared = prepared.find_shared(config, train_split, held_out)
    counts = report["splits"]["train"]
    in_loss = counts["trained_tokens"] / counts["tokens"]
    return Rows(tokenizer, new_tokens, train_split, lengths, held_out, held_out_lengths, shared, in_loss)


def add_adapters(config: TrainConfig, model, rows: Rows):
    """Make PEFT's LoraConfig of a run, or None; prepare a quantized model. Raises UserError for what can't be trained."""
    lora = load.lora_config(config)
    if lora:
        load.check_targets(model, lora)
        load.report_experts(model, lora)
        if rows.new_tokens:
            load.train_tokens(lora, model, rows.tokenizer, rows.new_tokens, config.train_new_tokens)
    if config.use_4bit or config.use_8bit:
        quantise.prepare_quantised(model, config.gradient_checkpointing)
    return lora


def choose_kernels(asked: bool | None, model) -> str:
    """Give the model Liger's fused kernels where they are asked for or can run; the choice in words.

    Raises UserError where they are asked for and can't run. The loss stays TRL's or the lab's.
    """
    if asked is False:
        return "transformers', as asked"
    problem = find_liger_problem(model.config.model_type)
    if problem and asked:
        raise UserError(f"use_liger_kernel: {problem}. Leave it out.")
    if problem:
        return f"transformers': {problem}"
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
    return "Liger's, for what it has fused in this architecture"


def find_liger_problem(model_type: str) -> str:
    """Why Liger's kernels can't run here on a model of this type, or an empty text."""
    if not torch.cuda.is_available():
        return "Liger's kernels need an NVIDIA GPU"
    if not is_liger_kernel_available():
        return "liger-kernel isn't installed (pip install liger-kernel)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return "" if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"liger-kernel has none for {model_type}"


def knows_bounds(config: TrainConfig, model, bf16: bool) -> bool:
    """Whether the model's attention keeps samples in one row apart. Raises UserError where it should and doesn't: it is tried out."""
    in_rows = attention.knows_bounds(model)
    if config.packing and not in_rows:
        raise UserError(f"packing: {config.model_name} has no attention that keeps packed samples apart; leave it out.")
    sharded = deepspeed_configs.find_stage(config.deepspeed) == 3  # then no device holds a whole model to try it on
    if in_rows and not sharded and attention.leaks(model, bf16):
        why = f"with {model.config._attn_implementation}, samples of {config.model_name} in one row see each other"
        fix = f"Add --no-use-flash-attention{', and leave out --packing' if config.packing else ''}."
        raise UserError(f"use_flash_attention: {why}. {fix}")
    return in_rows


def choose_batches(config: TrainConfig, trainer, model, shared: int, in_rows: bool, bf16: bool) -> tuple[int, str]:
    """Choose how batches are made; the tokens that all rows begin with if a batch computes them once, and the choice in words."""
    if config.packing:
        return 0, "packed into rows of max_length"
    if not in_rows:
        return 0, "of like length, padded"
    words = "in one row each, without padding"
    if not trainer.uses_answer_head:
        return 0, words
    shared = shared if attention.shares_prefix(model, bf16) else 0
    trainer.put_in_rows(shared)
    if shared:
        words += f"; the {shared} tokens that all rows begin with are computed once a batch"
    return shared, words


def train(config: TrainConfig) -> dict:
    """Run one training and return what `result.json` holds: status, configuration and hash, metrics, versions.

    Its status is completed, interrupted (by SIGINT or SIGTERM, after a checkpoint) or failed (with the error); a run that
    was killed leaves none. `seconds` counts from this start, `steps` all steps of the run, resumed or not. Raises UserError
    for what the user can fix.
    """
    with run_folder.noting_end(Path(config.output_dir)), distributed.initialized(config) as world:
        config = saved.adopt_adapter(config)
        checkpoint = distributed.run_on_main(run_folder.claim_folder, config, world.size)
        with forecast.advising(config):
            trainer = make_trainer(config)
        about = {
            "config": asdict(config),
            "config_hash": config.hash(),
            "processes": world.size,
            "choices": trainer.choices,
        }
        started = time.time()
        distributed.run_on_main(run_folder.begin, config, about)
        try:
            return run_steps(config, trainer, checkpoint, about, started)
        except BaseException as error:
            if is_full(error):
                error = run_folder.clear_full_disk(Path(config.output_dir))
            status, reason = run_folder.explain_end(error)
            found = {"status": status, "error": reason} | ({"rank": world.rank} if world.size > 1 else {})
            if not isinstance(error, UserError | KeyboardInterrupt):
                found["traceback"] = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
            if not (Path(config.output_dir) / "result.json").exists():  # else another process has said why
                with contextlib.suppress(OSError):  # the disk may be full
                    write_result(found | about, trainer, started)
            raise error


def run_steps(config: TrainConfig, trainer, checkpoint: Path | None, about: dict, started: float) -> dict:
    """Train from the beginning or from a checkpoint, save, and return the result."""
    trainer.add_callback(counted := CountState())
    if trainer.is_world_process_zero():
        trainer.add_callback(LiveLog(trainer))
    with StopOnSignal() as stop, forecast.advising(config, trainer.expected["memory"]):
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.received and trainer.state.global_step < trainer.state.max_steps:
            found = {"status": "interrupted", "signal": stop.received.name}
        else:
            memory = forecast.measure_memory(trainer.expected["memory"])
            rank = {"host": platform.node(), "peak_bytes": memory["peak_bytes"], "held": counted.parts}
            found = {"status": "completed", "memory": memory, "ranks": distributed.gather(rank)}
            if not checkpoint:
                found["time"] = duration.measure_run(trainer.expected["time"], started)
            trainer.save_run()
        return distributed.run_on_main(write_result, found | about, trainer, started)


def write_result(found: dict, trainer, started: float) -> dict:
    """Write `result.json` whole, with metrics and versions, and return its content; started: seconds since the epoch."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    metrics = {
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval_loss": held_out[-1] if held_out else None,
        "best_eval_loss": min(held_out, default=None),
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - started, 2),
        "trained_parameters": get_model_param_count(trainer.model, trainable_only=True),
    }
    result = found | {"metrics": metrics, "versions": machine.list_versions()}
    files.write_json(Path(trainer.args.output_dir) / "result.json", result)
    return result
