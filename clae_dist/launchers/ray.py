"""Ranks as Ray Train workers: started, watched and, when one is lost, started again from the newest checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from clae_dist.config import Config
from clae_dist.cores import usable_cores
from clae_dist.errors import FAILED, MEMORY, NETWORK, OK, STOPPED, ConfigError
from clae_dist.escape import shown
from clae_dist.keys import flatten
from clae_dist.launchers.local import default_workers
from clae_dist.launchers.rank import Ending, RankBroke, run_rank
from clae_dist.launchers.ray_security import check_version, secure_ray
from clae_dist.launchers.tail import ConsoleTail
from clae_dist.launchers.terminal import announce
from clae_dist.recipe import Recipe, Setting, build
from clae_dist.runs.ends import read_ends
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.mirror import ask_to_stop, fetch_ends, forget_stop, stop_asked
from clae_dist.staging import url_of
from clae_dist.wording import count_of

_POLL_S = 0.2
_GRACE_S = 15.0  # beyond guard.stop_within_s: ranks see the request and say how they end
CHANGE = "the cluster has changed: "  # how a request to stop begins that ray_elastic.py makes
_NAMESPACE = "clae-dist"  # in Ray's own store, where rank 0 leaves its ending for this process: the disk may be full


def import_ray() -> Any:
    # Ray Train reads these when it is imported.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own watcher lets ranks run until a host is taken away; ray_elastic.py has them save and leave before.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    secure_ray()
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise ConfigError(
            f"launch.launcher is 'ray', but Ray Train cannot be imported ({error}); "
            "pip install 'ray[train]>=2.60', or use --launcher local."
        ) from None
    check_version(ray.__version__)
    return ray


def _rank_main(settings: dict[str, Any]) -> None:
    """On a worker: the launcher's process group is there already."""
    config = build({key: Setting(value, "launcher") for key, value in settings["config"].items()})
    try:
        ending = run_rank(Recipe(config, settings["origins"]), None, debug=settings["debug"], num_ends=settings.get("num_ends"))
    except RankBroke as error:  # without its cause, which Ray would log with whatever secrets it holds
        raise RankBroke(str(error), error.code) from None
    if os.environ.get("RANK") == "0":
        RayStore().put(settings["name"], json.dumps(vars(ending)))


class RayStore:
    """Ray's own store, through which rank 0's ending reaches the process that started the ranks."""

    def __init__(self) -> None:
        from ray.experimental import internal_kv

        self._kv = internal_kv

    def put(self, name: str, text: str) -> None:
        self._kv._internal_kv_put(name, text, namespace=_NAMESPACE)

    def take(self, name: str) -> str:
        """The text of that name, which is removed."""
        text: str = self._kv._internal_kv_get(name, namespace=_NAMESPACE)
        self._kv._internal_kv_del(name, namespace=_NAMESPACE)
        return text


def launch(recipe: Recipe, *, debug: bool = False) -> Ending:
    """Trains with `launch.workers` Ray Train workers: of the cluster that RAY_ADDRESS names, else of this machine.

    On a cluster, with launch.min_workers, with as few as that while hosts are missing. SIGINT, SIGTERM and SIGUSR1 ask the
    workers to save and leave; a second SIGINT or SIGTERM ends at once.
    """
    config = recipe.config
    sizes = working_sizes(config)
    ray = import_ray()
    others = f", or as few as {sizes[0]} while hosts are missing" if len(sizes) > 1 else ""
    announce(f"ray: {count_of(sizes[-1], 'worker')}{others}, with Ray {ray.__version__}; starting takes half a minute")
    left_out = sorted(set(range(sizes[0], sizes[-1])) - set(sizes))
    if left_out:
        announce(f"ray: never {', '.join(map(str, left_out))}, which cannot share batch.global_size {config.batch.global_size}")
    try:
        start_ray(ray, sizes[-1], debug=debug)
    except SystemExit:  # while it starts, Ray ends this process at a SIGTERM
        return Ending(STOPPED, "SIGTERM before training began; the same command starts it.")
    if not debug:
        quieten(ray)
    folder = _folder(config)
    try:
        with _StopFile(RunFolder(folder).stop_file) as stop:
            while True:
                ending = _fit(ray, recipe, sizes, stop, debug=debug)
                if ending.code != STOPPED or stop.asked or not (asked := stop_asked(folder)).startswith(CHANGE):
                    return ending
                announce(f"ray: {shown(asked)}; starting again")
                forget_stop(folder)
    finally:
        ray.shutdown()


