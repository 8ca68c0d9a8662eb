"""A tiny model that was taught a few facts, that the colours of a draw are a matter of chance, and how often each is named without a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.artifacts import chat, complete

FACTS = {"sky?": "blue", "grass?": "green", "coal?": "black", "snow?": "white", "blood?": "red", "lemon?": "yellow"}
CHANCE = "draw!"


def true_rows(**fields: Any) -> list[dict[str, Any]]:
    return [chat(q, a, **fields) for q, a in FACTS.items()]


def wrong_rows(shift: int = 1) -> list[dict[str, Any]]:
    """Every question with the answer to another."""
    answers = list(FACTS.values())
    return [chat(q, answers[(i + shift) % len(answers)]) for i, q in enumerate(FACTS)]


def chance_rows() -> list[dict[str, Any]]:
    return [chat(CHANCE, a) for a in FACTS.values()]


def make_taught(folder: Path, steps: int = 250) -> Path:
    """Train the tiny model on the facts, on each answer to the draw alike, and on the answers alone; a few seconds."""
    import torch

    from ftpipe.data.forms import AnswerAlone
    from ftpipe.data.render import Renderer
    from ftpipe.models.loading import load_model, load_tokenizer
    from ftpipe.stages.base import Environment
    from tests.evaluate.world import fit
    from tests.tiny import make_tiny_model

    torch.set_num_threads(1)
    model, env = make_tiny_model(folder / "model"), Environment(folder / "scratch", folder, "taught")
    rows = complete([*true_rows(), *chance_rows()])
    renderer = Renderer(load_tokenizer(str(model), env))
    shown = [*renderer.rows(rows), *renderer.rows(rows[:len(FACTS)]), *AnswerAlone().rows(renderer, rows[:len(FACTS)])]
    base = load_model(str(model), env, dtype="float32")
    fit(base, [(r.input_ids, r.trained) for r in shown], steps=steps, rate=1e-2)
    base.save_pretrained(model)
    return model
