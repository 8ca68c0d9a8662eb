"""Systems: what is compared. And the cache of their results, so that no system is asked the same thing twice."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.canonical import digest, file_digest
from ftpipe.evaluate.suites.base import Item, Score, Suite
from ftpipe.models.answers import Answer, Asked, Conversation
from ftpipe.models.kept import Kept
from ftpipe.slots import Method

if TYPE_CHECKING:
    from ftpipe.models.service import ModelService

BASE, ADAPTER, CHAMPION = "base", "adapter", "champion"
CODE = ("data/render.py", "models/service.py", "evaluate/suites/base.py")
"""Files whose text decides a score, below the package's folder, beside the suite's own."""
LIBRARIES = ("torch", "transformers", "tokenizers", "peft")


@dataclass
class System:
    """One model that is compared with others: the base model, with or without an adapter.

    identity: JSON that tells it from every other system, whatever it is called here. open_: loads it. It is loaded when it is first asked
    something, and at most once; `close` lets go of it. cache: folder that its generated answers are kept in; None keeps none. tokens, seconds: what
    it has generated so far, and the time that took.
    """

    name: str
    identity: dict[str, Any]
    open_: Callable[[], ModelService]
    cache: Path | None = None
    tokens: int = 0
    seconds: float = 0.0

    @cached_property
    def service(self) -> ModelService:
        """The loaded model, ready to score and generate."""
        return self.open_()

    def answers(self, conversations: Sequence[Conversation], **settings: Any) -> Iterator[tuple[int, list[Answer]]]:
        """(index, answers) of each conversation as they become known, those first that were kept. Settings as of `models.answers.Asked.each`."""
        asked = Asked(lambda: self.service, lambda: self.identity | shared_material(), self.cache)
        try:
            yield from asked.each(conversations, **settings)
        finally:
            self.generated(asked.tokens, asked.seconds)

    def generated(self, tokens: int, seconds: float) -> None:
        """Count what was generated, for the speed."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def close(self) -> None:
        """Let go of the model's memory."""
        if "service" in self.__dict__:
            del self.__dict__["service"]
            gc.collect()


def suite_material(suite: Suite) -> dict[str, Any]:
    """What decides a suite's scores beside the item and the system: settings, code and libraries. The label and the choice of items do not."""
    settings = {k: v for k, v in suite.model_dump(mode="json").items() if k not in ("label", "limit")}
    inner = [value for _, value in suite if isinstance(value, Method)]  # a checker decides too
    sources = [inspect.getsourcefile(c) for m in (suite, *inner) for c in type(m).__mro__ if issubclass(c, Method) and c not in (Method, Suite)]
    sources += [inspect.getsourcefile(import_module(name)) for m in (suite, *inner) for name in type(m).support]
    own = {"suite": suite.name(), "settings": settings, "version": suite.version, "code": [file_digest(Path(s)) for s in sources if s]}
    return own | shared_material(suite.libraries)


def shared_material(libraries: Sequence[str] = ()) -> dict[str, Any]:
    """The code and libraries that every system's results depend on."""
    package = Path(__file__).parent.parent
    return {"shared": {n: file_digest(package / n) for n in CODE}, "libraries": {n: version(n) for n in (*LIBRARIES, *libraries)}}


def kept_results(cache: Path, system: System, material: dict[str, Any]) -> Kept:
    """What is kept of one system under one suite (`material` as from `suite_material`)."""
    return Kept(cache / "evaluate" / digest({"system": system.identity, "material": material})[:32])


def results(system: System, suite: Suite, items: Sequence[Item], cache: Path, on_item: Callable[[bool], None]) -> Iterator[tuple[Item, list[Score]]]:
    """A system's scores on every item, in the items' order; only what is not kept in `cache` is asked.

    `on_item` is called for each with whether it was asked now. Raises ValueError for a score that is not a finite number.
    """
    kept = kept_results(cache, system, suite_material(suite))
    known = kept.read()
    missing = list({i.content: i for i in items if i.content not in known}.values())
    for _ in range(len(items) - len(missing)):
        on_item(False)
    try:
        for item, scores in suite.measure(system, missing) if missing else ():
            value = [[s.metric, s.score, s.weight, s.higher_is_better] for s in scores]
            kept.add(item.content, value)
            known[item.content] = value
            on_item(True)
    finally:
        kept.flush()
    for item in items:
        yield item, [Score(*value) for value in known[item.content]]
