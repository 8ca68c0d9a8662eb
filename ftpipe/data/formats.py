"""The shapes training data comes in, and their one normal form: a row of `rows_schema()`.

| format | fields | becomes |
|---|---|---|
| alpaca | instruction, input, output; system, history | messages |
| sharegpt | conversations: list of {from, value}; system | messages |
| messages | messages: list of {role, content} | messages |
| prompt_completion | prompt, completion (or question/answer, prompt/response, query/response); system | messages |
| preference | prompt (or messages, conversations, instruction and input, question), chosen, rejected | preference |
| text | text | text |

Two more fields belong to all of the conversations: `tools`, the definitions of the tools that may be called, which become the first turn (role `tools`), and
`label` (or `kto_tag`), true or false, which calls the last answer good or bad: such a row becomes `unpaired`, so that a bad answer stands where no answer is
learnt from or compared with.

What a row says besides these fields is kept as its `meta`. A row that does not fit raises `FormatError`, which names the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from ftpipe.data.rows import TOOLS
from ftpipe.errors import ConfigError, DataError, nearest

FormatName = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "preference", "text"]
Message = dict[str, str]

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "system": "system", "developer": "system", "observation": "tool", "tool": "tool",
    "tool_response": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
}
PROMPT_NAMES, ANSWER_NAMES = ("prompt", "question", "query"), ("completion", "answer", "response")
LABELS = ("label", "kto_tag")
FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history", "tools", "label"),
    "sharegpt": ("conversations", "system", "tools", "label"),
    "messages": ("messages", "tools", "label"),
    "prompt_completion": ("prompt", "completion", "system", "tools", "label"),
    "preference": ("prompt", "chosen", "rejected", "system", "tools"),
    "text": ("text",),
}


class FormatError(DataError):
    """A row that does not have the shape it should. `reason` is short and equal for equal causes; `detail` says more about this row."""

    def __init__(self, reason: str, detail: str = ""):
        reason, detail = _clean(reason), _clean(detail)
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def check_fields(fields: Mapping[str, str], name: str) -> None:
    """Raise ConfigError if `fields` maps a name that the format (or, for `auto`, no format) has."""
    known = {f for n in ([name] if name != "auto" else FIELDS) for f in FIELDS[n]}
    for target in fields:
        if target not in known:
            raise ConfigError(f"`fields` maps {target!r}, which is no field of format {name}", remedy=nearest(target, known))


def recognise(raw: Mapping[str, Any]) -> str:
    """The format of a raw row, from its field names. Raises FormatError if none fits."""
    has = {k for k, v in raw.items() if v is not None}
    if {"chosen", "rejected"} <= has:
        return "preference"
    if "messages" in has:
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    if {"instruction", "output"} <= has:
        return "alpaca"
    if _first(has, PROMPT_NAMES) and _first(has, ANSWER_NAMES):
        return "prompt_completion"
    if "text" in has:
        return "text"
    raise FormatError("no known format", f"the row has the fields {', '.join(sorted(map(str, raw))) or 'none'}; name the format and map its `fields`")


def convert(raw: Mapping[str, Any], name: str = "auto", fields: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A raw row in normal form: format, messages, chosen, rejected, text (None where the format has none) and meta (a dict).

    Args:
        raw: the row as the source gave it.
        name: a format, or `auto` to recognise it from this row's fields.
        fields: the row's own name for a field of the format, e.g. `{"prompt": "q"}`.
    """
    mapped = dict(raw)
    for target, own in (fields or {}).items():
        if own not in raw:
            raise FormatError(f"field {own!r} is missing", f"`fields` takes {target} from it; the row has {', '.join(sorted(map(str, raw)))}")
        if own not in (fields or {}):
            mapped.pop(own, None)
        mapped[target] = raw[own]
    used = _Fields(mapped)
    row = {"format": None, "messages": None, "chosen": None, "rejected": None, "text": None} | _CONVERT[recognise(mapped) if name == "auto" else name](used)
    if row["messages"] is not None:
        row |= _judged(row, used)
        row["messages"] = _with_tools(row["messages"], used)
    row["meta"] = {_clean(str(k)): plain(v) for k, v in mapped.items() if k not in used.read and v is not None}
    return row


