"""Checkpoints: what a run needs to go on as if it had never stopped. Safetensors and JSON, written beside and renamed into place.

    step-00000120/
      parameters.safetensors   what trains or has trained (float32 masters), by name
      optimizer.safetensors    optimizer state, `<parameter>/<key>`
      memory.safetensors       tensors of `Run.memory`
      state.json               steps done, what trains now, numbers of the optimizer and of `Run.memory`, metrics so far

All is held whole, by name, whatever the ZeRO stage and the number of ranks, so that either may change between stop and resume. There is no random state
to keep: every step and micro-batch seeds its own from (seed, step), and the order of the rows is a function of (seed, epoch).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ArtifactError

if TYPE_CHECKING:
    import torch

FORMAT = 1


@dataclass
class Checkpoint:
    """The state after `step` steps."""

    step: int
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, Any]]
    trainable: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove older ones. Returns its folder. A kill at any moment leaves the older or the new one whole."""
    import torch
    from safetensors.torch import save_file

    name = f"step-{checkpoint.step:08d}"
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"{n}/{k}": v for n, state in checkpoint.optimizer.items() for k, v in state.items() if torch.is_tensor(v)}
    numbers = {n: {k: v for k, v in state.items() if not torch.is_tensor(v)} for n, state in checkpoint.optimizer.items()}
    memory = {k: v for k, v in checkpoint.memory.items() if torch.is_tensor(v)}
    for file, content in (("parameters", checkpoint.parameters), ("optimizer", tensors), ("memory", memory)):
        # clone(): parameters may share memory (tied weights), which safetensors refuses
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in content.items()}, temporary / f"{file}.safetensors")
    state = {"format": FORMAT, "step": checkpoint.step, "optimizer": numbers, "trainable": checkpoint.trainable, "metrics": checkpoint.metrics,
             "memory": {k: v for k, v in checkpoint.memory.items() if k not in memory}}
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for path in temporary.iterdir():
        with path.open("rb") as f:
            os.fsync(f.fileno())
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    for old in found(folder):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None. Raises ArtifactError if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folders = found(folder)
    if not folders:
        return None
    where = folders[-1]
    try:
        state = json.loads((where / "state.json").read_text(encoding="utf-8"))
        optimizer: dict[str, dict[str, Any]] = {n: dict(s) for n, s in state["optimizer"].items()}
        for name, tensor in load_file(where / "optimizer.safetensors").items():
            parameter, _, key = name.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = tensor
        return Checkpoint(state["step"], load_file(where / "parameters.safetensors"), optimizer, state["trainable"],
                          state["memory"] | load_file(where / "memory.safetensors"), state["metrics"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"the checkpoint cannot be read: {error}", where=str(where), remedy="remove it; training then starts anew") from error
