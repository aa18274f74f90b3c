"""TRL's SFTTrainer with the lab's way to the loss, to batches, and to checkpoints that can be trusted."""

import math
from collections import deque
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.data import ConcatDataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer

from sftlab import files
from sftlab.config.deepspeed import find_stage
from sftlab.errors import UserError
from sftlab.models import adapters
from sftlab.models.load import IGNORED
from sftlab.models.loss import add_answer_head, has_plain_head
from sftlab.train import distributed
from sftlab.train import folder as run_folder

COUNTERS = "meters{}.json"  # in a checkpoint, of rank 0; the others' have their rank in the name


class LabTrainer(SFTTrainer):
    """SFTTrainer with the loss on completion tokens only on a CPU, batches of rows of like length, and whole checkpoints.

    `lengths`: tokens of each training row, if rows of like length share a batch. `uses_answer_head`: whether the loss is
    computed the lab's way, else TRL's. `sharded`: whether each process holds a shard of every weight (ZeRO-3).
    """

    def __init__(self, *args, lengths: list[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths, self.losses = lengths, deque([0.0] * 10, maxlen=10)
        self.advice = f"Lower --learning-rate (now {self.args.learning_rate:g}) or add --warmup-steps 0.03."
        self.validation = torch.zeros(2, dtype=torch.float64)  # summed loss and tokens of the evaluation at work
        if (processes := self.accelerator.num_processes) > 1 and (rows := self.eval_dataset) is not None:
            empty = rows[0] | {"labels": [IGNORED] * len(rows[0]["labels"])}
            missing = -len(rows) % (self.args.per_device_eval_batch_size * processes)
            self.eval_dataset = ConcatDataset([rows, [empty] * missing])  # or a process would take some row again
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        plain = has_plain_head(causal) and self.args.loss_type == "nll" and not self.aux_loss_enabled
        self.sharded = self.is_deepspeed_enabled and find_stage(self.args.deepspeed) == 3
        cast = self.is_deepspeed_enabled and self.args.bf16  # DeepSpeed casts all to bfloat16
        whole = not self.sharded and not cast
        cpu = self.args.device.type == "cpu"
        if whole:
            for weight in self.model.parameters():
                if weight.requires_grad:  # TRL puts adapters on a quantized base in bfloat16, which loses small steps
                    weight.data = weight.data.float()
            adapters.prepare(self.model, self.args.bf16, cpu)
        self.uses_answer_head = plain and whole and cpu
        if self.uses_answer_head:
            add_answer_head(causal)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        self.validation += torch.stack([loss.double() * tokens, tokens]).cpu()
        return loss, logits, labels

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluate as transformers does, but with the mean over all tokens: a mean of batches' means would hang on their size."""
        self.validation.zero_()
        with torch.random.fork_rng(devices=[]):  # its data loader draws a seed, and training shall not depend on it
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self.accelerator.reduce(self.validation.to(self.args.device), "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(1, tokens)
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        lengths, inputs = inputs.get("lengths"), {name: value for name, value in inputs.items() if name != "lengths"}
        if return_outputs or not self.uses_answer_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        loss, tokens, right = model(**rest, answer_labels=labels)
        loss = loss / torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and gradients are averaged
        self.keep_metrics(inputs, lengths, tokens, right)
        return loss

    def keep_metrics(self, inputs, lengths, tokens, right) -> None:
        """Keep what TRL logs with the loss but entropy, summed over the processes in one exchange. lengths: tokens of each row, if known."""
        mode = "train" if self.model.training else "eval"
        if lengths is None:
            lengths = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
        sums = torch.stack([torch.as_tensor(part, dtype=torch.float64) for part in (tokens, right, lengths.sum())])
        tokens, right, seen = self.accelerator.reduce(sums, "sum").tolist()
        self._metrics[mode]["mean_token_accuracy"].append(right / max(1, tokens))
        if mode == "train":
            self._total_train_tokens += int(seen)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def training_step(self, *args, **kwargs):
        """Raise UserError, in all processes at once, where each of the last ten batches is far worse than a blind guess."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(self.accelerator.reduce(loss, "mean").item() * self.current_gradient_accumulation_steps)
        most = 1.5 * math.log(self.model.config.get_text_config().vocab_size)
        if min(self.losses) > most:
            found = f"above {most:.1f}, 1.5 times that of a blind guess, in {len(self.losses)} batches"
            raise UserError(f"the loss explodes at step {self.state.global_step + 1}: {found}. {self.advice}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not 0 <= norm < math.inf:  # DeepSpeed says -1 for a gradient that is no number
            last, step = run_folder.find_last(self.args.output_dir), self.state.global_step + 1
            broken = (name for name, weight in self.model.named_parameters() if not weight.isfinite().all())
            if step == 1 and not self.is_deepspeed_enabled and (name := next(broken, "")):  # DeepSpeed has stepped
                raise UserError(f"model_name: {name} holds values that are no numbers. Load the model again.")
            kept = f"The last checkpoint, {last}, is from before. " if last else ""
            raise UserError(f"the loss or a gradient is no number at step {step}. {kept}{self.advice}")
        return norm

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:  # else a run is resumed that was killed after its last step
            super()._run_epoch(*args, **kwargs)

    def put_in_rows(self, shared: int) -> None:
        """Let a batch be one row without padding. shared: tokens that all rows begin with, computed once."""
        self.data_collator = InRows(self.data_collator, shared, MULTIPLE[self.args.bf16])

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LikeLengths(self.lengths, rows, self.args.seed)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save what each process has of its own: with the random numbers' state its sums since it last logged, and TRL's count."""
        super()._save_rng_state(output_dir)
        counters = {
            "loss": self._tr_loss.item(),
            "logged_at": self._globalstep_last_logged,
            "metrics": {mode: dict(values) for mode, values in self._metrics.items()},
            "tokens": self._total_train_tokens,
        }
        files.write_json(self.find_counters(output_dir), counters)
        self.accelerator.wait_for_everyone()  # the file that says the checkpoint is whole comes after every process's part

    def _load_rng_state(self, checkpoint: str) -> None:
        """Restore what `_save_rng_state` saved, so that a resumed run logs what an uninterrupted one logs."""
        super()._load_rng_state(checkpoint)
        if saved := files.read_json(self.find_counters(checkpoint)):
            self._tr_loss += saved["loss"]
            self._globalstep_last_logged = saved["logged_at"]
            self._total_train_tokens = saved["tokens"]
            for mode, values in saved["metrics"].items():
                self._metrics[mode].update(values)

    def find_counters(self, checkpoint: str) -> Path:
        rank = self.args.process_index
        return Path(checkpoint) / COUNTERS.format(f"-{rank}" if rank else "")

    def save_run(self) -> None:
        """Save the adapter or model, the tokenizer with its template and the Trainer's state in the run folder, and check them."""
        if not self.sharded:
            check_moved(self.model.named_parameters())
        self.save_model()
        self.save_state()
        if self.sharded:
            distributed.run_on_main(self.check_saved, Path(self.args.output_dir))

    def check_saved(self, folder: Path) -> None:
        """Raise UserError if a sharded model isn't in a folder whole, in its true shapes, or its adapter learned nothing."""
        shapes = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as saved:
                shapes |= {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}
                check_moved((name, saved.get_tensor(name)) for name in saved.keys() if "lora_B" in name)
        for name, weight in self.model.named_parameters():
            plain = name.replace(".default", "").replace("modules_to_save.", "")
            shape = tuple(getattr(weight, "ds_shape", weight.shape))
            if weight.requires_grad and "token_adapter" not in name and shapes.get(plain) != shape:
                found = f"{plain} was saved as {shapes.get(plain, 'nothing')}, and has the shape {shape}"
                raise UserError(f"output_dir: {folder} is not whole: {found}. Its checkpoints are.")


def check_moved(weights) -> None:
    """Raise UserError if an adapter learned nothing: LoRA's B starts at zero, and one training step moves it."""
    still = [name for name, weight in weights if "lora_B" in name and not weight.any()]
    if still:
        fix = "Raise --learning-rate or --max-steps; with --gradient-checkpointing, inputs must require gradients."
        raise UserError(f"training moved nothing: {len(still)} adapters are still zero, {still[0]} first. {fix}")


# Batches with little or no padding. Where the attention knows where samples begin, a batch is one row without any. Elsewhere
# rows of about the same length go into a batch, in an order of the seed and the epoch alone, so that a resumed run has it, too.

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
        generator = torch.Generator().manual_seed(2**20 * self.seed + self.epoch)
        rows = torch.tensor(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
        *batches, last = rows.split(self.batch_size)  # which may be smaller
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter(torch.cat([*(batches[number] for number in order), last]).tolist())


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
