"""Checks of an adapter folder against the base model it is to be put on."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ArtifactError

if TYPE_CHECKING:
    import torch

MANIFEST = "ftpipe_adapter.json"
INERT = {".safetensors", ".json", ".md"}
"""Kinds of files an adapter may hold. None of them can run code when it is read."""
PEFT_PREFIX = "base_model.model."
log = logging.getLogger("ftpipe")


def read_manifest(folder: Path) -> dict[str, Any]:
    """`ftpipe_adapter.json` of an adapter folder. Raises ArtifactError if it is missing, unreadable or lacks a field."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = [k for k in ("method", "base") if not isinstance(manifest.get(k), dict)]
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the adapter has no readable {MANIFEST}: {error}", where=str(folder), remedy="name a folder that a train stage wrote") from error
    if missing:
        raise ArtifactError(f"{MANIFEST} lacks {', '.join(missing)}", where=str(path))
    return manifest


@contextmanager
def plain(folder: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> Iterator[Path]:
    """The adapter as a training method writes it: the folder itself or, for one that was packed (slot `compress`), its unpacked form in a temporary folder.

    base: gives the base model's weights by name, float32; called only where the packed form needs them.
    """
    packed = read_manifest(folder).get("packed")
    if packed is None:
        yield Path(folder)
        return
    from ftpipe import slots

    with tempfile.TemporaryDirectory(prefix="ftpipe-") as temporary:
        out = Path(temporary) / "adapter"
        slots.parse("compress", packed["method"]).expand(Path(folder), out, base)  # type: ignore[attr-defined]
        yield out


def checked(folder: Path, base: Mapping[str, str], model: torch.nn.Module, *, allow_zero: bool = False) -> dict[str, Any]:
    """The adapter's manifest, after these checks; each failure is an ArtifactError.

    Only safetensors, JSON and Markdown files; made for this base (hashes of weights and config); every tensor finite; every tensor whose name points into
    the base names a module or parameter that exists there and fits its shape; not a change of nothing at all (unless `allow_zero`).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    foreign = sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in INERT)
    if foreign:
        raise ArtifactError(f"an adapter holds only safetensors and JSON, this one has {', '.join(foreign[:5])}", where=str(folder),
                            remedy="remove them if you know them; pickle files can run code and are never read")
    _same_base(manifest, base, folder)
    _tensors(folder, model, allow_zero=allow_zero or manifest.get("zero_delta") is True)
    return manifest


def _same_base(manifest: dict[str, Any], base: Mapping[str, str], folder: Path) -> None:
    made_for = manifest["base"]
    different = [k for k in ("weights", "config") if made_for.get(k) != base[k]]
    if different:
        def named(i: Mapping[str, str]) -> str:
            return f"{i.get('model', '?')} ({', '.join(f'{k} {str(i.get(k))[:12]}' for k in different)})"
        raise ArtifactError(f"the adapter was trained on {named(made_for)}, the base given is {named(base)}", where=str(folder),
                            remedy="load it on the base it was trained on, or train it again on this one")
    for part in ("tokenizer", "chat_template"):
        if made_for.get(part, base[part]) != base[part]:
            log.warning("%s: the adapter was trained with another %s than the base now has; answers may differ", folder, part)


def _tensors(folder: Path, model: torch.nn.Module, *, allow_zero: bool) -> None:
    from safetensors import SafetensorError, safe_open

    from ftpipe.models.sparse import is_part
    from ftpipe.models.sparse import read as parts_of
    from ftpipe.models.weights import Tensors

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError("the adapter has no safetensors file", where=str(folder))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    change: dict[str, bool] = {}
    sparse: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    tensor = f.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise ArtifactError(f"tensor {name} holds values that are not finite", where=str(file),
                                            remedy="the training diverged: lower its learning rate")
                    if is_part(name):
                        sparse[name] = file
                        continue
                    _fits(name, tensor, parameters, modules, file)
                    change[name] = bool((tensor != parameters[name].to(tensor.device, tensor.dtype)).any()) if name in parameters else bool(tensor.any())
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"cannot be read as safetensors: {error}", where=str(file)) from error
    for name, part in parts_of(Tensors(sparse), str(folder)):
        why = part.misfit(tuple(parameters[name].shape)) if name in parameters else "it has none of that name"
        if why:
            raise _misfit(name, part.value, why, folder)
        change[name] = part.changes(parameters[name])
    if not any(_effects(change)) and not allow_zero:
        raise ArtifactError("the adapter changes nothing: its delta is all zero", where=str(folder),
                            remedy="check the learning rate and that tokens were trained on")


def _effects(change: Mapping[str, bool]) -> list[bool]:
    """For each part of the model whether it is changed, from which tensors hold anything. The change of a LoRA is a product (B A, AdaLoRA's B E A), so it
    is nothing as soon as one factor is."""
    factors: dict[str, bool] = {}
    for name, holds in change.items():
        target, _, kind = name.partition(".lora_")
        if kind and not kind.endswith("bias"):
            factors[target] = factors.get(target, True) and holds
        else:
            factors[name] = holds
    return list(factors.values())


def _misfit(name: str, tensor: torch.Tensor, why: str, file: Path) -> ArtifactError:
    return ArtifactError(f"tensor {name} {list(tensor.shape)} does not fit the base: {why}", where=str(file), remedy="load it on the base it was trained on")


def _fits(name: str, tensor: torch.Tensor, parameters: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module], file: Path) -> None:
    def fail(why: str) -> ArtifactError:
        return _misfit(name, tensor, why, file)

    if name in parameters:
        if tensor.shape != parameters[name].shape:
            raise fail(f"the base has {list(parameters[name].shape)} there")
        return
    if not name.startswith(PEFT_PREFIX):
        return  # a network of the method's own; its `load` knows what belongs there
    path = name[len(PEFT_PREFIX):]
    if path in parameters:
        if tensor.shape != parameters[path].shape:
            raise fail(f"the base has {list(parameters[path].shape)} there")
        return
    target, _, kind = path.partition(".lora_")
    if not kind:
        return
    if target not in modules:
        raise fail(f"it has no module {target}")
    weight = getattr(modules[target], "weight", None)
    # a quantised layer's weight may be packed; it says itself how many outputs and inputs it has
    shape = [getattr(modules[target], n, None) for n in ("out_features", "in_features")]
    if None in shape:
        shape = [] if weight is None else list(weight.shape)
    if len(shape) != 2:
        return
    # A is rank x inputs, B is outputs x rank; an embedding's pair is transposed
    sizes = {"A.": (1, shape[1]), "B.": (0, shape[0]), "embedding_A": (1, shape[0]), "embedding_B": (0, shape[1])}
    for prefix, (axis, size) in sizes.items():
        if kind.startswith(prefix) and tensor.dim() == 2 and tensor.shape[axis] != size:
            raise fail(f"the module's weight is {shape}")
