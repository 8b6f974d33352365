"""Manifests against their schemas, and what they run against the settings that there are."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from clae_dist.cli import make_parser
from clae_dist.recipe import resolve

ROOT = Path(__file__).parents[2]
STRING, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}  # `ray start` takes texts alone
TEMPLATE = {"type": "object", "required": ["spec"]}


def _object(required: list[str], **properties: object) -> dict[str, object]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


# The fields of ray.io/v1 that this project uses, as KubeRay's reference documents them.
WORKERS = _object(
    ["groupName", "template", "replicas", "minReplicas", "maxReplicas"],
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=PARAMETERS,
    template=TEMPLATE,
)
CLUSTER = _object(
    ["headGroupSpec"],
    rayVersion=STRING,
    authOptions=_object(["mode"], mode={"enum": ["token", "disabled"]}, secretName=STRING),
    headGroupSpec=_object(["template"], rayStartParams=PARAMETERS, template=TEMPLATE),
    workerGroupSpecs={"type": "array", "items": WORKERS, "minItems": 1},
)
RAY_JOB = _object(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER,
)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / "kuberay.yaml").read_text()))


def test_the_ray_job_has_the_fields_of_its_kind(documents: list[dict[str, Any]]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    job = documents[1]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    jsonschema.validate(job["spec"], RAY_JOB)
    assert job["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate({**job["spec"], "backofLimit": 1}, RAY_JOB)


def test_the_pods_and_the_volume_are_what_kubernetes_takes(documents: list[dict[str, Any]]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    claim, job = documents
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]} for group in groups]
    for document in (claim, *pods):
        kubernetes.validate(document, kubernetes.latest_version(), strict=True)
    wrong = {**pods[0], "spec": {**pods[0]["spec"], "contaners": []}}
    with pytest.raises(kubernetes.ValidationError, match="contaners"):
        kubernetes.validate(wrong, kubernetes.latest_version(), strict=True)
    for pod in pods:
        assert {"name": "shared", "mountPath": "/shared"} in pod["spec"]["containers"][0]["volumeMounts"]


def test_the_entrypoint_is_a_command_of_this_package(documents: list[dict[str, Any]]) -> None:
    words = shlex.split(documents[1]["spec"]["entrypoint"])
    command = words[words.index("clae_dist") + 1 :]
    arguments, rest = make_parser().parse_known_args(command)
    assert arguments.launcher == "ray"
    config, _ = resolve(str(ROOT / "configs" / "imagenet" / "clae.yaml"), [*arguments.overrides, *rest, "launch.launcher=ray"])
    workers = documents[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert config.launch.workers == workers["maxReplicas"]
    assert config.launch.min_workers == workers["minReplicas"]
    assert [size for size in range(2, 5) if config.works_on(size)] == [2, 4]


def test_rays_cluster_launcher_takes_the_file() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "launch" / "ray-cluster.yaml").read_text())
    # Of the local provider; Ray takes it out before it looks at the schema.
    assert cluster.pop("min_workers") == cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_workers": "three"}, schema)
