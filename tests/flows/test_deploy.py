"""What lies in deploy/ is what the programs that read it take: Prefect, Docker, Compose, Kubernetes and systemd, as far as they are here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
ROOT = DEPLOY.parent
PREFECT_FILES = [DEPLOY / "prefect.yaml", DEPLOY / "docker" / "prefect.yaml", DEPLOY / "kubernetes" / "prefect.yaml"]
KINDS = {"docker": "prefect-docker", "kubernetes": "prefect-kubernetes"}
pytestmark = pytest.mark.timeout(120)


def of(path: Path) -> str:
    return path.relative_to(DEPLOY).as_posix()


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def template(kind: str) -> dict[str, Any]:
    return json.loads((DEPLOY / kind / "base-job-template.json").read_text())


def shipped(kind: str) -> dict[str, Any]:
    """The template that Prefect itself brings for a kind of work pool."""
    import prefect.server.api.collections_data as data

    views = json.loads((Path(data.__path__[0]) / "views" / "aggregate-worker-metadata.json").read_text())
    return views[KINDS[kind]][kind]["default_base_job_configuration"]


def job(kind: str, **variables: Any) -> dict[str, Any]:
    """What a worker makes of the template and a deployment's job variables."""
    from prefect.utilities.templating import apply_values

    found = template(kind)
    defaults = {k: v["default"] for k, v in found["variables"]["properties"].items() if "default" in v}
    return apply_values(found["job_configuration"], defaults | variables)


@pytest.mark.parametrize("file", PREFECT_FILES, ids=of)
def test_every_deployment_resolves(file):
    import prefect
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.schema_tools.validation import validate

    found = yaml.safe_load(file.read_text())
    assert found["prefect-version"] == prefect.__version__
    for deployment in found["deployments"]:
        flow = load_flow_from_entrypoint(deployment["entrypoint"])
        assert flow.name == "data-to-model"
        validate(deployment["parameters"], flow.parameters.model_dump())
        flow.validate_parameters(deployment["parameters"])
        assert (ROOT / deployment["parameters"]["config"]).is_file()
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert deployment["work_pool"]["name"]
        for schedule in deployment["schedules"]:
            CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        assert "prefect.blocks" not in json.dumps(deployment), "`prefect deploy` would store the block's secret in the deployment"


@pytest.mark.parametrize("kind", KINDS)
def test_job_variables_and_templates_fit_the_kind_of_work_pool(kind):
    import jsonschema
    from prefect.client.schemas.actions import WorkPoolCreate

    found, brought = template(kind), shipped(kind)
    WorkPoolCreate(name="ftpipe", type=kind, base_job_template=found)
    assert set(brought["job_configuration"]) <= set(found["job_configuration"])  # what Prefect's worker expects is all there
    known = found["variables"]["properties"]
    assert set(brought["variables"]["properties"]) <= set(known)
    named = set(re.findall(r"{{ (\w+) }}", json.dumps(found["job_configuration"])))
    assert named == set(known), "every variable is used and every placeholder is a variable"
    jsonschema.Draft202012Validator.check_schema(found["variables"])
    jsonschema.validate({k: v["default"] for k, v in known.items() if "default" in v}, found["variables"])
    for deployment in yaml.safe_load((DEPLOY / kind / "prefect.yaml").read_text())["deployments"]:
        variables = deployment["work_pool"]["job_variables"]
        assert set(variables) <= set(known)
        jsonschema.validate(variables, found["variables"])


def test_a_docker_job_is_a_container_that_docker_can_make():
    from docker.models.containers import _create_container_args

    wanted = job("docker", image="ftpipe:1", volumes=["/home/me/project:/srv/ftpipe"])
    gpu = {"device_requests": [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}]}
    arguments = _create_container_args({"image": wanted["image"], "volumes": wanted["volumes"], "network": wanted["networks"][0], "version": "1.44",
                                        "auto_remove": wanted["auto_remove"], **wanted["container_create_kwargs"], **gpu})
    host = arguments["host_config"]
    assert host["ShmSize"] == 8 << 30 and host["Init"] is True and host["Binds"] == ["/home/me/project:/srv/ftpipe"]
    assert host["DeviceRequests"][0]["Count"] == -1
    network = compose()["networks"]["ftpipe"]["name"]
    assert wanted["networks"] == [network]


def kubectl(*words: str, given: str | None = None) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", *words], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def typed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as Kubernetes' own types read it: a wrong type is an error, an unknown field is lost. No cluster is asked."""
    return yaml.safe_load(kubectl("set", "env", "--local", "--filename", "-", "FTPIPE_TEST=1", "--output", "yaml", given=yaml.safe_dump(manifest)))


