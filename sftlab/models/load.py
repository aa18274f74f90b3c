"""Load a model and its tokenizer: where from, in which precision, quantised or not, with LoRA or without.

python -c "from sftlab.models import load; print(load.load_model('random-tiny:gpt2'))"
"""

import logging
import os
import sys
import warnings
from pathlib import Path

from sftlab import machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError, near_match
from sftlab.files import ROOT
from sftlab.hub import client as hub_client
from sftlab.hub import download
from sftlab.hub.catalog import MODELS, RANDOM, find_model
from sftlab.models import quantise, remote_code

TINY_BASE = ROOT / "data_samples" / "tiny-base"
# random-tiny:NAME: the architecture of NAME with these sizes, and tiny-base's tokenizer and vocabulary.
TINY_SHAPES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gemma": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "head_dim": 16},
}  # fmt: skip
TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def quiet_libraries() -> None:
    """Turn down what libraries say at start-up and nobody can act on; their warnings about the work itself stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which optional kernels were not found
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft|torch\.distributed")
    with machine.importing():
        import datasets
        import torch
        import transformers

        quantise.import_bitsandbytes()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints that it found none
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    machine.freeze_libraries("trl" in sys.modules)


def locate(name: str, weights: bool = False) -> str:
    """The folder or Hub id behind a model's name; `weights`: they are wanted, and fetched if they aren't on this machine.

    Raises UserError, in one line, if it can't be had, or the disk has no room for it.
    """
    if name == "tiny-base":
        if not (TINY_BASE / "config.json").is_file():
            raise UserError(f"model tiny-base: {TINY_BASE} is missing; run the lab from a clone of its repository.")
        return str(TINY_BASE)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file() and not (Path(name) / "adapter_config.json").is_file():
            raise UserError(f"model {name}: the folder holds no config.json, so it is no saved model.")
        return name
    known = find_model(name)
    hub_id = known.hub_id if known else name
    from huggingface_hub import errors, hf_hub_download

    try:
        hub_client.reach()
        settings = hf_hub_download(hub_id, "config.json")
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        failure = hub_client.explain(hub_id, "model", error)
        raise UserError(str(failure) + near_match(name, [model.name for model in MODELS])) from error
    if weights:
        download.fetch_weights(hub_id, Path(settings))
    return hub_id


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a model, with a padding token that is not its EOS wherever one can be had without new weights.

    trust_remote_code: whether code that comes with it may run.
    """
    from transformers import AutoTokenizer

    path = locate("tiny-base" if name.startswith(RANDOM) else name)
    with remote_code.guarded(name, path, trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(
            f"model {name}: its tokenizer can't tell where in the text a token lies, so no mask can be made."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def build_config(name: str):
    """transformers' configuration of `random:NAME` in its true shape, of `random-tiny:NAME` shrunk to two layers."""
    from transformers import AutoConfig

    known = find_model(name)
    if known is None or known.name == "tiny-base":
        names = [model.name for model in MODELS if model.name != "tiny-base"]
        raise UserError(f"model {name}: after random: comes a catalogue name ({', '.join(names)}).")
    shape = dict(known.shape)
    if name.startswith("random-tiny:"):
        tokenizer = load_tokenizer("tiny-base")
        shape |= get_tiny_shape(known.model_type) | {
            "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
    return AutoConfig.for_model(known.model_type, **shape)


def get_tiny_shape(model_type: str) -> dict:
    return TINY_SHAPES.get(model_type, TINY_SHAPE)


def build_small(name: str, trust_remote_code: bool = False):
    """A model of two small layers with random weights, of the architecture of any model, to try things out on."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = read_settings(name, trust_remote_code)
    inner = settings.get_text_config()
    inner.update(get_tiny_shape(inner.model_type) | {"vocab_size": 64, "pad_token_id": None})
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[: inner.num_hidden_layers]
    with remote_code.guarded(name, name, trust_remote_code):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def read_settings(name: str, trust_remote_code: bool = False):
    """transformers' configuration of any model that can be loaded; of the Hub's only that file is fetched."""
    from transformers import AutoConfig

    if name.startswith(RANDOM):
        return build_config(name)
    path = locate(name)
    with remote_code.guarded(name, path, trust_remote_code):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def build_random(name: str, dtype=None, device: str | None = None):
    """A model with random weights, in the shape of `build_config`; made where and as it's wanted, because billions of random
    numbers take a GPU seconds, and a CPU minutes. dtype: else float32; device: else torch's own default.
    """
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device) if device else contextlib.nullcontext():
        return AutoModelForCausalLM.from_config(build_config(name), dtype=dtype or torch.float32)


def choose_precision(config: TrainConfig) -> tuple[bool, str]:
    """Whether a run computes in bfloat16, and why: as the configuration says, else as `machine.choose_precision` does."""
    if config.bf16 is not None:
        return config.bf16, "as asked for (--bf16)" if config.bf16 else "as asked for (--no-bf16)"
    return machine.choose_precision()


def load_model(name: str, config: TrainConfig | None = None):
    """A causal language model in float32; its frozen weights in bfloat16 where --bf16 meets --use-lora.

    A folder with an adapter gives its base with the adapter on it. With a GPU the model is put there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config or TrainConfig(model_name=name)
    dtype = torch.bfloat16 if config.bf16 and config.use_lora else torch.float32
    if name.startswith(RANDOM):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        quantization = quantise.quantization_config(config)
        if not quantization:
            return build_random(name, dtype, device)
        model = quantise.build_random(build_config(name), dtype, quantization, device)
        return quantise.keep_scales(quantise.keep_gradients(model))
    path = locate(name, weights=True)
    options = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if quantization := quantise.quantization_config(config):
        options["quantization_config"] = quantization
    if (
        torch.cuda.is_available() and deepspeed_configs.find_stage(config.deepspeed) < 3
    ):  # which puts each piece where it belongs
        options["device_map"] = {"": torch.cuda.current_device()}
    loader = AutoModelForCausalLM
    if (Path(path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as loader
    try:
        with quantise.plain_falcon(), remote_code.guarded(name, path, config.trust_remote_code):
            model = loader.from_pretrained(path, **options)
    except OSError as error:
        raise UserError(f"model {name}: can't be loaded: {str(error).splitlines()[0]}") from error
    if quantization and not quantise.count_quantised(model):
        raise UserError(
            f"model {name}: none of its layers is of a kind that bitsandbytes quantises; leave that option out."
        )
    return quantise.keep_scales(quantise.keep_gradients(model)) if quantization else model


def lora_config(config: TrainConfig):
    """PEFT's LoraConfig of a run, or None without --use-lora. `auto` targets: the catalogue's, else all linear layers."""
    if not config.use_lora:
        return None
    from peft import LoraConfig

    known = find_model(config.model_name)
    if config.lora_target_modules == "auto" and known:
        targets = list(known.lora_targets)
    elif config.lora_target_modules in ("auto", "all-linear"):
        targets = "all-linear"
    else:
        targets = [part.strip() for part in config.lora_target_modules.split(",") if part.strip()]
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                      target_modules=targets, use_rslora=config.use_rslora, use_dora=config.use_dora, task_type="CAUSAL_LM")  # fmt: skip


def check_targets(model, targets: list[str] | str) -> None:
    """Raises UserError for a LoRA target that no layer of the model is named by."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(targets, str):
        return
    import torch

    layers = {
        name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)
    }
    for target in targets:
        if target not in layers:
            hint = near_match(target, layers)
            raise UserError(
                f"lora_target_modules: the model has no layer {target!r}.{hint} It has: {', '.join(sorted(layers))}."
            )


# Tokens that a prompt format brings and pre-training never saw: room for them, and training of just their rows.
#
# What a frozen base has for such tokens tells the model nothing: random numbers in a new row; in tiny-base, whose output
# layer is the same matrix, one direction for all that never occurred. LoRA alone leaves them so.


def fit_vocabulary(model, tokenizer) -> None:
    """Give the model an embedding for every token of the tokenizer; reported where some are new."""
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 only a piece of it is here
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
        print(
            f"{len(tokenizer) - rows} tokens were added: the model's embeddings now have {len(tokenizer)} rows, not {rows}"
        )


def train_tokens(lora, model, tokenizer, tokens: list[str], wanted: bool) -> None:
    """Let a LoraConfig train the embeddings of some tokens too (PEFT's trainable token indices), and say so.

    Only their rows are trained, in the input embeddings and, where it isn't the same matrix, in the output layer.
    """
    names = ", ".join(tokens)
    if not wanted:
        print(f"{names}: pre-training never saw them, and their embeddings stay as they are (--no-train-new-tokens)")
        return
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [inside] if outside is None or outside.weight is inside.weight else [inside, outside]
    indices = tokenizer.convert_tokens_to_ids(tokens)
    lora.trainable_token_indices = {
        name.rsplit(".", 1)[-1]: indices for name, part in model.named_modules() if any(part is one for one in parts)
    }
    print(f"{names}: pre-training never saw them, so their embeddings are trained, beside the adapters")


def expose_bias(model) -> None:
    """Let TRL's fused loss find the bias (or None) of an output layer whose token rows are trained.

    PEFT 0.21 wraps that layer and passes its weight on, with the trained rows in place, but no bias; TRL asks for both.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "token_adapter"):
        head.__dict__["bias"] = getattr(head.original_module, "bias", None)  # beside nn.Module's own book-keeping


def count_numel(weight) -> int:
    """How many numbers a weight has, also where ZeRO-3 has left a piece of it here."""
    return getattr(weight, "ds_numel", weight.numel())


IGNORED = -100  # torch's cross-entropy passes over this label
