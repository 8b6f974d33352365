#!/usr/bin/env bash
# Sets up the environment and runs every check: lint, format, types, import rules, shell scripts, tests.
#
#   ./launch/test.sh                    all checks; slow tests only if CI=true, the longest only with `-m long` or `-m chaos`
#   ./launch/test.sh -k gather          arguments are passed to pytest
#
# Stops at the first check that fails. The last lines are pytest's own.
set -euo pipefail

case ${1:-} in
  -h | --help) sed -n '2,/^set /{/^set /d; s/^#$//; s/^# //; p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
echo "== environment"
env=$("$here/launch/env.sh" | tail -1)
export PATH=$env/bin:$PATH
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} # this checkout, wherever the environment points

# A new machine of CI sets itself up; elsewhere the tests that need these are skipped with a message that names what to install.
if [ "${CI:-}" = true ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  missing=()
  for pair in ip:iproute2 nsenter:util-linux slurmctld:slurm-wlm munged:munge psql:postgresql pgrep:procps \
    chromium:chromium; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    echo "== installing what slow tests need: ${missing[*]}"
    apt-get update -qq || true
    for package in "${missing[@]}"; do
      DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$package" ||
        echo "== $package cannot be installed: the tests that need it are skipped"
    done
  fi
fi

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
check "shell scripts" shellcheck -x launch/*.sh launch/slurm.sbatch .ci/run

# Known vulnerabilities of installed packages are listed and are not a failure: not every mirror of the package index can answer.
if [ "${CLAE_AUDIT:-}" = true ]; then
  printf '\n== vulnerabilities: pip-audit\n'
  { timeout 600 python -m pip_audit --progress-spinner off --format json 2>/dev/null || true; } | python -c '
import json, sys
text = sys.stdin.read()
packages = json.loads(text)["dependencies"] if text.startswith("{") else []
asked = [package for package in packages if "vulns" in package]
for package in asked:
    for known in package["vulns"]:
        fixed = ", ".join(known["fix_versions"]) or "no version yet"
        print("warning: {} {}: {}, fixed in {}".format(package["name"], package["version"], known["id"], fixed))
print("{} of {} packages were found in the index and checked".format(len(asked), len(packages)))'
fi

marks=()
if [ "${CI:-}" = true ]; then marks=(-rs -m "not long and not chaos"); fi
printf '\n== tests: pytest%s\n' "${*:+ $*}${marks:+ (slow ones too)}"
# Two workers; tests/grouping.py shares the tests between them. `-n 0` runs all of them in one process.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${marks[@]}" "$@"
