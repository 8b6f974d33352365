#!/usr/bin/env bash
# Sets up the environment and runs every check: lint, format, types, import rules, shell scripts, tests.
#
#   ./launch/test.sh                    all of it (tests marked slow only where CI=true)
#   ./launch/test.sh -k gather          what follows goes to pytest
#
# Stops at the first check that fails. The last lines are pytest's own.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
echo "== environment"
env=$("$here/launch/env.sh" | tail -1)
export PATH=$env/bin:$PATH
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} # this checkout, wherever the environment points

check() {
  local heading=$1 start=$SECONDS
  shift
  printf '\n== %s: %s\n' "$heading" "$*"
  "$@" || { printf '== %s failed after %d s\n' "$heading" $((SECONDS - start)); exit 1; }
  printf '== %s: fine, %d s\n' "$heading" $((SECONDS - start))
}

# `python -m` rather than the scripts in bin: those begin with a line that cannot hold every path.
check lint python -m ruff check .
check format python -m ruff format --check .
check types python -m mypy
check "import rules" python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo
check "shell scripts" shellcheck launch/*.sh .ci/run

# Known vulnerabilities of what is installed: a list to read and no failure. It asks the package index about every package.
if [ "${CLAE_AUDIT:-}" = true ]; then
  printf '\n== vulnerabilities: pip-audit\n'
  if audit=$(timeout 600 python -m pip_audit --progress-spinner off 2>&1); then echo "none known"
  elif [[ $audit == *"known vulnerabilit"* ]]; then printf 'warning:\n%s\n' "$audit"
  else printf 'could not be asked for (is there a network?): %s\n' "${audit##*$'\n'}"; fi
fi

marks=()
if [ "${CI:-}" = true ]; then marks=(-m "slow or not slow"); fi
printf '\n== tests: pytest%s\n' "${*:+ $*}${marks:+ (slow ones too)}"
exec python -m pytest "${marks[@]}" "$@"
