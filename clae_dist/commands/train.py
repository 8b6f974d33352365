"""`clae train`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from clae_dist.commands.arguments import add_config, add_launcher, add_trust
from clae_dist.commands.settings import check_credentials, extended, resolved, set_option
from clae_dist.errors import STOPPED
from clae_dist.escape import say
from clae_dist.options import Parser
from clae_dist.redact import redact_text
from clae_dist.staging import shown_path

if TYPE_CHECKING:
    from clae_dist.recipe import Recipe

SUMMARY = "pretrain an encoder, or resume an interrupted run from its newest checkpoint"


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    add_launcher(parser, "ray", "torchrun", "local")
    parser.add_argument(
        "--extend",
        metavar="epochs=N",
        type=_epochs,
        help="continue the finished run CONFIG (its folder) until N epochs, as a new run RUN-epochsN beside it that names it; "
        "the learning rate follows the schedule of N epochs at once, which is a warm restart unless it is constant",
    )
    add_quiet(parser)
    add_trust(parser)


def add_quiet(parser: Parser) -> None:
    """Add --quiet."""
    parser.add_argument("--quiet", action="store_true", help="print only errors and the end; RUN/console.log has all lines")


def _epochs(text: str) -> str:
    key, _, value = text.partition("=")
    if key != "epochs" or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not epochs=N, the length of the extended run, such as epochs=200")
    return value


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.launchers.output import lasting_output

    with lasting_output(), exit_at_signals() as exit_if_asked:  # until a launcher listens
        set_option(arguments, "launcher", "launch.launcher")
        return train(extended(arguments) if arguments.extend else resolved(arguments), arguments, exit_if_asked)


def train(recipe: Recipe, arguments: argparse.Namespace, exit_if_asked: Callable[[], None]) -> int:
    """Start or resume the run of these settings, and return its exit code. `arguments` has quiet, trust and debug."""
    check_credentials(recipe)
    from clae_dist.launchers import claim, start

    if arguments.quiet:
        from clae_dist.launchers.terminal import QUIET

        os.environ[QUIET] = "1"  # inherited by the ranks
    if os.environ.get("LOCAL_RANK", "0") == "0" and (problem := claim(recipe.config, trust=arguments.trust)):
        text = f"clae: the run could not be recorded as yours ({problem}): opening it later may need --trust."
        say(text, file=sys.stderr)
    ending = start(recipe, debug=arguments.debug, before_ranks=exit_if_asked)
    if ending.message:
        say(redact_text(f"clae: {ending.message}"), file=sys.stderr)
    elif ending.code == 0 and os.environ.get("RANK", "0") == "0":
        say(f"saved in {shown_path(recipe.config.folder)}", flush=True)
    return ending.code


@contextmanager
def exit_at_signals() -> Iterator[Callable[[], None]]:
    """Inside, SIGTERM and SIGUSR1 exit with the code that asks a scheduler to start the command again.

    Yields a function that exits, too, if a signal has come: the SystemExit that a signal handler raises is lost if it
    interrupts code that catches everything, or a callback.
    """
    received: list[int] = []

    def exit_if_asked() -> None:
        if received:
            sys.exit(STOPPED)

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        print(f"clae: {signal.Signals(number).name} before training began; the same command starts it.", file=sys.stderr)
        sys.exit(STOPPED)

    main_thread = threading.current_thread() is threading.main_thread()
    signals = [one for one in (signal.SIGTERM, signal.SIGUSR1) if main_thread and signal.getsignal(one) is signal.SIG_DFL]
    for number in signals:
        signal.signal(number, handle)
    try:
        yield exit_if_asked
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
