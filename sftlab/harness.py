"""Public benchmarks through lm-eval, EleutherAI's harness: base and tuned model on the same tasks.

Needs the extra: .venv/bin/pip install -c constraints.txt -e ".[lm-eval]". Its tasks download their data sets from the Hub.
Tasks of your own, as YAML files in a folder, need no network.

sftlab evaluate runs/first --tasks arc_easy,hellaswag
"""

import importlib.util
import logging

from sftlab.config import EvaluateConfig
from sftlab.options import UserError, near_match


def check(config: EvaluateConfig) -> None:
    """Raises UserError where tasks are asked for and lm-eval is not installed, or doesn't know one of them."""
    if not config.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('tasks: lm-eval is not installed. Add it: pip install -c constraints.txt -e ".[lm-eval]".')
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.tasks_path)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            raise UserError(f"tasks: lm-eval knows no task {name!r}.{near_match(name, manager.all_tasks)} "
                            "`lm-eval ls tasks` lists them; a task of your own needs --tasks-path.")  # fmt: skip


def run_tasks(model, tokenizer, config: EvaluateConfig) -> dict[str, dict[str, list]]:
    """Task -> measure -> [value, standard error or None] of one loaded model, in the tokenizer's chat template.

    Empty without tasks. Raises UserError for a task whose data can't be had.
    """
    if not config.tasks:
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=config.tasks_path)
    known = manager.match_tasks(config.tasks)
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            judge, tasks=known, task_manager=manager, limit=config.tasks_limit, apply_chat_template=True, log_samples=False,
            random_seed=config.seed, numpy_random_seed=config.seed, torch_random_seed=config.seed, fewshot_random_seed=config.seed,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise UserError(
            f"tasks: the data of {', '.join(known)} can't be had: {' '.join(str(error).split())[:200]}"
        ) from error
    scores = {}
    for name, measures in found["results"].items():
        for key, value in measures.items():
            measure, _, rule = key.partition(",")
            if isinstance(value, int | float) and not measure.endswith("_stderr") and rule:
                error = measures.get(f"{measure}_stderr,{rule}")
                label = measure if rule == "none" else f"{measure} ({rule})"
                scores.setdefault(name, {})[label] = [
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                ]
    return scores


def pair(base: dict, tuned: dict) -> dict:
    """Task -> measure -> {base, tuned}, each [value, standard error]. lm-eval's errors are of each score, unpaired."""
    return {
        task: {name: {"base": base[task][name], "tuned": tuned[task][name]} for name in measures}
        for task, measures in base.items()
    }