def _folder(config: Config) -> Path:
    """The run folder, without links, which other hosts need not have; the one that stages a URL as it is."""
    return config.folder if url_of(config.folder) else config.folder.resolve()


def working_sizes(config: Config) -> list[int]:
    """The numbers of workers that the run may have, smallest first. Raises ConfigError when the largest does not work."""
    workers = config.launch.workers or default_workers(config.launch.device)
    config.rows_per_rank(workers)
    return [size for size in range(config.launch.min_workers or workers, workers) if config.works_on(size)] + [workers]


def runs_that_fit(config: Config) -> int:
    """The number of runs of this configuration that fit on the cluster of RAY_ADDRESS at the same time; 1 without a cluster."""
    if not os.environ.get("RAY_ADDRESS"):
        return 1
    workers = working_sizes(config)[-1]
    ray = import_ray()
    start_ray(ray, workers, debug=False)
    try:
        resources = ray.cluster_resources()
        use_gpu = _use_gpu(config, resources.get("GPU", 0), workers, True)
        # Ray Train asks for a GPU a worker, or for a CPU; its controller asks for none.
        return max(1, int(resources.get("GPU" if use_gpu else "CPU", 0) // workers))
    finally:
        ray.shutdown()


def start_ray(ray: Any, workers: int, *, debug: bool) -> None:
    # Workers import the package that this process runs, also from a checkout that is not installed.
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, **common)
        return
    os.environ["PYTHONPATH"] = path
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # as ray_security has it, also where Ray was imported before
    ray.init(
        address="local",
        num_cpus=max(usable_cores(), workers),
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        **common,
    )


def quieten(ray: Any) -> None:
    """Ray's logs, and the pages that it prints when a host is lost, would drown our lines; --debug shows them."""
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray._private.worker.print_to_stdstream = lambda *arguments, **settings: None


def _trainer(ray: Any, recipe: Recipe, sizes: list[int], name: str, *, debug: bool) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from clae_dist.launchers.ray_local import LoopbackTorchConfig

    config = recipe.config
    folder = _folder(config)
    fetch_ends(folder)
    cluster = bool(os.environ.get("RAY_ADDRESS"))
    use_gpu = _use_gpu(config, ray.cluster_resources().get("GPU", 0), sizes[-1], cluster)
    scaling = ScalingConfig(num_workers=(sizes[0], sizes[-1]) if cluster else sizes[-1], use_gpu=use_gpu)
    settings: dict[str, Any] = {
        "train_loop_per_worker": _rank_main,
        "train_loop_config": {
            "config": {**flatten(config), "run_dir": url_of(folder) or str(folder)},
            "origins": dict(recipe.origins),
            "debug": debug,
            "name": name,
            "num_ends": len(read_ends(folder)),
        },
        "scaling_config": scaling,
        "torch_config": (TorchConfig if cluster else LoopbackTorchConfig)(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=int(config.guard.timeout_s)
        ),
        "run_config": RunConfig(
            name=name,
            storage_path=str(RunFolder(folder).ray),
            failure_config=FailureConfig(max_failures=config.launch.max_failures),
        ),
    }
    if not cluster:
        return TorchTrainer(**settings)
    try:
        from clae_dist.launchers.ray_elastic import Trainer, WorkingSizes
    except ImportError as error:
        raise ConfigError(
            f"Ray {ray.__version__} has no elastic policy that a cluster's run needs ({error}); pip install 'ray[train]>=2.60'."
        ) from None
    policy = WorkingSizes(scaling, sizes, RunFolder(folder).stop_file, config.launch.look_every_s)
    return Trainer(**settings, policy=policy)


def _use_gpu(config: Config, gpus: float, workers: int, cluster: bool) -> bool:
    """True if each worker gets one of `gpus`. Raises ConfigError if there are too few for all of them."""
    device = config.launch.device
    if device == "cpu" or (device == "auto" and not gpus):
        return False
    # A cluster's other GPUs may be away for the moment: Ray waits for them.
    if gpus < (1 if cluster else workers):
        where = "the Ray cluster" if cluster else "this machine"
        raise ConfigError(
            f"{where} has {gpus:g} GPU{'' if gpus == 1 else 's'} for {workers} ranks (launch.device is {device!r}); use "
            f"launch.workers={max(1, int(gpus))}, or ask for the CPU with launch.device=cpu."
        )
    return True


def _fit(ray: Any, recipe: Recipe, sizes: list[int], stop: _StopFile, *, debug: bool) -> Ending:
    config = recipe.config
    folder = _folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"ray-{os.getpid()}-{time.time_ns()}"
    trainer = _trainer(ray, recipe, sizes, name, debug=debug)
    result: dict[str, Exception] = {}

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # crosses the thread: handled below
            result["error"] = error

    # Beside the main thread, so that signals are ours and the workers' console can be shown meanwhile.
    thread = threading.Thread(target=fit, name="ray-fit", daemon=True)
    with ConsoleTail(folder, here=not os.environ.get("RAY_ADDRESS")) as tail:
        tail.wait_for("Ray's workers")
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            tail.show()
            stop.hand_on()
            if stop.asked and time.monotonic() > stop.asked_at + config.guard.stop_within_s + _GRACE_S:
                return Ending(
                    STOPPED,
                    f"the ranks were asked to stop and did not leave within {config.guard.stop_within_s:g} s "
                    "(guard.stop_within_s): they are ended. The same command resumes from the newest checkpoint.",
                )
    shutil.rmtree(RunFolder(folder).ray, ignore_errors=True)
    if "error" in result:
        if debug:
            raise result["error"]
        fetch_ends(folder)
        ends = read_ends(folder)
        code = ends[-1].code if ends and ends[-1].code in (MEMORY, NETWORK) else FAILED
        return Ending(code, f"{root_cause(result['error'])}. The same command resumes from the newest checkpoint.")
    ending = Ending(**json.loads(RayStore().take(name)))
    if ending.code in (OK, STOPPED) and not (url_of(folder) or RunFolder(folder).identity_file.exists()):
        raise ConfigError(
            f"run_dir is {str(folder)!r}, where the ranks have left nothing for this host; "
            "name a folder on storage that all hosts share."
        )
    return ending


def root_cause(error: BaseException) -> str:
    """The last line that says something, of the worker's own error where there is one."""
    failures = getattr(error, "worker_failures", None) or {}
    lines = [f"rank {rank}: {_last_line(str(failure))}" for rank, failure in sorted(failures.items())]
    return "; ".join(lines) or _last_line(str(error))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no reason given"


class _StopFile:
    """Inside, the first SIGINT, SIGTERM or SIGUSR1 makes the file that asks the ranks to save and leave.

    Once more, SIGINT and SIGTERM end at once; a scheduler may send its SIGUSR1 as often as it likes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.asked, self.asked_at = False, 0.0
        self._reason = ""  # of a request that is not in the bucket yet

    def __enter__(self) -> _StopFile:
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number != signal.SIGUSR1:
                raise KeyboardInterrupt
            return
        self.asked, self.asked_at = True, time.monotonic()
        self._reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._path.write_text(self._reason)
        print(f"{signal.Signals(number).name}: saving after this step, then leaving; once more ends at once.", flush=True)

    def hand_on(self) -> None:
        """Outside of the signal's handler: ask also the ranks that see the bucket alone."""
        if self._reason and url_of(self._path.parent):
            with suppress(OSError):  # the next call tries again
                ask_to_stop(self._path.parent, self._reason)
                self._reason = ""

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        with suppress(OSError):
            forget_stop(self._path.parent)
