"""Counts the bytes that tensors hold while a piece of code runs, real tensors or ones without bytes: now, and at the peak.

python -c "from sftlab.live_bytes import LiveBytes; help(LiveBytes)"
"""

import weakref
from dataclasses import dataclass

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """The most bytes that were held: of them `gradients` in gradients of weights, and `head` since `enter_head`."""

    size: int = 0
    gradients: int = 0
    head: int = 0


class LiveBytes(TorchDispatchMode):
    """Live bytes of all that operations make while this is on, the weights of `model` left out.

    now: bytes; gradients: bytes of the weights' gradients so far; early, late: the peaks up to the end of the output
    layer, and after it, in the backward pass of the layers. `peak` is the larger one, in bytes.
    """

    def __init__(self, model):
        super().__init__()
        self.now = self.gradients = self.before_head = 0
        self.early, self.late, self.in_head, self.in_layers = Peak(), Peak(), False, False
        self.live, self.counted = {}, set()
        for part in (*model.parameters(), *model.buffers()):
            self.live[part.untyped_storage()._cdata] = None
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self.add_gradient)

    @property
    def peak(self) -> int:
        return max(self.early.size, self.late.size)

    def enter_head(self) -> None:
        self.in_head, self.in_layers, self.before_head = True, False, self.now

    def leave_head(self, slope=None) -> None:
        """The head is done when the gradient of what went into it is there: a hook for that tensor."""
        self.in_head, self.in_layers = False, True

    def add_gradient(self, weight) -> None:
        if id(weight) not in self.counted:  # later batches add to the same tensor
            self.counted.add(id(weight))
            self.gradients += weight.grad.nbytes

    def free(self, key: int, size: int) -> None:
        if self.live.pop(key, None) is not None:
            self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            storage = part.untyped_storage() if hasattr(part, "untyped_storage") else None
            if storage is not None and storage._cdata not in self.live:
                key, size = storage._cdata, storage.nbytes()
                self.live[key] = weakref.ref(storage, lambda _, key=key, size=size: self.free(key, size))
                self.now += size
                peak = self.late if self.in_layers else self.early
                if self.now > peak.size:
                    peak.size, peak.gradients = self.now, self.gradients
                    peak.head = self.now - self.before_head if self.in_head else 0
        return out
