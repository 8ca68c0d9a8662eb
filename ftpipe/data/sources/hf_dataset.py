"""A Hugging Face dataset: by hub id, or a folder of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from ftpipe.data.sources.base import Record, Source
from ftpipe.errors import ConfigError, DataError, InfrastructureError, nearest
from ftpipe.stages.base import Environment

COMMIT = re.compile(r"[0-9a-f]{40}")


class HfDataset(Source):
    """Rows of a dataset of the Hugging Face hub, or of a local folder (data files, or what `save_to_disk` wrote), through `datasets`.

    A dataset that needs its own code to load is refused by `datasets`, and that is not worked around.
    """

    libraries = ("datasets",)

    path: str = Field(min_length=1, description="Hub id such as org/name, or a folder relative to the configuration.")
    config: str | None = Field(default=None, description="Configuration (subset) of the dataset.")
    split: str = Field(default="train", description="Split to read; a slice such as train[:1000] works too.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub dataset; a full commit needs no network to plan.")

    def identity(self, env: Environment) -> dict[str, str]:
        folder = self._folder(env)
        if folder is None:
            return {self.path: self._commit()}
        from ftpipe.models.hashes import cached_digest

        files = sorted(p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts))
        if not any(p.stat().st_size for p in files):
            raise DataError("the folder holds no data", where=str(folder), remedy="check the path, or name files with the source that reads them")
        return {f"{self.path}/{p.relative_to(folder).as_posix()}": cached_digest(p, env.cache) for p in files}

    def records(self, env: Environment) -> Iterator[Record]:
        name = f"{self.path}{':' + self.config if self.config else ''}@{self.split}"
        rows = iter(self._load(env))
        line = 0
        while True:
            try:
                raw = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever the reader of this dataset's files raises; the iterator is of no use after it
                raise DataError(f"the dataset cannot be read after row {line}: {_first_line(error)}", where=name) from error
            line += 1
            yield Record(name, line, raw=dict(raw))

    def _load(self, env: Environment) -> Any:
        import datasets

        folder = self._folder(env)
        try:
            if folder is not None and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
                return self._saved(datasets.load_from_disk(str(folder)))
            # Slices need the Arrow form. A folder is streamed from its files; the hub's files go through its cache, which also serves offline.
            streaming = folder is not None and "[" not in self.split
            return datasets.load_dataset(str(folder or self.path), name=self.config, split=self.split, streaming=streaming,
                                         revision=None if folder else self._commit(), cache_dir=str(env.cache / "datasets"))
        except (ConnectionError, TimeoutError) as error:
            raise InfrastructureError(f"dataset {self.path} could not be fetched: {_first_line(error)}") from error
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise DataError(f"dataset {self.path} cannot be loaded: {_first_line(error)}", remedy="check `config`, `split` and `revision`") from error

    def _saved(self, found: Any) -> Any:
        import datasets

        if isinstance(found, datasets.DatasetDict):
            if self.split not in found:
                raise ConfigError(f"there is no split {self.split!r}", where=self.path, remedy=nearest(self.split, found))
            return found[self.split]
        return found

    def _folder(self, env: Environment) -> Path | None:
        """The local folder that `path` names, None for a hub id."""
        folder = env.path(self.path)
        if folder.is_dir():
            return folder
        if folder.exists() or self.path.startswith((".", "/", "~")) or self.path.count("/") > 1:
            raise ConfigError(f"{self.path!r} is no folder", where=str(folder), remedy="name a folder or a hub id; a single file has a source of its own")
        return None

    def _commit(self) -> str:
        """The commit of the hub dataset, asked of the hub, or of the local cache where the hub cannot be reached."""
        if self.revision and COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

        try:
            return str(HfApi().dataset_info(self.path, revision=self.revision, timeout=10).sha)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ConfigError(f"the hub has no dataset {self.path!r}{f' at {self.revision}' if self.revision else ''}",
                              remedy="check the spelling, and log in with `hf auth login` if it is private") from error
        except (HTTPError, OfflineModeIsEnabled, OSError) as error:
            ref = Path(constants.HF_HUB_CACHE) / f"datasets--{self.path.replace('/', '--')}" / "refs" / (self.revision or "main")
            if ref.is_file():
                return ref.read_text(encoding="utf-8").strip()
            raise ConfigError(f"dataset {self.path!r} is neither a folder nor in the hub's local cache, and the hub cannot be reached",
                              remedy="check the path or the network, or give a full commit as `revision`") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
