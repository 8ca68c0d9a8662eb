"""Short Python programs from a description, held to be right if their tests pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import comb
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ftpipe.canonical import digest
from ftpipe.errors import DataError
from ftpipe.evaluate.suites.base import Given, Item, Score, Suite
from ftpipe.evaluate.suites.generation import cut
from ftpipe.slots import choose
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from ftpipe.evaluate.systems import System

BEGIN, DONE = "[BEGIN]\n", "[DONE]"
FENCE = re.compile(r"```(?:python)?\s*\n(.*?)```", re.DOTALL)


class Code(Suite):
    """Share of a task's samples whose tests pass, for rows of the shape of MBPP, each run in a process of its own with limits (`evaluate/sandbox.py`).

    A row has `task_id`, `text` (or `prompt`), `code`, `test_list` and, if it needs them, `test_setup_code` and `challenge_test_list`. The program is the
    sample, then the setup, which may build on what the sample defines, then the tests; it passes if it reaches its end within the limits. The prompt
    is that of the paper (section 3.1): the tasks `shots` solved, then the task itself, each with its tests shown; the answer ends at [DONE].

    Metrics: `pass@1`, the share of samples that pass, which with greedy decoding is 0 or 1; and `pass@k` for `k`, by the unbiased estimator
    1 - C(n-c, k) / C(n, k) for c of n samples. The paper's first metric, tasks solved by any of 80 samples, is `pass@80` of 80 samples at
    temperature 0.5; it must not be compared with a greedy pass@1. A test shown in the prompt can be written into the answer: with `challenge` the row's
    hidden tests run too.

    What is run was written by a model. The sandbox stops accidents, not a determined attack: use a container for models that you do not trust.
    """

    paper: ClassVar[str] = "Program Synthesis with Large Language Models"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.evaluate.sandbox", "ftpipe.models.answers")

    source: choose("data/sources") = Field(description="The tasks, such as `{jsonl: {path: mbpp.jsonl}}`.")  # type: ignore[valid-type]
    run_model_code: Literal[True] = Field(description="Must be true: code that the models write is run on this machine.")
    first: int = Field(default=11, description="Smallest task_id that is asked; MBPP's test split is 11 to 510.")
    last: int = Field(default=510, description="Largest task_id that is asked.")
    shots: list[int] = Field(default=[2, 3, 4], description="task_id of the solved tasks in front of each question; none of them is asked.")
    limit: int = Field(default=0, ge=0, description="Use only so many tasks, the first; 0 uses all.")
    chat: bool = Field(default=False, description="Put the prompt into the model's chat template, and take the program out of a block of ``` if there is one.")
    challenge: bool = Field(default=False, description="Run the tests of `challenge_test_list` too, which the prompt does not show.")
    k: list[int] = Field(default=[1], min_length=1, description="Numbers of samples of which one has to pass.")
    samples: int = Field(default=1, ge=1, description="Samples of each task, with a temperature.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy decoding.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus that is sampled from, with a temperature.")
    seed: int = Field(default=0, ge=0, description="Seed of the sampling.")
    max_new_tokens: int = Field(default=512, ge=1, le=32_768, description="Longest answer, in tokens.")
    seconds: float = Field(default=3.0, gt=0, le=600, description="Processor time of a program.")
    memory_mib: int = Field(default=512, ge=64, description="Address space of a program, in MiB.")

    @field_validator("k")
    @classmethod
    def _ks(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value or value[0] < 1:
            raise ValueError("`k` has to be numbers from 1, rising")
        return value

    @model_validator(mode="after")
    def _enough(self) -> Code:
        if self.k[-1] > self.samples:
            raise ValueError(f"pass@{self.k[-1]} needs {self.k[-1]} `samples` or more")
        if self.samples > 1 and not self.temperature:
            raise ValueError("greedy samples are all the same; set a `temperature`")
        return self

    def externals(self, env: Environment) -> dict[str, Any]:
        return {"source": self.source.identity(env)}

    def items(self, given: Given) -> list[Item]:
        suite, = self.labels()
        tasks: dict[int, dict[str, Any]] = {}
        for record in self.source.records(given.env):
            tasks.update([_task(record)])
        lacking = [i for i in self.shots if i not in tasks]
        if lacking:
            raise DataError(f"the tasks {', '.join(map(str, lacking))} of `shots` are not in the source", where=suite, remedy="name others, or `shots: []`")
        shown = "".join(shot(tasks[i]) for i in self.shots)
        asked = [i for i in sorted(tasks) if self.first <= i <= self.last and i not in self.shots][: self.limit or None]
        if not asked:
            raise DataError(f"the source has no task with task_id {self.first} to {self.last}", where=suite, remedy="set `first` and `last`")
        found = []
        for i in asked:
            prompt = shown + question(tasks[i])
            after = [tasks[i]["setup"], *tasks[i]["tests"], *(tasks[i]["hidden"] if self.challenge else [])]
            found.append(Item(id=str(i), content=digest([prompt, after]), slice="", suite=suite, ask=(prompt, after)))
        return found

    def measure(self, system: System, items: Sequence[Item]) -> Iterator[tuple[Item, list[Score]]]:
        from ftpipe.evaluate.sandbox import run_program

        prompts = [[{"role": "user", "content": i.ask[0]}] if self.chat else i.ask[0] for i in items]
        for i, answers in system.answers(prompts, max_new_tokens=self.max_new_tokens, samples=self.samples, temperature=self.temperature, top_p=self.top_p,
                                         seed=self.seed):
            programs = ["\n".join([self.program(a.text), *items[i].ask[1]]) for a in answers if a.problem is None]
            passed = {p: run_program(p, seconds=self.seconds, memory=self.memory_mib * 2**20) == "passed" for p in sorted(set(programs))}
            right = sum(passed[p] for p in programs)
            yield items[i], [Score(f"pass@{k}", pass_at(k, len(programs), right)) for k in self.k] if programs else []

    def program(self, answer: str) -> str:
        """The program in an answer."""
        answer = cut(answer, [DONE])
        fenced = FENCE.search(answer) if self.chat else None
        return fenced[1] if fenced else answer


def _task(record: Any) -> tuple[int, dict[str, Any]]:
    """(task_id, task) of a record. Raises DataError, with its origin, for one that lacks something."""
    where = f"{record.source}:{record.line}"
    try:
        if record.error is not None:
            raise ValueError(f"{record.error} {record.detail}".strip())
        raw = record.raw
        text, tests, hidden = raw["text"] if "text" in raw else raw["prompt"], raw["test_list"], raw.get("challenge_test_list") or []
        imports = raw.get("test_imports") or []  # the sanitised rows have these in place of a setup
        task = {"text": text, "code": raw["code"], "tests": tests, "hidden": hidden, "setup": "\n".join([*imports, raw.get("test_setup_code") or ""])}
        said = [text, raw["code"], *tests, *hidden, *imports, task["setup"]]
        if not (isinstance(tests, list) and tests and all(isinstance(s, str) for s in said)):
            raise ValueError("`text` and `code` must hold text, `test_list` one test or more")
        return int(raw["task_id"]), task
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a task: {f'{error} is missing' if isinstance(error, KeyError) else error}", where=where,
                        remedy="write task_id, text, code and test_list as in MBPP") from error


def question(task: dict[str, Any]) -> str:
    """The prompt of one task, up to where the program begins."""
    return (f"You are an expert Python programmer, and here is your task: {task['text']} Your code should pass these tests:\n\n"
            + "\n".join(task["tests"]) + "\n" + BEGIN)


def shot(task: dict[str, Any]) -> str:
    """A solved task, as it stands in front of the question."""
    return question(task) + task["code"].replace("\r\n", "\n").strip("\n") + f"\n{DONE}\n"


def pass_at(k: int, n: int, c: int) -> float:
    """The chance that one of k samples, drawn without replacement from n of which c pass, passes: 1 - C(n-c, k) / C(n, k)."""
    return 1 - comb(n - c, k) / comb(n, k)
