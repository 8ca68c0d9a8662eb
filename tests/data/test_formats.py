"""Each shape of data becomes the same rows, and a row that does not fit says which field and why."""

from __future__ import annotations

import datetime
import json
import math

import pytest

from ftpipe.data.formats import FormatError, check_fields, convert, recognise
from ftpipe.data.rows import content_id
from ftpipe.errors import ConfigError

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TURN_Q, TURN_A = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}

SAME = {
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "sharegpt": {"conversations": [TURN_Q, TURN_A]},
    "messages": {"messages": QA},
    "prompt_completion": {"prompt": "q", "completion": "a"},
}


@pytest.mark.parametrize("name, raw", SAME.items())
def test_every_conversation_format_comes_to_the_same_row(name, raw):
    assert recognise(raw) == name
    row = convert(raw)
    assert row["messages"] == QA
    assert content_id(row) == content_id(convert({"question": "q", "answer": "a"})) == content_id(convert(raw, name))


@pytest.mark.parametrize("raw, messages", [
    ({"instruction": "add", "input": "1 2", "output": "3"}, [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
    ({"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]]},
     [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, *QA]),
    ({"conversations": [TURN_Q, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "7"}, TURN_A], "system": "s"},
     [{"role": "system", "content": "s"}, QA[0], {"role": "assistant", "content": "{}"}, {"role": "tool", "content": "7"}, QA[1]]),
    ({"conversations": QA}, QA),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, QA[1]]}, QA),
    ({"messages": [QA[0], {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
     [QA[0], {"role": "assistant", "content": '{"name": "f", "arguments": "{}"}'}]),
    ({"prompt": [QA[0]], "completion": [QA[1]]}, QA),
])
def test_conversations(raw, messages):
    assert convert(raw)["messages"] == messages


@pytest.mark.parametrize("raw", [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"question": "q", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"prompt": [QA[0]], "chosen": [QA[1]], "rejected": [{"role": "assistant", "content": "b"}]},
    {"prompt": "q", "chosen": QA, "rejected": [QA[0], {"role": "assistant", "content": "b"}]},
    {"chosen": QA, "rejected": [QA[0], {"role": "assistant", "content": "b"}]},
    {"conversations": [TURN_Q], "chosen": TURN_A, "rejected": {"from": "gpt", "value": "b"}},
])
def test_preference_pairs_in_every_shape(raw):
    row = convert(raw)
    assert (row["format"], row["messages"], row["chosen"], row["rejected"]) == ("preference", [QA[0]], [QA[1]], [{"role": "assistant", "content": "b"}])
    assert row["meta"] == {}


def test_what_else_a_row_says_is_kept_as_json():
    row = convert({"text": "t", "score": math.nan, "when": datetime.date(2024, 1, 2), "tags": ("x",), "none": None, "raw": b"\x00"})
    assert row["text"] == "t"
    assert row["meta"] == {"score": None, "when": "2024-01-02", "tags": ["x"], "raw": "00"}


def test_tools_become_the_first_turn_in_the_form_templates_take():
    bare = {"name": "f", "parameters": {"x": {"type": "int", "default": None}}}
    whole = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}
    for tools in ([bare], json.dumps([bare]), [json.dumps(bare)], [whole], bare):
        for raw in ({"prompt": "q", "completion": "a"}, {"messages": QA}):
            row = convert(raw | {"tools": tools})
            assert [t["role"] for t in row["messages"]] == ["tools", "user", "assistant"] and row["meta"] == {}
            assert json.loads(row["messages"][0]["content"]) == [whole]
    pair = convert({"prompt": "q", "chosen": "a", "rejected": "b", "tools": [bare]})
    assert pair["messages"][0]["role"] == "tools" and len(pair["chosen"]) == 1
    for other in ("search", ["search"], [{}], "[{}]", 3):
        row = convert({"prompt": "q", "completion": "a", "tools": other})
        assert row["messages"] == QA and row["meta"] == {"tools": other}
    assert content_id(convert({"messages": QA})) != content_id(convert({"messages": QA, "tools": [bare]})), "another question"


@pytest.mark.parametrize("field", ["label", "kto_tag"])
def test_a_judged_answer_stands_where_its_judgement_says(field):
    for raw in SAME.values():
        good, bad = (convert(raw | {field: judged}) for judged in (True, False))
        assert good | {"chosen": None, "rejected": [QA[1]]} == bad
        assert (good["format"], good["messages"], good["chosen"], good["rejected"], good["meta"]) == ("unpaired", [QA[0]], [QA[1]], None, {})
    long = convert({"messages": [*QA, *QA, {"role": "user", "content": "and?"}], field: False})
    assert long["messages"] == [*QA, QA[0]] and long["rejected"] == [QA[1]]
    for other in (0, 1, "false", None):
        assert convert({"messages": QA, field: other})["format"] == "messages", "a class, not a judgement"
    assert convert({"text": "t", "label": False})["text"] == "t"
    assert convert({"prompt": "q", "completion": "a", "is_good": False}, "auto", {"label": "is_good"})["rejected"] == [QA[1]]


def test_fields_are_mapped_by_name():
    assert convert({"q": "q", "a": "a", "id": 3}, "auto", {"prompt": "q", "completion": "a"})["messages"] == QA
    swapped = convert({"prompt": "a", "completion": "q"}, "prompt_completion", {"prompt": "completion", "completion": "prompt"})
    assert swapped["messages"] == QA
    with pytest.raises(FormatError, match="field 'q' is missing"):
        convert({"a": "a"}, "prompt_completion", {"prompt": "q"})
    with pytest.raises(ConfigError, match="'promt', which is no field") as caught:
        check_fields({"promt": "q"}, "prompt_completion")
    assert "'prompt'" in caught.value.remedy


@pytest.mark.parametrize("raw, reason, detail", [
    ({"foo": 1}, "no known format", "foo"),
    ({"instruction": "q", "output": 3}, "output is not text", "int"),
    ({"instruction": "q", "output": "  "}, "output is empty", ""),
    ({"prompt": "q", "completion": ""}, "completion is empty", ""),
    ({"messages": "hello"}, "messages is not a list of turns", "str"),
    ({"messages": []}, "messages is empty", ""),
    ({"messages": [QA[0]]}, "messages has no assistant turn", ""),
    ({"messages": [QA[0], {"role": "asistant", "content": "a"}]}, "messages.role is no known role", "messages[1].role is 'asistant'; did you mean 'assistant'"),
    ({"messages": [QA[0], {"role": "assistant"}]}, "messages.content is not text", "messages[1].content is NoneType"),
    ({"messages": [QA[0], "a"]}, "messages is not a turn", "messages[1] is str"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, QA[1]]}, "messages.content holds a part that is not text", "image_url"),
    ({"conversations": [TURN_Q, {"from": "gpt", "value": ["x"]}]}, "conversations.value holds a part that is not text", "conversations[1].value"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same", ""),
    ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing", ""),
    ({"text": "half \ud83d"}, "text holds half a character", "character 5"),
    ({"instruction": "q", "output": "a", "history": "x"}, "history is not a list of pairs", ""),
])
def test_a_row_that_does_not_fit_names_field_and_reason(raw, reason, detail):
    with pytest.raises(FormatError) as caught:
        convert(raw)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
