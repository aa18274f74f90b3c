"""Every option of the lab, once: its name, type, default, help text, choices and range.

The command line, the notebooks' parameters and the forms are made from these fields or checked against them.

    python -c "from sftlab.config.configs import TrainConfig; print(TrainConfig.build(learning_rate='2e-4'))"
"""

from dataclasses import dataclass, fields
from functools import partial

from sftlab.config import conflicts
from sftlab.config.options import Options, coerce, option
from sftlab.errors import UserError

# of a training's options, in this order
GROUPS = ("model", "data", "LoRA", "optimization", "saving and logging", "hardware")
of_model, of_data, of_lora, of_optimization, of_saving, of_hardware = (partial(option, group=group) for group in GROUPS)

TRUST = "run Python code that the model brings along, with your rights on this machine; off: such a model is refused"
FILE_SOURCES = ("json", "jsonl", "csv", "parquet")
SOURCES = ("facts", "alpaca", "dolly", "wizardlm", *FILE_SOURCES)  # the bundled facts, public sets, your own files
QUANTIZED_BASES = ("dequantised", "published")
DEDUPE = ("off", "exact", "near")
FORMATS = ("alpaca", "chatml", "llama2", "model")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass
class DataConfig(Options):
    """What `sftlab prepare` makes: a folder that `datasets.load_from_disk` opens, with `train` and `test`."""

    model: str = option("tiny-base", "model whose tokenizer is used: tiny-base, a catalogue name, a Hub id, a folder")
    source: str = option("facts", "where the rows come from", choices=SOURCES)
    source_path: list | None = option(None, "files or folders, for --source json, jsonl, csv, parquet", commas=True)
    test_path: str | None = option(None, "a file with the validation rows, instead of splitting some off")
    columns: list | None = option(None, "names of your files' columns, as instruction=question,output=answer")
    hub_id: str | None = option(None, "another Hub data set in the columns of the source, instead of the usual one")
    format: str = option("alpaca", "prompt format; model: the tokenizer's own", choices=FORMATS)
    chat_template_kwargs: list | None = option(None, "the template's variables, as enable_thinking=false", commas=True)
    train_on: str = option("all", "which answers of a conversation are in the loss", choices=("all", "last"))
    merge_turns: bool = option(False, "join turns of one role that follow each other, instead of dropping the row")
    num_samples: int | None = option(None, "a seeded random sample of so many training rows; default: all", low=1)
    test_size: float = option(0.1, "share of the rows for validation, without --test-path", low=0.001, high=0.9)
    max_length: int = option(1024, "longest sequence in tokens; longer rows are cut, and counted", low=8)
    dedupe: str = option("exact", "drop rows that repeat an earlier one, or come near one", choices=DEDUPE)
    near_threshold: float = option(0.9, "Jaccard similarity of 5-grams from which near drops a row", low=0.3, high=1)
    fix_mojibake: bool = option(False, "fix text that was decoded wrongly, as the report offers")
    output_dir: str = option("datasets", "the folder in which the data set's folder is made")
    overwrite: bool = option(False, "replace the data set's folder if it exists")
    dry_run: bool = option(False, "print what would be done, show the first rows, and write nothing")
    offline: bool = option(False, "don't use the network: the bundled sample stands in for a public set")
    trust_remote_code: bool = option(False, TRUST)
    seed: int = option(42, "seed of the sample and of the split", low=0, high=2**32 - 1)

    def check(self) -> None:
        if self.source in FILE_SOURCES and not self.source_path:
            raise UserError(f"source_path: --source {self.source} needs --source-path FILE.")
        if self.source not in FILE_SOURCES and self.source_path:
            why = f"only --source {', '.join(FILE_SOURCES)} read files"
            raise UserError(f"source_path: {why}; leave it out or drop --source {self.source}.")
        if self.chat_template_kwargs and self.format != "model":
            raise UserError("chat_template_kwargs: they are for the model's own template; add --format model.")
        if self.hub_id and self.source not in ("alpaca", "dolly", "wizardlm"):
            raise UserError(f"hub_id: --source {self.source} is not from the Hub; choose alpaca, dolly or wizardlm.")


OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit")


@dataclass
class TrainConfig(Options):
    """One training run: `sftlab train`, the notebooks and the launchers all read these."""

    model_name: str = of_model("tiny-base", "base model: tiny-base, a catalogue name, a Hub id or a local folder")
    trust_remote_code: bool = of_model(False, TRUST)
    use_4bit: bool = of_model(False, "store the base in 4-bit NF4 (QLoRA); needs --use-lora")
    use_8bit: bool = of_model(False, "store the base in 8-bit (LLM.int8); needs --use-lora")
    bf16: bool | None = of_model(None, "compute in bfloat16; default: where this machine has instructions for it")
    use_flash_attention: bool | None = of_model(None, "attention without padding; default: where possible")
    use_liger_kernel: bool | None = of_model(None, "Liger's fused kernels on an NVIDIA GPU; default: where installed")
    dataset_path: str = of_data("datasets/facts_tiny-base_1408", "a data set made by `sftlab prepare`")
    max_length: int = of_data(1024, "longest sequence in tokens", low=8)
    packing: bool = of_data(False, "fill each sequence with several samples, which never see each other")
    use_lora: bool = of_lora(False, "train low-rank adapters instead of all weights")
    lora_r: int = of_lora(16, "rank of the LoRA adapters: their inner width", low=1)
    lora_alpha: int = of_lora(32, "scale of the adapters: their output is multiplied by alpha / r", low=1)
    lora_dropout: float = of_lora(0.1, "dropout on the adapters' input", low=0, high=0.9)
    lora_target_modules: str = of_lora("auto", "layers with adapters: names with commas, all-linear, or auto")
    lora_target_parameters: str | None = of_lora(None, "weights of experts with adapters, too: names with commas")
    init_adapter: str | None = of_lora(None, "a run or adapter to train on from, with other data")
    use_rslora: bool = of_lora(False, "scale adapters by alpha / sqrt(r) instead, which suits high ranks")
    use_dora: bool = of_lora(False, "train norm and direction of each weight row separately (DoRA); slower")
    train_new_tokens: bool = of_lora(True, "with LoRA, train the embeddings of the format's new tokens, too")
    num_epochs: float = of_optimization(3.0, "passes over the training set", low=0.001)
    max_steps: int = of_optimization(-1, "stop after this many optimizer steps; -1 goes by --num-epochs", low=-1)
    batch_size: int = of_optimization(4, "sequences per device and step", low=1)
    gradient_accumulation_steps: int = of_optimization(1, "batches whose gradients are added up for a step", low=1)
    learning_rate: float = of_optimization(2e-4, "peak learning rate of the schedule", low=0, high=1)
    lr_scheduler_type: str = of_optimization("linear", "how the learning rate falls", choices=SCHEDULES)
    warmup_steps: float = of_optimization(0.0, "steps of rising learning rate; below 1: a share of all steps", low=0)
    optim: str = of_optimization("adamw_torch_fused", "the optimizer; 8 bits are slow on a CPU", choices=OPTIMIZERS)
    weight_decay: float = of_optimization(0.0, "weight decay, decoupled from the gradient in AdamW", low=0, high=1)
    max_grad_norm: float = of_optimization(1.0, "gradients are clipped to this norm; 0: never", low=0)
    seed: int = of_optimization(42, "seed of row order, dropout and adapters", low=0, high=2**32 - 1)
    output_dir: str = of_saving("runs/sft", "the run folder that is made")
    logging_steps: int = of_saving(10, "log the loss every so many steps", low=1)
    report_to: str = of_saving("none", "where the log goes, too", choices=("none", "tensorboard", "trackio"))
    save_steps: int = of_saving(500, "write a checkpoint every so many steps", low=1)
    save_total_limit: int = of_saving(2, "how many checkpoints are kept: the last ones, and the best among them", low=1)
    eval_steps: int = of_saving(0, "validation loss every so many steps; 0: once per epoch", low=0)
    eval_samples: int = of_saving(200, "rows that the validation loss is taken on; 0: all of them", low=0)
    load_best_model_at_end: bool = of_saving(False, "end with the checkpoint of the lowest validation loss")
    resume: bool = of_saving(False, "resume from the last checkpoint in --output-dir")
    overwrite: bool = of_saving(False, "delete --output-dir first if it exists")
    gradient_checkpointing: bool = of_hardware(False, "recompute activations: less memory, more time")
    dataloader_num_workers: int = of_hardware(0, "processes that make batches ready; 0: none beside the trainer", low=0)
    keep_memory: bool | None = of_hardware(None, "keep freed memory of a CPU for the next step; default: if it fits")
    check_memory: bool = of_hardware(True, "refuse a run that is expected not to fit in this machine's free memory")
    deepspeed: str | None = of_hardware(None, "DeepSpeed: zero1, zero2, zero3, also with -offload, or a JSON file")

    def check(self) -> None:
        if self.max_steps == 0:
            raise UserError("max_steps: 0 trains nothing; give a number of steps, or -1 to go by --num-epochs.")
        for message in conflicts.find(self):
            raise UserError(message)


