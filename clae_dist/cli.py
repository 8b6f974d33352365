"""`clae COMMAND …`: find the command, parse its arguments, run it, and turn errors into one line and an exit code.

Nothing slow is imported here, nor by a command before its arguments and settings are checked.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

from clae_dist import __version__
from clae_dist.commands import NAMES, module_of
from clae_dist.errors import INTERRUPTED, STOPPED, ClaeError, exit_code, exit_codes_help
from clae_dist.escape import say, shown_lines
from clae_dist.lifetime import dedicate_process, end, end_with_parent, has_forked
from clae_dist.options import Parser, open_standard_streams
from clae_dist.redact import redact_text
from clae_dist.staging import url_of
from clae_dist.storage import storage_error

_ALL_RANKS_CHECKED_S = 2.5


def make_parser() -> Parser:
    """The parser of `clae`; in its namespace, `command` is the command's name and `parser` the command's parser."""
    parser = Parser(
        prog="clae",
        description="Contrastive learning with adversarial examples (CLAE) on a global batch.",
        epilog=exit_codes_help(),
    )
    parser.set_defaults(top_parser=parser)
    parser.add_argument("--version", action="version", version=f"clae-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in NAMES:
        module = module_of(name)
        description = getattr(module, "DESCRIPTION", module.SUMMARY)
        command = commands.add_parser(name, help=module.SUMMARY, description=description, epilog=exit_codes_help())
        command.add_argument("--debug", action="store_true", help="print tracebacks and the launcher's own log")
        module.add_arguments(command)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command. Exits with code 2 and the command's usage if they cannot be understood."""
    arguments, rest = make_parser().parse_known_args(argv)
    if rest:  # argparse accepts no positional arguments after an option
        if not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in rest):
            arguments.parser.refuse(rest)
        arguments.overrides += rest
    return arguments


def _check_ranks(command: str) -> None:
    if any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")) and command != "config":
        from clae_dist.launchers.environment import check_ranks

        check_ranks()


def _copies(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """The copies of the runs on object storage that the command reads."""
    named = [getattr(arguments, name, None) or [] for name in ("run", "runs", "compare", "encoder", "subject")]
    paths = [Path(path) for value in named for path in (value if isinstance(value, list) else [value])]
    folders = [path for path in paths if path.is_absolute() and url_of(path)]
    if not folders:
        return nullcontext()
    from clae_dist.runs.copies import copied

    return copied(folders, say)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. A user's mistake is one readable line; --debug adds the traceback."""
    arguments = parse(argv)
    try:
        _check_ranks(arguments.command)
        with _copies(arguments):
            code: int = module_of(arguments.command).run(arguments)
        return code
    except KeyboardInterrupt:
        print("clae: interrupted by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as raised:
        if arguments.debug:
            print(shown_lines(redact_text(traceback.format_exc())), end="", file=sys.stderr)
        error = storage_error(raised) or raised
        code = exit_code(error)
        name, hint = "", ""
        if not isinstance(error, ClaeError):
            name, hint = f"{type(error).__name__}: ", "" if arguments.debug else " (--debug prints the traceback)"
        say(redact_text(f"clae: {name}{error}{hint}"), file=sys.stderr)
        return code


def run() -> NoReturn:
    """Run `main` and end the process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks of torchrun would survive a kill of torchrun
        end_with_parent(os.getppid())
    dedicate_process()
    open_standard_streams()
    code = main()
    if "WORLD_SIZE" in os.environ:  # a rank of torchrun
        from clae_dist.world import leave, told

        if code == STOPPED and ":" in os.environ.get("CLAE_NODES", ""):
            # When a host joins, one host's agent asks all ranks to leave. Ranks that have not noticed yet would take these
            # for finished and end the rendezvous; they check once a second.
            time.sleep(_ALL_RANKS_CHECKED_S)
        leave(told(code))
    if has_forked():
        from clae_dist.world import leave

        leave(code)
    end(code)
