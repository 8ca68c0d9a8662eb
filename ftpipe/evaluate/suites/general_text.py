"""Forgetting: loss on general text that has nothing to do with the training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.canonical import file_digest
from ftpipe.errors import ConfigError, DataError
from ftpipe.evaluate.suites.base import Given, Item, Score, Suite
from ftpipe.evaluate.suites.heldout_loss import token_losses
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from ftpipe.evaluate.systems import System

OWN = Path(__file__).parent.parent / "general_text.jsonl"


class GeneralText(Suite):
    """Mean negative log-likelihood of a token of general prose, in nats.

    The rise over the base model is what was forgotten, by the definition of PEFT's method comparison (cross-entropy after training minus
    before, on encyclopaedic text). The project brings a few dozen short paragraphs, written for it, so that no web page that a model has
    learnt by heart stands in for general ability; they are enough for the paired difference, whose items scatter far less than the losses.
    """

    forgetting: ClassVar[bool] = True

    path: str = Field(default="", description="JSONL file of one's own: {\"text\": ..., \"subject\": ...} a line; by default the project's paragraphs.")
    limit: int = Field(default=0, ge=0, description="Use only so many paragraphs, the first; 0 uses all.")

    def _file(self, env: Environment) -> Path:
        return env.path(self.path) if self.path else OWN

    def externals(self, env: Environment) -> dict[str, Any]:
        file = self._file(env)
        if not file.is_file():
            raise ConfigError("no such file of general text", where=str(file), remedy="name a JSONL file with a `text` in each line, or leave `path` out")
        return {"text": file_digest(file)}

    def items(self, given: Given) -> list[Item]:
        file = self._file(given.env)
        suite, = self.labels()
        found: list[Item] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                text = entry["text"]
                if not (isinstance(text, str) and text.strip()):
                    raise ValueError("`text` must hold text")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"not a line of general text: {error}", where=f"{file}:{number}", remedy='write {"text": "..."}') from error
            content = hashlib.sha256(text.encode()).hexdigest()
            found.append(Item(id=f"{number}", content=content, slice=str(entry.get("subject", "")), suite=suite, ask=text))
        if not found:
            raise DataError("there is no text in it", where=str(file))
        return found[: self.limit] if self.limit else found

    def measure(self, system: System, items: Sequence[Item]) -> Iterator[tuple[Item, list[Score]]]:
        yield from token_losses(system, items, [{"format": "text", "text": i.ask} for i in items])