@dataclass
class EvaluateConfig(Options):
    """What `sftlab evaluate` measures: a run's tuned model against its base, on the rows held out from it."""

    run_dir: str = option("runs/sft", "the run folder that `sftlab train` made")
    dataset_path: str | None = option(None, "another prepared data set whose `test` rows are asked, not the run's own")
    num_questions: int = option(200, "a seeded random sample of so many held-out rows; 0: all of them", low=0)
    max_new_tokens: int | None = option(None, "longest answer in tokens; default: by the longest expected", low=1)
    batch_size: int = option(32, "rows answered at once", low=1)
    smallest_gain: float = option(0.1, "the smallest gain in exact match that matters", low=0.001, high=1)
    level: float = option(0.95, "how often an interval shall hold the true value", low=0.5, high=0.999)
    resamples: int = option(10_000, "resamples of the bootstrap", low=100, high=1_000_000)
    prose: str | None = option(None, "text to look for forgetting in: a file of paragraphs")
    num_texts: int = option(200, "only the first so many of these texts; 0: all of them", low=0)
    trust_remote_code: bool = option(False, TRUST)
    seed: int = option(42, "seed of the sample and of the bootstrap", low=0, high=2**32 - 1)


@dataclass
class ExportConfig(Options):
    """What `sftlab export` makes of a run: a folder that others can load with transformers or PEFT."""

    run_dir: str = option("runs/sft", "the run folder that `sftlab train` made")
    output_dir: str | None = option(None, "the folder that is made (default: exports/RUN-KIND)")
    kind: str = option("merged", "a whole model, or the adapter alone", choices=("merged", "adapter"))
    dtype: str = option("bfloat16", "dtype of a merged model", choices=("bfloat16", "float16", "float32"))
    merge_into: str = option("dequantised", "base of a quantized run to merge into", choices=QUANTIZED_BASES)
    trust_remote_code: bool = option(False, TRUST)
    overwrite: bool = option(False, "replace --output-dir if it is an export")


@dataclass
class ChatConfig(Options):
    """What `sftlab chat` talks to, and how answers are drawn."""

    model_name: str = option("runs/sft", "a run folder, an export, tiny-base, a catalogue name or a Hub id")
    trust_remote_code: bool = option(False, TRUST)
    system: str = option("", "a system message, which stands before the conversation")
    format: str = option("model", "prompt format; model: the tokenizer's own", choices=FORMATS)
    max_new_tokens: int = option(256, "longest answer in tokens", low=1)
    temperature: float = option(0.0, "0: the likeliest token each time; above: drawn, more freely the higher", low=0)
    seed: int = option(42, "seed of drawn answers", low=0, high=2**32 - 1)


