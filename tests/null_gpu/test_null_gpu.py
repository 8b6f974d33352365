"""The program on one and two null GPUs: every backend trains and resumes, and touches no device but its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from clae_dist.config import Model
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import BAD_CONFIG, OK
from clae_dist.models.encoders import build_encoder
from clae_dist.runs.folder import RunFolder, step_of
from tests import processes
from tests.null_gpu.build import NoNullGpuError, NullGpu, build
from tests.processes import ROOT, Completed

BACKENDS = ("ddp", "fsdp2", "zero-0", "zero-1", "zero-2")


@pytest.fixture(scope="module")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> NullGpu:
    try:
        return build(tmp_path_factory.mktemp("null_gpu"))
    except NoNullGpuError as error:
        pytest.skip(f"no null GPU: {error}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 96, 16).folder)


def python(null_gpu: NullGpu, gpus: int, *arguments: str, **environment: str) -> Completed:
    # No kernel runs: memory that is used again would hold an earlier tensor's bytes for a result, and fresh memory is zero.
    fresh = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    there = null_gpu.environment(gpus, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **fresh, **environment)
    return processes.run(sys.executable, *arguments, env=there, timeout=600)


class Trained:
    """What every backend did on `gpus` null GPUs."""

    def __init__(self, null_gpu: NullGpu, shards: str, folder: Path, gpus: int) -> None:
        self.folder = folder
        self.done = python(null_gpu, gpus, "-m", "tests.null_gpu.backends", shards, str(folder), str(gpus))
        self.ranks: list[dict[str, Any]] = []
        for rank in range(gpus):
            path = folder / f"rank-{rank}.json"
            assert path.exists(), self.done.stdout + self.done.stderr
            self.ranks.append(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def one(null_gpu: NullGpu, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(null_gpu, shards, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(null_gpu: NullGpu, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(null_gpu, shards, tmp_path_factory.mktemp("two"), 2)


def assert_trained_and_resumed(trained: Trained, backend: str) -> None:
    for rank, report in enumerate(trained.ranks):
        assert backend in report["runs"], f"not reached: {report['runs']}"
        run = report["runs"][backend]
        assert run["endings"] == ["", ""]
        assert [len(steps) for steps in run["steps"]] == [4, 2]  # the second start began after step 2
        assert all(step["launches"] > 100 for steps in run["steps"] for step in steps)
        assert report["devices"] == [rank], "a rank has used another device than its own"
    console = (trained.folder / backend / "console.log").read_text()
    assert "cuda" in console
    assert "resuming after step 2" in console
    assert [step_of(path) for path in RunFolder(trained.folder / backend).find_checkpoints()] == [4, 2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_one_gpu_trains_and_resumes(one: Trained, backend: str) -> None:
    assert_trained_and_resumed(one, backend)
    step = one.ranks[0]["runs"][backend]["steps"][0][-1]
    if backend == "ddp":  # there is nobody to communicate with
        assert (step["all_gathers"], step["all_reduces"], step["reduce_scatters"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero-0", "zero-1", "zero-2"])
def test_deepspeed_needs_two_gpus(one: Trained, backend: str) -> None:
    (ending,) = one.ranks[0]["runs"][backend]["endings"]
    assert "this run has a single rank" in ending


@pytest.mark.slow
def test_one_gpu_evaluates_reports_and_exports(one: Trained) -> None:
    assert one.done.returncode == OK, one.done.stdout + one.done.stderr
    found = json.loads((one.folder / "ddp" / "evaluation.json").read_text())
    assert found["device"] == "cuda"
    assert (one.folder / "ddp" / "report" / "report.html").exists()
    assert list((one.folder / "ddp" / "export").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gpus_train_and_resume(two: Trained, backend: str) -> None:
    assert_trained_and_resumed(two, backend)
    step = two.ranks[1]["runs"][backend]["steps"][0][-1]
    assert step["all_gathers"] > 0  # of rows, at least
    assert step["all_reduces"] > 0
    if backend == "fsdp2":
        assert step["reduce_scatters"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_the_host_waits_once_a_step(one: Trained, two: Trained, backend: str) -> None:
    """To hear if the loss and the gradient are finite. A thread that writes a checkpoint may wait during a step as well, and
    DDP reads 8 times of its own in each of its first 10 forwards."""
    for trained in (one, two):
        of_ddp = 8 if backend == "ddp" and trained is two else 0
        for report in trained.ranks:
            waits = [step["waits"] for steps in report["runs"][backend]["steps"] for step in steps[1:]]
            assert min(waits) == 1 + of_ddp, (trained.folder.name, waits)


@pytest.mark.slow
def test_a_step_communicates_twice_a_batch_norm_and_pass(two: Trained) -> None:
    """CLAE (exact) takes two passes with batch norms: one of the attack, and one of all three views that it trains on."""
    step = two.ranks[0]["runs"]["ddp"]["steps"][0][-1]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in build_encoder(Model(encoder="small_resnet"), 32)[0].modules())
    assert step["all_gathers"] == 2 * norms + 7  # of rows: three views, one that is attacked; and of their three losses
    assert 2 * norms + 2 <= step["all_reduces"] <= 2 * norms + 6  # of gradients and of a flag


@pytest.mark.slow
def test_counts_by_dispatch_are_those_of_the_null_gpu(two: Trained) -> None:
    """`clae bench gpu-counts` counts the same collectives. Its kernels are fewer than the launches here, where a convolution is
    several of them an image, since cuDNN is not replaced."""
    code = (
        "from clae_dist.bench import gpu_actions as a\n"
        "counts = a.step(a.Shape('small_resnet', 2, 12, 16))\n"
        "print(counts.collectives_named('allgather'), counts.collectives_named('allreduce'), counts.kernels)"
    )
    done = processes.run(sys.executable, "-W", "ignore", "-c", code, check=True)
    gathers, reduces, kernels = map(int, done.stdout.split())
    step = two.ranks[0]["runs"]["ddp"]["steps"][0][-1]
    assert (step["all_gathers"], step["all_reduces"]) == (gathers, reduces)
    assert kernels < step["launches"] < 4 * kernels, (kernels, step["launches"])


@pytest.mark.slow
def test_nothing_of_ours_warns_on_gpus(two: Trained) -> None:
    said = two.done.stdout + two.done.stderr
    assert two.done.returncode == OK, said
    assert [line for line in said.splitlines() if "FutureWarning" in line and "deprecated" in line] == []


@pytest.mark.slow
def test_more_ranks_than_gpus_are_refused_with_host_and_ranks(null_gpu: NullGpu, shards: str, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("batch: {global_size: 8}\nmodel: {encoder: small_resnet}\ntracking: {name: none}\n")
    done = python(
        null_gpu,
        *(1, "-m", "tests.null_gpu.program", "train", str(recipe), f"data.shards={shards}", f"run_dir={tmp_path}/run"),
        "launch.workers=2",
    )
    assert done.returncode == BAD_CONFIG, done.stdout + done.stderr
    assert "has 1 visible GPU for ranks 0, 1" in done.stderr


_WRONG_DEVICES = """
import ctypes, torch
def refused(action):
    try:
        action()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    raise SystemExit("nothing was refused")
