"""Time training, the lab's against TRL's, in turns and in processes of their own: same rows, same order, same losses.

python benchmarks/train.py                                   # all cases of this machine, about an hour on 2 cores
python benchmarks/train.py --cases llama-11m --repeats 1     # one case, once
python benchmarks/train.py --cases llama-11m --data rows.json   # rows of one's own: instruction, input, output
python benchmarks/train.py --cases Qwen3-8B --folder work    # kept: the same command again makes only the runs that are missing
python benchmarks/train.py --cases Qwen3-8B --profile        # one step of the lab's, by kernel
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ALIKE = "TRL bfloat16, rows of like length"  # what TRL has against padding without flash-attn
# Each precision is compared with itself. TRL without gradient checkpointing; "TRL, defaults" is its own choice: bfloat16 and checkpointing.
ON_CPU = ("lab float32", "TRL float32", "lab bfloat16", "TRL bfloat16", "TRL, defaults")
LIGER, PACKED, WITHOUT = "TRL bfloat16, Liger", "TRL bfloat16, packed", "lab bfloat16, without Liger"
ON_GPU = ("lab bfloat16", WITHOUT, "TRL bfloat16", LIGER, "TRL, defaults", ALIKE, PACKED)
NEEDS = {
    WITHOUT: "liger_kernel",
    LIGER: "liger_kernel",
    PACKED: "flash_attn",
}  # packages; without them a variant is left out
OTHER_ROWS = (ALIKE, PACKED)  # their steps see other rows than the lab's
WARM = {"cpu": 1, "cuda": 4}  # steps that are left out: kernels are made, and memory is asked for, in the first ones


@dataclass(frozen=True)
class Case:
    """A model, rows and a way to train: `shape` of a Llama with random weights, or the name of a model.

    `packing`: rows are filled with several samples, and the lab alone runs. `few_steps`: of what a CPU takes minutes for: TRL's defaults, and bfloat16 where it has no instructions for it. 0: left out.
    """

    name: str
    model: str | dict
    lora: bool
    rows: str  # facts: the bundled questions; chats: conversations put together from the bundled samples
    batch_size: int
    max_length: int
    steps: int
    few_steps: int = 3
    gpu: bool = False
    packing: bool = False


SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
         "vocab_size": 32000, "tie_word_embeddings": True}  # fmt: skip
CASES = (
    Case("llama-11m", SMALL, True, "chats", 4, 512, 60),
    Case("llama-11m full", SMALL, False, "chats", 4, 512, 20),
    Case("tiny-base", "tiny-base", True, "facts", 16, 128, 40),
    Case("gpt2", "random:gpt2", True, "chats", 4, 512, 6, 0),
    Case("Llama-2-7b", "random:Llama-2-7b-hf", True, "chats", 8, 1024, 20, 20, gpu=True),
    Case("Qwen3-8B", "random:Qwen3-8B", True, "chats", 8, 1024, 20, 20, gpu=True),
    Case("Qwen3-8B packed", "random:Qwen3-8B", True, "chats", 1, 4096, 20, 20, gpu=True, packing=True),
    Case("gpt2 on a GPU", "random:gpt2", False, "chats", 16, 1024, 60, 60, gpu=True),
)


def build(case: Case, folder: Path, data_file: str | None) -> None:
    """The model and the prepared rows of a case, in a folder that every process reads."""
    import torch
    from prepare import make_chats
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from sftlab import files
    from sftlab.config.configs import DataConfig
    from sftlab.data import dataset
    from sftlab.models import load

    set_seed(0)
    if case.model != "tiny-base":
        settings = LlamaConfig(**case.model, num_key_value_heads=4) if isinstance(case.model, dict) else None
        dtype = torch.bfloat16 if case.gpu and case.lora else torch.float32
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = LlamaForCausalLM(settings) if settings else load.build_random(case.model, dtype, device)
        for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):  # GPT-2's; losses can't be equal with it
            setattr(model.config, dropout, 0.0)
        model.save_pretrained(folder / "model")
        load.load_tokenizer("tiny-base").save_pretrained(folder / "model")
    if data_file and case.rows == "chats":
        source = {"source": "json", "source_path": [data_file]}
    elif case.rows == "chats":
        text = "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in make_chats(1000))
        files.write_text(folder / "chats.jsonl", text)
        source = {"source": "jsonl", "source_path": [str(folder / "chats.jsonl")]}
    else:
        source = {"source": "facts"}
    name = "tiny-base" if case.model == "tiny-base" else str(folder / "model")
    made = dataset.prepare(
        DataConfig(model=name, output_dir=str(folder), max_length=case.max_length, test_size=0.01, **source)
    )
    made.rename(folder / "data")


def make_trainer(case: Case, variant: str, folder: Path, steps: int):
    """The trainer of one variant; all see the rows in the same order. TRL gets them tokenised and labelled."""
    import torch

    from sftlab.config.configs import TrainConfig
    from sftlab.train import run

    name = "tiny-base" if case.model == "tiny-base" else str(folder / "model")
    config = TrainConfig(
        model_name=name, dataset_path=str(folder / "data"), output_dir=str(folder / "run"), use_lora=case.lora, lora_dropout=0,
        lora_target_modules="all-linear" if case.lora else "auto", max_steps=steps, batch_size=case.batch_size,
        learning_rate=2e-4, max_length=case.max_length, logging_steps=1, save_steps=10**6, eval_steps=10**6,
        lr_scheduler_type="constant", bf16="float32" not in variant,  # the same rate for those that run fewer steps
        packing=case.packing, use_liger_kernel=False if variant == WITHOUT else None,
    )  # fmt: skip
    if variant.startswith("lab"):
        return run.make_trainer(config)
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from sftlab.data import dataset
    from sftlab.models import load

    gpu, options, loading = torch.cuda.is_available(), {}, {}
    if variant != "TRL, defaults":
        options = {"bf16": config.bf16, "gradient_checkpointing": False}
        options |= {"train_sampling_strategy": "group_by_length"} if variant == ALIKE else {}
        options |= {"use_liger_kernel": True} if variant == LIGER else {}
        options |= {"packing": True} if variant == PACKED else {}
        loading = {"dtype": torch.bfloat16 if config.bf16 and case.lora else torch.float32}
        loading |= {"attn_implementation": "flash_attention_2"} if variant == PACKED else {}
    splits, _ = dataset.load_prepared(folder / "data")
    args = SFTConfig(
        output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=case.batch_size, learning_rate=2e-4,
        max_length=case.max_length, logging_steps=1, save_strategy="no", report_to="none", use_cpu=not gpu,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(load.locate(name), **{"dtype": torch.float32} | loading), args=args,
        train_dataset=splits["train"].select_columns(["input_ids", "labels"]),
        processing_class=load.load_tokenizer(name),
        peft_config=load.lora_config(config),
    )  # fmt: skip


def run_one(case: Case, variant: str, folder: Path, steps: int, output: Path, profiled: bool) -> None:
    """One training in this process: seconds of each step, its loss, tokens and FLOPs, to a JSON file.

    profiled: the last step is recorded by torch.profiler, and its table of kernels lies beside the JSON file.
    """
    import resource

    import torch
    from transformers import TrainerCallback

    from sftlab import files
    from sftlab.memory import duration
    from sftlab.models import load

    load.quiet_libraries()
    trainer = make_trainer(case, variant, folder, steps)
    starts, seconds, lengths, profiler = [], [], [], torch.profiler.profile()

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if profiled and state.global_step == steps - 1:
                profiler.start()
            starts.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - starts[-1])
            if profiled and state.global_step == steps:
                profiler.stop()

    collate = trainer.data_collator

    def count(rows):
        lengths.append([len(row["input_ids"]) for row in rows])
        return collate(rows)

    trainer.data_collator = count
    trainer.add_callback(Clock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    gpu = torch.cuda.is_available()
    if profiled:
        by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
        files.write_text(output.with_suffix(".txt"), profiler.key_averages().table(sort_by=by, row_limit=40))
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    files.write_json(output, {
        "seconds": seconds, "losses": losses, "tokens": [sum(part) for part in lengths[: len(seconds)]],
        "flops": [duration.count_step(trainer.model, part) for part in lengths[: len(seconds)]],
        "rate": duration.measure_rate("float32" not in variant), "data_sheet": duration.find_peak(torch.cuda.get_device_name()) if gpu else None,
        "peak_bytes": peak, "choices": getattr(trainer, "choices", {}),
    })  # fmt: skip


def list_variants(case: Case) -> list[str]:
    """The variants that this machine has the packages for; of a packed case the lab's own."""
    variants = [one for one in (ON_GPU if case.gpu else ON_CPU) if one.startswith("lab") or not case.packing]
    return [one for one in variants if one not in NEEDS or importlib.util.find_spec(NEEDS[one])]


