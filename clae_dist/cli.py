"""`clae …`: parse, call, print, exit code; nothing else."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from clae_dist.arguments import parser as make_parser
from clae_dist.escape import say, shown_lines
from clae_dist.lifetime import end_with_parent
from clae_dist.options import open_standard_streams
from clae_dist.redact import redact_text

if TYPE_CHECKING:
    from clae_dist.config import Config
    from clae_dist.runs.trust import Permission

_STOPPED = 75  # training.guard.STOPPED, which is torch's time away
_ALL_HAVE_LOOKED_S = 2.5
_CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_AUTH")


def _resolve(arguments: argparse.Namespace, defaults: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """The settings of recipe, command line and environment; `defaults` come before the command line's."""
    from clae_dist.recipe import resolve

    config, origins = resolve(arguments.config, arguments.overrides, defaults)
    config = _of_trusted_file(arguments, config, origins)
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    if store and not config.tracking.uri:
        config = replace(config, tracking=replace(config.tracking, uri=store))
        origins["tracking.uri"] = "MLFLOW_TRACKING_URI"
    return config, origins


def _option(arguments: argparse.Namespace, option: str, key: str) -> None:
    """Makes an option that stands for a setting one of the overrides. Raises ConfigError where both are given."""
    from clae_dist.config import ConfigError

    value = getattr(arguments, option)
    if value is None:
        return
    if any(text.startswith(f"{key}=") for text in arguments.overrides):
        raise ConfigError(f"--{option} and {key}= are one setting, and both are given; keep one of them.")
    arguments.overrides.append(f"{key}={value}")


def _permission(arguments: argparse.Namespace) -> Permission:
    from clae_dist.runs.trust import Permission

    return Permission(arguments.trust, os.environ.get("MLFLOW_TRACKING_URI", ""))


def _of_trusted_file(arguments: argparse.Namespace, config: Config, origins: dict[str, str]) -> Config:
    """The settings as they may be acted on by a command that only looks: RUN/config.yaml is data there, as in all that opens
    a run, unless the command line names the value."""
    from pathlib import Path

    if arguments.command not in ("doctor", "dry-run") or arguments.trust:
        return config
    path = Path(arguments.config)
    from clae_dist.runs.folder import CONFIG_FILE

    if CONFIG_FILE not in (path.name, path.resolve().name):
        return config
    from clae_dist.runs.trust import check_settings

    named = {key for key, origin in origins.items() if origin == "command line"}
    return check_settings(path, config, named, os.environ.get("MLFLOW_TRACKING_URI", ""))


def _check_credentials(config: Config, origins: dict[str, str]) -> None:
    """Raises ConfigError where MLflow's client would send the environment's credentials to another server than the
    environment's, which a recipe names."""
    from clae_dist.config import ConfigError
    from clae_dist.data.urls import uri_without_secrets

    store, uri, origin = os.environ.get("MLFLOW_TRACKING_URI", ""), config.tracking.uri, origins["tracking.uri"]
    credentials = [name for name in _CREDENTIALS if os.environ.get(name)]
    named_here = origin in ("command line", "MLFLOW_TRACKING_URI") or not uri.startswith(("http:", "https:"))
    shown, own = uri_without_secrets(uri), uri_without_secrets(store)
    if store and credentials and not named_here and shown != own and config.tracking.name != "none":
        raise ConfigError(
            f"tracking.uri is {shown!r} ({origin}), but {credentials[0]} in the environment is for MLFLOW_TRACKING_URI, "
            f"{own!r}, and would be sent; unset one of them, or name the server on the command line (tracking.uri={shown})."
        )


def _train(arguments: argparse.Namespace) -> int:
    from clae_dist.launchers.output import lasting_output

    if arguments.quiet:
        from clae_dist.launchers.terminal import QUIET

        os.environ[QUIET] = "1"  # for the ranks, too
    with lasting_output(), _leaving_at_signals() as leave_if_asked:  # until a launcher listens
        return _start(arguments, leave_if_asked)


@contextmanager
def _leaving_at_signals() -> Iterator[Callable[[], None]]:
    """Inside, what would kill this process ends it with the exit code that asks a scheduler for another start.

    Yields a function that ends it, too, if a signal has come: the exit that a handler raises is lost where it interrupts code
    that catches everything, or a callback.
    """
    received: list[int] = []

    def leave_if_asked() -> None:
        if received:
            sys.exit(_STOPPED)

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        print(f"clae: {signal.Signals(number).name} before training began; the same command starts it.", file=sys.stderr)
        sys.exit(_STOPPED)

    here = threading.current_thread() is threading.main_thread()
    heard = [number for number in (signal.SIGTERM, signal.SIGUSR1) if here and signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, leave)
    try:
        yield leave_if_asked
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _start(arguments: argparse.Namespace, leave_if_asked: Callable[[], None]) -> int:
    from clae_dist.launchers import claim, start

    _option(arguments, "launcher", "launch.launcher")
    config, origins = _resolve(arguments)
    _check_credentials(config, origins)
    if os.environ.get("LOCAL_RANK", "0") == "0" and (problem := claim(config, arguments.trust)):
        say(f"clae: the run could not be noted as yours ({problem}): opening it later may need --trust.", file=sys.stderr)
    ending = start(config, origins, arguments.debug, leave_if_asked)
    if ending.message:
        say(redact_text(f"clae: {ending.message}"), file=sys.stderr)
    elif ending.code == 0 and os.environ.get("RANK", "0") == "0":
        say(f"saved in {config.folder}", flush=True)
    return ending.code


