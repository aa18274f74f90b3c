"""TRL's SFTTrainer with the lab's way to the loss, to batches, and to checkpoints that can be trusted.

python -c "from sftlab.train.trainer import LabTrainer; help(LabTrainer)"
"""

import random
import shutil
from pathlib import Path

import torch
from torch.utils.data import Sampler
from trl import SFTTrainer

from sftlab.config.deepspeed import find_stage
from sftlab.errors import UserError
from sftlab.models import adapters
from sftlab.models.load import IGNORED
from sftlab.models.loss import add_answer_head, has_plain_head
from sftlab.train import checkpoints, distributed
from sftlab.train.callbacks import Divergence


class LabTrainer(SFTTrainer):
    """SFTTrainer, and beside it: the answers' loss on a CPU, batches of like length, checkpoints with their meters.

    `lengths`: tokens of each training row; rows of like length then share a batch. `uses_answer_head`: whether the loss
    is computed on the answers' positions alone; `in_pieces`: whether each process holds a piece of every weight (ZeRO-3); where that isn't possible it goes TRL's way.
    """

    def __init__(self, *args, lengths: list[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths, self.problem = lengths, None
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        plain = has_plain_head(causal) and self.args.loss_type == "nll" and not self.aux_loss_enabled
        self.in_pieces = self.is_deepspeed_enabled and find_stage(self.args.deepspeed) == 3
        whole = not self.in_pieces and not (
            self.is_deepspeed_enabled and self.args.bf16
        )  # DeepSpeed casts all to bfloat16
        for weight in self.model.parameters() if whole else ():
            if weight.requires_grad:  # TRL puts adapters beside a quantised base in bfloat16, which loses small steps
                weight.data = weight.data.float()
        cpu = self.args.device.type == "cpu"
        if whole:
            adapters.prepare(self.model, self.args.bf16, cpu)
        self.uses_answer_head = plain and whole and cpu
        if self.uses_answer_head:
            add_answer_head(causal)
        self.divergence = Divergence(self.model.config.get_text_config().vocab_size)
        self.add_callback(self.divergence)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        lengths, inputs = inputs.get("lengths"), {name: value for name, value in inputs.items() if name != "lengths"}
        if return_outputs or not self.uses_answer_head or self.label_smoother or self.compute_loss_func:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        loss, tokens, right, entropy = model(**rest, answer_labels=labels)
        loss = loss / torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and gradients are averaged
        self.keep_metrics(inputs, lengths, tokens, right, entropy)
        return loss

    def keep_metrics(self, inputs, lengths, tokens, right, entropy) -> None:
        """What TRL logs beside the loss, summed over the processes in one exchange. lengths: tokens of each row, if known."""
        mode = "train" if self.model.training else "eval"
        if lengths is None:
            lengths = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
        seen = lengths.sum()
        sums = torch.stack([torch.as_tensor(part, dtype=torch.float64) for part in (tokens, right, entropy, seen)])
        tokens, right, entropy, seen = self.accelerator.reduce(sums, "sum").tolist()
        self._metrics[mode]["entropy"].append(entropy / max(1, tokens))
        self._metrics[mode]["mean_token_accuracy"].append(right / max(1, tokens))
        if mode == "train":
            self._total_train_tokens += int(seen)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        share = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        self.check_step(loss.item() * share)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:
            self.divergence.check_gradient(norm, self.args, self.state, self.model)
        return norm

    def check_step(self, loss: float) -> None:
        """Raises UserError for a loss or gradient that is no number or diverges, in all processes at the same step."""
        try:
            self.divergence.check_loss(loss, self.args, self.state, self.model)
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:  # whose step is over by now
                norm = self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
                self.divergence.check_gradient(norm, self.args, self.state, self.model, applied=True)
        except UserError as error:
            self.problem = self.problem or error  # told to the others when all have come to the end of the step
        if self.accelerator.sync_gradients or self.accelerator.num_processes == 1:
            distributed.raise_together(self.problem)

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LikeLengths(self.lengths, rows, self.args.seed)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the file that says the checkpoint is whole comes after every process's part

    def _save_checkpoint(self, model, trial):
        folder, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = folder / f"checkpoint-{step}"
        whole = distributed.from_main(checkpoints.is_whole, checkpoint)  # a shared disk may show it to others later
        if self.args.should_save and not whole:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what a killed run left of it
        self.accelerator.wait_for_everyone()
        try:
            if whole:  # written at this step already; it may be the best since
                return checkpoints.note_best(checkpoint, self)
            checkpoints.write_meters(checkpoint, self)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if checkpoints.is_full(error):
                raise checkpoints.drop_partial(folder, step) from error
            raise


# Batches with little or no padding: cut rows, and rows of like length together.
#
# Where the attention knows where samples begin, a batch is one row without any padding. Elsewhere rows of about the same
# length go into a batch, in an order that depends on the seed and the epoch alone, so that a resumed run has it, too.


WINDOW = 50  # batches among whose rows those of like length are looked for
MULTIPLE = {True: 16, False: 1}  # of tokens in a row, in bfloat16 and in float32, whose products are MKL's


class LikeLengths(Sampler):
    """Indices of rows, batch after batch, each from rows of like length; the batches come in random order."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        rows = list(range(len(self.lengths)))
        rng.shuffle(rows)
        size, batches = self.batch_size, []
        for start in range(0, len(rows), size * WINDOW):
            window = sorted(rows[start : start + size * WINDOW], key=lambda row: self.lengths[row])
            batches += [window[at : at + size] for at in range(0, len(window), size)]
        whole = [batch for batch in batches if len(batch) == size]
        rng.shuffle(whole)
        return iter([row for batch in whole + [b for b in batches if len(b) < size] for row in batch])


class InRows:
    """TRL's collator for rows without padding, for a CPU: a batch as one row of few different lengths.

    shared: tokens that all rows begin with; a batch of several holds them once, before all others. multiple: the row's length
    is a multiple of it, by tokens of a sample of their own that nobody sees, because oneDNN makes a kernel for each new
    length, which takes time and memory. `lengths` of a batch: tokens of each of its rows.
    """

    def __init__(self, collate, shared: int, multiple: int):
        self.collate, self.shared, self.multiple = collate, shared, multiple

    def __call__(self, rows: list[dict]) -> dict:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        lengths, shared = torch.tensor([len(row["input_ids"]) for row in rows]), self.shared if len(rows) > 1 else 0
        parts = rows
        if shared:
            first = {name: column[:shared] for name, column in rows[0].items()}
            parts = [first, *({name: column[shared:] for name, column in row.items()} for row in rows)]
        if left := -sum(len(part["input_ids"]) for part in parts) % self.multiple:
            parts = [*parts, {"input_ids": [self.collate.pad_token_id] * left, "labels": [IGNORED] * left}]
        batch = self.collate(parts)
        batch["position_ids"][0, shared:] += shared
        return batch | {"shared_prefix": shared, "lengths": lengths}
