"""Check the memory estimate: what is expected of a run against what it took, each case in a process of its own.

python benchmarks/memory.py                                  # all cases of this machine, about 10 minutes on 2 cores
python benchmarks/memory.py --cases "gpt2 LoRA" "gpt2 full"

All rows of a case have the same length, so that the estimate knows it exactly. Two peaks are measured: of tensors
(every allocation counted; on a GPU its allocator's own count), and of the process (on a GPU: what its allocator holds).
On a GPU each case's speed is told, too, and what the CUDA context takes beside the allocator.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LORA, CHECKPOINTED = {"use_lora": True}, {"gradient_checkpointing": True}
# name -> options of the run, with its batch_size and max_length
CPU_CASES = {
    "tiny-base full": {"batch_size": 16, "max_length": 128},
    "tiny-base full, checkpointed": {"batch_size": 16, "max_length": 128} | CHECKPOINTED,
    "tiny-base LoRA": {"batch_size": 16, "max_length": 128} | LORA,
    "tiny-base LoRA, large batch": {"batch_size": 64, "max_length": 128} | LORA,
    "tiny-base LoRA, accumulated": {"batch_size": 8, "max_length": 128, "gradient_accumulation_steps": 2} | LORA,
    "tiny-base LoRA, padded": {"batch_size": 16, "max_length": 128, "use_flash_attention": False} | LORA,
    "tiny-base LoRA, packed": {"batch_size": 4, "max_length": 256, "packing": True} | LORA,
    "tiny-base LoRA, 8 bits": {"batch_size": 16, "max_length": 128, "use_8bit": True} | LORA,
    "tiny-base LoRA, 4 bits": {"batch_size": 16, "max_length": 128, "use_4bit": True} | LORA,
    "tiny-base full, bfloat16": {"batch_size": 16, "max_length": 128, "bf16": True},
    "tiny-base LoRA, bfloat16": {"batch_size": 16, "max_length": 128, "bf16": True} | LORA,
    "tiny-base LoRA, small batch, bfloat16": {"batch_size": 4, "max_length": 128, "bf16": True} | LORA,
    "tiny-base LoRA, padded, bfloat16": {
        "batch_size": 16,
        "max_length": 128,
        "use_flash_attention": False,
        "bf16": True,
    }
    | LORA,
    "tiny-base LoRA, packed, bfloat16": {"batch_size": 4, "max_length": 256, "packing": True, "bf16": True} | LORA,
    "tiny-base LoRA, 4 bits, bfloat16": {"batch_size": 16, "max_length": 128, "use_4bit": True, "bf16": True} | LORA,
    "gpt2 full": {"model_name": "random:gpt2", "batch_size": 2, "max_length": 256},
    "gpt2 full, checkpointed": {"model_name": "random:gpt2", "batch_size": 2, "max_length": 256} | CHECKPOINTED,
    "gpt2 LoRA": {"model_name": "random:gpt2", "batch_size": 4, "max_length": 256} | LORA,
    "gpt2 LoRA, bfloat16": {"model_name": "random:gpt2", "batch_size": 4, "max_length": 256, "bf16": True} | LORA,
    "gpt2 LoRA, checkpointed": {"model_name": "random:gpt2", "batch_size": 4, "max_length": 256} | LORA | CHECKPOINTED,
    "gpt2 LoRA, 4 bits": {"model_name": "random:gpt2", "batch_size": 2, "max_length": 256, "use_4bit": True} | LORA,
    "gpt-neo-125M LoRA": {"model_name": "random:gpt-neo-125M", "batch_size": 2, "max_length": 256} | LORA,
}
BIG = {"max_length": 1024, "gradient_checkpointing": True, "bf16": True} | LORA
GPU_CASES = {
    "gpt2 full": {"model_name": "random:gpt2", "batch_size": 16, "max_length": 1024, "bf16": True},
    "Llama-2-7b LoRA": {"model_name": "random:Llama-2-7b-hf", "batch_size": 4} | BIG,
    "Llama-2-7b LoRA, not checkpointed": {"model_name": "random:Llama-2-7b-hf", "batch_size": 4} | BIG | {"gradient_checkpointing": False},
    "Llama-2-7b LoRA, float32": {"model_name": "random:Llama-2-7b-hf", "batch_size": 1, "max_length": 1024} | LORA,
    "Llama-2-13b LoRA, 8 bits": {"model_name": "random:Llama-2-13b-hf", "batch_size": 2, "use_8bit": True} | BIG,
    "Llama-2-70b LoRA, 4 bits": {"model_name": "random:Llama-2-70b-hf", "batch_size": 1, "lora_r": 8, "use_4bit": True} | BIG,
}  # fmt: skip
# Chosen before any of them was measured, and kept: what the estimate says of these was not repaired by them.
UNSEEN = {
    "Qwen3-0.6B full": {"model_name": "random:Qwen3-0.6B", "batch_size": 8, "max_length": 1024, "bf16": True},
    "Qwen3-8B LoRA packed": {"model_name": "random:Qwen3-8B", "batch_size": 1, "packing": True} | BIG | {"max_length": 4096, "gradient_checkpointing": False},
    "Llama-3.1-8B LoRA 4 bits": {"model_name": "random:Llama-3.1-8B", "batch_size": 2, "use_4bit": True} | BIG | {"max_length": 2048},
    "Mistral-7B full 8-bit optimizer": {"model_name": "random:Mistral-7B-v0.1", "batch_size": 1, "optim": "adamw_8bit"} | BIG | {"use_lora": False},
    "gemma-7b LoRA 8 bits": {"model_name": "random:gemma-7b", "batch_size": 4, "use_8bit": True} | BIG,
    "Llama-2-70b LoRA 4 bits 2048": {"model_name": "random:Llama-2-70b-hf", "batch_size": 1, "lora_r": 8, "use_4bit": True} | BIG | {"max_length": 2048},
}  # fmt: skip
GPU_CASES |= UNSEEN
STEPS, GPU_STEPS, WARM = 3, 13, 3  # on a GPU the steps after the first ones are timed, too


def write_rows(path: Path, length: int) -> None:
    """96 rows of a question and an answer that take `length` tokens, or one or two fewer, in the alpaca format."""
    from sftlab import files
    from sftlab.data import formats
    from sftlab.models import load

    tokenizer = load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "alpaca")

    def make(number: int, words: int) -> list[dict]:
        return formats.to_messages({"instruction": f"Say it {number}.", "output": "a" + " yen" * words}, "alpaca")

    def count(words: int) -> int:
        return len(tokenizer.apply_chat_template(make(100, words), return_dict=False))

    words = length - count(0)
    while count(words) > length:
        words -= 1
    rows = [{"instruction": f"Say it {number}.", "output": "a" + " yen" * words} for number in range(100, 196)]
    files.write_text(path, json.dumps(rows))


def hold(model) -> int:
    """Bytes of a model's weights as they lie in memory, bitsandbytes' constants included."""
    size = 0
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        constants = (state.absmax, state.code, state.state2.absmax, state.state2.code) if state else ()
        size += weight.nbytes + sum(part.nbytes for part in constants)
    scales = [part.state.SCB for part in model.modules() if hasattr(part, "state") and hasattr(part.state, "SCB")]
    return size + sum(scale.nbytes for scale in scales if scale is not None)


def run_one(options: dict, output: Path) -> None:
    """One training in this process: expected and measured bytes, and on a GPU its speed, to a JSON file."""
    import torch
    from transformers import TrainerCallback

    from sftlab import files
    from sftlab.config.configs import DataConfig, TrainConfig
    from sftlab.data import dataset
    from sftlab.memory import duration
    from sftlab.memory.dry_run import LiveBytes
    from sftlab.models import load
    from sftlab.train import forecast, run

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    load.quiet_libraries()
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        rows = Path(folder) / "rows.json"
        short = min(options["max_length"], 128) if options.get("packing") else options["max_length"]
        write_rows(rows, short)
        name = options.get("model_name", "tiny-base")
        prepared = dataset.prepare(DataConfig(model=name, source="json", source_path=[str(rows)], output_dir=folder,
                                           max_length=options["max_length"]))  # fmt: skip
        config = TrainConfig(**{"bf16": False} | options, dataset_path=str(prepared), output_dir=f"{folder}/run",
                             max_steps=GPU_STEPS if gpu else STEPS, save_steps=10**6, eval_steps=10**6, keep_memory=False)  # fmt: skip
        trainer = run.make_trainer(config)
        if gpu:
            trainer.add_callback(Clock())
        counter = LiveBytes(trainer.model)
        with contextlib.nullcontext() if gpu else counter:
            trainer.train()
    took = forecast.measure_memory(trainer.expected["memory"])
    tensors = torch.cuda.max_memory_allocated() if gpu else hold(trainer.model) + counter.peak
    parts = took["parts"]
    expected = sum(
        size for name, size in parts.items() if name not in ("runtime", "data and tokenizer", "kernels in bfloat16")
    )
    found = {"expected": expected, "tensors": tensors, "expected_process": took["expected_bytes"],
             "process": took["peak_bytes"], "parts": parts}  # fmt: skip
    if gpu:
        free, whole = torch.cuda.mem_get_info()
        step = statistics.median(after - before for before, after in zip(ends[WARM:], ends[WARM + 1 :], strict=False))
        tokens = [options["max_length"]] * options["batch_size"] * options.get("gradient_accumulation_steps", 1)
        rate = duration.count_step(trainer.model, tokens) / step
        found |= {"beside_allocator": whole - free - torch.cuda.memory_reserved(), "seconds_per_step": step,
                  "tokens_per_second": sum(tokens) / step, "of_measured_matrix_rate": rate / duration.measure_rate(bf16=True),
                  "of_data_sheet": rate / (duration.find_peak(torch.cuda.get_device_name()) or float("inf"))}  # fmt: skip
    files.write_json(output, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="names of cases; all of this machine's if not given")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file, too")
    parser.add_argument("--one", nargs=2, metavar=("OPTIONS", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(json.loads(args.one[0]), Path(args.one[1]))
    import torch

    from sftlab import files, machine

    known = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    for name in args.cases or ():
        if name not in known:
            parser.error(f"no case {name!r}; there are {', '.join(known)}")
    results = {}
    print("\n".join(machine.describe_machine()))
    print(f"{'MB':38}{'expected':>10}{'tensors':>10}{'error':>8}{'expected':>12}{'process':>10}{'error':>8}")
    for name in args.cases or known:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result.json"
            command = [sys.executable, __file__, "--one", json.dumps(known[name]), str(output)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-3000:]}")
            found = json.loads(output.read_text())
        results[name] = found
        pairs = [(found["expected"], found["tensors"]), (found["expected_process"], found["process"])]
        cells = "".join(f"{one / 1e6:>{width}.1f}{two / 1e6:>10.1f}{one / two - 1:>8.1%}"
                        for (one, two), width in zip(pairs, (10, 12), strict=True))  # fmt: skip
        print(f"{name:38}{cells}", flush=True)
        if "tokens_per_second" in found:
            print(f"    {found['tokens_per_second']:.0f} tokens/s, {found['of_data_sheet']:.1%} of the data-sheet's rate, "
                  f"{found['of_measured_matrix_rate']:.1%} of that of matrix products; beside the allocator, and of other "
                  f"processes: {found['beside_allocator'] / 1e6:.0f} MB", flush=True)  # fmt: skip
    for label, one, two in (("tensors", "expected", "tensors"), ("process", "expected_process", "process")):
        errors = [found[one] / found[two] - 1 for found in results.values()]
        print(
            f"{label}: median error {statistics.median(map(abs, errors)):.1%}, from {min(errors):+.1%} to {max(errors):+.1%}"
        )
    if args.output:
        files.write_json(args.output, {"machine": machine.describe_machine(), "cases": results})


if __name__ == "__main__":
    main()