class _Fields:
    """A raw row that remembers which of its fields were read."""

    def __init__(self, raw: dict[str, Any]):
        self.raw, self.read = raw, set()

    def get(self, field: str) -> Any:
        self.read.add(field)
        return self.raw.get(field)

    def need(self, field: str) -> Any:
        value = self.get(field)
        if value is None:
            raise FormatError(f"field {field!r} is missing", f"the row has {', '.join(sorted(map(str, self.raw)))}")
        return value

    def text(self, field: str, *, empty: bool = False) -> str:
        return _text(self.need(field), field, empty=empty)

    def optional(self, field: str) -> str:
        value = self.get(field)
        return "" if value is None else _text(value, field, empty=True)

    def has(self, field: str) -> bool:
        return self.raw.get(field) is not None


def _text(value: Any, field: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{_name(field)} is not text", f"{field} is {type(value).__name__}")
    if not empty and not value.strip():
        raise FormatError(f"{_name(field)} is empty", field if "[" in field else "")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{_name(field)} holds half a character", f"{field}: lone surrogate at character {error.start}") from None
    return value


def _name(field: str) -> str:
    """`messages[3].content` without the index, so that equal faults count as one reason."""
    return "".join(part.rpartition("]")[2] if "]" in part else part for part in field.split("["))


def _turn(turn: Any, field: str) -> Message:
    """One turn, as {role, content} or {from, value}."""
    if not isinstance(turn, Mapping):
        raise FormatError(f"{_name(field)} is not a turn", f"{field} is {type(turn).__name__}, not an object")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        raise FormatError(f"{_name(field)}.{role_key} is no known role", f"{field}.{role_key} is {role!r}; {nearest(str(role), ROLES)}")
    content = turn.get(text_key)
    calls = turn.get("tool_calls")
    if calls and not content and isinstance(calls, (list, tuple)):  # calls of the OpenAI form become the text that ShareGPT's function_call turns hold
        content = "\n".join(json.dumps(plain(call.get("function", call) if isinstance(call, Mapping) else call), ensure_ascii=False) for call in calls)
    if isinstance(content, (list, tuple)):
        content = _parts(content, f"{field}.{text_key}")
    return {"role": ROLES[role], "content": _text(content, f"{field}.{text_key}", empty=ROLES[role] != "assistant")}


def _parts(parts: Any, field: str) -> str:
    """Content given as a list of parts; only text can be used."""
    other = [p.get("type") if isinstance(p, Mapping) else type(p).__name__ for p in parts if not (isinstance(p, Mapping) and p.get("type") == "text")]
    if other:
        raise FormatError(f"{_name(field)} holds a part that is not text", f"{field}: {other[0]}")
    return "".join(_text(p.get("text"), field, empty=True) for p in parts)


def _turns(value: Any, field: str) -> list[Message]:
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise FormatError(f"{_name(field)} is not a list of turns", f"{field} is {type(value).__name__}")
    if not value:
        raise FormatError(f"{_name(field)} is empty")
    return [_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _conversation(turns: list[Message], field: str) -> dict[str, Any]:
    if not any(t["role"] == "assistant" for t in turns):
        raise FormatError(f"{field} has no assistant turn")
    return {"format": "messages", "messages": turns}


def _with_system(system: str, turns: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *turns] if system.strip() and turns[0]["role"] != "system" else turns


def _judged(row: dict[str, Any], used: _Fields) -> dict[str, Any]:
    """A conversation whose last answer is called good or bad, as a prompt and that answer; nothing of one that is not. What follows the answer is left out."""
    named = next((name for name in LABELS if isinstance(used.raw.get(name), bool)), None)
    if named is None or row["format"] != "messages":
        return {}
    turns = row["messages"]
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return {"format": "unpaired", "messages": turns[:last], "chosen" if used.get(named) else "rejected": [turns[last]]}


def _with_tools(turns: list[Message], used: _Fields) -> list[Message]:
    """The conversation behind the definitions of its tools. What is in `tools` and is no definition stays what else the row says."""
    tools = tool_definitions(used.raw.get("tools"))
    if not tools:
        return turns
    used.read.add("tools")
    return [{"role": TOOLS, "content": json.dumps(tools, ensure_ascii=False)}, *turns]


def tool_definitions(value: Any) -> list[dict[str, Any]]:
    """Tools as chat templates take them, {type: function, function: {name, ...}}; none if it is not a list (or JSON of one) of objects with a name.

    A bare {name, ...} is put into that form, and keys without a value, which tables give to every row, are left out.
    """
    value = _parsed(value)
    found = []
    for tool in [value] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        tool = _parsed(tool)
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            return []
        found.append(_filled(plain(tool if "function" in tool else {"type": "function", "function": tool})))
    return found


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v) for k, v in value.items() if v is not None}
    return [_filled(v) for v in value] if isinstance(value, list) else value


