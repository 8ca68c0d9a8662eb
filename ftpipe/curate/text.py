"""What a row says, as SQL over the columns of `rows_schema()`: for steps that compare texts."""

from __future__ import annotations

from typing import Literal

from ftpipe.data.rows import TOOLS

Part = Literal["all", "prompt", "answer"]
"""Part of a row: everything, the turns of everybody but the assistant, or the assistant's turns (of a pair: chosen and rejected).
A row of plain text has no parts and is always compared whole."""

TURN, ROLE = "chr(30)", "chr(31)"


def squeeze(sql: str) -> str:
    """SQL of a text in Unicode normal form C, every run of white space (ASCII and Unicode) made one space, none at the ends."""
    return rf"trim(regexp_replace(nfc_normalize({sql}), '[\s\x0b\x85\p{{Z}}]+', ' ', 'g'))"


def row_text(part: Part = "all") -> str:
    """SQL of the contents of a row's turns, one after the other, separated by line feeds. Roles do not show, nor do tool definitions, which many rows share."""
    def contents(column: str, keep: str = "true") -> str:
        said = f"coalesce(m.role, '') <> '{TOOLS}' and {keep}"
        return f"array_to_string(list_transform(list_filter({column}, lambda m: {said}), lambda m: coalesce(m.content, '')), chr(10))"

    return _by_format(part, contents, "chr(10)")


def exact_text(part: Part = "all", *, ignore_case: bool = False, ignore_whitespace: bool = True) -> str:
    """SQL of a text that two rows share if and only if they say the same: NFC, turns and roles marked by control characters."""
    def clean(sql: str) -> str:
        sql = squeeze(sql) if ignore_whitespace else f"nfc_normalize({sql})"
        return f"lower({sql})" if ignore_case else sql

    def contents(column: str, keep: str = "true") -> str:
        said = f"coalesce(m.role, '') || {ROLE} || " + clean("coalesce(m.content, '')")
        return f"array_to_string(list_transform(list_filter({column}, lambda m: {keep}), lambda m: {said}), {TURN})"

    return _by_format(part, contents, "chr(29)", clean)


def _by_format(part: Part, contents, separator: str, clean=lambda sql: sql) -> str:
    keep = {"all": "true", "prompt": "m.role <> 'assistant'", "answer": "m.role = 'assistant'"}[part]
    turns = contents("messages", keep)
    pair = {"all": ["messages", "chosen", "rejected"], "prompt": ["messages"], "answer": ["chosen", "rejected"]}[part]
    joined = f" || {separator} || ".join(f"coalesce({contents(c)}, '')" for c in pair)
    plain = clean("coalesce(text, '')")
    return f"case format when 'text' then {plain} when 'preference' then {joined} when 'unpaired' then {joined} else coalesce({turns}, '') end"