def compare(case: Case, folder: Path, repeats: int, profiled: bool) -> dict:
    """Run all variants in turns and return their medians and ratios; losses must agree before times are told.

    A run whose figures lie in the folder already isn't made again.
    """
    from sftlab import machine

    env = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    runs: dict[str, list[dict]] = {}
    failed, warm = {}, WARM["cuda" if case.gpu else "cpu"]
    for turn in range(repeats):
        for variant in list_variants(case)[: 1 if profiled else None]:
            slow = variant == "TRL, defaults" or "bfloat16" in variant and not machine.has_bf16()
            few = slow and not case.gpu and case.few_steps < case.steps
            if variant in failed or few and (turn or not case.few_steps):
                continue  # once says enough, where a step takes half a minute
            steps = (case.few_steps if few else case.steps) + warm
            output = folder / ("profile.json" if profiled else f"{variant}{turn}.json")
            command = [sys.executable, __file__, "--one", case.name, variant, str(folder), str(steps), str(output)]
            command += ["--profile"] if profiled else []
            if output.exists():
                runs.setdefault(variant, []).append(json.loads(output.read_text()))
                continue
            start = time.perf_counter()
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode and not variant.startswith("lab") and "out of memory" in done.stderr:
                failed[variant] = "out of memory"
                print(f"{case.name}: {variant:28} {failed[variant]}", flush=True)
                continue
            if done.returncode:
                raise SystemExit(f"{case.name}, {variant}: {done.stderr[-3000:]}")
            made = json.loads(output.read_text()) | {"whole": time.perf_counter() - start}
            output.write_text(json.dumps(made))
            runs.setdefault(variant, []).append(made)
            timed = sum(runs[variant][-1]["seconds"][warm:])
            print(f"{case.name}: {variant:28} {timed:8.2f} s for {steps - warm} steps", flush=True)
    return {
        "case": case.name,
        "losses_differ_by": compare_losses(case, runs),
        **summarise(runs, warm),
        "failed": failed,
    }


