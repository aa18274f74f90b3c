"""A finished run, opened again: its configuration, its tokenizer, and its model as it was trained.

python -c "from sftlab.train import saved; print(saved.open_run('runs/first').config)"
"""

import dataclasses
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.data import dataset
from sftlab.data.dataset import FACTS
from sftlab.errors import UserError
from sftlab.hub import catalog
from sftlab.models import load, quantise
from sftlab.train import checkpoints

# Of no meaning to a run that is only read; and whether its code may run is for who reads it to say.
WRITING = {"output_dir", "resume", "overwrite", "deepspeed", "trust_remote_code"}


@dataclass
class Run:
    """A finished run: its folder, its configuration with the precision that it chose, its result, its data's report.

    `data` is empty where the data set's folder is gone.
    """

    folder: Path
    config: TrainConfig
    result: dict
    data: dict

    @property
    def quantised(self) -> bool:
        return self.config.use_4bit or self.config.use_8bit


def open_run(path: str | Path, trust_remote_code: bool = False) -> Run:
    """The run in a folder. Raises UserError for a checkpoint, a run that didn't end well, and what is no run at all."""
    folder = Path(path)
    if checkpoints.get_step(folder) is not None and (folder.parent / "run.json").is_file():
        raise UserError(f"run_dir: {folder} is a checkpoint. Name its run, {folder.parent}; if that was cut short, "
                        "first end it with `sftlab train … --resume`.")  # fmt: skip
    if not (folder / "run.json").is_file():
        raise UserError(f"run_dir: {folder} is not a run folder made by `sftlab train`. Name one that holds run.json.")
    result = files.read_json(folder / "result.json")
    status = result.get("status", "not ended")
    if status != "completed":
        raise UserError(f"run_dir: the run in {folder} is {status}, so what it holds is no finished model. Go on with "
                        "`sftlab train … --resume`.")  # fmt: skip
    values = {name: value for name, value in TrainConfig.keep_known(result["config"]).items() if name not in WRITING}
    values["bf16"] = result.get("choices", {}).get("precision", "").startswith("bfloat16")
    config = TrainConfig.build(**values, trust_remote_code=trust_remote_code)
    return Run(folder, config, result, files.read_json(Path(config.dataset_path) / FACTS))


def read_settings(run: Run):
    """transformers' configuration of the base, or of the model itself after full fine-tuning."""
    name = run.config.model_name if run.config.use_lora else str(run.folder)
    return load.read_settings(name, run.config.trust_remote_code)


def count_parameters(run: Run) -> int:
    """How many parameters that model has, tied ones counted once."""
    import torch

    return load.build_empty(read_settings(run), torch.float32, None, run.config.trust_remote_code).num_parameters()


def load_run(run: Run, base: str = "trained", exactly: bool = True):
    """The tuned model of a run, its adapter (if any) beside the base and not merged.

    exactly: computing in float32, whatever the weights were stored in; else as it was trained, in the same memory.

    base, where it is quantised: `trained` leaves it so; `dequantised` reads its 8 or 4 bits back into float32;
    `published` takes the weights that it was quantised from. The order is that of a training, so that random weights
    and added embeddings come out the same.
    """
    from peft import PeftModel
    from transformers import set_seed

    trusted = run.config.trust_remote_code
    tokenizer = load.load_tokenizer(str(run.folder), trusted)
    compute = compute_exactly if exactly else (lambda model: model)
    if not run.config.use_lora:
        return set_ends(
            compute(load.load_model(str(run.folder), TrainConfig(trust_remote_code=trusted))), tokenizer
        ).eval()
    config = run.config
    if base == "published":
        config = dataclasses.replace(config, use_4bit=False, use_8bit=False, bf16=False)
    set_seed(config.seed)
    model = load.load_model(config.model_name, config)
    load.fit_vocabulary(model, tokenizer)
    model = set_ends(compute(model), tokenizer)
    if base == "dequantised":
        import torch

        logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)  # says what was asked for
        model = model.dequantize(torch.float32)
    return keep_head_bias(PeftModel.from_pretrained(model, str(run.folder))).eval()


def set_ends(model, tokenizer):
    """Let the model end and fill answers with the tokenizer's tokens, which are the format's, as in training; return it."""
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        settings.bos_token_id = tokenizer.bos_token_id
    return model


def compute_exactly(model):
    """Let a model compute in float32, whatever its weights were stored in; quantised weights stay what they are."""
    import torch

    for part in model.modules():
        if hasattr(part, "compute_dtype"):  # 4-bit layers read their weights back into it
            part.compute_dtype, part.compute_type_is_set = torch.float32, True
            part.weight.quant_state.dtype = torch.float32
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return model


