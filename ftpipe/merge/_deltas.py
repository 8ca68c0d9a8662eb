"""Adapters as changes of weights: what merging, editing and compressing work on.

A change of one weight is kept as the two thin factors of a LoRA where it is one, and as a full matrix otherwise. Everything is float32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import torch

FACTS, WEIGHTS, CONFIG, FULL = "ftpipe_adapter.json", "adapter_model.safetensors", "adapter_config.json", "weights.safetensors"
PREFIX = "base_model.model."
PROBE_ROWS, PROBE_TOKENS = 3, 32
log = logging.getLogger("ftpipe")


@dataclass(frozen=True)
class Delta:
    """The change of one weight (out x in, or any shape if dense): `dense_`, or `b @ a` with a (rank x in) and b (out x rank), the scale already in b."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    dense_: torch.Tensor | None = None

    @property
    def low_rank(self) -> bool:
        return self.dense_ is None

    def dense(self) -> torch.Tensor:
        """The whole change."""
        return self.b @ self.a if self.dense_ is None else self.dense_

    def times(self, factor: float) -> Delta:
        """The change, `factor` times as large."""
        return Delta(self.a, self.b * factor) if self.low_rank else Delta(dense_=self.dense_ * factor)


Deltas = Mapping[str, Delta]
"""Changes by the name of the base model's parameter."""


def add(parts: Sequence[Delta]) -> Delta:
    """The sum of changes of one weight. Low-rank changes stay so, exactly: their factors are put side by side, and the ranks add up.

    Averaging A and B apart, as is often done, is not that: mean(B) mean(A) is not the mean of B A.
    """
    import torch

    if all(p.low_rank for p in parts):
        return Delta(torch.cat([p.a for p in parts]), torch.cat([p.b for p in parts], dim=1))
    total = parts[0].dense().clone()
    for part in parts[1:]:
        total += part.dense()
    return Delta(dense_=total)


def truncate(delta: Delta, rank: int) -> Delta:
    """The best change of at most `rank` in the Frobenius norm (Eckart and Young 1936); of a low-rank one without ever forming it, through QR of its factors."""
    import torch

    if delta.low_rank:
        if delta.a.shape[0] <= rank:
            return delta
        qb, rb = torch.linalg.qr(delta.b.double())
        qa, ra = torch.linalg.qr(delta.a.double().T)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        return _balanced(qb @ u[:, :rank], s[:rank], vh[:rank] @ qa.T)
    if delta.dense_.dim() != 2:
        return delta
    u, s, vh = torch.linalg.svd(delta.dense_.double(), full_matrices=False)
    return _balanced(u[:, :rank], s[:rank], vh[:rank])


def _balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> Delta:
    root = s.sqrt()
    return Delta((root[:, None] * vh).float(), (u * root).float())


def norm(deltas: Deltas) -> float:
    """Frobenius norm of all changes together; of low-rank ones from the small Gram matrices of their factors."""
    total = 0.0
    for d in deltas.values():
        if d.low_rank:
            a, b = d.a.double(), d.b.double()
            total += float(((a @ a.T) * (b.T @ b)).sum())
        else:
            total += float(d.dense_.double().pow(2).sum())
    return max(total, 0.0) ** 0.5


def facts_of(folder: Path) -> dict[str, Any]:
    """`ftpipe_adapter.json` of an adapter folder."""
    from ftpipe.models.adapters import read_manifest

    return read_manifest(folder)


