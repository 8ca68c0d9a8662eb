"""The scoring service on other machines: the model's files and shards of rendered rows go out, scores come back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.canonical import digest
from ftpipe.engines.base import Engine
from ftpipe.models.loading import TOKENIZER_FILES, DType, default_device
from ftpipe.models.locate import locate, weight_files
from ftpipe.models.service import ModelService, RowScore
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import numpy as np

    from ftpipe.data.render import Rendered

SHARD_TOKENS = 16_384
"""Tokens of a shard: what a lost worker costs, and a few batches of a GPU."""
MODEL, ADAPTER = "model", "adapter"
_open: dict[str, ModelService] = {}
"""The service that this worker has ready, by what it was opened with; one at a time."""


@dataclass(frozen=True)
class Opening:
    """How a worker opens the model. model: its folder, or its .gguf file. names: its files and the adapter's (below `adapter`), in the order in which they
    come along."""

    model: str
    names: tuple[str, ...]
    contents: str
    dtype: DType
    device: str
    threads: int
    max_length: int | None

    @property
    def key(self) -> str:
        return digest([self.model, list(self.names), self.contents, self.dtype, self.device, self.max_length])


def score_elsewhere(engine: Engine, rendered: Sequence[Rendered], *, model: str, env: Environment, adapter: Path | None, contents: str, dtype: DType,
                    max_length: int | None, loss: bool, embed: bool) -> Iterator[list[tuple[int, RowScore]]]:
    """`ModelService.score` by the workers of an engine: (index into `rendered`, score) of one shard after the other.

    A worker takes the device of this machine and its number of threads (or those of the engine's smallest machine), scores with the same service, and gets
    the model's files with its work, so that it needs neither a disk in common nor a network. On CPUs of one kind the scores are the same bits as here,
    since there a row does not depend on its neighbours; on GPUs, and between kinds of CPUs, they differ by rounding.

    Args:
        contents: a hash of the model and the adapter.
    """
    import torch

    device = default_device()
    threads = engine.threads(torch.get_num_threads())
    source = locate(model, env)
    # a GGUF file goes as it is: adapters know their base by its hash
    files = {f"{MODEL}/{p.relative_to(source.folder).as_posix()}": p for p in ([source.gguf] if source.gguf else _model_files(source.folder))}
    opened = next(iter(files)) if source.gguf else MODEL
    files |= {f"{ADAPTER}/{p.relative_to(adapter).as_posix()}": p for p in sorted(adapter.rglob("*")) if p.is_file()} if adapter else {}
    opening = Opening(opened, tuple(files), contents, dtype, device, threads, max_length)
    # the longest first: rows of like length go together, and no long shard is left for the end
    order = sorted(range(len(rendered)), key=lambda i: (-len(rendered[i].input_ids), i))
    shards = [[order[i] for i in shard] for shard in _shards([len(rendered[i].input_ids) for i in order])]
    work = ((opening, [rendered[i] for i in shard], loss, embed) for shard in shards)
    results = engine.map(score_shard, work, common=[_bytes(p) for p in files.values()], alone=True, threads=threads, gpu=device == "cuda")
    for shard, scores in zip(shards, results, strict=True):
        # copies: a view would hold the shard's memory in the engine's store
        yield [(i, s if s.embedding is None else replace(s, embedding=s.embedding.copy())) for i, s in zip(shard, scores, strict=True)]


def score_shard(work: tuple[Opening, list[Rendered], bool, bool], *files: np.ndarray) -> list[RowScore]:
    """Score some rows with the model that `files` hold; a worker opens it once."""
    opening, rendered, loss, embed = work
    if opening.key not in _open:
        _open.clear()
        _open[opening.key] = _opened(opening, files)
    return _open[opening.key].score(rendered, loss=loss, embed=embed)


def _opened(opening: Opening, files: Sequence[np.ndarray]) -> ModelService:
    import torch

    torch.set_num_threads(opening.threads)
    with tempfile.TemporaryDirectory(prefix="ftpipe-model-") as where:
        root = Path(where)
        for name, data in zip(opening.names, files, strict=True):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data.tofile(path)
        adapter = root / ADAPTER if (root / ADAPTER).exists() else None
        return ModelService.open(str(root / opening.model), Environment(root, root, ""), adapter=adapter, dtype=opening.dtype, device=opening.device,
                                 max_length=opening.max_length)


def _model_files(at: Path) -> list[Path]:
    """What transformers reads of a model's folder."""
    wanted = [*weight_files(at), *at.glob("*.json"), *at.glob("*.jinja"), *at.glob("additional_chat_templates/*.jinja"), *(at / n for n in TOKENIZER_FILES)]
    return sorted({p for p in wanted if p.is_file()})


def _bytes(path: Path) -> Any:
    """A file as an array that is read where it is needed, and not copied here."""
    import numpy as np

    return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)


def _shards(lengths: list[int]) -> Iterator[list[int]]:
    """Places of rows that go together, by their numbers of tokens."""
    shard, tokens = [], 0
    for i, length in enumerate(lengths):
        if shard and tokens + length > SHARD_TOKENS:
            yield shard
            shard, tokens = [], 0
        shard.append(i)
        tokens += length
    if shard:
        yield shard