def _alpaca(row: _Fields) -> dict[str, Any]:
    turns = _with_system(row.optional("system"), [{"role": "user", "content": _instruction(row)}, {"role": "assistant", "content": row.text("output")}])
    past = row.get("history") or []
    if not (isinstance(past, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in past)):
        raise FormatError("history is not a list of pairs")
    said = [{"role": role, "content": _text(p[j], f"history[{i}]")} for i, p in enumerate(past) for j, role in enumerate(("user", "assistant"))]
    return {"format": "messages", "messages": [*turns[:-2], *said, *turns[-2:]]}


def _instruction(row: _Fields) -> str:
    instruction, context = row.text("instruction"), row.optional("input")
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _sharegpt(row: _Fields) -> dict[str, Any]:
    return _conversation(_with_system(row.optional("system"), _turns(row.need("conversations"), "conversations")), "conversations")


def _messages(row: _Fields) -> dict[str, Any]:
    return _conversation(_turns(row.need("messages"), "messages"), "messages")


def _prompt(row: _Fields, field: str) -> list[Message]:
    value = row.need(field)
    return _turns(value, field) if not isinstance(value, str) else [{"role": "user", "content": _text(value, field)}]


def _answer(value: Any, field: str) -> list[Message]:
    return _turns(value, field) if not isinstance(value, str) else [{"role": "assistant", "content": _text(value, field)}]


def _prompt_completion(row: _Fields) -> dict[str, Any]:
    prompt, answer = _first(row.raw, PROMPT_NAMES) or "prompt", _first(row.raw, ANSWER_NAMES) or "completion"
    turns = [*_prompt(row, prompt), *_answer(row.need(answer), answer)]
    return _conversation(_with_system(row.optional("system"), turns), answer)


def _preference(row: _Fields) -> dict[str, Any]:
    chosen, rejected = _answer(row.need("chosen"), "chosen"), _answer(row.need("rejected"), "rejected")
    if row.has("instruction"):
        prompt = [{"role": "user", "content": _instruction(row)}]
    elif source := _first(row.raw, ("prompt", "messages", "conversations", "question", "query")):
        prompt = _prompt(row, source)
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:  # some sets repeat the prompt inside both answers
            chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    else:  # both are whole conversations, and their common start is the prompt
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise FormatError("field 'prompt' is missing", "chosen and rejected share no first turn either")
    if chosen == rejected:
        raise FormatError("chosen and rejected are the same")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not any(t["role"] == "assistant" for t in turns):
            raise FormatError(f"{name} has no assistant turn")
    return {"format": "preference", "messages": _with_system(row.optional("system"), prompt), "chosen": chosen, "rejected": rejected}


def _plain_text(row: _Fields) -> dict[str, Any]:
    return {"format": "text", "text": row.text("text")}


def _first(has: Any, names: tuple[str, ...]) -> str | None:
    """The first of `names` that a row has (and that is not null, where `has` is the row itself)."""
    return next((n for n in names if n in has and (not isinstance(has, Mapping) or has[n] is not None)), None)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dates and other objects as text, NaN and infinities as null."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_clean(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _clean(text: str) -> str:
    """`text` with lone surrogates, which no encoding can hold, written out as \\udXXX."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


_CONVERT: dict[str, Callable[[_Fields], dict[str, Any]]] = {
    "alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages, "prompt_completion": _prompt_completion, "preference": _preference, "text": _plain_text,
}
assert set(_CONVERT) == set(get_args(FormatName)) == set(FIELDS)
