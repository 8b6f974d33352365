"""Manifests against their schemas, and what they run against the settings that there are."""

from __future__ import annotations

import ast
import json
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from clae_dist.cli import make_parser
from clae_dist.recipe import resolve
from tests import processes

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


# The fields of a task that this project uses, as SkyPilot's reference documents them (sky/utils/schemas.py of 0.14.1; the
# package itself asks for a hundred others).
SKYPILOT = _object(
    ["num_nodes", "resources", "run"],
    name=STRING,
    num_nodes=COUNT,
    workdir=STRING,
    resources=_object(
        ["accelerators"],
        accelerators=STRING,
        use_spot={"type": "boolean"},
        disk_size=COUNT,
        job_recovery=_object(["max_restarts_on_errors"], max_restarts_on_errors=COUNT),
    ),
    envs={"type": "object", "additionalProperties": {"type": "string"}},
    setup=STRING,
    run=STRING,
)


def dry_run(script: str, folder: Path, **environment: str) -> list[str]:
    """The words of launch/torchrun.sh's command when a shell runs `script` in the checkout, instead of torchrun.sh."""
    (folder / "launch").mkdir()
    fake = folder / "launch" / "torchrun.sh"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = processes.run("bash", "-euc", script, cwd=folder, env=processes.environment(**environment))
    assert done.returncode == 0, done.stderr
    options = [word for word in done.stdout.splitlines() if word.startswith("--")]
    assert all(f"{option}" in (ROOT / "launch" / "torchrun.sh").read_text() for option in options)
    return done.stdout.splitlines()


def test_the_task_of_skypilot(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    jsonschema.validate(task, SKYPILOT)
    with pytest.raises(jsonschema.ValidationError, match="num_node"):
        jsonschema.validate({**task, "num_node": 1}, SKYPILOT)
    ips = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    words = dry_run(task["run"], tmp_path, **ips, **task["envs"])
    assert words[:6] == ["--nodes", "2", "--gpus-per-node", "8", "--head", "10.0.0.1:29500"]
    config, _ = resolve(str(ROOT / words[6]), words[7:])
    assert config.works_on(16)


def test_the_component_of_torchx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchX reads types and the docstring of each argument. Where it is not installed (it pins an old urllib3), a stand-in
    takes the fields that its reference documents."""
    source = ROOT / "launch" / "torchx_component.py"
    (function,) = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    text = ast.get_docstring(function) or ""
    for argument in function.args.args:
        assert argument.annotation is not None
        assert f"    {argument.arg}: " in text

    def role(*, name: str, image: str, entrypoint: str, args: list[str], **more: Any) -> SimpleNamespace:
        assert set(more) == {"num_replicas", "max_retries", "retry_policy", "resource"}
        return SimpleNamespace(name=name, entrypoint=entrypoint, args=args, **more)

    specs = SimpleNamespace(
        AppDef=lambda *, name, roles: SimpleNamespace(name=name, roles=roles),
        Role=role,
        RetryPolicy=SimpleNamespace(APPLICATION="APPLICATION"),
        resource=lambda *, cpu, gpu, memMB: (cpu, gpu, memMB),
        macros=SimpleNamespace(rank0_env="${rank0_env}"),
    )
    monkeypatch.setitem(sys.modules, "torchx", SimpleNamespace(specs=specs))
    monkeypatch.setitem(sys.modules, "torchx.specs", specs)
    train = runpy.run_path(str(source))["train"]
    recipe = "configs/imagenet/clae.yaml"
    app = train("image", recipe, "/shards", "s3://bucket/run", hosts=2, settings="seed=3 name='two words'")
    (one,) = app.roles
    assert (one.entrypoint, one.num_replicas, one.resource) == ("bash", 2, (64, 8, 512 * 1024))
    flag, script = one.args
    assert flag == "-c"
    # As TorchX substitutes its macros, and a scheduler sets the variable.
    script = script.replace("${rank0_env}", "RANK0").replace("$$", "$")
    words = dry_run(script, tmp_path, RANK0="node-1")
    assert words[:6] == ["--nodes", "2", "--gpus-per-node", "8", "--head", "node-1:29500"]
    config, _ = resolve(str(ROOT / words[6]), words[7:])
    assert (config.seed, config.name) == (3, "two words")
