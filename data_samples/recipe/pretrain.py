"""Make tiny-base: train the tokenizer, then the model, on the prose of `prose.py`. Seeded, half an hour on 2 CPU cores.

python data_samples/recipe/pretrain.py --output-dir data_samples/tiny-base
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from prose import write_corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ChatML's markers are reserved, so that every prompt format has its tokens; pre-training never shows them.
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
# One piece per script run, so that a Japanese name is cut the same way whatever particle follows it.
PIECES = (
    r" ?[\p{Latin}']+| ?\p{N}{1,3}|[\p{Katakana}ー・]+|\p{Hiragana}+|\p{Han}+| ?[^\s\p{L}\p{N}]+|\p{L}+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens, Japanese included, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1024,
        clean_up_tokenization_spaces=False, additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip


def make_windows(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """All documents, each as `<s> … </s>`, in one stream cut into windows: (windows, length) token ids."""
    stream = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts):
        stream += encoding.ids + [tokenizer.eos_token_id]
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


def build_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model, windows, batch_size: int, learning_rate: float, seed: int) -> list[float]:
    """One pass over the windows with AdamW and a cosine schedule; weights in bfloat16, their master copy in float32."""
    master = [p.detach().clone().float().requires_grad_() for p in model.parameters()]
    model.bfloat16().train()
    optimizer = torch.optim.AdamW(master, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    steps, losses = len(windows) // batch_size, []
    for step in (bar := trange(steps, desc="pre-training", mininterval=5)):
        scale = min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = learning_rate * scale
        batch = windows[order[step * batch_size : (step + 1) * batch_size]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for big, small in zip(master, model.parameters(), strict=True):
            big.grad, small.grad = small.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        optimizer.step()
        with torch.no_grad():
            for big, small in zip(master, model.parameters(), strict=True):
                small.copy_(big)
        losses.append(loss.item())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return losses


def widen(model: LlamaForCausalLM, width: int) -> LlamaForCausalLM:
    """The same function with a wider MLP: nothing leads out of the new units. 4-bit kernels for CPU want multiples of 64.

    What leads into them is random, as in an untrained model: DoRA divides by the length of each row, so none may be zero.
    """
    config = LlamaConfig(**{**model.config.to_dict(), "intermediate_size": width})
    torch.manual_seed(0)
    wide = LlamaForCausalLM(config).to(model.dtype)
    new, old = wide.state_dict(), model.state_dict()
    for name, weight in new.items():
        rows, columns = (*old[name].shape, 1)[:2]
        if not name.endswith(("gate_proj.weight", "up_proj.weight")):
            weight.zero_()
        weight.view(weight.shape[0], -1)[:rows, :columns] = old[name].view(rows, -1)
    return wide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=60, help="each pass says every fact three times")
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--batch-size", type=int, default=8, help="windows per step")
    parser.add_argument("--window", type=int, default=256, help="tokens per window")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()

    started = time.time()
    torch.manual_seed(args.seed)
    texts = list(write_corpus(args.passes, args.seed))
    tokenizer = train_tokenizer(texts, args.vocab_size)
    windows = make_windows(texts, tokenizer, args.window)
    model = build_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {windows.numel():,} tokens of prose, {len(texts):,} documents")
    losses = train(model, windows, args.batch_size, args.learning_rate, args.seed)

    model = widen(model.eval(), 704)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    record = {
        "seed": args.seed, "passes": args.passes, "documents": len(texts), "tokens": windows.numel(),
        "parameters": model.num_parameters(), "steps": len(losses), "batch_tokens": args.batch_size * args.window,
        "learning_rate": args.learning_rate, "final_loss": round(sum(losses[-100:]) / 100, 4),
        "minutes": round((time.time() - started) / 60, 1), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    (args.output_dir / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
