"""A Ray cluster."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.engines.base import Engine
from ftpipe.errors import ConfigError, FtpipeError, InfrastructureError

CHUNK = 8
"""Small items that travel together."""
LIBRARIES = ("numpy", "pyarrow", "torch", "transformers", "tokenizers", "peft", "gguf")
"""Libraries that a piece of work may use, and that must be the same everywhere for results to be."""
LOCAL = "local"


class Ray(Engine):
    """Work is sent to a Ray cluster in shards and put together in order. A shard whose worker or machine is lost is done again elsewhere.

    Data travels through Ray's object store: nodes need no common disk, but the same ftpipe, Python and libraries, which each worker proves before it works.
    The steps themselves, their files and the artifacts stay on the machine that started them.
    """

    needs: ClassVar[tuple[str, ...]] = ("ray",)
    spreads: ClassVar[bool] = True

    address: str = Field(default="auto", min_length=1, description="`auto` is the cluster that runs on this machine or that RAY_ADDRESS names, HOST:PORT or "
                         "ray://HOST:PORT another one; `local` starts one of this machine's processors for the life of the process.")
    retries: int = Field(default=3, ge=0, description="How often a shard is done again whose worker or machine was lost.")

    def check(self) -> None:
        if find_spec("ray") is None:
            raise ConfigError("engine is ray, but Ray is not installed", remedy="pip install 'ftpipe[ray]', or leave `engine` out")
        if self.address != LOCAL:
            self._connected()

    def threads(self, wanted: int) -> int:
        """No more than the smallest machine has, or it would get no work."""
        ray = self._connected()
        return max(1, min([wanted, *(int(cpus) for node in ray.nodes() if node["Alive"] and (cpus := node["Resources"].get("CPU", 0)) >= 1)]))

    def map(self, work: Callable[..., Any], items: Iterable[Any], *, common: Sequence[Any] = (), alone: bool = False, threads: int = 1,
            gpu: bool = False) -> Iterator[Any]:
        ray = self._connected()
        threads = self.threads(threads)
        task = ray.remote(max_retries=self.retries, num_cpus=threads, num_gpus=1 if gpu else 0)(_shard)
        shared = [ray.put(value) for value in common]
        room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        items, waiting = iter(items), deque()
        try:
            while chunk := list(islice(items, 1 if alone else CHUNK)):
                waiting.append(task.remote(_surroundings(), work, chunk, *shared))
                if len(waiting) > room:
                    yield from self._result(waiting.popleft())
            while waiting:
                yield from self._result(waiting.popleft())
        finally:
            for shard in waiting:
                ray.cancel(shard)

    def _result(self, shard: Any) -> list[Any]:
        """What a shard gave. An error of the work itself is raised as it was there."""
        import ray

        try:
            return ray.get(shard)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FtpipeError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise InfrastructureError(f"a shard was lost with its worker {self.retries + 1} times: {_first_line(error)}", where=f"Ray at {self.address}",
                                      remedy="look for memory that ran out on the nodes (`ray status`, `ray logs`), then run again") from error

    def _connected(self) -> Any:
        """The module, connected to the cluster; what is connected already stays so."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        if ray.is_initialized():
            return ray
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self.address == LOCAL:
            quiet |= {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self.address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise InfrastructureError(f"no Ray cluster can be reached: {_first_line(error)}", where=f"engine: ray at {self.address}",
                                      remedy="start one (`ray start --head`), correct `address`, or leave `engine` out") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray puts its own in its place, and a run must end its ranks when it is told to stop
        return ray


def _shard(expected: dict[str, str], work: Callable[..., Any], chunk: list[Any], *common: Any) -> list[Any]:
    """What a worker does: some items, one after the other."""
    found = _surroundings()
    if found != expected:
        name = next(k for k in expected if found[k] != expected[k])
        raise ConfigError(f"this node has {name} {found[name]}, and the machine that started the run {expected[name]}", where=f"Ray node {platform.node()}",
                          remedy="install the same ftpipe and libraries on all nodes; results must not depend on where they are computed")
    return [work(item, *common) for item in chunk]


@lru_cache
def _surroundings() -> dict[str, str]:
    """What must be the same on all machines: ftpipe's code, Python, and libraries."""
    import ftpipe

    package, code = Path(ftpipe.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"ftpipe (code)": code.hexdigest()[:12], "Python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