def lost(given: Any, read: Any, path: str = "") -> list[str]:
    """Places of `given` that are not in `read`."""
    if isinstance(given, dict):
        if not isinstance(read, dict):
            return [path]
        return [p for k, v in given.items() for p in (lost(v, read[k], f"{path}.{k}") if k in read else [f"{path}.{k}"])]
    if isinstance(given, list):
        return [path] if not isinstance(read, list) or len(read) < len(given) else [p for i, v in enumerate(given) for p in lost(v, read[i], f"{path}[{i}]")]
    return []


def test_a_kubernetes_job_is_one_that_kubernetes_knows():
    wanted = job("kubernetes", image="ftpipe:1", name="run", command=["prefect", "flow-run", "execute"], labels={"a": "b"}, env=[{"name": "A", "value": "b"}],
                 gpus=1, memory_limit="32Gi", memory_request="16Gi")["job_manifest"]
    read = typed(wanted)
    assert lost(wanted, read) == []
    pod = read["spec"]["template"]["spec"]
    assert read["spec"]["backoffLimit"] == 0 and pod["restartPolicy"] == "Never", "retries are the flow's part"
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "32Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "ftpipe"}}]
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/srv/ftpipe", "/dev/shm"}
    broken = json.loads(json.dumps(wanted))
    broken["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []  # the check would see a slip
    assert lost(broken, typed(broken)) == [".spec.template.spec.containers[0].volumeMount"]


def test_the_kubernetes_folder_is_complete():
    documents = list(yaml.safe_load_all(kubectl("kustomize", str(DEPLOY / "kubernetes"))))
    by = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert {k for k, _ in by} == {"Namespace", "PersistentVolumeClaim", "ServiceAccount", "Role", "RoleBinding", "Deployment"}
    assert all(d["metadata"].get("namespace") == "ftpipe" for (kind, _), d in by.items() if kind != "Namespace")
    worker = by["Deployment", "ftpipe-worker"]
    assert lost(worker, typed(worker)) == []
    container = worker["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example.com/ftpipe:1"
    pool = yaml.safe_load((DEPLOY / "kubernetes" / "prefect.yaml").read_text())["deployments"][0]["work_pool"]["name"]
    assert container["args"][container["args"].index("--pool") + 1] == pool
    defaults = {k: v.get("default") for k, v in template("kubernetes")["variables"]["properties"].items()}
    assert defaults["claim"] == by["PersistentVolumeClaim", "ftpipe"]["metadata"]["name"] and defaults["namespace"] == "ftpipe"
    assert not any(kind == "Secret" for kind, _ in by)


def test_the_nodes_of_kubernetes_are_what_kubernetes_knows_and_run_a_command_that_ftpipe_has():
    from ftpipe.cli import VERBS

    nodes, service = (yaml.safe_load_all((DEPLOY / "kubernetes" / "nodes.yaml").read_text()))
    assert lost(nodes, typed(nodes)) == []
    assert nodes["spec"]["serviceName"] == service["metadata"]["name"] and service["spec"]["selector"] == nodes["spec"]["selector"]["matchLabels"]
    pod = nodes["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"][:2] == ["ftpipe", "node"] and "node" in VERBS
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in pod["containers"][0]["volumeMounts"]}
    run = {v["name"]: v for v in template("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["volumes"]}
    assert set(run) == {v["name"] for v in pod["volumes"]}, "a run and the nodes see the same folder"


def test_what_compose_names_is_there():
    found = compose()
    services = found["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits until {other} is healthy"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith(("/", "$")) or source in found["volumes"]
        assert set(service["networks"]) <= set(found["networks"])
        assert all(p.startswith("127.0.0.1:") for p in service.get("ports", [])), f"{name} is open to the network"
        assert ":" in service["image"], f"{name} has an image without a version"
    text = (DEPLOY / "compose.yaml").read_text()
    for file in re.findall(r"/opt/ftpipe/(deploy/\S+?)[;,\]\s]", text):
        assert (ROOT / file).is_file()
    asked, offered = set(re.findall(r"(?<!\$)\$\{(\w+):\?", text)), (DEPLOY / ".env.example").read_text()
    assert asked == {"POSTGRES_PASSWORD", "STORE_USER", "STORE_PASSWORD", "PREFECT_API_AUTH"}
    assert all(re.search(rf"^{name}=", offered, re.M) for name in asked | {"FTPIPE_FOLDER", "HF_TOKEN"})
    assert not re.findall(r"^\w*PASSWORD=\S", offered, re.M), "no password is shipped"


def test_the_servers_of_compose_understand_their_settings(monkeypatch):
    """Prefect is asked what it makes of the environment it is given; MLflow, slow to import, whether it reads the names."""
    from prefect.settings import Settings

    services = compose()["services"]
    for name, value in services["prefect"]["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+(?::-([^}]*))?\}", lambda m: m.group(1) or "pw", str(value)))
    server = Settings().server
    assert server.database.connection_url.get_secret_value() == "postgresql+asyncpg://ftpipe:pw@postgres:5432/prefect"
    assert server.api.host == "0.0.0.0" and server.api.port == 4200 and server.api.auth_string.get_secret_value() == "pw"

    package = Path(importlib.util.find_spec("mlflow").origin).parent
    source = "".join((package / file).read_text() for file in ("cli/__init__.py", "utils/cli_args.py", "environment_variables.py"))
    read = set(re.findall(r'(?:envvar=|_EnvironmentVariable\(|_BooleanEnvironmentVariable\()\s*"(MLFLOW_\w+)"', source))
    given = {name for name in services["mlflow"]["environment"] if name.startswith("MLFLOW_")}
    assert len(given) >= 6 and given <= read


def test_compose_itself_accepts_the_files():
    if shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    env = os.environ | {"POSTGRES_PASSWORD": "a", "STORE_USER": "b", "STORE_PASSWORD": "cccccccc", "PREFECT_API_AUTH": "d:e"}
    files = [word for file in ("compose.yaml", "compose.gpu.yaml") for word in ("--file", str(DEPLOY / file))]
    done = subprocess.run(["docker", "compose", *files, "--profile", "docker", "config", "--quiet"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_image_is_made_of_the_lock_and_of_files_that_are_there():
    text = (DEPLOY / "Dockerfile").read_text()
    left_out = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.*)", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source.split("/")[0] not in left_out, source
    assert "--no-deps -r requirements.lock" in text and text.rindex("USER ftpipe") > text.rindex("pip install")
    assert not re.search(r"^(ARG|ENV).*(PASSWORD|TOKEN|SECRET)", text, re.M)
    assert {"**/.env", ".ftpipe", ".git"} <= set(left_out)


def test_the_lock_of_the_image_agrees_with_the_other():
    from packaging.requirements import Requirement

    def read(path: Path) -> dict[str, Requirement]:
        lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
        return {r.name.lower().replace("_", "-"): r for r in map(Requirement, filter(None, lines))}

    lock, own, asked = read(ROOT / "requirements.lock"), read(DEPLOY / "requirements.lock"), read(DEPLOY / "requirements.txt")
    assert not set(lock) & set(own)
    for name, requirement in asked.items():
        (pin,) = own[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version)


@pytest.mark.parametrize("unit", sorted(p.name for p in (DEPLOY / "systemd").glob("*.service")))
def test_systemd_accepts_the_unit(unit, tmp_path):
    text = (DEPLOY / "systemd" / unit).read_text()
    (line,) = re.findall(r"^ExecStart=(\S+)(.*)", text, re.M)
    program, words = Path(line[0]), line[1].split()
    assert program.name in ("ftpipe", "prefect") and words
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for file in (DEPLOY / "systemd").glob("*.service"):
        (tmp_path / file.name).write_text(file.read_text().replace("/opt/ftpipe/.venv/bin/", f"{Path(shutil.which('true')).parent}/")
                                          .replace("/bin/ftpipe ", "/bin/true ").replace("/bin/prefect ", "/bin/true "))
    instance = unit.replace("@", "@quickstart")
    if instance != unit:
        (tmp_path / unit).rename(tmp_path / instance)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / instance)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"SYSTEMD_LOG_LEVEL": "warning"})
    said = [s for s in done.stderr.splitlines() if str(tmp_path) in s or instance in s]
    assert done.returncode == 0 and said == [], done.stderr


def test_the_command_of_the_unit_is_one_that_ftpipe_has():
    (words,) = re.findall(r"^ExecStart=\S+ (.*)", (DEPLOY / "systemd" / "ftpipe@.service").read_text(), re.M)
    from typer.testing import CliRunner

    from ftpipe.cli import serve, status  # noqa: F401  they add themselves to the application
    from ftpipe.cli._app import app

    words = words.replace("configs/%i.yaml", "no-such.yaml").replace("${CRON}", "'0 3 * * *'").replace("${CRON_ZONE}", "UTC")
    done = CliRunner().invoke(app, shlex.split(words))
    assert type(done.exception).__name__ == "ConfigError" and "no-such.yaml" in str(done.exception), done.output


def test_the_readme_of_deploy_names_what_is_there():
    text = (DEPLOY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (DEPLOY / link).exists(), link
    assert "deploy/README.md" in (ROOT / "README.md").read_text()
