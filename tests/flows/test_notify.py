"""A failed run and a refused candidate reach a receiver through an automation of a real Prefect server, each once."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from ftpipe.errors import ConfigError, TrainingError
from ftpipe.pipeline import spec
from tests.stages_for_tests import wait_for, write_pipeline

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def received():
    """A receiver of web hooks: its address, and what it was told."""
    told: list[dict] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *a):
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", told
    server.shutdown()


def config(folder, name, stages, **top):
    path = write_pipeline(folder, stages, name=name)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | top))
    return str(path)


def test_failures_and_refusals_are_told_once_and_good_runs_are_not(client, folder, received):
    from prefect import tags
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    from flows import notify
    from flows.data_to_model import data_to_model

    url, told = received
    CustomWebhookNotificationBlock(name="ops", url=url, json_data={"subject": "{{subject}}", "body": "{{body}}"}).save("ops", overwrite=True)
    target = ["custom-webhook/ops"]
    gate = config(folder / "gate", "gated", {"judged": {"kind": "planted_verdict", "passes": True}}, notify=target)
    assert data_to_model(gate)["verdict"] == "passed"
    (made,) = client.read_automations_by_name("ftpipe: gated")

    data_to_model(gate, overrides={"stages.judged.passes": False})
    wait_for(lambda: told, 20, what="the refusal")
    assert told[0]["subject"] == "ftpipe: the gate refused a candidate" and told[0]["body"].startswith("gated 2") and "refused" in told[0]["body"]
    data_to_model(gate, overrides={"stages.judged.passes": False})  # nothing new was judged

    failing = config(folder / "fail", "failing", {"shaky": {"kind": "flaky", "retryable": False}}, notify=target)
    with pytest.raises(TrainingError), tags(notify.tag("failing")):  # as `flows.run` and deployments have it
        data_to_model(failing)
    wait_for(lambda: len(told) > 1, 20, what="the failure")
    assert told[1]["subject"] == "ftpipe: run Failed" and told[1]["body"].startswith("failing 2") and "try 1 fails" in told[1]["body"]
    assert len(told) == 2

    assert client.read_automations_by_name("ftpipe: gated") == [made], "one automation, left alone while `notify` stays"
    notify.automate(client, "gated", [])
    assert client.read_automations_by_name("ftpipe: gated") == []
    notify.automate(client, "failing", [])


def test_a_block_that_is_not_there_stops_serving_but_no_run(client, folder):
    from flows import notify
    from flows.data_to_model import data_to_model

    with pytest.raises(ConfigError, match="no block slack-webhook/nobody") as caught:
        notify.automate(client, "small", ["slack-webhook/nobody"])
    assert caught.value.where == "notify" and client.read_automations_by_name("ftpipe: small") == []
    done = data_to_model(config(folder, "small", {"judged": {"kind": "planted_verdict", "passes": True}}, notify=["slack-webhook/nobody"]))
    assert done["state"] == "succeeded"


@pytest.mark.parametrize("wrong", ["team", "https://hooks.slack.com/services/T/B/x", "slack-webhook/"])
def test_notify_names_blocks_and_nothing_else(wrong, folder):
    with pytest.raises(ConfigError, match="names no Prefect block"):
        spec.load(config(folder, "small", {"judged": {"kind": "planted_verdict"}}, notify=[wrong]))