def _config(arguments: argparse.Namespace) -> int:
    from clae_dist.config.sharing import shareable
    from clae_dist.recipe import to_yaml

    config, origins = _resolve(arguments)
    print(to_yaml(shareable(config), origins), end="")
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    from clae_dist.launchers.dry_run import dry_run

    _option(arguments, "launcher", "launch.launcher")
    config, origins = _resolve(arguments)
    ending = dry_run(config, origins, arguments.debug)
    say(
        redact_text(f"clae: {ending.message}" if ending.code else f"dry run passed: {ending.message}"),
        file=sys.stderr if ending.code else sys.stdout,
    )
    return ending.code


def _evaluate(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import evaluate

    evaluate(arguments.run, shards=arguments.shards, permission=_permission(arguments))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import report

    report(arguments.run, arguments.compare, shards=arguments.shards, permission=_permission(arguments))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import export

    export(arguments.run, arguments.to, permission=_permission(arguments))
    return 0


def _checkpoints(arguments: argparse.Namespace) -> int:
    from clae_dist.config import ConfigError
    from clae_dist.runs.checkpoint.listing import export_checkpoint, say_checkpoints
    from clae_dist.runs.trust import check_folder

    if (arguments.export is None) != (arguments.to is None):
        raise ConfigError("--export [STEP] and --to FILE go together; one of them is missing.")
    check_folder(arguments.run, _permission(arguments))
    if arguments.export is None:
        return say_checkpoints(arguments.run, arguments.verify, arguments.json, print if arguments.json else say)
    say(f"wrote {export_checkpoint(arguments.run, arguments.export, arguments.to)}")
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from clae_dist.config import ConfigError
    from clae_dist.parity.run import DEMO, parity

    for flag in ("world_size", "steps", "rows"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}; use at least 1.")
    if arguments.config and "=" in arguments.config and not os.path.exists(arguments.config):
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    _option(arguments, "backend", "parallel.backend")
    config, origins = _resolve(arguments, () if arguments.config else DEMO)
    ending = parity(config, origins, arguments.world_size, arguments.rows, arguments.steps, arguments.json)
    if ending.message:
        print(redact_text(ending.message), file=sys.stderr if ending.message.startswith("clae: ") else sys.stdout)
    return ending.code


def _replay(arguments: argparse.Namespace) -> int:
    from clae_dist.launchers.replay import replay_step

    ending = replay_step(arguments.step, arguments.shards, _permission(arguments))
    print(redact_text(ending.message))
    return ending.code


def _bench(arguments: argparse.Namespace) -> int:
    from clae_dist.bench import run_bench
    from clae_dist.config import ConfigError

    for option, value in (
        ("SHARDS", arguments.shards),
        ("--images-per-s", arguments.images_per_s),
        ("--split", arguments.split),
    ):
        if value and arguments.bench != "data":
            raise ConfigError(
                f"{option} is {value}, which `clae bench {arguments.bench}` does not use; only `clae bench data` does."
            )

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    wanted = (arguments.bench, arguments.quick, arguments.json)
    if arguments.bench != "data":
        return run_bench(*wanted, print, progress)
    of_data = {"shards": arguments.shards, "rate": arguments.images_per_s, "split": arguments.split or "train"}
    return run_bench(*wanted, print, progress, **of_data)


def _doctor(arguments: argparse.Namespace) -> int:
    from clae_dist.doctor import run_doctor

    config = _resolve(arguments)[0] if arguments.config else None
    return run_doctor(config, lambda text: say(redact_text(text)))


_COMMANDS = {
    "train": _train,
    "config": _config,
    "dry-run": _dry_run,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "checkpoints": _checkpoints,
    "parity": _parity,
    "replay": _replay,
    "bench": _bench,
    "doctor": _doctor,
}


def _check_ranks(command: str) -> None:
    if any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")) and command != "config":
        from clae_dist.launchers.environment import check_ranks

        check_ranks()


def run() -> NoReturn:
    """The program: `main`, and the end of the process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun lets its ranks live on when it is killed itself
        end_with_parent(os.getppid())
    open_standard_streams()
    code = main()
    if "WORLD_SIZE" in os.environ:  # torchrun's rank
        from clae_dist.world import leave, told

        if code == _STOPPED and ":" in os.environ.get("CLAE_NODES", ""):
            # For a host that comes, one host's agent asks all ranks to leave. Those that still take theirs to have finished
            # would end the meeting: they look once a second.
            time.sleep(_ALL_HAVE_LOOKED_S)
        leave(told(code))
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. A user's mistake is one readable line, with --debug its traceback, too."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no settings after an option
        if not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in rest):
            arguments.parser.refuse(rest)
        arguments.overrides += rest
    try:
        _check_ranks(arguments.command)
        return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        print("clae: ended by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        from clae_dist.errors import UNEXPECTED, exit_code
        from clae_dist.storage import storage_error

        code = exit_code(error)
        if arguments.debug:
            print(shown_lines(redact_text(traceback.format_exc())), end="", file=sys.stderr)
        hint = "" if code != UNEXPECTED or arguments.debug else " (--debug shows where)"
        name = f"{type(error).__name__}: " if code == UNEXPECTED else ""
        say(redact_text(f"clae: {name}{storage_error(error) or error}{hint}"), file=sys.stderr)
        return code