@dataclass
class MemoryConfig(Options):
    """Where a run is to fit, for `sftlab memory`: the kind of device, how many, and how they share."""

    device: str = option("cpu", "kind of device to plan for", choices=("cpu", "gpu"))
    room: float | None = option(None, "GB (10^9 bytes) of each device (default: this machine's)", low=0.1)
    devices: int = option(1, "devices in all, over all nodes", low=1)
    zero: int = option(0, "ZeRO stage over these devices; 0: each holds everything (DDP)", low=0, high=3)
    offload: bool = option(False, "keep the optimizer's state in the host's memory; needs --zero")

    def check(self) -> None:
        if self.offload and not self.zero:
            raise UserError("offload: it is DeepSpeed's, with a ZeRO stage; add --zero 1, 2 or 3.")


@dataclass
class MetricsConfig(Options):
    """What `sftlab metrics` watches, how often, and where the samples go."""

    output_dir: str = option("results/current", "the folder that gets metrics.jsonl")
    every: float = option(1.0, "seconds from sample to sample", low=0.1, high=3600)
    overwrite: bool = option(False, "replace a metrics.jsonl that is there")


SCALING = ("strong", "weak", "both")


@dataclass
class BenchmarkConfig(Options):
    """What `sftlab benchmark` measures: data sets of some sizes, on more and more nodes, how often and how long."""

    nodes: list | None = option(None, "a number, for 1, 2, 4, … nodes up to it (default: 1), or several, as 2,4,8")
    devices_per_node: int = option(1, "GPUs of a node; where there is none, processes", low=1)
    sizes: list | None = option(None, "training rows of the data sets (default: 1000,5000,10000)")
    scaling: str = option("strong", "one global batch for all devices (strong), or for each (weak)", choices=SCALING)
    global_batch: int | None = option(None, "samples of a step in strong scaling; default: of the most devices", low=1)
    steps: int = option(30, "steps that are timed", low=1)
    untimed_steps: int = option(5, "steps before these, which warm up and don't count", low=1)
    repeats: int = option(3, "how often each point is measured, in turn with the others", low=1)
    output_dir: str = option("results", "the folder that gets a JSON file per point")
    hostfile: str | None = option(None, "file with a line `host slots=8` for each node; default: this machine")
    overwrite: bool = option(False, "measure points again that --output-dir holds")

    def check(self) -> None:
        self.sizes = parse_counts("sizes", self.sizes or [1000, 5000, 10000])
        self.nodes = parse_counts("nodes", self.nodes or [1])
        if len(self.nodes) == 1:
            [most] = self.nodes
            self.nodes = [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def parse_counts(name: str, values: list) -> list[int]:
    """Whole numbers from 1, each once, in order."""
    counts = sorted({coerce(name, part, int) for part in values})
    if not counts or counts[0] < 1:
        raise UserError(f"{name}: write whole numbers from 1, as 1,2,4.")
    return counts


LAUNCHERS = ("torchrun", "deepspeed")


@dataclass
class LaunchConfig(Options):
    """How `sftlab launch` starts a training: on how many devices and nodes, and by what."""

    nodes: int = option(1, "machines in all", low=1)
    gpus_per_node: int | None = option(None, "processes on each node, one per GPU; default: all of this one", low=1)
    hostfile: str | None = option(None, "a file with a line `HOST slots=GPUS` for each node")
    slurm: bool = option(False, "print a batch file for Slurm's sbatch instead of starting")
    slurm_options: str | None = option(None, "more of Slurm's options for it, as partition=gpu,time=8:00:00")
    launcher: str = option("torchrun", "what starts the processes; deepspeed uses ssh", choices=LAUNCHERS)
    master_addr: str | None = option(None, "address of the first node; default: the hostfile's first")
    master_port: int = option(29500, "a free port of the first node", low=1024, high=65535)
    dry_run: bool = option(False, "check, and print the commands, but start nothing")

    def check(self) -> None:
        if self.slurm and self.hostfile:
            raise UserError("slurm: Slurm gives the nodes; leave out --hostfile.")
        if self.slurm and self.launcher != "torchrun":
            raise UserError("launcher: the batch file starts torchrun, also for --deepspeed; leave --launcher out.")
        if self.nodes > 1 and not (self.slurm or self.hostfile):
            raise UserError(f"nodes: {self.nodes} need a --hostfile, or --slurm.")
        if self.slurm and not self.gpus_per_node:
            raise UserError("gpus_per_node: with --slurm give the GPUs of a node; this machine may have others.")


@dataclass
class RunsConfig(Options):
    """Which runs `sftlab runs` lists, and which one it stops, resumes or follows."""

    folder: str | None = option(None, "where to look, in all folders below (default: runs)")
    stop: str | None = option(None, "ask the run in this folder to write a checkpoint and end")
    resume: str | None = option(None, "resume the run in this folder from its last checkpoint, in the background")
    follow: str | None = option(None, "print the losses of the run in this folder as they come, until it ends")

    def check(self) -> None:
        if self.stop and (self.resume or self.follow):
            raise UserError("stop: a run that ends is neither resumed nor followed; give --stop alone.")


@dataclass
class ReportConfig(Options):
    """What `sftlab report` makes of a folder with results."""

    folder: str = option("results", "the folder with results")
    bandwidth: float | None = option(None, "GB/s between nodes, for two modelled bounds of the speed", low=0.001)


LOWER = ("loss", "perplexity", "error", "seconds", "bytes", "memory")  # in a metric's name: the lower the better


@dataclass
class SweepConfig(Options):
    """What `sftlab sweep` tries: a notebook at every point of a grid of its parameters, on some seeds."""

    notebook: str = option("", "the notebook; it must call course.record(…, metrics={…})")
    grid: list | None = option(None, "parameters and their values, as lora_r=4,16", commas=True)
    parameters: list | None = option(None, "")  # pairs, each of a -p
    seeds: list | None = option(None, "run each setting with each of these seeds, as 1,2,3")
    metric: str = option("eval_loss", "the number that decides, among those that the notebook records")
    direction: str = option(
        "auto", "which value is best; auto: min of a loss, a time or memory, else max", choices=("auto", "min", "max")
    )
    profile: str | None = option(None, "smoke, cpu or gpu (default: $SFTLAB_PROFILE, else cpu)")
    output_dir: str | None = option(None, "folder for all outputs (default: runs/sweep-NOTEBOOK)")
    overwrite: bool = option(False, "run points again that --output-dir holds as completed")

    def check(self) -> None:
        if self.direction == "auto":
            self.direction = "min" if any(word in self.metric for word in LOWER) else "max"


@dataclass
class TokenConfig(Options):
    """What `sftlab token` does; the token itself is asked for, and is no option."""

    status: bool = option(False, "say where the token comes from, whose it is and what it may do")


@dataclass
class ModelsConfig(Options):
    """Which models `sftlab access` and `sftlab download` are about."""

    models: list | None = option(None, "catalogue names, Hub ids or folders; default: the catalogue", commas=True)


@dataclass
class DoctorConfig(Options):
    """What `sftlab doctor` looks at: this machine and installation, or what is left of a run."""

    target: str | None = option(None, "a run folder, a log, or - for standard input")


# Options by their name, for what checks single values: the parameters of notebooks.
KINDS = (LaunchConfig, BenchmarkConfig, MemoryConfig, ChatConfig, ExportConfig, EvaluateConfig, DataConfig, TrainConfig)
FIELDS = {field.name: field for kind in KINDS for field in fields(kind)}

# What a benchmark sets itself, so that it doesn't offer these options of a training; and those of the data that it takes.
SAVING = tuple(name for name, field in TrainConfig.__dataclass_fields__.items() if field.metadata["group"] == GROUPS[4])
SET_BY_BENCHMARK = ("dataset_path", "num_epochs", "max_steps", *SAVING)
DATA_OF_BENCHMARK = ("source", "source_path", "columns", "hub_id", "format", "offline")
