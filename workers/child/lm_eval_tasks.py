"""The tasks of a job by lm-eval: what they ask of a model, and what a model's answers are worth.

lm-eval reads the documents, cuts them into tokens and computes every metric. It asks a model by calling it;
ours pass layer by layer, all at once. So a first run of lm-eval collects what is asked, and when that is
answered, a further one for each model gets its answers. Imported only where a job names tasks: it takes
seconds, and is an extra of the installation.
"""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from app.core.errors import TextRefused
from app.core.faults.system_faults import system_number
from app.core.records.specs import BUNDLED_TASKS
from workers.child.recovery import TaskOutcome
from workers.quantization.continuations import Continuation

STREAMED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # of lm-eval's types of output
FEWSHOT_SEED, RANDOM_SEED = 1234, 0  # lm-eval's own, so that its command line gives the same scores
BOOTSTRAPS = 1000  # for standard errors without a formula
BUNDLED = {name: f"nibble_{name.partition(':')[2]}" for name in BUNDLED_TASKS}  # and their names in lm-eval
ASKED_AS = {entry: name for name, entry in BUNDLED.items()}

Answer = tuple[float, bool]  # log-likelihood in nats, and whether each token is the likeliest


@dataclass(frozen=True)
class LmEvalTasks:
    """Loaded tasks, and all that they ask of a model, each question once."""

    tasks: dict[str, Any]  # by lm-eval's name
    limit: int | None
    model: AnsweredModel
    requests: tuple[Continuation, ...] = ()

    @classmethod
    def open(
        cls,
        names: Sequence[str],
        limit: int | None,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> LmEvalTasks:
        """Raises TextRefused for a task that is unknown, can't be loaded, or generates text."""
        os.environ["DISABLE_MULTIPROC"] = "1"  # else lm-eval starts a process for each core
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        random.seed(RANDOM_SEED)
        np.random.seed(FEWSHOT_SEED)
        tasks = load_tasks(names)
        model = AnsweredModel(tokenizer, resolve_max_length(config, tokenizer))
        opened = cls(tasks, limit, model)
        try:
            opened.run({}, bootstraps=0)
        except Exception as fault:  # each task has code of its own
            raise refused(fault, f"{', '.join(names)}: lm-eval can't read the documents") from fault
        return cls(tasks, limit, model, tuple(model.asked))

    def outcomes(self, answers: Mapping[Continuation, Answer]) -> list[TaskOutcome]:
        """The metrics of the model that gave these answers, as each task orders them."""
        results = self.run(answers, bootstraps=BOOTSTRAPS)
        return [outcome for name in self.tasks for outcome in outcomes_of(name, results)]

    def run(self, answers: Mapping[Continuation, Answer], *, bootstraps: int) -> Any:
        self.model.answers = answers
        return evaluate(self.model, {"tasks": self.tasks}, limit=self.limit, bootstrap_iters=bootstraps)


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks by name; groups and tags as the tasks in them."""
    folder = str(files("workers.texts").joinpath("tasks"))
    # To index lm-eval's own tasks takes 15 s.
    manager = TaskManager(include_path=folder, include_defaults=not set(names) <= set(BUNDLED))
    tasks: dict[str, Any] = {}
    for name in names:
        tasks |= loaded(manager, name)
    for name, task in tasks.items():
        refuse_generation(name, task.OUTPUT_TYPE)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def refuse_generation(name: str, output_type: str) -> None:
    if output_type not in STREAMED:
        raise TextRefused(
            f"the task {name} generates text ({output_type}), and a job scores likelihoods only",
            code="task_generates",
            remedy="name tasks of multiple choice or likelihoods; ask others of the deployed model",
            param="evaluation.tasks",
        )


def loaded(manager: TaskManager, name: str) -> dict[str, Any]:
    entry = BUNDLED.get(name, name)
    if entry not in manager.task_index:
        raise TextRefused(
            f"lm-eval has no task {name!r}", code="task_unknown", param="evaluation.tasks",
            remedy="name one of `lm-eval ls tasks`, or a bundled one",
        )  # fmt: skip
    refuse_generation(name, (manager.task_index[entry].cfg or {}).get("output_type", STREAMED[0]))
    try:
        tasks: dict[str, Any] = manager.load([entry])["tasks"]
    except Exception as fault:  # lm-eval, datasets and the code of tasks raise what they like
        raise refused(fault, f"the task {name} can't be loaded") from fault
    return tasks


def refused(fault: Exception, what: str) -> Exception:
    """The refusal that a fault of a task means; the fault itself where it is the host's."""
    is_remote = isinstance(fault, ConnectionError)
    if isinstance(fault, MemoryError) or not (is_remote or system_number(fault) in (None, errno.ENOENT)):
        return fault
    return TextRefused(
        f"{what}: {type(fault).__name__}: {' '.join(str(fault).split())[:500]}", code="task_unavailable",
        remedy="its data set must be reachable on the hub, or in the cache of the worker's host",
        param="evaluation.tasks",
    )  # fmt: skip


def outcomes_of(name: str, results: Any) -> Iterator[TaskOutcome]:
    """The metrics of one task, in its order, from lm-eval's results, whose keys are `metric,filter`."""
    scores, samples = results["results"][name], results["samples"][name]
    better = results["higher_is_better"][name]
    order = [each["metric"] for each in results["configs"][name].get("metric_list") or ()]
    keys = [key.split(",", 1) for key in scores if "," in key and "_stderr," not in key]
    keys.sort(key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    for metric, chosen in keys:
        value = scores[f"{metric},{chosen}"]
        values = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        error = scores.get(f"{metric}_stderr,{chosen}")
        yield TaskOutcome(
            task=ASKED_AS.get(name, name),
            metric=metric if chosen == "none" else f"{metric} ({chosen})",
            higher_is_better=better.get(metric) is not False,
            value=float(value),
            standard_error=float(error) if isinstance(error, int | float | np.floating) else None,
            count=int(scores["sample_len"]),
            documents=summands(values, float(value)),
        )


def summands(values: list[Any], mean: float) -> tuple[float, ...]:
    """The documents' numbers if `mean` is their mean."""
    numbers = [float(value) for value in values if isinstance(value, int | float | np.number | np.bool_)]
    is_mean = len(numbers) == len(values) > 0 and abs(sum(numbers) / len(numbers) - mean) < 1e-9
    return tuple(numbers) if is_mean else ()


class AnsweredModel(TemplateLM):  # type: ignore[misc]  # lm-eval comes without types
    """A model that lm-eval asks: it has the computed answers, or notes what is asked while there are none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        """`longest` is the number of tokens that the model can read."""
        super().__init__()
        self.tokenizer, self.longest = tokenizer, longest
        self.answers: Mapping[Continuation, Answer] = {}
        self.asked: dict[Continuation, None] = {}  # in order, each once

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_options: object) -> list[Answer]:
        return [self.answer(context, tokens) for _, context, tokens in requests]

    def answer(self, context: Sequence[int], tokens: Sequence[int]) -> Answer:
        """Of a context that is too long the end counts, as in lm-eval."""
        if len(tokens) > self.longest:
            raise ValueError(f"a continuation has {len(tokens)} tokens, the model reads {self.longest}")
        space = self.longest + 1 - len(tokens)
        request = Continuation(tuple(context)[-space:], tuple(tokens))
        if self.answers:
            return self.answers[request]  # a KeyError: lm-eval asks what it did not ask at first
        self.asked[request] = None
        return 0.0, False

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows that the model can read."""
        return [sum(score for score, _ in map(self.window, self.windows(*each.args))) for each in requests]

    def windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text)
        rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.longest, context_len=1)
        yield from map(make_disjoint_window, rolling)

    def window(self, pair: tuple[list[int], list[int]]) -> Answer:
        return self.answer(*pair)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("load_tasks refuses tasks that generate")

    @property
    def eot_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text without context."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options: object
    ) -> list[int]:
        """As lm-eval's own model of transformers does it."""
        first = self.prefix_token_id
        if add_special_tokens is None and first is not None:
            has_first = has_bos_prefix(string, self.tokenizer.decode(first))
            add_special_tokens = False if has_first else None
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])
