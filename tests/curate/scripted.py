"""Models whose answers are known: a service that says what a script tells it to, without a forward pass, and a small model taught by heart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from ftpipe.models.service import Generation


def taught(folder: Path, start: Path, rows: list[dict]) -> Path:
    """A model folder: that of `start`, all its weights trained until it knows the answers of `rows` by heart. About a second."""
    from ftpipe.data.render import Renderer
    from ftpipe.models.loading import load_model, load_tokenizer
    from ftpipe.stages.base import Environment
    from tests.artifacts import complete
    from tests.evaluate.world import fit

    shutil.copytree(start, folder)
    env = Environment(folder.parent, folder.parent, "test")
    model = load_model(str(folder), env, dtype="float32", device="cpu")
    fit(model, [(r.input_ids, r.trained) for r in Renderer(load_tokenizer(str(folder), env)).rows(complete(rows))], steps=100, rate=2e-2)
    model.save_pretrained(folder)
    return folder


class Scripted:
    """Stands in for `ModelService.open`. `script(adapter, conversation, n)` gives the n-th answer of a sampled batch (0 for a greedy one), `None` an
    unfinished one; `seed` is put in front where the script asks for it. `asked` lists what was generated."""

    def __init__(self, script: Callable, room: int = 100_000):
        self.script, self.room = script, room
        self.asked: list[tuple[str, list[dict], int]] = []
        self.opened = 0

    def __call__(self, model, env, *, adapter=None, dtype="bfloat16", **options):
        self.opened += 1
        name = adapter.parent.parent.name if adapter else "base"

        def generate(prompts, *, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, batch_size=8):
            found = []
            for n, prompt in enumerate(prompts):
                conversation = json.loads(bytes(prompt))
                text = self.script(adapter, conversation, n, seed)
                self.asked.append((name, conversation, n))
                found.append(Generation([], text if text is not None else "half an ans", text is not None))
            return found

        return SimpleNamespace(renderer=SimpleNamespace(prompt=lambda turns: list(json.dumps(list(turns)).encode())), max_length=self.room,
                               device=SimpleNamespace(type="cpu"), generate=generate)

    def install(self, monkeypatch) -> Scripted:
        from ftpipe.models.service import ModelService

        monkeypatch.setattr(ModelService, "open", self)
        monkeypatch.setattr("ftpipe.models.answers.gc", SimpleNamespace(collect=lambda: 0))  # there is no model whose memory could come back
        return self
