"""`ftpipe doctor`: is everything there, and what to do where it is not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app

OK, NOTE, BAD = "ok", "note", "bad"
Finding = tuple[str, str, str, str]
"""State, what was looked at, what was found, what to do."""
FREE_GB = 5


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A pipeline to check too: settings, model, servers.", show_default=False)] = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:
    """Check the installation, versions, devices, DeepSpeed, servers and the workspace; say how to mend what is wrong. Exit status 1 if something is."""
    findings: list[Finding] = []
    for check in (_python, _packages, _devices, _distributed, _prefect, lambda: _workspace(workspace), lambda: _config(config)):
        findings += _safely(check)
    if as_json:
        typer.echo(json.dumps([dict(zip(("state", "what", "found", "remedy"), f)) for f in findings], indent=1))
    else:
        from ftpipe.cli._console import console

        for state, what, found, remedy in findings:
            mark = {OK: "[green]✓[/green]", NOTE: "[yellow]·[/yellow]", BAD: "[red]✗[/red]"}[state]
            console.print(f"{mark} [bold]{what}[/bold]  {found}", highlight=False)
            if remedy and state != OK:
                console.print(f"    -> {remedy}", markup=False, highlight=False)
    if any(f[0] == BAD for f in findings):
        raise typer.Exit(1)


def _safely(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    from ftpipe.errors import FtpipeError

    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)
    except FtpipeError as error:
        found.append((BAD, error.where or "ftpipe", error.what, error.remedy or ""))
    except Exception as error:
        found.append((BAD, getattr(check, "__name__", "check").strip("_"), f"{type(error).__name__}: {error}", "install ftpipe's locked dependencies again"))
    return found


def _python() -> Iterator[Finding]:
    import platform

    good = sys.version_info >= (3, 11)
    yield OK if good else BAD, "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", "use Python 3.11 or newer"


def _packages() -> Iterator[Finding]:
    """Every requirement of the package against what is installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    wrong = 0
    listed = [Requirement(r) for r in requires("ftpipe") or []]
    for requirement in listed:
        extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not extra:
                wrong += 1
                yield BAD, requirement.name, "is not installed", f"pip install '{requirement.name}{requirement.specifier}'"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong += not extra
            yield NOTE if extra else BAD, requirement.name, f"{found} is installed, {requirement.specifier} is needed", \
                f"pip install '{requirement.name}{requirement.specifier}'"
    if not wrong:
        yield OK, "packages", f"{len(listed)} requirements are met", ""


def _devices() -> Iterator[Finding]:
    import torch

    from ftpipe.train.launch import cores

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            yield OK, f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free", ""
        if not torch.cuda.is_bf16_supported():
            yield NOTE, "bfloat16", "this GPU computes it slowly", "set dtype: float32 in train stages"
    else:
        built = torch.version.cuda
        yield NOTE if built else OK, "devices", f"no GPU; {cores()} processors" + (f", though torch is built for CUDA {built}" if built else ""), \
            "look at nvidia-smi: the driver may be missing or too old for this torch"
        from ftpipe.models.kernels import native

        compiled = native.load(torch.bfloat16)
        products = compiled and native.products(torch.ones(2, dtype=torch.bfloat16)) is not None
        found = f"for training and scoring on a processor, {'with' if products else 'without'} matrix products of bfloat16" if compiled else \
            "none: training and scoring take up to half as long again"
        yield OK if compiled else NOTE, "compiled functions", found, \
            f"install a C compiler with OpenMP, such as gcc, or set CC to it; unset {native.SWITCH} if it is 0"
    yield OK, "torch", f"{torch.__version__}, {torch.get_num_threads()} threads", ""


def _distributed() -> Iterator[Finding]:
    """DeepSpeed can be imported, and ranks can meet."""
    import torch.distributed as dist

    from ftpipe.train.setup import import_deepspeed

    deepspeed = import_deepspeed("cpu")
    yield OK, "DeepSpeed", deepspeed.__version__, ""
    backends = [b for b, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    yield OK if backends else BAD, "backends", ", ".join(backends) or "none", "install a torch with distributed support"


def _prefect() -> Iterator[Finding]:
    from flows.server import check, configured
    from ftpipe.secrets import hide

    url = configured()
    if url is None:
        database = os.environ.get("PREFECT_SERVER_DATABASE_CONNECTION_URL") or os.environ.get("PREFECT_API_DATABASE_CONNECTION_URL") or ""
        yield OK, "Prefect", "no server is configured; each run brings one of its own" + (f", on {hide(database)}" if database else ""), ""
        return
    check(url)
    yield OK, "Prefect", f"{url} answers", ""


def _workspace(workspace: Any) -> Iterator[Finding]:
    """It can be written, locked, and has room."""
    import shutil
    import tempfile

    from filelock import FileLock

    parent = next(p for p in (workspace.absolute(), *workspace.absolute().parents) if p.is_dir())
    with tempfile.TemporaryDirectory(prefix=".ftpipe-doctor-", dir=parent) as folder, FileLock(f"{folder}/lock", timeout=5):
        pass
    free = shutil.disk_usage(parent).free / 1e9
    yield OK if free >= FREE_GB else NOTE, "workspace", f"{workspace}: can be written and locked, {free:.0f} GB free", \
        f"less than {FREE_GB} GB is little for checkpoints; `ftpipe gc` shows what can go"


def _config(config: str | None) -> Iterator[Finding]:
    if config is None:
        return
    from ftpipe.pipeline import spec
    from ftpipe.pipeline.plan import plan
    from ftpipe.pipeline.store import Store
    from ftpipe.secrets import hide

    pipeline = spec.load(config)
    pipeline.check()
    plan(pipeline, Store(pipeline.env.workspace))  # looks for every source and model
    yield OK, config, f"{len(pipeline.stages)} stages; settings, model and sources are in order", ""
    for what, uri in (("tracking", pipeline.env.tracking_uri), ("registry", pipeline.env.registry_uri)):
        if uri and uri.startswith("http"):
            import httpx

            try:
                good = httpx.get(f"{uri.rstrip('/')}/health", timeout=10).status_code == 200
            except httpx.HTTPError:
                good = False
            yield OK if good else BAD, f"MLflow ({what})", f"{hide(uri)} {'answers' if good else 'does not answer'}", \
                f"start it, or correct `{what}` in {config}"
        elif uri and uri.startswith("postgresql"):
            yield _database(f"MLflow ({what})", uri, f"start it, or correct `{what}` in {config}")


def _database(what: str, uri: str, remedy: str) -> Finding:
    """Whether a PostgreSQL database can be connected to."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    from ftpipe.secrets import hide

    try:
        with create_engine(uri, connect_args={"connect_timeout": 10}).connect():
            return OK, what, f"{hide(uri)} answers", ""
    except SQLAlchemyError as error:
        return BAD, what, f"{hide(uri)} does not answer: {hide(str(error)).strip().splitlines()[0]}", remedy
