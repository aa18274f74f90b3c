"""A finished run, opened again: its configuration, its tokenizer, and its model as it was trained.

python -c "from sftlab.train import saved; print(saved.open_run('runs/first').config)"
"""

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.data import dataset, prepared, templates
from sftlab.errors import UserError
from sftlab.hub import catalog
from sftlab.models import load, quantise
from sftlab.train import folder as run_folder

# Of no meaning to a run that is only read; and whether its code may run is for who reads it to say.
LEFT_OUT = {"output_dir", "resume", "overwrite", "deepspeed", "trust_remote_code"}


@dataclass
class Run:
    """A finished run: its folder, its configuration with the precision that it chose, its result, its data's report.

    `data` is empty where the data set's folder is gone. `read_run` adds the tokenizer and the data set.
    """

    folder: Path
    config: TrainConfig
    result: dict
    data: dict
    tokenizer: object = None
    splits: object = None

    @property
    def quantised(self) -> bool:
        return self.config.use_4bit or self.config.use_8bit


def open_run(path: str | Path, trust_remote_code: bool = False) -> Run:
    """Open the run in a folder. Raises UserError for a checkpoint, a run that didn't end well, and what is no run at all."""
    folder = Path(path)
    if run_folder.get_step(folder) is not None and (folder.parent / "run.json").is_file():
        fix = f"Name its run, {folder.parent}; if that was cut short, first end it with `sftlab train … --resume`."
        raise UserError(f"run_dir: {folder} is a checkpoint. {fix}")
    if not (folder / "run.json").is_file():
        raise UserError(f"run_dir: {folder} is not a run folder made by `sftlab train`. Name one that holds run.json.")
    result = files.read_json(folder / "result.json")
    status = result.get("status", "not ended")
    if status != "completed":
        fix = "Resume it with `sftlab train … --resume`."
        raise UserError(f"run_dir: the run in {folder} is {status}, so what it holds is no finished model. {fix}")
    values = {name: value for name, value in TrainConfig.keep_known(result["config"]).items() if name not in LEFT_OUT}
    values["bf16"] = result.get("choices", {}).get("precision", "").startswith("bfloat16")
    config = TrainConfig.build(**values, trust_remote_code=trust_remote_code)
    return Run(folder, config, result, files.read_json(Path(config.dataset_path) / dataset.FACTS))


def read_run(folder: str | Path, dataset_path: str | None = None, trust_remote_code: bool = False) -> Run:
    """Open a run with all that an evaluation needs; `dataset_path`: another set than the run's own.

    Raises UserError for a folder that is no finished run, a data set that is gone, or one for other tokens.
    """
    run = open_run(folder, trust_remote_code)
    run.config = replace(run.config, dataset_path=dataset_path or run.config.dataset_path)
    run.splits, run.data = dataset.load_prepared(run.config.dataset_path)
    run.tokenizer = load.load_tokenizer(str(folder), trust_remote_code)
    prepared.check_tokens(run.splits["test"], run.tokenizer, run.data, run.config)
    return run


def read_settings(run: Run):
    """Read transformers' configuration of the base, or of the model itself after full fine-tuning."""
    name = run.config.model_name if run.config.use_lora else str(run.folder)
    return load.read_settings(name, run.config.trust_remote_code)


def load_run(run: Run, base: str = "trained", exactly: bool = True):
    """Load the tuned model of a run, its adapter (if any) not merged.

    exactly: computing in float32, whatever the weights were stored in; else as it was trained, in the same memory.
    base, where it is quantized: `trained` leaves it so; `dequantised` turns its 8 or 4 bits into float32; `published` takes
    the weights that it was quantized from.
    """
    config, trusted = run.config, run.config.trust_remote_code
    tokenizer = load.load_tokenizer(str(run.folder), trusted)
    if not config.use_lora:
        model = load.load_model(str(run.folder), TrainConfig(trust_remote_code=trusted))
        model = load.set_ends(model, tokenizer, templates.find_traits(tokenizer).ends)
        return (compute_exactly(model) if exactly else model).eval()
    if base == "published":
        config = replace(config, use_4bit=False, use_8bit=False, bf16=False)
    return load_adapter(run.folder, config, tokenizer, exactly, dequantize=base == "dequantised")