def find_lost_bias(model):
    """The bias of an output layer whose token rows are trained, which PEFT 0.21 leaves out of the sum; or None.

    The run trained with it (`load.expose_bias`), and a merged model has it again.
    """
    head = model.get_output_embeddings()
    return getattr(head.original_module, "bias", None) if hasattr(head, "token_adapter") else None


def keep_head_bias(model):
    """Add that bias again, and return the model."""
    if (bias := find_lost_bias(model)) is not None:
        model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: output + bias)
    return model


def load_any(name: str, trust_remote_code: bool = False):
    """A model and its tokenizer by the name of a run, an export, or anything that `load.load_model` knows.

    A run comes as it was trained, quantised if it was; an adapter on its base; anything else in the precision that it
    was saved in. Raises UserError for what can't be had.
    """
    if (Path(name) / "run.json").is_file():
        run = open_run(name, trust_remote_code)
        return load_run(run, exactly=False), load.load_tokenizer(name, trust_remote_code)
    tokenizer = load.load_tokenizer(name, trust_remote_code)
    if not name.startswith(catalog.RANDOM) and (Path(name) / "adapter_config.json").is_file():
        return load_adapter(name, tokenizer, exactly=False, trust_remote_code=trust_remote_code), tokenizer
    if name.startswith(catalog.RANDOM):
        return load.load_model(name).eval(), tokenizer
    import torch
    from transformers import AutoModelForCausalLM

    device = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    try:
        path = load.locate(name)
        with load.guarded(name, path):
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", device_map=device, trust_remote_code=trust_remote_code
            )
    except OSError as error:
        raise UserError(f"model {name}: can't be loaded: {str(error).splitlines()[0]}") from error
    return model.eval(), tokenizer


def load_adapter(name: str, tokenizer, config: TrainConfig | None = None, base: str = "", exactly: bool = True,
                 trust_remote_code: bool = False):  # fmt: skip
    """An adapter's folder, on the base that its adapter_config.json names: tiny-base, a catalogue name, a Hub id, a folder.

    config: how the base is held; as it was trained, where the folder is an export that says so. base: another name of it.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    base = base or files.read_json(Path(name) / "adapter_config.json")["base_model_name_or_path"]
    bits = files.read_json(Path(name) / "export.json").get("base_bits")
    config = config or TrainConfig(use_lora=True, use_4bit=bits == 4, use_8bit=bits == 8, bf16=False,
                                   trust_remote_code=trust_remote_code)  # fmt: skip
    model = load.load_model(base, config)
    load.fit_vocabulary(model, tokenizer)
    if (Path(name) / "generation_config.json").is_file():  # the base's own settings may end answers elsewhere
        model.generation_config = GenerationConfig.from_pretrained(name)
    return PeftModel.from_pretrained(compute_exactly(model) if exactly else model, name).eval()


@dataclass
class Subject:
    """A finished run: its folder, result, configuration with the precision it had, tokenizer, and data set."""

    folder: Path
    result: dict
    config: TrainConfig
    tokenizer: object
    splits: object
    report: dict


def read_run(folder: str | Path, dataset_path: str | None = None, trust_remote_code: bool = False) -> Subject:
    """A run folder with all that an evaluation needs; `dataset_path`: another set than the run's own.

    Raises UserError for a folder that is no finished run, a data set that is gone, or one for other tokens.
    """
    opened = open_run(folder, trust_remote_code)
    config = dataclasses.replace(opened.config, dataset_path=dataset_path or opened.config.dataset_path)
    splits, report = dataset.load_prepared(config.dataset_path)
    tokenizer = load.load_tokenizer(str(folder), trust_remote_code)
    dataset.check_tokens(splits["test"], tokenizer, report, config)
    return Subject(opened.folder, opened.result, config, tokenizer, splits, report)


def load_models(run: Subject) -> Iterator[tuple[str, object]]:
    """The base, held as in training, and then the tuned model; never both in memory, if the caller lets go of the first."""
    from transformers import set_seed

    config = dataclasses.replace(run.config, gradient_checkpointing=False)
    set_seed(config.seed)  # a base of random weights is the run's own again
    model = load.load_model(config.model_name, config)
    load.fit_vocabulary(model, run.tokenizer)
    if config.use_4bit or config.use_8bit:
        quantise.prepare_quantised(model, config)  # as in training: what isn't quantised is in float32
    yield "base", model
    if (run.folder / "adapter_config.json").is_file():
        from peft import PeftModel

        model = keep_head_bias(PeftModel.from_pretrained(model, str(run.folder)))
    else:
        del model
        gc.collect()
        model = load.load_model(str(run.folder), config)
    yield "tuned", model
