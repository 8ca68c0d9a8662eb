"""An adapter behind OpenAI's protocol, by a server that is installed: vLLM, or the one that comes with transformers. ftpipe has none of its own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ftpipe.canonical import digest
from ftpipe.errors import ConfigError, InfrastructureError
from ftpipe.stages.base import Environment

TRANSFORMERS = ("fastapi", "uvicorn", "openai")
"""What `transformers serve` imports beside transformers."""
REMEDY = "`pip install 'ftpipe[endpoint]'` for the server of transformers, or install vLLM"
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
         "PYTHONSAFEPATH": "1"}
"""The server has its model in a folder and asks nobody for anything. It is started in that folder's parent, which is no place to import from."""


def _vllm() -> list[str] | None:
    beside = str(Path(sys.executable).parent)
    found = shutil.which("vllm", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    return [found] if found else None


def _transformers() -> list[str] | None:
    return [sys.executable, "-m", "transformers.cli.transformers"] if all(find_spec(name) for name in TRANSFORMERS) else None


SERVERS: Mapping[str, tuple[Callable[[], list[str] | None], Callable[[str], list[str]]]] = {
    "vllm": (_vllm, lambda name: ["--served-model-name", name]),
    "transformers": (_transformers, lambda name: []),
}
"""The servers in the order in which they are chosen: how each is started if it is installed, and what else it is told about its model's name."""


def command(name: str, host: str, port: int, *, server: str = "auto", more: Sequence[str] = ()) -> list[str]:
    """The argument list that serves the model in the folder `name` of the working folder, under that name.

    Raises ConfigError if the server (`auto`: none of those known) is not installed.
    """
    for known, (find, naming) in SERVERS.items():
        if server in ("auto", known) and (start := find()):
            return [*start, "serve", name, "--host", host, "--port", str(port), *naming(name), *more]
    wanted = "no server that speaks OpenAI's protocol" if server == "auto" else f"the server {server}"
    raise ConfigError(f"{wanted} is {'' if server == 'auto' else 'not '}installed", remedy=REMEDY)


def free(host: str, port: int) -> None:
    """Raises InfrastructureError if nothing can listen there."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise InfrastructureError(f"port {port} of {host} cannot be listened at: {error.strerror or error}", remedy="name another one: --port 8001") from error


def prepared(name: str, model: str, env: Environment, adapter: Path, *, base: Literal["trained", "original"] = "trained",
             dtype: Literal["bfloat16", "float32"] = "bfloat16") -> Path:
    """The merged model in a folder of the workspace's cache, called like the adapter; made once for each adapter, base and type."""
    from filelock import FileLock

    from ftpipe.models.export import export_merged
    from ftpipe.models.hashes import cached_digest
    from ftpipe.models.loading import identity

    files = {p.relative_to(adapter).as_posix(): cached_digest(p, env.cache) for p in sorted(adapter.rglob("*")) if p.is_file()}
    key = digest({"adapter": files, "model": identity(model, env), "base": base, "dtype": dtype})[:16]
    # What clients call the model by is this name, and the servers read meaning into ':' and '@'.
    out = env.cache / "endpoints" / key / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "adapter")
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out.parent}.lock"):
        return out if out.is_dir() else export_merged(model, env, adapter, out, base=base, dtype=dtype)


def become(argv: Sequence[str], folder: Path) -> None:
    """Replace this process with the server, started in `folder`. Ctrl-C then reaches the server itself, and nothing is left to outlive it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(folder)
    os.execvpe(argv[0], list(argv), os.environ | QUIET)
