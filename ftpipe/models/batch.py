"""Answers to the prompts of a file, appended as they come, so that a stopped run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.canonical import digest
from ftpipe.errors import DataError
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from ftpipe.decode.base import Decoder


def answer_file(model: str, env: Environment, adapter: Path | None, prompts: Path, out: Path, *, max_new_tokens: int, temperature: float = 0.0,
                top_p: float = 1.0, seed: int = 0, decoder: Decoder | None = None, base: bool = False,
                progress: Callable[[int, int], None] = lambda n, of: None) -> int:
    """Answer each row of `prompts` and append it with `answer` (and `base_answer`) to `out`, in the file's order. Returns the number of rows in `out`.

    Rows that `out` holds already, told by their prompt, are passed over; a last line that was cut off by a kill is taken away first. Each answer depends
    on its prompt, the seed and the settings alone. `decoder`, a method of the slot `decode`, replaces temperature and top_p of
    the adapter's answers.

    Raises:
        DataError: naming file and line, before a model is loaded, for a row without a prompt, or an `out` that is of other prompts.
    """
    from ftpipe.models.service import ModelService

    asked = _read(prompts)
    done = _done(out, asked)
    if len(done) == len(asked):
        return len(done)
    services: dict[str, Any] = {"answer": ModelService.open(model, env, adapter=adapter)}
    if base and adapter is not None:
        services["base_answer"] = ModelService.open(model, env)
    with out.open("a", encoding="utf-8") as f:
        for number in range(len(done), len(asked)):
            row, messages = asked[number]
            for name, service in services.items():
                made, = service.generate([service.renderer.prompt(messages)], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
                                         decoder=decoder if name == "answer" else None, env=env, batch_size=1)
                row = row | {name: made.text, "finished": made.finished} if name == "answer" else row | {name: made.text}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            f.flush()
            os.fsync(f.fileno())
            progress(number + 1, len(asked))
    return len(asked)


def _read(path: Path) -> list[tuple[dict[str, Any], list[dict[str, str]]]]:
    """Rows and the conversations to answer."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if path.suffix not in (".jsonl", ".ndjson"):
            found.append(({"prompt": line}, [{"role": "user", "content": line}]))
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"not valid JSON: {error}", where=where) from error
        found.append((row, _conversation(row, where)))
    if not found:
        raise DataError("the file holds no prompts", where=str(path))
    return found


def _conversation(row: Any, where: str) -> list[dict[str, str]]:
    """The turns up to the answer that is wanted."""
    from ftpipe.data.formats import FormatError, convert

    try:
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and "completion" not in row:
            return [{"role": "user", "content": row["prompt"]}]
        messages = convert(row, "auto", {})["messages"] or [] if isinstance(row, dict) else []
    except FormatError as error:
        raise DataError(f"{error.reason}: {error.detail}", where=where, remedy="give each row a `prompt`, or `messages`") from error
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not turns:
        raise DataError("there is nothing to answer", where=where, remedy="give each row a `prompt`, or `messages`")
    return turns


def _done(out: Path, asked: list[tuple[dict[str, Any], Any]]) -> list[str]:
    """Prompts that `out` holds already, after taking away a line that was cut off."""
    if not out.exists():
        return []
    data = out.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if whole != data:
        with out.open("r+b") as f:
            f.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            same = number <= len(asked) and digest(_bare(row)) == digest(_bare(asked[number - 1][0]))
        except (ValueError, AttributeError):
            same = False
        if not same:
            raise DataError("it holds answers to other prompts", where=f"{out}:{number}", remedy="name another file to write, or remove this one")
        found.append(line)
    return found


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("answer", "base_answer", "finished")}
