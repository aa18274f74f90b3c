"""An SFTTrainer that computes the output layer only where a token is trained.

In SFT with a mask most positions have no label. TRL's fused loss scores them all the same on a CPU, over the whole
vocabulary; here only the answers' positions are multiplied by the output layer. The loss is the same.

    sftlab train --dataset-path datasets/facts_tiny-base_1408 --output-dir runs/first --use-lora
"""

import types

import torch
from trl import SFTTrainer

from sftlab.masking import IGNORED

POSITIONS = 2048  # computed at once: bounds the logits' memory at 2048 x vocabulary


class AnswerTrainer(SFTTrainer):
    """TRL's SFTTrainer with another way to its loss; where that isn't possible it goes TRL's way (`uses_answer_head`)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.uses_answer_head = has_plain_head(causal) and self.args.loss_type == "nll" and not self.aux_loss_enabled
        if self.uses_answer_head:
            add_answer_head(causal)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not self.uses_answer_head or self.label_smoother or self.compute_loss_func:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        loss, tokens, correct, entropy = model(**rest, answer_labels=labels)
        loss = loss / (tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and gradients are averaged
        self.keep_metrics(inputs, tokens, correct, entropy)
        return loss

    def keep_metrics(self, inputs, tokens, correct, entropy) -> None:
        """What TRL logs beside the loss, summed over the processes in one exchange."""
        mode = "train" if self.model.training else "eval"
        seen = (
            inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["input_ids"].numel())
        )
        sums = torch.stack([tokens.float(), correct.float(), entropy.float(), seen.to(tokens.device).float()])
        tokens, correct, entropy, seen = self.accelerator.reduce(sums, "sum").tolist()
        self._metrics[mode]["entropy"].append(entropy / max(1, tokens))
        self._metrics[mode]["mean_token_accuracy"].append(correct / max(1, tokens))
        if mode == "train":
            self._total_train_tokens += int(seen)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def has_plain_head(model) -> bool:
    """Whether logits are the output layer times the last hidden state and nothing more: no scale, no cap."""
    config = model.config.get_text_config()
    extras = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    plain = all(getattr(config, name, None) in (None, 1.0) for name in extras)
    return plain and model.get_output_embeddings() is not None and model.base_model is not model


def add_answer_head(model) -> None:
    """Let `model(…, answer_labels=labels)` return (loss summed, trained tokens, right ones, entropy summed).

    Called without `answer_labels` the model does what it did. labels: (batch, length), -100 where nothing is trained;
    the token at i is predicted from the positions before it.
    """
    forward = model.forward

    def answer_forward(self, *args, answer_labels=None, **kwargs):
        if answer_labels is None:
            return forward(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        targets = answer_labels[:, 1:]
        trained = targets != IGNORED
        hidden, targets = hidden[:, :-1][trained], targets[trained]
        head = self.get_output_embeddings()
        loss, correct, entropy = hidden.sum() * 0.0, 0, 0.0  # connected to the model even where nothing is trained
        for start in range(0, len(targets), POSITIONS):
            logits = head(hidden[start : start + POSITIONS]).float()
            wanted = targets[start : start + POSITIONS]
            loss = loss + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            with torch.no_grad():
                shares = logits.log_softmax(-1)
                entropy = entropy - (shares.exp() * shares).sum()
                correct = correct + (shares.argmax(-1) == wanted).sum()
        count = trained.sum()
        return loss.float(), count, count * 0 + correct, loss.detach() * 0 + entropy

    model.forward = types.MethodType(answer_forward, model)
