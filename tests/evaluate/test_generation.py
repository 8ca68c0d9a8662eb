"""Generated answers: what is asked, what is checked, and that no model is asked twice."""

from __future__ import annotations

import pytest

from ftpipe import slots
from ftpipe.errors import ConfigError, DataError
from ftpipe.evaluate.suites.generation import Generation
from ftpipe.models.answers import SAMPLES
from tests.artifacts import chat
from tests.evaluate.asking import given, jsonl, scores, scripted

MATH = [{"question": "2 and 3?", "answer": "2+3 = <<2+3=5>>5\n#### 5", "kind": "sum"}, {"question": "Half of 1,000?", "answer": "#### 500", "kind": "half"}]


def test_numeric_answers_of_a_file_are_held_against_the_final_number(tmp_path):
    asked = given(tmp_path)
    suite = Generation(source={"jsonl": {"path": jsonl(tmp_path / "math.jsonl", MATH)}}, checker="final_number", group_by="kind")
    right = scripted(asked, lambda q, n: "so #### 5" if q == "2 and 3?" else "it is\n#### $500")
    assert scores(suite, right, asked) == {"math.jsonl:1": 1.0, "math.jsonl:2": 1.0}
    wrong = scripted(asked, lambda q, n: "#### 5", "wrong")
    assert scores(suite, wrong, asked) == {"math.jsonl:1": 1.0, "math.jsonl:2": 0.0}
    assert [i.slice for i in suite.items(asked)] == ["sum", "half"]
    looser = suite.model_copy(update={"checker": slots.parse("evaluate/checkers", {"regex": {"pattern": r"#### \d"}})})
    assert list(scores(looser, wrong, asked).values()) == [1.0, 1.0] and len(wrong.script.asked) == 2, "another checker asks no model again"
    again = scripted(asked, lambda q, n: pytest.fail("asked"), "wrong")
    assert list(scores(suite, again, asked).values()) == [1.0, 0.0] and again.script.opened == 0


def test_tool_calls_of_held_out_rows_are_compared_as_json(tmp_path):
    call = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'
    turns = [("system", "Call tools."), ("user", "Weather?"), ("assistant", "Where?"), ("user", "Oslo, 2 days"), ("assistant", call)]
    asked = given(tmp_path, [{"messages": [{"role": r, "content": c} for r, c in turns]}, chat("Other?", "[1, 2]")])
    suite = Generation(checker="json")
    system = scripted(asked, lambda q, n: '```json\n{"arguments": {"days": 2.0, "city": "Oslo"}, "name": "weather"}\n```' if "Oslo" in q else "[2, 1]")
    assert sorted(scores(suite, system, asked).values()) == [0.0, 1.0]
    assert sorted(len(c) for _, c, _ in system.script.asked) == [1, 4], "the whole conversation before the last answer is asked"


def test_a_tool_call_in_the_middle_is_what_is_asked_for(tmp_path):
    call = '{"name": "search", "arguments": {"for": "rice"}}'
    talk = [{"from": "human", "value": "Find rice."}, {"from": "function_call", "value": call}, {"from": "observation", "value": "[]"},
            {"from": "gpt", "value": "There is none."}]
    rows = [{"conversations": talk}, {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    asked = given(tmp_path)
    suite = Generation(source={"jsonl": {"path": jsonl(tmp_path / "calls.jsonl", rows)}}, reference_like=r'^\{"name":', checker="json")
    system = scripted(asked, lambda q, n: call)
    assert scores(suite, system, asked) == {"calls.jsonl:1": 1.0} and [len(c) for _, c, _ in system.script.asked] == [1]


def test_samples_are_graded_by_their_share_and_answers_are_cut(tmp_path):
    asked = given(tmp_path, [chat("a?", "yes")])
    suite = Generation(samples=4, temperature=1.0, stop=["\nQ:"])
    system = scripted(asked, lambda q, n: "yes\nQ: more" if n % 4 == 0 else "no")
    assert list(scores(suite, system, asked).values()) == [0.25] and len(system.script.asked) == SAMPLES


def test_a_prompt_without_room_has_no_score_and_a_judge_is_another_model(tmp_path):
    asked = given(tmp_path, [chat("a?", "yes"), chat("b" * 5000, "no")])
    system = scripted(asked, lambda q, n: "aye")
    system.script.room = 2000
    assert len(scores(Generation(), system, asked)) == 1
    judged: list[str] = []
    with pytest.raises(ValueError, match="needs a `judge_model`"):
        Generation(checker="judge")
    with pytest.raises(ValueError, match="asks no `judge_model`"):
        Generation(judge_model="m")
    model = tmp_path / "judge"
    from tests.tiny import make_tiny_model

    make_tiny_model(model)
    system = scripted(asked, lambda q, n: "aye", "roomy")
    judge = scripted(asked, lambda q, n: judged.append(q) or ("Yes." if "aye" in q and "Correct answer:\nyes" in q else "no"), "judge")
    service = system.service
    service.companion = lambda name, env: judge.service
    found = scores(Generation(checker="judge", judge_model=str(model), max_new_tokens=9), system, asked)
    assert sorted(found.values()) == [0.0, 1.0] and len(judged) == 2


def test_what_cannot_work_is_said(tmp_path):
    asked = given(tmp_path)
    with pytest.raises(DataError, match="no question with an answer"):
        Generation().items(asked)
    with pytest.raises(DataError, match=r"bad.jsonl:2: .*"):
        Generation(source={"jsonl": {"path": jsonl(tmp_path / "bad.jsonl", [MATH[0], {"foo": 1}])}}).items(asked)
    with pytest.raises(ValueError, match="are all the same"):
        Generation(samples=2)
    with pytest.raises(ConfigError, match="does not exist"):
        Generation(source={"jsonl": {"path": "nowhere.jsonl"}}).externals(asked.env)
