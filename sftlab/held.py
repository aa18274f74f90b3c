"""What one process holds of a training: weights, gradients, the optimizer's state, in bytes, at the first step.

These are the three things that ZeRO shares out, so that one can see who holds what.

    python -c "from sftlab import held; help(held.Held)"
"""

from transformers import TrainerCallback


class Held(TrainerCallback):
    """Counts when the optimizer has just moved the weights for the first time: all three are there.

    `parts`: bytes of {"weights", "gradients", "optimizer"}, or None before that step. With DeepSpeed the optimizer's part
    has the float32 copy of the weights that it moves, and of the gradients each process has only its share left by then,
    from stage 1 on.
    """

    def __init__(self):
        self.parts, self.hook = None, None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = optimizer
        while (deeper := getattr(inner, "optimizer", None)) is not None:  # accelerate's and DeepSpeed's wrappers
            inner = deeper

        seen = set()  # DeepSpeed moves one group of weights after the other, and gives each one's gradients free

        def count(*_):
            found = count_parts(model, inner, seen)
            self.parts = {name: found[name] + (self.parts or {}).get(name, 0) for name in found}

        self.hook = inner.register_step_post_hook(count)

    def on_step_end(self, args, state, control, **kwargs):
        self.hook.remove()


def count_parts(model, optimizer, seen: set) -> dict:
    """Bytes by part that aren't in `seen` yet. A tensor that several names share counts once; under ZeRO-3 a weight is the
    piece that is here.
    """
    weights = list(model.parameters())
    pieces = [piece for weight in weights if (piece := getattr(weight, "ds_tensor", None)) is not None]
    moved = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in weights + moved if weight.grad is not None]
    states = [
        value for state in optimizer.state.values() for value in state.values() if hasattr(value, "untyped_storage")
    ]
    return {
        "weights": count_bytes(weights + pieces, seen),
        "gradients": count_bytes(gradients, seen),
        "optimizer": count_bytes(moved + states, seen),
    }


def count_bytes(tensors: list, seen: set) -> int:
    """Bytes of the storages behind tensors, each once; `seen`: those that were counted before, and these from now on."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
