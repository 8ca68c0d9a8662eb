"""JSON files: a list of objects, or an object that holds one."""

from __future__ import annotations

import json as codec
from collections.abc import Iterator

from pydantic import Field, field_validator

from ftpipe.data.files import File
from ftpipe.data.sources.base import FileSource, Record, check_encoding, undecodable
from ftpipe.errors import DataError

BLANK = " \t\r\n"


class Json(FileSource):
    """A file that is one JSON list of objects, or an object with such a list in it. A file is read as a whole; use `jsonl` for large data.

    Of a file that was cut off or is damaged in the middle, the items before that place are used and the rest is one quarantined record.
    """

    suffixes = (".json",)

    key: str | None = Field(default=None, description="Where the list is, if the file holds an object: a key, or several joined by dots.")
    encoding: str = Field(default="utf-8", description="Encoding of the files.")

    _encoding = field_validator("encoding")(check_encoding)

    def read(self, file: File, name: str) -> Iterator[Record]:
        with file.unpacked() as f:
            data = f.read()
        try:
            text = data.decode(self.encoding)
        except UnicodeDecodeError as error:  # kept as lone surrogates, so that only the items that hold such bytes are lost
            reason, detail = undecodable(data, error)
            if error.encoding.startswith(("utf-16", "utf-32")):
                yield Record(name, 1, error=reason, detail=detail)
                return
            text = data.decode(self.encoding, errors="surrogateescape")
        text = text.removeprefix("\ufeff")
        start = len(text) - len(text.lstrip(BLANK))
        items = _items(text, start) if text[start : start + 1] == "[" and self.key is None else self._inside(text, file.path)
        for number, (value, raw, problem) in enumerate(items, start=1):
            if problem:
                yield Record(name, number, error=problem[0], detail=problem[1], text=_printable(raw))
            elif bad := _stray_byte(raw):
                yield Record(name, number, error=f"not valid {self.encoding}", detail=f"byte 0x{bad:02x}; set `encoding` if the file is in another one",
                             text=_printable(raw))
            elif not isinstance(value, dict):
                yield Record(name, number, error="not a JSON object", detail=f"it is {type(value).__name__}", text=raw)
            else:
                yield Record(name, number, raw=value)

    def _inside(self, text: str, path: str) -> Iterator[tuple]:
        """The items of a list inside the file's object."""
        try:
            value = codec.loads(text)
        except (ValueError, RecursionError) as error:
            yield None, text, ("not valid JSON", f"{error}; nothing of the file could be read")
            return
        if self.key is not None:
            for part in self.key.split("."):
                if not (isinstance(value, dict) and part in value):
                    raise DataError(f"the file has no {self.key!r}", where=path,
                                    remedy=f"its keys are {', '.join(value)}" if isinstance(value, dict) else "it is a list; leave `key` out")
                value = value[part]
        elif isinstance(value, dict):
            lists = [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
            if len(lists) != 1:
                raise DataError("the file is an object, not a list of rows", where=path,
                                remedy=f"name its list with `key` (keys: {', '.join(value)}), or use `jsonl` for one object a line")
            value = value[lists[0]]
        if not isinstance(value, list):
            raise DataError(f"{self.key or 'the file'} is {type(value).__name__}, not a list of rows", where=path)
        for item in value:
            yield item, codec.dumps(item, ensure_ascii=False), None


def _items(text: str, start: int) -> Iterator[tuple]:
    """(value, its text, None) of each item of the list at `start`, then perhaps (None, rest, problem)."""
    decoder, at = codec.JSONDecoder(), start + 1
    while True:
        while at < len(text) and text[at] in BLANK:
            at += 1
        if text[at : at + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
            after = end
            while after < len(text) and text[after] in BLANK:
                after += 1
            if text[after : after + 1] not in (",", "]"):
                yield value, text[at:end], None
                cut = after >= len(text)
                yield None, text[end:], ("the JSON is cut off", "the list never ends") if cut else ("not valid JSON", f"no , or ] at character {after + 1}")
                return
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, codec.JSONDecodeError) and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"))
            yield None, text[at:], ("the JSON is cut off" if cut else "not valid JSON", f"{error}; nothing after it could be read")
            return
        yield value, text[at:end], None
        at = after + 1 if text[after] == "," else after


def _stray_byte(text: str) -> int | None:
    """The first byte that was not in the encoding (`surrogateescape` keeps it as U+DC80 to U+DCFF)."""
    if text.isascii():
        return None
    return next((ord(c) - 0xDC00 for c in text if "\udc80" <= c <= "\udcff"), None)


def _printable(text: str) -> str:
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
