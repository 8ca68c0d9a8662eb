"""What the tests of sparse training share: whole weights, a stop and a resume, a model with biases, and training by plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ftpipe.train import checkpoint
from tests.train.small import examples, small_run, steps


def whole(run) -> dict[str, Any]:
    """Every parameter's value, whatever the ZeRO stage."""
    from ftpipe.train.engine import gathered

    with gathered(run.model.parameters(), run.zero):
        return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names of the parameters that are not what they were, to the bit."""
    return {n for n in before if not before[n].float().equal(after[n].float())}


def stopped_and_resumed(model: Path, folder: Path, stop: int, end: int, **settings: Any):
    """A run that was killed after `stop` steps and taken up again from its checkpoint, after `end` steps; and the records of its second life.

    The second life is shown other rows before training, so that a method that looks at them again does not find what it found.
    """
    from ftpipe.train.engine import Engine
    from ftpipe.train.loop import _restore

    broken = small_run(model, **settings)
    steps(broken, examples(), stop)
    checkpoint.write(folder, checkpoint.Checkpoint(stop, broken.engine.trained(), broken.engine.optimizer_state(), list(broken.engine.names), broken.memory))
    kept = checkpoint.latest(folder)
    with patch("ftpipe.train.engine.Engine"):  # as in the loop, where the engine is built from what the checkpoint holds
        resumed = small_run(model, memory=kept.memory, rows=examples(3, seed=9), **settings)
    assert _restore(resumed, kept)[0] == stop
    resumed.engine = Engine(resumed, 1.0, touched=kept.parameters)
    resumed.engine.restore(kept.optimizer)
    return resumed, steps(resumed, examples(), end, first=stop)


def saved(run, folder: Path) -> bytes:
    """The bytes of the adapter that the run would leave, in a folder that can be read as one."""
    folder.mkdir(parents=True)
    run.adapt.save(run.model, run.engine.state(), folder)
    (folder / "ftpipe_adapter.json").write_text(json.dumps({"method": run.adapt.dump(), "base": {}}), encoding="utf-8")
    return (folder / "weights.safetensors").read_bytes()


def loaded(run, folder: Path):
    """The run's adapter, saved into `folder` and put on the base model."""
    saved(run, folder)
    return run.adapt.load(run.load_base(), folder)


def batches_of(run, n: int, first: int = 0, **plan: Any):
    """The micro-batches of steps `first` to `n` as `steps` takes them, and the count of each step: [(batches, count)]."""
    from ftpipe.train.batches import Plan

    rows = examples()
    how = Plan(lengths=[e.tokens for e in rows], times=[1] * len(rows), seed=1, batch_tokens=plan.pop("batch_tokens", 100), rows_per_step=8, **plan)
    found = []
    for step, (_, numbers) in enumerate(how.steps(steps=n)):
        if step >= first:
            packs = [run.objective.collate(run, [rows[r] for r in pack]) for pack in how.packs(numbers)]
            found.append((packs, sum(b.count for b in packs)))
    return found


def gradients(model, run, batches, count) -> list[dict[str, Any]]:
    """By plain autograd: each micro-batch's share of the gradient of a step's mean loss, by name."""
    import torch

    from ftpipe.train.forward import token_losses

    found = []
    for batch in batches:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(token_losses(model, batch).sum() / count, list(trained.values()), allow_unused=True)
        found.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), grads, strict=True)})
    return found


def make_gpt2(folder: Path, *, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """A model with biases and without rotary positions, of the family of GPT-2, with the tiny model's tokenizer. The biases are drawn, not zero."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tiny import make_tiny_model

    make_tiny_model(folder)
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=259, n_positions=512, n_embd=hidden, n_layer=layers, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder
