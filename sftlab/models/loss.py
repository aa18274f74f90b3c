"""The loss of SFT computed on completion tokens only, in one pass over the logits.

On a CPU, TRL's fused loss scores positions without a label, too, and computes the logits twice. Here only positions in the
loss are multiplied by the output layer, a few hundred at a time in one buffer; loss, gradient and accuracy all come from the
one softmax. On a GPU TRL's own kernel scores these positions only, and is taken there.

    python benchmarks/train.py
"""

import inspect
import types

import torch

from sftlab.models.load import IGNORED

SIXTEEN = 16  # rows of a product in bfloat16 are a multiple of it: oneDNN makes a kernel for each new number of them
NUMBERS = 2**23  # logits computed at once: 32 MiB of float32, which is where it was fastest on CPUs


class AnswerLoss(torch.autograd.Function):
    """Cross-entropy summed over positions, from hidden states and the output layer's weight.

    hidden: (n, width), weight: (vocabulary, width), bias: (vocabulary) or None, targets: (n), width as the model's.
    Returns (loss, right), each a float32 sum over the positions; only the loss has a gradient. It is computed
    in the forward pass already, as softmax minus one-hot, so the logits are never kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        count, vocabulary = len(targets), weight.shape[0]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        matrix, needs_grad = weight.detach().to(dtype), any(ctx.needs_input_grad[:3])
        rows = max(1, min(count, NUMBERS // vocabulary))
        buffer = torch.empty(rows, vocabulary, dtype=torch.float32)
        needed = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        grads = [torch.zeros_like(part, dtype=torch.float32) if asked else None for part, asked in needed]
        loss, right = (torch.zeros((), dtype=torch.float32) for _ in range(2))
        for start in range(0, count, rows):
            states = hidden[start : start + rows].to(dtype)
            odd = -len(states) % SIXTEEN if dtype != torch.float32 else 0
            wanted = targets[start : start + rows, None]
            logits = buffer[: len(wanted)]
            if dtype == torch.float32:
                torch.mm(states, matrix.t(), out=logits)
            else:
                logits.copy_((add_rows(states, odd) @ matrix.t())[: len(wanted)])
            if bias is not None:
                logits += bias
            top = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, wanted)
            probs = torch.softmax(logits, -1, out=logits)
            log_total = top - probs.amax(-1, keepdim=True).log()
            loss = loss + (log_total - chosen).sum()
            right = right + (chosen == top).sum()
            if needs_grad:
                probs.scatter_add_(1, wanted, probs.new_full(wanted.shape, -1.0))
                grad = probs.to(dtype)
                if grads[0] is not None:
                    grads[0][start : start + rows] = (add_rows(grad, odd) @ matrix)[: len(wanted)]
                if grads[1] is not None:
                    grads[1] += grad.t() @ states
                if grads[2] is not None:
                    grads[2] += probs.sum(0)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden, weight, bias)]
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, scale, *_):
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else (grad * scale).to(dtype) for grad, dtype in parts), None


def add_rows(matrix, count: int):
    """The matrix with so many rows of zeros below."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, count)) if count else matrix


# Of a configuration: what changes the logits after the output layer.
EXTRAS = "final_logit_softcapping logit_scale output_multiplier lm_head_multiplier logits_scaling logits_soft_cap"


def has_plain_head(model) -> bool:
    """Whether logits are the output layer times the last hidden state and nothing more: no scale, no cap."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    plain = all(getattr(config, name, None) in (None, 1.0) for name in EXTRAS.split())
    return plain and head is not None and head.weight.is_floating_point() and model.base_model is not model


def add_answer_head(model) -> None:
    """Let `model(…, answer_labels=labels)` return (loss summed, trained tokens, right ones).

    labels: (batch, length), -100 where nothing is trained; the token at i is predicted from the positions before it.
    """
    forward = model.forward

    def answer_forward(self, *args, answer_labels=None, **kwargs):
        if answer_labels is None:
            return forward(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        targets = answer_labels[:, 1:]
        trained = targets != IGNORED
        head = self.get_output_embeddings()
        bias = getattr(head, "bias", None)
        loss, right = AnswerLoss.apply(hidden[:, :-1][trained], head.weight, bias, targets[trained])
        return loss, trained.sum(), right

    # generate() passes position_ids only to a forward that names them, and padding shifts positions without them
    answer_forward.__signature__ = inspect.signature(type(model).forward)
    model.forward = types.MethodType(answer_forward, model)