x = torch.ones(4, device="cuda:0")
print(refused(lambda: torch.cuda.set_device(2)))
print(refused(lambda: x + torch.ones(4, device="cuda:1")))
print(refused(lambda: torch.zeros(1 << 33, device="cuda:0")))
null = ctypes.CDLL("libnull_gpu.so")
communicator, stream = ctypes.c_void_p(), ctypes.c_void_p()
torch.cuda.set_device(1)
assert null.ncclCommSplit(ctypes.byref(ctypes.c_long(1)), 0, 0, ctypes.byref(communicator), None) == 0
for tensor in (torch.ones(4, device="cuda:1"), x, torch.ones(4)):
    rows = ctypes.c_void_p(tensor.data_ptr())
    print(null.ncclAllReduce(rows, rows, ctypes.c_size_t(4), 7, 0, communicator, None))
null.cudaStreamCreate(ctypes.byref(stream))
null.cudaSetDevice(0)
event = ctypes.c_void_p()
null.cudaEventCreate(ctypes.byref(event))
print(null.cudaEventRecord(event, stream))
"""


@pytest.mark.slow
def test_the_null_gpu_refuses_what_is_on_another_device(null_gpu: NullGpu) -> None:
    done = python(null_gpu, 2, "-c", _WRONG_DEVICES)
    assert done.returncode == 0, done.stderr
    device, tensors, memory, *codes = done.stdout.splitlines()
    assert "invalid device ordinal" in device
    assert "on the same device" in tensors
    assert "out of memory" in memory
    assert codes == ["0", "4", "4", "400"]  # success, twice ncclInvalidArgument, cudaErrorInvalidResourceHandle


def test_visible_devices_are_heard(null_gpu: NullGpu) -> None:
    code = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name(0))"
    assert python(null_gpu, 4, "-c", code, CUDA_VISIBLE_DEVICES="3,1").stdout.split() == ["2", "null", "GPU", "3"]


_AUGMENTATION = """
import ctypes, json, torch
from clae_dist.config import Augment
from clae_dist.data.augment_batched import augment_batched
from clae_dist.data.augment_views import augment_views
null = ctypes.CDLL("libnull_gpu.so")
null.null_gpu_count.restype = ctypes.c_long
device, settings, found = torch.device("cuda:0"), [Augment(blur=0.5)] * 2, {}
for side in (32, 224):
    views = torch.zeros(2, 16, side, side, 3, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    draws = torch.rand(2, 16, 10) * 0.999
    actions = {
        "batched": lambda: augment_batched(views, draws, settings),
        "as in training": lambda: augment_views(views, draws, settings, device, torch.float32),
    }
    for name, action in actions.items():
        for _ in range(2):
            before = [null.null_gpu_count(number) for number in range(2)]
            action()
        found[f"{name} {side}"] = [null.null_gpu_count(number) - count for number, count in enumerate(before)]
print(json.dumps(found))
"""


def test_the_augmentation_launches_few_kernels_and_never_waits(null_gpu: NullGpu) -> None:
    done = python(null_gpu, 1, "-c", _AUGMENTATION)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for side in (32, 224):
        launches, waits = found[f"batched {side}"]
        assert 0 < launches <= 40  # products are the null cuBLAS's and not among them
        assert waits == 0
        assert found[f"as in training {side}"] == [2, 0]  # Triton's two kernels


_WITHOUT_A_COMPILER = """
import torch, warnings
from clae_dist.data.augment_batched import augment_batched
from clae_dist.data import augment_views
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert augment_views.augmentation_of(torch.device("cuda:0")) is augment_batched
print(*(warning.message for warning in caught if "Triton" in str(warning.message)))
"""


@pytest.mark.slow
def test_without_triton_the_augmentation_is_batched_and_says_so(null_gpu: NullGpu, tmp_path: Path) -> None:
    nothing_compiled = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": str(tmp_path), "CC": ""}
    done = python(null_gpu, 1, "-c", _WITHOUT_A_COMPILER, **nothing_compiled)
    assert done.returncode == 0, done.stderr
    assert "Triton does not start" in done.stdout


@pytest.mark.slow
def test_checks_of_verify_fail_by_values_alone(null_gpu: NullGpu, tmp_path: Path) -> None:
    done = python(null_gpu, 2, "-m", "tests.null_gpu.verified", str(tmp_path / "to"))
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads((tmp_path / "to" / "verify.json").read_text())
    checks = {entry["check"]: entry for entry in content["checks"]}
    assert {name: entry["error"] for name, entry in checks.items() if entry["error"]} == {}
    assert [name for name, entry in checks.items() if "had no result" in entry["reason"]] == []
    assert [rank["device"] for rank in checks["collectives"]["figures"]["ranks"]] == ["cuda:0", "cuda:1"]
    assert len(checks["collectives"]["figures"]["rows"]) == 12
    assert "SyncBatchNorm" in checks["batch norm"]["figure"]
    assert len(checks["attacks"]["figures"]["rows"]) > 20
    assert checks["checkpoints"]["figures"]["moves"] == [["ddp", "fsdp2"], ["fsdp2", "zero-1"], ["zero-1", "ddp"]]
