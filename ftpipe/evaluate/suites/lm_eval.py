"""Tasks of lm-evaluation-harness, by name or from a folder of one's own, item by item."""

from __future__ import annotations

import io
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.canonical import digest, folder_digest
from ftpipe.errors import ConfigError, DataError, nearest
from ftpipe.evaluate.suites.base import Given, Item, Score, Suite
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from ftpipe.evaluate.systems import System

CHUNK = 256
"""Documents asked in one call; after each call results are saved and progress is told."""
PERPLEXITIES = {"word_perplexity": "nats_per_word", "byte_perplexity": "nats_per_byte", "bits_per_byte": "nats_per_byte"}


class LmEval(Suite):
    """Runs tasks of lm-evaluation-harness on the loaded model and keeps every sample's score.

    Each task is reported as a suite of its own; a group (mmlu) as one suite whose slices are its tasks, every item counting alike. Metrics
    that exist for a single item (acc, exact_match, ...) keep their names, with the filter's name after a comma where a task has several;
    perplexities become the loss they are the exponential of (nats a word or byte), weighted by words or bytes; metrics that exist for a whole
    corpus only (bleu, mcc) have no paired comparison and are left out.

    Tasks that the harness brings download their data from the hub; the tasks of a `folder` may read local files (`dataset_path: json`,
    `dataset_kwargs: {data_files: ...}`, relative to the folder) and then need no network. A task's YAML may name Python functions beside it,
    which are run: use folders that you trust.
    """

    libraries: ClassVar[tuple[str, ...]] = ("lm-eval", "datasets")

    tasks: list[str] = Field(min_length=1, description="Names of tasks or groups, as `lm-eval ls tasks` lists them; with `folder`, as its files call them.")
    folder: str = Field(default="", description="Folder with task files (YAML) of one's own.")
    limit: int = Field(default=0, ge=0, description="Use only so many items of each task, the first; 0 uses all.")
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples in front of each question; as the task says by default.")
    chat_template: bool = Field(default=False, description="Put questions into the model's chat template.")
    batch_size: int = Field(default=8, ge=1, description="Requests of one batch.")

    def labels(self) -> list[str]:
        return [f"{self.label}/{t}" if self.label else t for t in self.tasks]

    def externals(self, env: Environment) -> dict[str, Any]:
        return {"folder": folder_digest(self._folder(env))} if self.folder else {}

    def _folder(self, env: Environment) -> Path:
        folder = env.path(self.folder)
        if not folder.is_dir():
            raise ConfigError("no such folder of tasks", where=str(folder))
        return folder

    def items(self, given: Given) -> list[Item]:
        folder = self._folder(given.env) if self.folder else None
        stamp = folder_digest(folder) if folder else ""
        found: list[Item] = []
        for written, label in zip(self.tasks, self.labels()):
            for name, (task, settings) in _tasks(written, str(folder or ""), stamp).items():
                docs = [_text(d) for d in list(task.eval_docs)[: self.limit or None]]
                # Examples are drawn one after the other for all documents, so an item's prompt depends on which others are asked.
                together = digest(docs) if self._shots(task) else ""
                about = digest([settings, stamp, together])
                found += [Item(id=f"{name}:{i}", content=digest([about, doc]), slice=name, suite=label, ask=(written, name, i, str(folder or ""), stamp))
                          for i, doc in enumerate(docs)]
        if not found:
            raise DataError(f"the tasks {', '.join(self.tasks)} have no items")
        return found

    def _shots(self, task: Task) -> int:
        return (task.config.num_fewshot or 0) if self.num_fewshot is None else self.num_fewshot

    def measure(self, system: System, items: Sequence[Item]) -> Iterator[tuple[Item, list[Score]]]:
        by_task: dict[tuple, list[Item]] = defaultdict(list)
        for item in items:
            written, name, _, folder, stamp = item.ask
            by_task[written, name, folder, stamp].append(item)
        for (written, name, folder, stamp), asked in by_task.items():
            task, _ = _tasks(written, folder, stamp)[name]
            asked = sorted(asked, key=lambda i: i.ask[2])  # the harness walks through the documents in their order
            size = len(asked) if self._shots(task) else CHUNK
            for start in range(0, len(asked), size):
                yield from self._run(system, name, task, asked[start:start + size], _manager(folder, stamp))

    def _run(self, system: System, name: str, task: Task, items: Sequence[Item], manager: Any) -> Iterator[tuple[Item, list[Score]]]:
        with _quiet():
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            service = system.service
            model = HFLM(pretrained=service.model, tokenizer=service.tokenizer, batch_size=self.batch_size, max_length=service.max_length)
            samples = simple_evaluate(model=model, tasks=[task], samples={name: [i.ask[2] for i in items]}, num_fewshot=self.num_fewshot,
                                      task_manager=manager, apply_chat_template=self.chat_template, bootstrap_iters=0, log_samples=True)["samples"][name]
        filters = {s["filter"] for s in samples}
        better = task.higher_is_better()
        scores: dict[int, dict[str, Score]] = defaultdict(dict)
        for sample in samples:
            for metric in sample["metrics"]:
                score = _score(metric, sample[metric], better.get(metric, True), sample["filter"] if len(filters) > 1 else "")
                if score is not None:
                    scores[sample["doc_id"]][score.metric] = score
        for item in items:
            yield item, list(scores[item.ask[2]].values())


def _score(metric: str, value: Any, better: bool, filtered: str) -> Score | None:
    name = f"{metric},{filtered}" if filtered else metric
    if metric in PERPLEXITIES and isinstance(value, (tuple, list)):
        log_likelihood, weight = value
        return Score(PERPLEXITIES[metric], -log_likelihood / weight, float(weight), higher_is_better=False) if weight else None
    if metric == "perplexity" and isinstance(value, (int, float)):
        return Score("nats", -float(value), 1.0, higher_is_better=False)
    if isinstance(value, (bool, int, float)):
        return Score(name, float(value), 1.0, higher_is_better=bool(better))
    return None


@lru_cache(maxsize=64)
def _tasks(written: str, folder: str, stamp: str) -> dict[str, tuple[Task, str]]:
    """The tasks behind a name, by their own names, each with its settings as text (a run changes the object). `stamp` is the folder's digest."""
    with _quiet(), _inside(folder):
        manager = _manager(folder, stamp)
        known = manager.all_tasks
        if written not in known:
            raise ConfigError(f"{'the folder' if folder else 'lm-evaluation-harness'} has no task {written!r}", where=folder or None,
                              remedy=nearest(written, known) if folder else nearest(written, known).split("known:")[0] + "`lm-eval ls tasks` lists them all")
        try:
            return {name: (task, _text(task.dump_config())) for name, task in manager.load([written])["tasks"].items()}
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"the data of task {written!r} cannot be had: {str(error)[:300]}", where=folder or None,
                            remedy="without a network, use a task folder with local data files") from error


@lru_cache(maxsize=8)
def _manager(folder: str, stamp: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder or None, include_defaults=not folder)  # reading its own thousands of files takes the harness many seconds


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Within the folder of tasks, so that their data files may be named relative to it."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own log and progress bars, held back; restored afterwards."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _text(value: Any) -> str:
    """A document or a task's settings as text that is the same in every process."""
    return json.dumps(value, sort_keys=True, default=lambda v: getattr(v, "__qualname__", type(v).__name__), ensure_ascii=False)