def load_adapter(folder: Path, config: TrainConfig, tokenizer, exactly: bool = True, dequantize: bool = False):
    """Load the adapter in a folder, not merged, on the base that a configuration names."""
    from transformers import GenerationConfig

    model = load.load_base(config, tokenizer, templates.find_traits(tokenizer).ends)
    if exactly:
        compute_exactly(model)
    if dequantize:
        logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)  # says what was asked for
        model = quantise.dequantize(model)
    if (folder / "generation_config.json").is_file():  # an export's: the base's own settings may end answers elsewhere
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return put_adapter(model, folder)


def add_adapter(model, folder: Path, **options):
    """Put the adapter in a folder on its base. Raises UserError where its files can't be read."""
    from peft import PeftModel

    with load.guarded(str(folder), str(folder)):
        return PeftModel.from_pretrained(model, str(folder), **options)


def put_adapter(model, folder: Path):
    """Put the adapter in a folder on its base to be asked, not merged.

    The bias of an output layer whose token rows are trained is added again: PEFT 0.21 leaves it out of the sum.
    """
    model = add_adapter(model, folder).eval()
    if (bias := load.find_lost_bias(model)) is not None:
        model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: output + bias)
    return model


def compute_exactly(model):
    """Let a model compute in float32, whatever its weights were stored in; quantized weights stay what they are."""
    import torch

    for part in model.modules():
        if hasattr(part, "compute_dtype"):  # 4-bit layers dequantize their weights into it
            part.compute_dtype, part.compute_type_is_set = torch.float32, True
            part.weight.quant_state.dtype = torch.float32
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def load_models(run: Run) -> Iterator[tuple[str, object]]:
    """Yield the base as it was trained on, and then the tuned model; never both in memory, if the caller lets go of the first.

    run: of `read_run`.
    """
    model = load.load_base(run.config, run.tokenizer, templates.find_traits(run.tokenizer).ends)
    if run.quantised:
        quantise.prepare_quantised(model, checkpointing=False)  # as in training: what isn't quantized is in float32
    yield "base", model
    if run.config.use_lora:
        yield "tuned", put_adapter(model, run.folder)
    else:
        del model
        gc.collect()
        yield "tuned", load_run(run, exactly=False)


def load_any(name: str, trust_remote_code: bool = False):
    """Load a model and its tokenizer by the name of a run, an export, or anything that `load.load_model` knows.

    A run comes as it was trained, quantized if it was; an adapter on its base; anything else in the precision that it
    was saved in. Raises UserError for what can't be had.
    """
    if (Path(name) / "run.json").is_file():
        run = open_run(name, trust_remote_code)
        return load_run(run, exactly=False), load.load_tokenizer(name, trust_remote_code)
    config = TrainConfig(trust_remote_code=trust_remote_code, bf16=False)
    tokenizer = load.load_tokenizer(name, trust_remote_code)
    if (Path(name) / "adapter_config.json").is_file():
        model = load_adapter(Path(name), read_base(Path(name), config), tokenizer, exactly=False)
    elif name.startswith(catalog.RANDOM):
        model = load.load_model(name)
    else:
        model = load.load_saved(name, config, "auto", None)
    return model.eval(), tokenizer


def read_base(folder: Path, config: TrainConfig) -> TrainConfig:
    """Complete a configuration by the base of an adapter, from its files; in an export by its bits, too."""
    name = files.read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    bits = files.read_json(folder / "export.json").get("base_bits")
    return replace(config, model_name=name, use_lora=True, use_4bit=bits == 4, use_8bit=bits == 8)


def adopt_adapter(config: TrainConfig) -> TrainConfig:
    """Take over the LoRA options of --init-adapter. Raises UserError where it holds no whole adapter of this base."""
    if not config.init_adapter:
        return config
    folder = Path(config.init_adapter)
    settings = files.read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        fix = "Name a run trained with --use-lora, or its export."
        raise UserError(f"init_adapter: {folder} holds no LoRA adapter. {fix}")
    base = settings["base_model_name_or_path"]
    if (folder / "run.json").is_file():
        base = open_run(folder, config.trust_remote_code).config.model_name
    if base != config.model_name and base != load.locate(config.model_name):
        raise UserError(f"model_name: the adapter in {folder} was trained on {base}. Add --model-name {base}.")
    targets = settings["target_modules"]
    adopted = replace(
        config,
        lora_r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        lora_target_modules=targets if isinstance(targets, str) else ",".join(sorted(targets)),
        lora_target_parameters=",".join(settings.get("target_parameters") or []) or None,
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
    )
    print(f"init_adapter: trains on from {folder}, of rank {adopted.lora_r}, alpha {adopted.lora_alpha}, on {targets}")
    return adopted
