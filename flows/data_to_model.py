"""The main flow: every stage of a pipeline in order, each as a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_client, get_run_logger, runtime
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Completed

from flows import notify
from flows.logs import to_prefect
from flows.server import flush
from flows.session import Session, current
from flows.settle import settle
from flows.signals import stop_with_parent, undisturbed_interrupt
from flows.stale import labels
from flows.summary import page, sentence, summary
from ftpipe.pipeline import spec
from ftpipe.pipeline.runner import Run, Selection
from ftpipe.tracking import Listeners, MlflowListener
from tasks.progress import ProgressArtifacts
from tasks.publish import markdown
from tasks.stage import execute


def name_of_run() -> str:
    """The flow run's name until the run has one of its own."""
    return Path(runtime.flow_run.parameters["config"]).stem


@flow(name="data-to-model", flow_run_name=name_of_run, persist_result=False, on_completion=[settle], on_failure=[settle])
def data_to_model(config: str, only: str | None = None, start: str | None = None, to: str | None = None, force: list[str] | None = None,
                  overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Bring a pipeline up to date: from raw rows to a registered adapter and its report.

    Args:
        config: path of the pipeline file on the machine that runs the flow.
        only: run this stage alone. start: begin at this stage. to: end with this stage.
        force: stages to run even if nothing changed, or `all`.
        overrides: values of the file by dotted path, such as `{"stages.adapter.epochs": 2}`.

    Returns:
        `flows.summary.summary` of the run.
    """
    return go_through(config, only=only, start=start, to=to, force=force or [], overrides=overrides)


def go_through(config: str, *, only: str | None, start: str | None, to: str | None, force: list[str], overrides: dict[str, Any] | None) -> Any:
    """The body of the flows. Stages run in this thread: Prefect ends a flow by raising in it, and only there do their `finally` blocks run."""
    session = current.get() or Session()
    context = FlowRunContext.get()
    served = context.flow_run.deployment_id is not None
    log = get_run_logger()
    with stop_with_parent(served), undisturbed_interrupt(), to_prefect(log) as handler:
        pipeline = spec.load(config, overrides=overrides)
        selection = Selection.of(pipeline, only=only, start=start, to=to, force=force)
        progress = ProgressArtifacts(pipeline.name)
        mlflow = MlflowListener(pipeline.env, stages=pipeline.stages)
        listeners = Listeners([*([session.listener] if session.listener else []), progress, mlflow])
        run = session.run = Run(pipeline, selection=selection, listener=listeners)
        mlflow.run_id = run.id
        _introduce(context.flow_run, run, log)
        try:
            for name in run.order:
                execute(name, run, handler)
            run.close()
        except KeyboardInterrupt:
            run.close("cancelled")
            return Cancelled(message="Stopped with ctrl-C.")
        except BaseException as error:
            run.close("failed" if isinstance(error, Exception) else "cancelled")
            if not isinstance(error, Exception):
                flush(5)  # SIGTERM will end this process before anything else can
            raise
        finally:
            progress.close()
        markdown(f"{pipeline.name}-run", page(run), "What this run did")
        found = summary(run)
        if found["verdict"] == "refused" and any(run.pipeline.stages[name].produces == "verdict" for name in found["built"]):
            notify.refused(context.flow_run, pipeline.name, sentence(found))
        return Completed(message=sentence(found), data=found)


def _introduce(flow_run: Any, run: Run, log: Any) -> None:
    """Give the flow run the names that join it to the store: the pipeline's and the run's; say which process runs it, and who wants to hear of failures."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=f"{run.pipeline.name} {run.id}", tags=sorted({*flow_run.tags, notify.tag(run.pipeline.name)}))
        client.update_flow_run_labels(flow_run.id, labels() | {"ftpipe.run": run.id, "ftpipe.pipeline": run.pipeline.name,
                                                               "ftpipe.config": str(Path(run.pipeline.source or "").absolute())})
        if run.pipeline.settings.notify:
            try:
                notify.automate(client, run.pipeline.name, run.pipeline.settings.notify)
            except Exception as error:  # no reason to train nothing
                log.warning("nobody will be notified: %s", error)
