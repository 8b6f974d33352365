"""argparse for `clae` and `data_prep`: an option given twice is refused, and errors show the subcommand's usage."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from clae_dist.errors import ConfigError
from clae_dist.redact import redact_text, redact_word
from clae_dist.staging import copy_folder, is_url

QUOTE = "a shell makes several arguments of unquoted braces and stars: quote those, as in 'x-{000000..000099}.tar'"


def user_path(text: str) -> Path:
    """The path that an argument names, with home folders in place of `~` and `~user`: no shell expands `--to=~/x`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: the home folder is not known on this machine; write the full path") from None


def run_path(text: str) -> Path:
    """The folder of a run that an argument names; of one on object storage, the folder with its copies."""
    try:
        return copy_folder(text) if is_url(text) else user_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_or_name(text: str) -> str:
    """A run on object storage as `run_path` has it; anything else, such as a folder or timm/NAME, as it is."""
    return str(run_path(text)) if is_url(text) else text


def open_standard_streams() -> None:
    """Open the null device for streams closed by a shell (`>&-`); otherwise the next opened file would become stdout."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


class _StoreOnce(argparse._StoreAction):
    """Refuse an option that is given twice, of which argparse would silently use the last value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given: set[str] = vars(namespace).setdefault("_given", set())
        if self.option_strings and self.dest in given:
            parser.error(f"{option_string} is given twice; keep one ({QUOTE}).")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose subparsers are also of this class."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self.set_defaults(parser=self)  # replaced by that of the subcommand

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and the message without secrets, as it may quote the command line."""
        super().error(redact_text(message))

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """Exit with code 2 because of `rest`, arguments that the command does not have."""
        positionals = [action.metavar for action in self._actions if not action.option_strings and action.metavar]
        one = f"; {self.prog} takes one {positionals[-1]}, and {QUOTE}" if positionals else ""
        words = " ".join(map(redact_word, rest))
        self.error(f"unrecognized arguments: {words}{'' if any(word.startswith('-') for word in rest) else one}")
