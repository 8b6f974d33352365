"""Work other than training on Ray Train workers: every rank joins the process group that Ray starts, and does it once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clae_dist.devices import Request as Device
from clae_dist.errors import FAILED
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.ray import RayStore, import_ray, quieten, root_cause, start_ray
from clae_dist.launchers.terminal import announce
from clae_dist.wording import count_of

_TIMEOUT_S = 7 * 86_400


def _main(settings: dict[str, Any]) -> None:
    """On a worker."""
    ending: Ending = settings["work"](*settings["arguments"])
    if os.environ.get("RANK") == "0":
        RayStore().put(settings["name"], json.dumps(vars(ending)))


def run_on_ray(work: Callable[..., Ending], arguments: tuple[Any, ...], workers: int, device: Device, folder: Path) -> Ending:
    """`work(*arguments)` on `workers` workers of the cluster that RAY_ADDRESS names, else of this machine; rank 0's ending.

    `folder`, which all hosts see, gets Ray's working files, which are removed at the end.
    """
    ray = import_ray()
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from clae_dist.launchers.ray_local import LoopbackTorchConfig

    announce(f"ray: {count_of(workers, 'worker')}, with Ray {ray.__version__}; starting takes half a minute")
    start_ray(ray, workers, debug=False)
    quieten(ray)
    cluster = bool(os.environ.get("RAY_ADDRESS"))
    use_gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) >= workers
    name = f"ray-{os.getpid()}-{time.time_ns()}"
    trainer = TorchTrainer(
        train_loop_per_worker=_main,
        train_loop_config={"work": work, "arguments": arguments, "name": name},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        torch_config=(TorchConfig if cluster else LoopbackTorchConfig)(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=_TIMEOUT_S
        ),
        run_config=RunConfig(name=name, storage_path=str(folder.absolute())),
    )
    try:
        trainer.fit()
        return Ending(**json.loads(RayStore().take(name)))
    except Exception as error:  # the workers', wrapped by Ray
        return Ending(FAILED, f"clae: {root_cause(error)}. The same command continues from the finished work.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        ray.shutdown()
