"""Tokens that a prompt format brings and pre-training never saw: room for them, and training of just their rows.

What a frozen base has for such tokens tells the model nothing: random numbers in a new row; in tiny-base, whose output
layer is the same matrix, one direction for all that never occurred. LoRA alone leaves them so.

python -c "from sftlab import new_tokens; help(new_tokens.train_tokens)"
"""


def fit_vocabulary(model, tokenizer) -> None:
    """Give the model an embedding for every token of the tokenizer; said aloud where some are new."""
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
