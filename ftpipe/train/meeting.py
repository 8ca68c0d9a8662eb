"""Several machines train together: the one that runs the pipeline says what there is to do, others that wait for work come.

    <workspace>/nodes/<stage>.json     an offer: where to come, how many ranks each is to start, which versions everybody must have
    <start>/join-<id>.json             a node that came: its name and address; <start>/refused-<id>.json: one that cannot, and why
    <start>/job.json                   the job, once it is settled who takes part; a node stops its ranks when it is gone

The workspace is the same folder on all of them. Whether a node can be reached is tried before it counts as come: it connects to the address and
port where the first rank will listen, which is how the ranks find each other (torch's TCP store).
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ftpipe.errors import ConfigError, InfrastructureError

POLL = 0.2
LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
FOLDER = "nodes"


class Nodes(BaseModel):
    """Settings of a training on several machines."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(ge=2, description="Machines that train together, this one among them. On each of the others `ftpipe node` waits for work.")
    least: int | None = Field(default=None, ge=1, description="Go on with as few machines as this, from the last checkpoint, when others do not come or "
                              "are lost; without it the training then fails.")
    join: float = Field(default=600, gt=0, description="Seconds to wait for the other machines.")
    silence: float = Field(default=60, gt=0, description="Seconds after which a machine that is not heard of counts as lost.")
    address: str = Field(default="", pattern=r"^[A-Za-z0-9.:_-]*$", description="Name or address under which the others reach this machine; its host name if "
                         "not set.")
    port: int = Field(default=0, ge=0, le=65535, description="TCP port at which the ranks meet; a free one if not set. Connections between ranks use "
                      "further ports.")


def interface(address: str) -> str:
    """Name of the network interface that has an address, for gloo and NCCL, which must not guess. Empty if none has it."""
    import psutil

    return next((name for name, found in psutil.net_if_addrs().items() for a in found if a.address.partition("%")[0] == address), "")


def versions() -> dict[str, str]:
    """What must be alike on all machines of a training."""
    from importlib.metadata import version

    from ftpipe import __version__

    return {"ftpipe": __version__, "python": platform.python_version(), **{name: version(name).partition("+")[0] for name in LIBRARIES}}


def here(nodes: Nodes) -> str:
    """The address under which others reach this machine."""
    name = nodes.address or socket.gethostname()
    remedy = "set `nodes: {address: ...}` to the name or address under which the other machines reach this one"
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError(f"{name!r} has no address: {error}", where="nodes", remedy=remedy) from error
    if not nodes.address and (found.startswith("127.") or found == "::1"):
        raise ConfigError(f"the host name {name} stands for {found}, at which no other machine reaches this one", where="nodes", remedy=remedy)
    return str(found)


@contextmanager
def offered(nodes: Nodes, folder: Path, workspace: Path, name: str, **wanted: Any) -> Iterator[dict[str, Any]]:
    """Offer work to nodes, for the length of the block, while the port is kept and connections to it are let in. Yields the offer.

    Args:
        folder: of this start. name: of the offer. wanted: what each node has to know: ranks, device, share_devices.
    """
    address = here(nodes)
    offers = workspace / FOLDER
    offers.mkdir(parents=True, exist_ok=True)
    path = offers / f"{name}.json"
    try:
        door = socket.create_server(("", nodes.port), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=2 * nodes.count)
    except OSError as error:
        raise InfrastructureError(f"port {nodes.port} cannot be used: {error.strerror}", where="nodes", remedy="set another `nodes: {port: ...}`") from error
    with door:
        offer = {"folder": str(folder), "workspace": str(workspace), "address": address, "port": door.getsockname()[1],
                 "join": nodes.join, "versions": versions(), **wanted}
        try:
            write(path, offer)
            yield offer
        finally:
            path.unlink(missing_ok=True)


def gathered(nodes: Nodes, folder: Path, log: Callable[[str], None]) -> list[dict[str, str]]:
    """Wait for nodes; returns those that came, in the order of their names, without this machine. Raises InfrastructureError if there are too few."""
    began, said = time.monotonic(), False
    while True:
        found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("join-*.json"))]
        if len(found) >= nodes.count - 1:
            return found[:nodes.count - 1]
        waited = time.monotonic() - began
        if waited > nodes.join:
            break
        if not said and waited > 2:
            said = True
            log(f"waiting up to {nodes.join:g} s for {nodes.count - 1} other machines, on which `ftpipe node` runs in this workspace")
        time.sleep(POLL)
    refused = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("refused-*.json"))]
    came = f"{1 + len(found)} of {nodes.count} machines came within {nodes.join:g} s" + "".join(f"; {r['name']} refused: {r['reason']}" for r in refused)
    if 1 + len(found) < (nodes.least or nodes.count):
        raise InfrastructureError(came, where="nodes", remedy="start `ftpipe node` with this workspace on the others, and see what it says; `least` goes on "
                                  "with fewer")
    log(f"{came}; going on with them")
    return found


def named(node: dict[str, str]) -> str:
    return f"{node['name']} ({node['address']})"


def write(path: Path, value: Any) -> None:
    """Write JSON so that readers see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


def share(place: int, ranks: int) -> Sequence[int]:
    """The ranks of the node at this place; the machine that runs the pipeline is at place 0."""
    return range(place * ranks, (place + 1) * ranks)
