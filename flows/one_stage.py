"""One stage alone, on the inputs that are there already."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.data_to_model import go_through, name_of_run
from flows.settle import settle


@flow(name="one-stage", flow_run_name=name_of_run, persist_result=False, on_completion=[settle], on_failure=[settle])
def one_stage(config: str, stage: str, force: bool = False, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run one stage of a pipeline; what it reads must be up to date. Arguments and result as for `data_to_model`."""
    return go_through(config, only=stage, start=None, to=None, force=[stage] if force else [], overrides=overrides)
