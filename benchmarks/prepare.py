"""Time the preparation of chats, the lab's against TRL's, in one run: same chats, same template, equal ids and labels.

python benchmarks/prepare.py                        # 20,000 chats, A B A B A B, a few minutes on 2 cores
python benchmarks/prepare.py --chats 2000 --repeats 1
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path


def make_chats(count: int, seed: int = 0) -> list[list[dict]]:
    """Conversations of one to six exchanges, every fourth with a system message, drawn from the bundled samples."""
    from sftlab.data import sources
    from sftlab.data.rows import check_rows, get_answer, get_prompt

    pairs = {}
    for source in sources.SAMPLE_FILES:
        rows, _ = check_rows(sources.load_sample(source), source)
        for row in rows:
            turns = row.get("messages", [{}, {"content": get_prompt(row)}, {"content": get_answer(row)}])
            texts = [turn["content"] for turn in turns[len(turns) % 2 :]]  # without the system message
            pairs.setdefault(source, []).extend(zip(texts[::2], texts[1::2], strict=True))
    rng, chats = random.Random(seed), []
    for number in range(count):
        chat = [{"role": "system", "content": "Answer in the language of the question."}] if number % 4 == 0 else []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 6))):
            question, answer = rng.choice(pairs[rng.choice(list(pairs))])
            chat += [{"role": "user", "content": f"{question} ({rng.randrange(10**6)})"},
                     {"role": "assistant", "content": answer}]  # fmt: skip
        chats.append(chat)
    return chats


def load_tokenizer():
    from sftlab.data import formats
    from sftlab.models import load

    tokenizer = load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "chatml")
    tokenizer.model_max_length = 10**6
    return tokenizer


def prepare_with_lab(chats, tokenizer, folder: str):
    """The lab's preparation: `input_ids` and `labels` beside the messages, in an Arrow file."""
    from sftlab.config.configs import DataConfig
    from sftlab.data import dataset, examples, rows

    found = [{"place": f"row {number}", "messages": chat} for number, chat in enumerate(chats["messages"], 1)]
    written = examples.write_rows(found, tokenizer, DataConfig(format="chatml"), {}, rows.Notes())
    return dataset.tokenize(written, tokenizer, folder)


def prepare_with_trl(chats, tokenizer, folder: str):
    """TRL's: an SFTTrainer made around a model of two layers, which tokenises in its constructor, in two processes."""
    from trl import SFTConfig, SFTTrainer

    from sftlab.models import load

    args = SFTConfig(output_dir=folder, assistant_only_loss=True, dataset_num_proc=2, max_length=None, report_to="none",
                     use_cpu=True, bf16=False)  # fmt: skip
    model = load.load_model("random-tiny:Llama-2-7b-hf")
    return SFTTrainer(model, args=args, train_dataset=chats, processing_class=tokenizer).train_dataset


def check_equal(ours, theirs, tokens: int) -> None:
    """Raises AssertionError unless every row has the same ids, and the same ones among them are trained."""
    count = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["input_ids"] == other["input_ids"]
        trained = other["labels"] if "labels" in other else other["assistant_masks"]
        wanted = [value != -100 for value in trained] if "labels" in other else [bool(value) for value in trained]
        assert [label != -100 for label in mine["labels"]] == wanted
        count += len(mine["input_ids"])
    assert count == tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file, too")
    args = parser.parse_args()

    import datasets
    import trl

    from sftlab import files, machine
    from sftlab.config.configs import DataConfig
    from sftlab.data import dataset
    from sftlab.models import load

    load.quiet_libraries()
    datasets.disable_caching()
    seconds = {"lab": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = make_chats(args.chats)
        datasets.Dataset.from_dict({"messages": rows}).save_to_disk(f"{folder}/chats")
        made = {}
        for turn in range(args.repeats):
            for name, prepare in (("lab", prepare_with_lab), ("TRL", prepare_with_trl)):
                chats = datasets.load_from_disk(f"{folder}/chats")
                (work := Path(folder) / f"{name}{turn}").mkdir()
                start = time.perf_counter()
                made[name] = prepare(chats, load_tokenizer(), str(work))
                seconds[name].append(time.perf_counter() - start)
                print(f"{name:4} {seconds[name][-1]:6.2f} s", flush=True)
        tokens = sum(len(ids) for ids in made["lab"]["input_ids"])
        check_equal(made["lab"], made["TRL"], tokens)

        source = Path(folder) / "chats.jsonl"
        source.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in rows), "utf-8")
        config = DataConfig(source="jsonl", source_path=[str(source)], format="chatml", output_dir=f"{folder}/datasets",
                            max_length=4096)  # fmt: skip
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            dataset.prepare(config)
        whole = time.perf_counter() - start

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "machine": machine.describe_machine(), "trl": trl.__version__, "chats": args.chats, "tokens": tokens,
        "seconds": seconds, "median": middle, "ratio": middle["TRL"] / middle["lab"],
        "prepare_with_report_seconds": whole,
    }  # fmt: skip
    print(f"{args.chats:,} chats, {tokens:,} tokens, ids and labels equal; medians: lab {middle['lab']:.2f} s, "
          f"TRL {trl.__version__} with 2 processes {middle['TRL']:.2f} s: {result['ratio']:.2f} times as fast")  # fmt: skip
    print(f"`sftlab prepare` whole, with checks and report: {whole:.1f} s")
    if args.output:
        files.write_json(args.output, result)


if __name__ == "__main__":
    main()
