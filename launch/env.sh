#!/usr/bin/env bash
# Creates the environment that quickstart, tests and CI share, when it is missing, and prints its path as the last line:
#
#   source "$(./launch/env.sh | tail -1)/bin/activate"
#
# It lives in ${CLAE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/clae-dist}, keyed by a hash of what pyproject.toml asks for and of
# the Python version, so that a second checkout reuses it. An install that was interrupted is started over (from pip's
# own download cache). The `clae` command in it runs the checkout you stand in; elsewhere, the one that ran env.sh last.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${CLAE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/clae-dist}
say() { printf 'env: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

find_python() {
  local candidate
  for candidate in "${CLAE_PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    { [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1; } || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 found; install one (Debian: apt-get install python3 python3-venv) or name it in CLAE_PYTHON."
}

python=$(find_python)
# The key covers what is installed, not how ruff is configured: the same file with another lint rule is the same environment.
key=$("$python" - "$here/pyproject.toml" <<'PY'
import hashlib, json, sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
asked = [project["requires-python"], project["dependencies"], project["optional-dependencies"], sys.version]
print(hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12])
PY
)
env=$cache/env-$key

install() {
  say "creating $env with $("$python" --version) (about 6 GB; 4 to 10 minutes the first time)"
  local free_kb
  free_kb=$(df -Pk "$cache" | awk 'NR == 2 { print $4 }')
  [ "$free_kb" -gt 9000000 ] || fail "$cache has $((free_kb / 1000000)) GB free and the install needs 9; free some or set CLAE_CACHE to another disk."
  rm -rf "$env"
  "$python" -m venv "$env" || fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv."
  "$env/bin/python" -m pip install --quiet --upgrade pip >&2
  "$env/bin/python" - "$here/pyproject.toml" >"$env/requirements.txt" <<'PY'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], *sum(project["optional-dependencies"].values(), []), sep="\n")
PY
  say "installing: $(tr '\n' ' ' <"$env/requirements.txt")"
  "$env/bin/python" -m pip install --progress-bar off --requirement "$env/requirements.txt" >"$env/install.log" 2>&1 &
  local pip_pid=$! seconds=0
  trap 'kill "$pip_pid" 2>/dev/null; exit 130' INT TERM
  while kill -0 "$pip_pid" 2>/dev/null; do
    sleep 1; seconds=$((seconds + 1))
    [ $((seconds % 20)) -ne 0 ] || say "$seconds s: $(tail -n 1 "$env/install.log" | cut -c 1-100)"
  done
  trap - INT TERM
  wait "$pip_pid" || { tail -n 15 "$env/install.log" >&2; fail "pip failed (log: $env/install.log); the next run starts over."; }
  touch "$env/.complete"
}

mkdir -p "$cache"
exec 9>"$cache/env-$key.lock"
flock -n 9 || { say "another process is installing $env; waiting for it"; flock 9; }
if [ -e "$env/.complete" ] && "$env/bin/python" -c '' 2>/dev/null; then
  say "using $env"
else
  install
fi
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$here" >"$site/clae_dist.pth.$$" && mv "$site/clae_dist.pth.$$" "$site/clae_dist.pth"
cat >"$env/bin/clae.$$" <<EOF_CLAE
#!$env/bin/python
import os, sys
if os.path.isfile("clae_dist/cli.py"):  # a checkout: run it, whichever checkout made this environment
    sys.path.insert(0, os.getcwd())
from clae_dist.cli import main
if __name__ == "__main__":
    sys.exit(main())
EOF_CLAE
chmod +x "$env/bin/clae.$$" && mv "$env/bin/clae.$$" "$env/bin/clae"
printf '%s\n' "$env"