def same_base(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The facts of the first adapter, after checking that all are for one base. Raises ConfigError."""
    facts = {name: facts_of(folder) for name, folder in folders.items()}
    (first, own), *rest = facts.items()
    for name, other in rest:
        if any(own["base"].get(k) != other["base"].get(k) for k in ("weights", "config")):
            raise ConfigError(f"{first} is for {own['base'].get('model')}, {name} for {other['base'].get('model')}",
                              remedy="only adapters for one base can be combined")
        if own.get("quantize") != other.get("quantize"):
            def said(facts: dict[str, Any]) -> str:
                return f"quantised by {json.dumps(facts['quantize'])}" if facts.get("quantize") else "as it is"
            raise ConfigError(f"{first} was trained on the base {said(own)}, {name} on the base {said(other)}",
                              remedy="only adapters for one base can be combined; train them with the same `quantize`")
    return own


def read(folder: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, Delta]:
    """The changes of an adapter. `base` gives the base model's weights, and is called only for an adapter of whole weights.

    Raises ConfigError for adapters whose effect is no sum of weight changes (DoRA, prompts, adapters in series).
    """
    from safetensors.torch import load_file

    if (folder / FULL).is_file():
        from ftpipe.models import sparse

        weights = base()
        parts = sparse.read(load_file(folder / FULL), str(folder))
        if added := sorted(set(parts) - set(weights)):
            raise ConfigError(f"the adapter adds {added[0]}, which the base model does not have, so it is no sum of weight changes", where=str(folder),
                              remedy="use LoRA or full weights")
        return {n: Delta(dense_=part.on(weights[n]) - weights[n].float()) for n, part in parts.items()}
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type") or "its method"
        raise ConfigError(f"an adapter of {kind} is no sum of weight changes and cannot be computed with", where=str(folder), remedy="use LoRA or full weights")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        path, _, side = name.removeprefix(PREFIX).partition(".lora_")
        if side not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ConfigError(f"tensor {name} is no part of a LoRA of linear layers", where=str(folder), remedy="train without extra modules or biases")
        found.setdefault(path, {})[side[0]] = tensor.float()
    return {f"{path}.weight": Delta(pair["A"], pair["B"] * _scale(config, path)) for path, pair in sorted(found.items())}


def _scale(config: dict[str, Any], path: str) -> float:
    def of(pattern: dict[str, Any], default: Any) -> Any:
        return next((v for k, v in (pattern or {}).items() if path == k or path.endswith("." + k)), default)

    rank, alpha = of(config.get("rank_pattern"), config["r"]), of(config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def write(folder: Path, deltas: Deltas, facts: Mapping[str, Any], base: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Write an adapter folder: a LoRA where every change is of low rank (smaller ranks are filled up with zeros), whole weights otherwise.

    facts: those of an adapter that went into it; base, tokenizer, chat template and type are taken over.
    """
    import torch
    from safetensors.torch import save_file

    from ftpipe.train.adapt.lora import Lora

    folder.mkdir(parents=True, exist_ok=True)
    if all(d.low_rank for d in deltas.values()):
        rank = max(d.a.shape[0] for d in deltas.values())
        tensors = {}
        for name, d in sorted(deltas.items()):
            short = rank - d.a.shape[0]
            path = PREFIX + name.removesuffix(".weight")
            tensors[f"{path}.lora_A.weight"] = torch.cat([d.a, d.a.new_zeros(short, d.a.shape[1])]).contiguous()
            tensors[f"{path}.lora_B.weight"] = torch.cat([d.b, d.b.new_zeros(d.b.shape[0], short)], dim=1).contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        modules = sorted(n.removesuffix(".weight") for n in deltas)
        lora = Lora(r=rank, alpha=rank, target_modules=modules)
        config = lora.config().to_dict() | {"base_model_name_or_path": facts["base"].get("model"), "inference_mode": True}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")
        method: dict[str, Any] = lora.dump()
        count = sum(t.numel() for t in tensors.values())
    elif facts.get("quantize"):
        raise ConfigError("the result is no longer of low rank, and whole weights have no place in a quantised base",
                          remedy="use a method that keeps the rank low, or train on the base as it is")
    else:
        weights = base()
        dtype = getattr(torch, facts.get("dtype", "float32"))
        whole = {n: (weights[n] + d.dense()).to(dtype).contiguous() for n, d in sorted(deltas.items())}
        save_file(whole, folder / FULL, metadata={"format": "pt"})
        method, count = {"full": {}}, sum(t.numel() for t in whole.values())
    kept = {k: facts[k] for k in ("base", "tokenizer", "chat_template", "dtype", "quantize") if k in facts}
    (folder / FACTS).write_text(json.dumps(kept | {"method": method, "trainable": count}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_weights(model: str, env: Environment, facts: Mapping[str, Any] | None = None) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that loads the base model's weights once, in float32 on the CPU, by parameter name. facts: those of the adapter; if it was trained on a
    quantised base, the weights are those that base stands for."""
    from functools import lru_cache

    @lru_cache
    def load() -> dict[str, torch.Tensor]:
        from ftpipe.models.loading import load_model, quantized_base

        loaded = quantized_base(model, env, facts or {})
        return dict((load_model(model, env, dtype="float32", device="cpu") if loaded is None else loaded).state_dict())

    return load


def probe(model: str, env: Environment, deltas: Deltas, dtype: Any, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write `probe.safetensors`: logits of the base model (see `base_weights` for `facts`) with the changes added to its weights, in `dtype`. It does not go
    through the adapter folder, so that whoever loads the folder and compares finds out if it does not hold what was computed."""
    import torch
    from safetensors.torch import save_file

    from ftpipe.evaluate.suites.general_text import OWN
    from ftpipe.models.loading import load_model, load_tokenizer, quantized_base

    tokenizer = load_tokenizer(model, env)
    lines = OWN.read_text(encoding="utf-8").splitlines()[:PROBE_ROWS]
    ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:PROBE_TOKENS] for line in lines])
    loaded = quantized_base(model, env, facts or {}, dtype=dtype)
    loaded = load_model(model, env, dtype=dtype, device="cpu") if loaded is None else loaded
    parameters = dict(loaded.named_parameters())
    with torch.inference_mode():
        for name, delta in deltas.items():
            parameters[name].copy_((parameters[name].float() + delta.dense()).to(parameters[name].dtype))
        logits = loaded(input_ids=ids, use_cache=False).logits[:, -1].float()
    save_file({"input_ids": ids, "logits": logits.contiguous()}, path)
