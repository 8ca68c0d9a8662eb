"""Tell people when a run fails or the gate refuses a candidate: a Prefect automation for each pipeline, kept as the pipeline file's `notify` says."""

from __future__ import annotations

from typing import Any

from ftpipe.errors import ConfigError

REFUSED = "ftpipe.gate.refused"
EVENTS = ("prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut", REFUSED)
SUBJECT = "ftpipe: {{ event.event|replace('ftpipe.gate.refused', 'the gate refused a candidate')|replace('prefect.flow-run.', 'run ') }}"
BODY = "{{ flow_run.name }}: {{ event.payload.message or event.payload.validated_state.message }}\n{{ flow_run|ui_url }}"


def tag(pipeline: str) -> str:
    """The tag of every flow run of a pipeline, by which the automation knows them. A deployment has it, or the run from its creation on."""
    return f"pipeline:{pipeline}"


def automate(client: Any, pipeline: str, targets: list[str]) -> None:
    """Create, change or, without targets, delete the pipeline's automation. Prefect's server then watches; it also sees runs that were killed.

    Args:
        targets: Prefect notification blocks, as `slack-webhook/team`. Addresses and tokens stay in them.

    Raises:
        ConfigError: there is no such block.
    """
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    name = f"ftpipe: {pipeline}"
    there = client.read_automations_by_name(name)
    if not targets:
        for found in there:
            client.delete_automation(found.id)
        return
    actions = [SendNotification(block_document_id=_block(client, target), subject=SUBJECT, body=BODY) for target in targets]
    of_pipeline = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag(pipeline)}"}
    wanted = AutomationCore(name=name, description=f"Made by ftpipe from `notify` of the pipeline {pipeline}; it is kept as that says.", actions=actions,
                            trigger=EventTrigger(expect=set(EVENTS), match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=of_pipeline))
    if not there:
        client.create_automation(wanted)
    elif _essence(there[0]) != _essence(wanted):
        client.update_automation(there[0].id, wanted)


def refused(flow_run: Any, pipeline: str, message: str) -> None:
    """Emit the event of a refused candidate."""
    from prefect.events import emit_event

    emit_event(REFUSED, resource={"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": flow_run.name},
               related=[{"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag(pipeline)}"}], payload={"message": message})


def _essence(automation: Any) -> tuple[Any, ...]:
    trigger = automation.trigger
    return automation.enabled, set(trigger.expect), trigger.match, trigger.match_related, [(a.block_document_id, a.subject, a.body) for a in automation.actions]


def _block(client: Any, target: str) -> Any:
    from prefect.exceptions import ObjectNotFound

    kind, _, name = target.partition("/")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound as error:
        raise ConfigError(f"Prefect has no block {target}", where="notify",
                          remedy="make it in the UI under Blocks (Slack, e-mail, Teams, custom webhook ...), or correct `notify`") from error
