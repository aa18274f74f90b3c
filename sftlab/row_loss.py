"""The loss of single rows: how surprised a model is by each answer, or by each text.

A mean alone can't say how sure it is. Here every row keeps its sum and its number of tokens, so that two models can be
compared row by row. The mean is over all tokens; the Trainer's held-out loss is a mean over batches, and the same only as
far as its batches hold equally many.

python -c "from sftlab import row_loss; help(row_loss.measure_rows)"
"""

import math
import os

from sftlab.masking import IGNORED


def measure_rows(model, rows: list[dict], pad_token_id: int, batch_size: int = 32, bf16: bool = False):
    """Cross-entropy in nats, summed over each row's trained tokens, and their number: two float64 arrays of (rows).

    rows: `input_ids` and `labels`, equally long lists; -100 where nothing is predicted. Rows of like length share a
    batch; padding and batches change nothing but rounding. `bf16`: computed under autocast, as such a run trains.
    """
    import numpy
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from tqdm.auto import tqdm

    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    sums, counts, was_training = numpy.zeros(len(rows)), numpy.zeros(len(rows)), model.training
    quiet = len(order) <= batch_size or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="loss", leave=False, disable=quiet):
            chosen = order[start : start + batch_size]
            ids = pad_sequence([torch.tensor(rows[row]["input_ids"]) for row in chosen], True, pad_token_id)
            labels = pad_sequence([torch.tensor(rows[row]["labels"]) for row in chosen], True, IGNORED)
            lengths = torch.tensor([len(rows[row]["input_ids"]) for row in chosen])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            device, aims = model.device, labels[:, 1:].to(model.device)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False).logits
            trained = aims != IGNORED
            # float32 for the trained positions alone: a vocabulary of 256,000 would fill the memory
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1][trained].float(), aims[trained].long(), reduction="none"
            )
            places = trained.nonzero()[:, 0].cpu().numpy()
            size = len(chosen)
            sums[chosen] = numpy.bincount(places, losses.double().cpu().numpy(), minlength=size)
            counts[chosen] = numpy.bincount(places, minlength=size)
    finally:
        model.train(was_training)
    return sums, counts


def encode_texts(tokenizer, texts: list[str], max_length: int = 1024) -> list[dict]:
    """Plain texts as rows for `measure_rows`, every token predicted; after BOS where pre-training put one; cut."""
    from sftlab.formats import adds_bos

    first = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids = [(first + tokenizer(text, add_special_tokens=False).input_ids)[:max_length] for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens a model that is so surprised might as well have guessed."""
    return math.exp(min(loss, 700))
