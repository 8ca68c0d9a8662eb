"""The shipped deployment file names a flow that exists, with parameters that it takes."""

from __future__ import annotations

from pathlib import Path

import yaml

FILE = Path(__file__).parents[2] / "deploy" / "prefect.yaml"


def test_every_deployment_resolves():
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.schema_tools.validation import validate

    for deployment in yaml.safe_load(FILE.read_text())["deployments"]:
        flow = load_flow_from_entrypoint(deployment["entrypoint"])
        assert flow.name == "data-to-model"
        validate(deployment["parameters"], flow.parameters.model_dump())
        flow.validate_parameters(deployment["parameters"])
        assert (FILE.parents[1] / deployment["parameters"]["config"]).is_file()
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert deployment["work_pool"]["name"]
        for schedule in deployment["schedules"]:
            CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