def find_lab(variant: str) -> str:
    """The lab's variant in the precision of another one."""
    return "lab float32" if "float32" in variant else "lab bfloat16"


def compare_losses(case: Case, runs: dict[str, list[dict]]) -> dict[str, float]:
    """The largest relative difference to the lab's losses, step by step, of each variant that takes the same rows.

    Raises AssertionError where it's more than rounding: in float32 a ten-thousandth, in bfloat16 a few hundredths.
    """
    found = {}
    for variant, made in runs.items():
        if find_lab(variant) not in (variant, *runs) or variant in (find_lab(variant), *OTHER_ROWS):
            continue
        pairs = list(zip(runs[find_lab(variant)][0]["losses"], made[0]["losses"], strict=False))
        found[variant] = max(abs(mine - other) / abs(other) for mine, other in pairs)
        tolerance = 1e-4 if "float32" in variant else 5e-2
        assert found[variant] <= tolerance, f"{case.name}: losses of the lab and of {variant}: {pairs}"
    return found


def summarise(runs: dict[str, list[dict]], warm: int) -> dict:
    """Median seconds, tokens per second, and in each pair of runs how many times those of the variant the tokens per second
    of the lab in the same precision are, over the steps that both made; `warm` first steps are left out.
    """
    last = {variant: made[0]["losses"][-1] for variant, made in runs.items() if variant.startswith("lab")}
    summary = {"last_loss": last, "choices": next(iter(runs.values()))[0]["choices"], "variants": {}}
    for variant, made in runs.items():
        ours = runs.get(find_lab(variant), [])
        steps = min(len(made[0]["seconds"]), *(len(run["seconds"]) for run in ours))

        def speed(run, steps=steps):
            return sum(run["tokens"][warm:steps]) / sum(run["seconds"][warm:steps])

        steps = len(made[0]["seconds"])
        took = statistics.median(sum(run["seconds"][warm:]) for run in made)
        rate = statistics.median(run["rate"] for run in made)
        summary["variants"][variant] = {
            "steps": steps - warm, "seconds": took, "whole_process": statistics.median(r["whole"] for r in made),
            "tokens_per_second": sum(made[0]["tokens"][warm:]) / took,
            "of_measured_matrix_rate": sum(made[0]["flops"][warm:]) / took / rate,
            "of_data_sheet": sum(made[0]["flops"][warm:]) / took / (made[0]["data_sheet"] or float("inf")),
            "times_slower_than_lab": [speed(mine) / speed(run) for mine, run in zip(ours, made, strict=False)],
            "peak_gigabytes": max(run["peak_bytes"] for run in made) / 1e9,
        }  # fmt: skip
    return summary


