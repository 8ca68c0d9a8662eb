"""Code tasks of MBPP's shape: the prompt, the order in which a program is put together, and what counts as solved."""

from __future__ import annotations

from itertools import combinations

import pytest

from ftpipe.errors import DataError
from ftpipe.evaluate.suites.code import Code, pass_at
from tests.evaluate.asking import given, jsonl, scores, scripted


def row(i: int, code: str, tests: list[str], **more) -> dict:
    return {"task_id": i, "text": f"Write function number {i}.", "code": code, "test_list": tests, "test_setup_code": "", "challenge_test_list": []} | more


SHOTS = [row(i, f"def f{i}(x):\r\n  return x + {i}", [f"assert f{i}({j}) == {i + j}" for j in range(3)]) for i in (2, 3, 4)]
GOLD = {11: "def double(x):\n  return 2 * x",
        12: "class Node:\n  def __init__(self, v):\n    self.v = v\ndef value(n):\n  return n.v",
        13: "def same(x):\n  return x"}
TASKS = [row(11, GOLD[11], [f"assert double({j}) == {2 * j}" for j in range(3)], challenge_test_list=["assert double('a') == 'aa'"]),
         row(12, GOLD[12], ["assert value(root) == 5"] * 3, test_setup_code="root = Node(5)"),
         row(13, GOLD[13], ["assert same(1) == 1"] * 3), row(600, "x = 1", ["assert x"])]


def suite(tmp_path, **settings) -> Code:
    return Code(source={"jsonl": {"path": jsonl(tmp_path / "tasks.jsonl", SHOTS + TASKS)}}, run_model_code=True, **settings)


def number(prompt: str) -> int:
    return int(prompt.rpartition("Write function number ")[2].split(".")[0])


def test_gold_code_passes_only_because_the_setup_runs_after_it_and_a_stub_fails(tmp_path):
    asked = given(tmp_path)
    chat = suite(tmp_path, chat=True)
    assert scores(chat, scripted(asked, lambda q, n: GOLD[number(q)]), asked) == {"11": 1.0, "12": 1.0, "13": 1.0}
    fenced = scripted(asked, lambda q, n: f"Here:\n```python\n{GOLD[number(q)]}\n```\nDone.", "fenced")
    assert set(scores(chat, fenced, asked).values()) == {1.0}
    stubs = {11: "def double(x): pass", 12: "import os\nos._exit(0)", 13: "raise SystemExit"}
    assert set(scores(chat, scripted(asked, lambda q, n: stubs[number(q)], "stub"), asked).values()) == {0.0}
    memorised = scripted(asked, lambda q, n: "def double(x): return {0: 0, 1: 2, 2: 4}[x]" if number(q) == 11 else GOLD[number(q)], "memorised")
    assert scores(chat, memorised, asked)["11"] == 1.0 and scores(suite(tmp_path, chat=True, challenge=True), memorised, asked)["11"] == 0.0


def test_the_prompt_is_the_papers_to_the_byte(tmp_path):
    prompt, _ = suite(tmp_path, limit=1).items(given(tmp_path))[0].ask
    intro = "You are an expert Python programmer, and here is your task: Write function number {}. Your code should pass these tests:\n\n"
    expected = "".join(intro.format(i) + "".join(f"assert f{i}({j}) == {i + j}\n" for j in range(3)) + f"[BEGIN]\ndef f{i}(x):\n  return x + {i}\n[DONE]\n"
                       for i in (2, 3, 4))
    assert prompt == expected + intro.format(11) + "assert double(0) == 0\nassert double(1) == 2\nassert double(2) == 4\n[BEGIN]\n"
    assert prompt.count("assert ") == 12


def test_a_base_model_goes_on_from_plain_text_and_is_cut_at_done(tmp_path, tiny_model):
    from ftpipe.evaluate.systems import System
    from ftpipe.models.service import ModelService

    asked = given(tmp_path)
    service = ModelService.open(str(tiny_model), asked.env, dtype="float32")
    assert service.tokenizer.decode(service.renderer.start("def f[BEGIN]\n")) == "def f[BEGIN]\n"
    tasks = suite(tmp_path, limit=1, shots=[], max_new_tokens=3)
    assert list(scores(tasks, System("tiny", {"is": "tiny"}, lambda: service), asked).values()) == [0.0]
    assert tasks.program("def g(): pass\n[DONE]\nmore") == "def g(): pass\n"


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("c", [0, 1, 4, 10])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_solution(k: int, c: int):
    subsets = list(combinations([i < c for i in range(10)], k))
    assert pass_at(k, 10, c) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_samples_are_counted_each(tmp_path):
    asked = given(tmp_path)
    tasks = suite(tmp_path, chat=True, limit=1, samples=4, temperature=0.5, k=[1, 4])
    system = scripted(asked, lambda q, n: GOLD[11] if n == 1 else "no")
    assert scores(tasks, system, asked, "pass@1") == {"11": 0.25} and scores(tasks, system, asked, "pass@4") == {"11": 1.0}


def test_what_cannot_work_is_said(tmp_path):
    with pytest.raises(ValueError, match="run_model_code"):
        Code(source={"jsonl": {"path": "x"}})
    with pytest.raises(ValueError, match="needs 4 `samples`"):
        suite(tmp_path, k=[1, 4])
    with pytest.raises(DataError, match="the tasks 9 of `shots`"):
        suite(tmp_path, shots=[9]).items(given(tmp_path))
    broken = Code(source={"jsonl": {"path": jsonl(tmp_path / "b.jsonl", [{"task_id": 1, "text": "x", "code": "y"}])}}, run_model_code=True)
    with pytest.raises(DataError, match=r"b.jsonl:1: not a task: 'test_list' is missing"):
        broken.items(given(tmp_path / "other"))
