"""`clae completion`."""

from __future__ import annotations

import argparse

from clae_dist.options import Parser

SUMMARY = "print a script for tab completion of commands, options, recipes and settings"
DESCRIPTION = """\
Prints a script that completes commands, options, recipes, keys of settings and their values. To install it:

  bash    clae completion bash > ~/.local/share/bash-completion/completions/clae      (or: source <(clae completion bash))
  zsh     clae completion zsh > DIR/_clae, with DIR in fpath before compinit
"""

_RECIPE, _SETTING, _EITHER = "_clae_recipe_file", "_clae_setting", "_clae_recipe_file_or_setting"
_PATHS = {
    **dict.fromkeys(("run", "subject", "runs", "step", "shards", "compare", "folder"), "directory"),
    **dict.fromkeys(("to", "study"), "file"),
}

_BASH = """\
_clae_values() {
  case "$1" in
%(values)s
  esac
}

# Bash splits words at "=", so that key, "=" and value may be words of their own.
_clae_setting() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} key=""
  if [[ $word == "=" ]]; then key=$before; word=""
  elif [[ $before == "=" ]]; then key=${COMP_WORDS[COMP_CWORD-2]}
  elif [[ $word == *=* ]]; then
    compgen -P "${word%%%%=*}=" -W "$(_clae_values "${word%%%%=*}")" -- "${word#*=}"
    return
  else
    compgen -W "%(keys)s" -- "$word"
    return
  fi
  case "$key" in
    %(paths)s) compgen -f -- "$word" ;;
    *) compgen -W "$(_clae_values "$key")" -- "$word" ;;
  esac
}

_clae_key() { compgen -W "%(keys)s" -- "$1" | sed 's/=$//'; }

_clae_recipe_file() {
  compgen -W "%(recipes)s" -- "$1"
  compgen -f -X '!*.y*ml' -- "$1"
  compgen -d -- "$1"
}

_clae_recipe_file_or_setting() {
  _clae_recipe_file "$1"
  _clae_setting "$1"
}

_clae_complete() {
  _shtab_clae "$@"
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
"""

_ZSH = """\
_clae_values() {
  case "$1" in
%(values)s
  esac
}

_clae_setting() {
  if compset -P '*='; then
    case "${IPREFIX%%%%=*}" in
      %(paths)s) _files ;;
      *) compadd -- $(_clae_values "${IPREFIX%%%%=*}") ;;
    esac
  else
    compadd -S '' -- %(keys)s
  fi
}

_clae_key() {
  local keys=(%(keys)s)
  compadd -- ${keys%%=}
}

_clae_recipe_file() {
  compadd -- %(recipes)s
  _files -g '*.(yaml|yml)'
}

_clae_recipe_file_or_setting() {
  _clae_recipe_file
  _clae_setting
}
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell")


def run(arguments: argparse.Namespace) -> int:
    import shtab

    parser = arguments.top_parser
    _mark(parser)
    preamble = (_BASH if arguments.shell == "bash" else _ZSH) % _words()
    script = shtab.complete(parser, arguments.shell, root_prefix="clae", preamble=preamble)
    print(script)
    if arguments.shell == "bash":
        print("complete -o bashdefault -F _clae_complete clae")
    return 0


def _words() -> dict[str, str]:
    """Keys, values and recipes as they are written into the script."""
    from clae_dist.explain import explanations
    from clae_dist.home import PATHS
    from clae_dist.methods import KNOWN
    from clae_dist.objectives import names
    from clae_dist.recipe import recipe_names

    known = explanations()
    choices = {key: " ".join(one.choices) for key, one in known.items() if one.choices}
    choices["method.name"] = " ".join(KNOWN)
    choices["objective.name"] = " ".join(names())
    choices["model.encoder"] = "small_resnet torchvision/resnet18 torchvision/resnet50 timm/"
    return {
        "keys": " ".join(f"{key}=" for key in known),
        "values": "\n".join(f'    {key}) echo "{words}" ;;' for key, words in choices.items()),
        "paths": "|".join(PATHS),
        "recipes": " ".join(recipe_names()),
    }


def _mark(parser: argparse.ArgumentParser) -> None:
    """Tell shtab how the arguments of every command are completed."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark(command)
        function = {
            "overrides": _SETTING,
            "config": _EITHER if action.nargs == "?" else _RECIPE,
            "explain": "_clae_key",
            **{name: "_shtab_compgen_dirs" if kind == "directory" else "_shtab_compgen_files" for name, kind in _PATHS.items()},
        }.get(action.dest)
        if function:
            zsh = {"_shtab_compgen_dirs": "_files -/", "_shtab_compgen_files": "_files"}.get(function, function)
            action.complete = {"bash": function, "zsh": zsh}  # type: ignore[attr-defined]