def tell(result: dict) -> None:
    apart = ", ".join(f"{part:.0e}" for part in result["losses_differ_by"].values())
    print(f"\n{result['case']}: last losses {result['last_loss']}; step by step they differ by {apart} at most")
    print(
        f"{'':29}{'steps':>6}{'seconds':>9}{'process':>9}{'tokens/s':>10}{'of rate':>9}{'of sheet':>9}{'GB':>7}   the lab is x times as fast"
    )
    for name, row in result["variants"].items():
        ratios = ", ".join(f"{ratio:.2f}" for ratio in row["times_slower_than_lab"])
        print(f"{name:29}{row['steps']:>6}{row['seconds']:>9.2f}{row['whole_process']:>9.2f}{row['tokens_per_second']:>10.0f}"
              f"{row['of_measured_matrix_rate']:>9.1%}{row['of_data_sheet']:>9.1%}{row['peak_gigabytes']:>7.2f}   {ratios}")  # fmt: skip
    for name, why in result["failed"].items():
        print(f"{name:29}{why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="time so many steps, instead of the number of each case")
    parser.add_argument("--data", help="a JSON file with rows of instruction, input and output, instead of the chats")
    parser.add_argument("--folder", type=Path, help="keep models, rows and runs here; what is there isn't made again")
    parser.add_argument("--profile", action="store_true", help="the lab's first variant once, its last step by kernel")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file, too")
    parser.add_argument(
        "--one", nargs=5, metavar=("CASE", "VARIANT", "FOLDER", "STEPS", "OUTPUT"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    known = {case.name: replace(case, steps=args.steps or case.steps) for case in CASES}
    if args.one:
        name, variant, folder, steps, output = args.one
        return run_one(known[name], variant, Path(folder), int(steps), Path(output), args.profile)
    import torch
    import trl

    from sftlab import files, machine
    from sftlab.models import load

    load.quiet_libraries()
    wanted = args.cases or [case.name for case in CASES if case.gpu == torch.cuda.is_available()]
    for name in wanted:
        if name not in known:
            parser.error(f"no case {name!r}; there are {', '.join(known)}")
    results = {"machine": machine.describe_machine(), "trl": trl.__version__, "cases": []}
    for name in wanted:
        with tempfile.TemporaryDirectory() as aside:
            folder = args.folder / name.replace(" ", "-") if args.folder else Path(aside)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "data").exists():  # the last thing that is made
                build(known[name], folder, args.data)
            results["cases"].append(compare(known[name], folder, 1 if args.profile else args.repeats, args.profile))
            if args.profile:
                print((folder / "profile.txt").read_text())
        tell(results["cases"][-1])
        if args.output:
            files.write_json(args.output, results)


if __name__ == "__main__":
    main()
