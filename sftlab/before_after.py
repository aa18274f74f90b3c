"""A finished run, read back: its configuration, tokenizer and data set, and its two models, one after the other.

python -c "from sftlab import before_after; help(before_after.load_models)"
"""

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftlab import data, finished, models, new_tokens, quantise, train
from sftlab.config import TrainConfig


@dataclass
class Subject:
    """A finished run: its folder, result, configuration with the precision it had, tokenizer, and data set."""

    folder: Path
    result: dict
    config: TrainConfig
    tokenizer: object
    splits: object
    report: dict


def read_run(folder: str | Path, dataset_path: str | None = None, trust_remote_code: bool = False) -> Subject:
    """A run folder with all that an evaluation needs; `dataset_path`: another set than the run's own.

    Raises UserError for a folder that is no finished run, a data set that is gone, or one for other tokens.
    """
    opened = finished.open_run(folder, trust_remote_code)
    config = dataclasses.replace(opened.config, dataset_path=dataset_path or opened.config.dataset_path)
    splits, report = data.load_prepared(config.dataset_path)
    tokenizer = models.load_tokenizer(str(folder), trust_remote_code)
    train.check_tokens(splits["test"], tokenizer, report, config)
    return Subject(opened.folder, opened.result, config, tokenizer, splits, report)


def load_models(run: Subject) -> Iterator[tuple[str, object]]:
    """The base, held as in training, and then the tuned model; never both in memory, if the caller lets go of the first."""
    from transformers import set_seed

    config = dataclasses.replace(run.config, gradient_checkpointing=False)
    set_seed(config.seed)  # a base of random weights is the run's own again
    model = models.load_model(config.model_name, config)
    new_tokens.fit_vocabulary(model, run.tokenizer)
    if config.use_4bit or config.use_8bit:
        quantise.prepare_quantised(model, config)  # as in training: what isn't quantised is in float32
    yield "base", model
    if (run.folder / "adapter_config.json").is_file():
        from peft import PeftModel

        model = finished.keep_head_bias(PeftModel.from_pretrained(model, str(run.folder)))
    else:
        del model
        gc.collect()
        model = models.load_model(str(run.folder), config)
    yield "tuned", model
