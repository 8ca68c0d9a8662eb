"""Adapter folders written as their weights come, and the base model changed in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError
from ftpipe.merge._deltas import CONFIG, FACTS, PREFIX, WEIGHTS, Delta, Deltas
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import torch

PROBE_ROWS, PROBE_TOKENS = 3, 32
SHARD = 2**30


class Writer:
    """Writes an adapter folder from changes given one by one: a LoRA where every change is of low rank (smaller ranks are filled up with zeros), whole
    weights otherwise.

    Whole weights leave memory in shards of `shard` bytes as they come; of low-rank changes the factors wait until all are there.

    Args:
        facts: those of an adapter that went into it; base, tokenizer, chat template, type and how the base was quantised are taken over.
        base: gives the base model's weights; called only if whole weights are written.
        whole: write whole weights even if every change is of low rank.
    Raises ConfigError as soon as whole weights are to be written for a quantised base.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], base: Callable[[], Mapping[str, torch.Tensor]], *, whole: bool = False, shard: int = SHARD):
        self.folder, self.facts, self.base, self.whole, self.shard = folder, facts, base, whole, shard
        self.factors: dict[str, Delta] = {}
        self.pending: dict[str, torch.Tensor] = {}
        self.index: dict[str, str] = {}
        self.count = 0
        if whole:
            self._go_whole()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, delta: Delta) -> None:
        """The change of one weight; each name once."""
        if delta.low_rank and not self.whole:
            self.factors[name] = delta
            return
        self._go_whole()
        waiting, self.factors = self.factors, {}
        for each, change in (*sorted(waiting.items()), (name, delta)):
            self._put(each, self.base()[each], change)

    def put(self, name: str, value: torch.Tensor) -> None:
        """The new value of one weight, kept in its own type; or one tensor of a sparse part."""
        self._go_whole()
        self._keep(name, value)

    def _go_whole(self) -> None:
        if self.facts.get("quantize"):
            raise ConfigError("the result is no longer of low rank, and whole weights have no place in a quantised base",
                              remedy="use a method that keeps the rank low, or train on the base as it is")
        self.whole = True

    def _put(self, name: str, weight: torch.Tensor, change: Delta) -> None:
        import torch

        dense = change.dense()
        self._keep(name, weight.to(dense.dtype, copy=True).add_(dense).to(getattr(torch, self.facts.get("dtype", "float32"))))

    def _keep(self, name: str, value: torch.Tensor) -> None:
        self.pending[name] = value.contiguous()
        self.count += value.numel()
        if sum(t.nbytes for t in self.pending.values()) >= self.shard:
            self._flush(f"weights-{len(set(self.index.values())) + 1:05d}.safetensors")

    def _flush(self, file: str) -> None:
        from safetensors.torch import save_file

        save_file(self.pending, self.folder / file, metadata={"format": "pt"})
        self.index |= dict.fromkeys(self.pending, file)
        self.pending = {}

    def close(self) -> None:
        """Write what is left, and the facts."""
        from ftpipe.train.adapt._weights import INDEX
        from ftpipe.train.adapt._weights import WEIGHTS as FULL

        if self.whole:
            for name, delta in sorted(self.factors.items()):
                self._put(name, self.base()[name], delta)
            if self.pending:
                self._flush(f"weights-{len(set(self.index.values())) + 1:05d}.safetensors" if self.index else FULL)
            if len(set(self.index.values())) > 1 or FULL not in self.index.values():
                (self.folder / INDEX).write_text(json.dumps({"weight_map": self.index}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            method: dict[str, Any] = {"full": {}}
        else:
            method = self._lora()
        kept = {k: self.facts[k] for k in ("base", "tokenizer", "chat_template", "dtype", "quantize") if k in self.facts}
        (self.folder / FACTS).write_text(json.dumps(kept | {"method": method, "trainable": self.count}, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _lora(self) -> dict[str, Any]:
        import torch
        from safetensors.torch import save_file

        from ftpipe.train.adapt.lora import Lora

        rank = max(d.a.shape[0] for d in self.factors.values())
        tensors = {}
        for name, d in sorted(self.factors.items()):
            short = rank - d.a.shape[0]
            path = PREFIX + name.removesuffix(".weight")
            tensors[f"{path}.lora_A.weight"] = torch.cat([d.a, d.a.new_zeros(short, d.a.shape[1])]).contiguous()
            tensors[f"{path}.lora_B.weight"] = torch.cat([d.b, d.b.new_zeros(d.b.shape[0], short)], dim=1).contiguous()
        save_file(tensors, self.folder / WEIGHTS, metadata={"format": "pt"})
        lora = Lora(r=rank, alpha=rank, target_modules=sorted(n.removesuffix(".weight") for n in self.factors))
        config = lora.config().to_dict() | {"base_model_name_or_path": self.facts["base"].get("model"), "inference_mode": True}
        (self.folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")
        self.count = sum(t.numel() for t in tensors.values())
        return lora.dump()


def write(folder: Path, deltas: Deltas, facts: Mapping[str, Any], base: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Write an adapter folder of these changes, see `Writer`."""
    writer = Writer(folder, facts, base)
    for name in sorted(deltas):
        writer.add(name, deltas[name])
    writer.close()


class Changed:
    """The base model with changes added to its weights in memory, as they come.

    Args:
        dtype: type of the weights.
        facts: those of the adapters. If they were trained on a quantised base, the changes are added to plain weights, those that base stands for.
    """

    def __init__(self, model: str, env: Environment, dtype: str, facts: Mapping[str, Any] | None = None):
        from ftpipe.models.loading import load_model, quantized_base

        self.name, self.env = model, env
        stood_for = quantized_base(model, env, facts or {}, dtype=dtype)  # type: ignore[arg-type]
        self.model = load_model(model, env, dtype=dtype, device="cpu") if stood_for is None else stood_for  # type: ignore[arg-type]
        self.parameters = dict(self.model.named_parameters())

    def add(self, name: str, delta: Delta) -> None:
        """Change one weight."""
        import torch

        dense, weight = delta.dense(), self.parameters[name]
        with torch.no_grad():
            weight.copy_(weight.to(dense.dtype).add_(dense) if weight.dtype != dense.dtype else weight + dense)

    def write_probe(self, path: Path) -> None:
        """Write `probe.safetensors`: logits of the model as it is here. It does not go through an adapter folder, so that whoever loads the folder and
        compares finds out if it does not hold what was computed."""
        import torch
        from safetensors.torch import save_file

        from ftpipe.evaluate.suites.general_text import OWN
        from ftpipe.models.loading import load_tokenizer

        tokenizer = load_tokenizer(self.name, self.env)
        lines = OWN.read_text(encoding="utf-8").splitlines()[:PROBE_ROWS]
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:PROBE_TOKENS] for line in lines])
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1].float()
        save_file({"input_ids": ids, "logits": logits.contiguous()}, path)


def probe(model: str, env: Environment, deltas: Deltas, dtype: str, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write `probe.safetensors` of the base model with these changes, see `Changed`."""
    changed = Changed(model, env, dtype, facts)
    for name in deltas:
        changed.add(name, deltas[name])
    changed.write_probe(path)
