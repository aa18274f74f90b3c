"""Load a model and its tokenizer: where from, in which precision, quantised or not, with LoRA or without.

python -c "from sftlab.models import load; print(load.load_model('random-tiny:gpt2'))"
"""

import contextlib
import gc
import logging
import os
import sys
import warnings
from pathlib import Path

from huggingface_hub import errors, hf_hub_download
from safetensors import SafetensorError

from sftlab import machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError, near_match
from sftlab.files import ROOT
from sftlab.hub import client as hub_client
from sftlab.hub import download
from sftlab.hub.catalog import MODELS, RANDOM, find_model
from sftlab.models import quantise

IGNORED = -100  # torch's cross-entropy passes over this label
TINY_BASE = ROOT / "data_samples" / "tiny-base"
# random-tiny:NAME: the architecture of NAME with these sizes, and tiny-base's tokenizer and vocabulary.
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TINY_SHAPES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gemma": TINY_SHAPE | {"num_key_value_heads": 4, "head_dim": 16},
}


def quiet_libraries() -> None:
    """Turn down what libraries print at start-up and nobody can act on; their warnings about the work itself stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which optional kernels were not found
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft|torch\.distributed")
    gc.disable()  # libraries make half a million objects, and all of them stay
    import datasets
    import torch
    import transformers

    quantise.import_bitsandbytes()
    gc.enable()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints that it found none
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    machine.freeze_libraries("trl" in sys.modules)


def locate(name: str, weights: bool = False) -> str:
    """Find the folder or Hub id behind a model's name; `weights`: fetch them if they aren't on this machine.

    Raises UserError, in one line, if it can't be had, or the disk has no room for it.
    """
    if name == "tiny-base":
        if not (TINY_BASE / "config.json").is_file():
            raise UserError(f"model tiny-base: {TINY_BASE} is missing; run the lab from a clone of its repository.")
        return str(TINY_BASE)
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"model {name}: the folder holds no config.json, so it is no saved model.")
        return name
    known = find_model(name)
    hub_id = known.hub_id if known else name
    try:
        hub_client.reach()
        settings = hf_hub_download(hub_id, "config.json")
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        failure = hub_client.explain(hub_id, "model", error)
        raise UserError(f"{failure}{near_match(name, [model.name for model in MODELS])}") from error
    if weights and not download.is_whole(Path(settings).parent):
        download.fetch_model(hub_id, Path(settings).parent.name)
    return hub_id


@contextlib.contextmanager
def guarded(name: str, path: str):
    """Turn into a UserError what is wrong in a model's files, and transformers' refusal of Python code that it brings along."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        words = " ".join(str(error).split())
        if "trust_remote_code" not in words:
            fix = "If its files are damaged or missing, save or fetch it again."
            raise UserError(f"model {name}: can't be loaded: {words[:200].rstrip('.')}. {fix}") from error
        risk = "it brings Python code of its own, which could do anything here that you may do"
        fix = f"Read it in {path}; only if you trust who wrote it, add --trust-remote-code."
        raise UserError(f"model {name}: {risk}. {fix}") from None


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """Load the tokenizer of a model, with a padding token that is not its EOS wherever one can be had without new weights."""
    from transformers import AutoTokenizer

    path = locate("tiny-base" if name.startswith(RANDOM) else name)
    with guarded(name, path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        why = "its tokenizer doesn't know where in the text a token lies, so no mask can be made"
        raise UserError(f"model {name}: {why}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if isinstance(templates := tokenizer.chat_template, dict):  # one for each use
        tokenizer.chat_template = templates.get("default") or next(iter(templates.values()))
    return tokenizer


def build_config(name: str):
    """Build transformers' configuration of `random:NAME` in its true shape, of `random-tiny:NAME` shrunk to two layers."""
    from transformers import AutoConfig

    known = find_model(name)
    if known is None or known.name == "tiny-base":
        names = [model.name for model in MODELS if model.name != "tiny-base"]
        raise UserError(f"model {name}: after random: comes a catalogue name ({', '.join(names)}).")
    shape = dict(known.shape)
    if name.startswith("random-tiny:"):
        tokenizer = load_tokenizer("tiny-base")
        shape |= TINY_SHAPES.get(known.model_type, TINY_SHAPE) | {"vocab_size": len(tokenizer)}
        shape |= {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(known.model_type, **shape)


def read_settings(name: str, trust_remote_code: bool = False):
    """Read transformers' configuration of any model: of the catalogue's without a network, of the Hub's only that file."""
    from transformers import AutoConfig

    known = find_model(name)
    if name.startswith(RANDOM) or known and known.name != "tiny-base" and not Path(name).is_dir():
        return build_config(name)
    path = locate(name)
    with guarded(name, path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def find_positions(settings) -> int:
    """Find how many positions a model has for tokens, by transformers' configuration; sys.maxsize where it names none."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def build_random(name: str, dtype=None, device: str | None = None):
    """Build `random:NAME` where it's wanted: billions of random numbers take a GPU seconds, and a CPU minutes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device) if device else contextlib.nullcontext():
        return AutoModelForCausalLM.from_config(build_config(name), dtype=dtype or torch.float32)


def build_empty(settings, dtype, quantization=None, trust_remote_code: bool = False):
    """Build a model without bytes (torch's meta device), its layers as bitsandbytes would store them.

    settings: transformers' configuration; dtype: of all that isn't quantised; quantization: of `quantization_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    name = settings.name_or_path
    with torch.device("meta"), quantise.plain_falcon(), guarded(name, name):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    if quantization:
        quantizer = AutoHfQuantizer.from_config(quantization)
        quantizer.preprocess_model(model=model, device_map=None)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    return model


def choose_precision(config: TrainConfig, device: str | None = None) -> tuple[bool, str]:
    """Choose whether a run computes in bfloat16, and say why. device: `gpu` for any GPU, which need not be here."""
    if config.bf16 is not None:
        return config.bf16, f"as asked for ({'--bf16' if config.bf16 else '--no-bf16'})"
    return (True, "on a GPU") if device == "gpu" else machine.choose_precision()


def load_model(name: str, config: TrainConfig | None = None):
    """Load a causal language model in float32; its frozen weights in bfloat16 where --bf16 meets --use-lora.

    A folder with an adapter gives its base with the adapter on it. With a GPU the model is put there.
    """
    import torch

    config = config or TrainConfig(model_name=name)
    dtype = torch.bfloat16 if config.bf16 and config.use_lora else torch.float32
    quantization = quantise.quantization_config(config)
    if not name.startswith(RANDOM):
        return load_saved(name, config, dtype, quantization)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not quantization:
        return build_random(name, dtype, device)
    model = build_empty(build_config(name), dtype, quantization)
    return quantise.fix_layers(quantise.fill_random(model, dtype, device), name)


def load_saved(name: str, config: TrainConfig, dtype, quantization):
    """Load a model from a folder or from the Hub. dtype: `auto` for the one it was saved in. Raises UserError where that fails."""
    import torch
    from transformers import AutoModelForCausalLM

    path, options = locate(name, weights=True), {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if quantization:
        options["quantization_config"] = quantization
    sharded = deepspeed_configs.find_stage(config.deepspeed) == 3  # and put in place by DeepSpeed
    if torch.cuda.is_available() and not sharded:
        options["device_map"] = {"": torch.cuda.current_device()}
    loader = AutoModelForCausalLM
    if (Path(path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as loader
    with quantise.plain_falcon(), guarded(name, path):
        model = loader.from_pretrained(path, **options)
    return quantise.fix_layers(model, name) if quantization else model


def load_base(config: TrainConfig, tokenizer, ends: tuple[int, ...]):
    """Load the model that a run begins with, the same each time. tokenizer: with the data set's format; ends: of `set_ends`."""
    from transformers import set_seed

    set_seed(config.seed)  # random weights, added embeddings, and in training the adapters' first values
    model = load_model(config.model_name, config)
    fit_vocabulary(model, tokenizer)
    return set_ends(model, tokenizer, ends)


def set_ends(model, tokenizer, ends: tuple[int, ...]):
    """Let the model end answers with these tokens, beside those that it ended them with, and pad with the tokenizer's; return it."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    for settings in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(settings, name, getattr(tokenizer, name))
    every = [end for end in dict.fromkeys([*ends, *known]) if end is not None]
    if every:
        model.generation_config.eos_token_id = every if len(every) > 1 else every[0]
    return model


def lora_config(config: TrainConfig):
    """Make PEFT's LoraConfig of a run, or None without --use-lora. `auto` targets: the catalogue's, else all linear layers."""
    if not config.use_lora:
        return None
    from peft import LoraConfig

    known, targets = find_model(config.model_name), config.lora_target_modules
    if targets == "auto":
        targets = list(known.lora_targets) if known else "all-linear"
    elif targets != "all-linear":
        targets = split_names(targets)
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        target_parameters=split_names(config.lora_target_parameters) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )


def split_names(names: str | None) -> list[str]:
    return [part.strip() for part in (names or "").split(",") if part.strip()]


def check_targets(model, lora) -> None:
    """Raise UserError for a target of a LoraConfig that no layer, or expert, of the model is named by.

    `all-linear` of a mixture of experts becomes the names of its layers: PEFT would add its router and its experts to them.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, kinds, experts = model.get_output_embeddings(), torch.nn.Linear | Conv1D, find_experts(model)
    linear = {name for name, part in model.named_modules() if isinstance(part, kinds) and part is not head}
    layers = {name.rsplit(".", 1)[-1] for name in linear}
    if experts and lora.target_modules == "all-linear":
        lora.target_modules = layers
    for option, targets, known in (
        ("lora_target_modules", lora.target_modules, layers),
        ("lora_target_parameters", lora.target_parameters or [], set(experts)),
    ):
        for target in [] if isinstance(targets, str) else targets:
            if target not in known:
                there = f"It has: {', '.join(sorted(known))}." if known else "It has no experts; leave that option out."
                kind = "layer" if known is layers else "experts' weight"
                raise UserError(f"{option}: the model has no {kind} {target!r}.{near_match(target, known)} {there}")


def find_experts(model) -> dict[str, int]:
    """The weights that hold all experts of a layer, by the ends of their names, and the parameters that each has in all layers."""
    found = {}
    for name, weight in model.named_parameters():
        if ".experts." in name and weight.dim() == 3 and "lora_" not in name:
            short = ".".join(name.split(".")[-3:])
            found[short] = found.get(short, 0) + getattr(weight, "ds_numel", weight.numel())
    return found


def report_experts(model, lora) -> None:
    """Print the share of a model's parameters that its experts hold, where they get no adapters."""
    experts = {name: size for name, size in find_experts(model).items() if name not in (lora.target_parameters or ())}
    if experts:
        share = sum(experts.values()) / model.num_parameters()
        reach = f"--lora-target-parameters {','.join(experts)} --lora-dropout 0"
        place = f"{share:.0%} of the parameters are in {', '.join(experts)}"
        print(f"experts: {place}, and get no adapters; {reach} reaches them")


def fit_vocabulary(model, tokenizer) -> None:
    """Give the model an embedding for every token of the tokenizer; reported where some are new."""
    weight = model.get_input_embeddings().weight
    rows, wanted = getattr(weight, "ds_shape", weight.shape)[0], len(tokenizer)  # under ZeRO-3 only a shard is here
    if wanted > rows:
        model.resize_token_embeddings(wanted)
        print(f"{wanted - rows} tokens were added: the model's embeddings now have {wanted} rows, not {rows}")


def train_tokens(lora, model, tokenizer, tokens: list[str], wanted: bool) -> None:
    """Let a LoraConfig train the embeddings of tokens that pre-training never saw (PEFT's trainable token indices), and print it.

    Only their rows are trained, in the input embeddings and, where it isn't the same matrix, in the output layer.
    """
    names = ", ".join(tokens)
    if not wanted:
        print(f"{names}: pre-training never saw them, and their embeddings stay as they are (--no-train-new-tokens)")
        return
    matrices = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    if matrices[0].weight is matrices[-1].weight:
        matrices = matrices[:1]
    names_of = {id(part): name.rsplit(".", 1)[-1] for name, part in model.named_modules()}
    indices = tokenizer.convert_tokens_to_ids(tokens)
    lora.trainable_token_indices = {names_of[id(part)]: indices for part in matrices}
    print(f"{names}: pre-training never saw them, so their embeddings are trained, beside the adapters")


def find_lost_bias(model):
    """Find the bias of an output layer whose token rows are trained, which PEFT 0.21 leaves out of the sum; or None."""
    head = model.get_output_embeddings()
    return getattr(head.original_module, "bias", None) if hasattr(head, "token_adapter") else None


def expose_bias(model) -> None:
    """Let a loss find that bias: PEFT passes on the weight only."""
    if hasattr(head := model.get_output_embeddings(), "token_adapter"):
        head.__dict__["bias"] = find_lost_bias(model)  # beside nn.Module's own book-keeping
