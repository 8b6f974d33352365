#!/usr/bin/env bash
# Creates the environment that quickstart, tests and CI share, if it is missing, and prints its path as the last line:
#
#   source "$(./launch/env.sh | tail -1)/bin/activate"
#
# It lives in ${CLAE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/clae-dist}, keyed by a hash of what pyproject.toml asks for and of
# the Python version, so that a second checkout reuses it. An interrupted install is restarted (from pip's download cache).
# The `clae` command in it runs the checkout of the current folder; elsewhere, the checkout that ran env.sh last.
#
# CLAE_PYTHON names another Python; CLAE_FREE_GB (default 9) is the free space required for an install.
set -euo pipefail

case ${1:-} in
  "") ;;
  -h | --help) sed -n '2,/^set /{/^set /d; s/^#$//; s/^# //; p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "env: $1 is not an option; see --help." >&2; exit 2 ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
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
cache=${CLAE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/clae-dist}
mkdir -p "$cache" || fail "$cache cannot be created; set CLAE_CACHE to a writable folder."
cache=$(cd "$cache" && pwd)
env=$cache/env-$key

install() {
  local needed_gb=${CLAE_FREE_GB:-9} free_kb
  say "creating $env with $("$python" --version) (about 6 GB; 4 to 10 minutes the first time)"
  free_kb=$(df -Pk "$cache" | awk 'NR == 2 { print $4 }')
  [ "$free_kb" -ge $((needed_gb * 1000000)) ] ||
    fail "$cache has $((free_kb / 1000000)) GB free and the install needs $needed_gb; free some or set CLAE_CACHE to another disk."
  rm -rf "$env"
  "$python" -m venv "$env" || fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv."
  "$env/bin/python" -m pip install --quiet --retries 1 --upgrade pip >"$env/upgrade.log" 2>&1 ||
    say "pip could not upgrade itself; continuing with $("$env/bin/python" -m pip --version | cut -d ' ' -f 1-2) (log: $env/upgrade.log)"
  "$env/bin/python" - "$here/pyproject.toml" >"$env/requirements.txt" <<'PY'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], *sum(project["optional-dependencies"].values(), []), sep="\n")
PY
  say "installing: $(tr '\n' ' ' <"$env/requirements.txt")"
  # pip inherits the lock: should this script be killed, the next one waits until its pip is gone, and starts over then.
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

exec 9>"$cache/env-$key.lock"
flock -n 9 || { say "another process is checking or installing $env; waiting for it"; flock 9; }
if [ -e "$env/.complete" ] && "$env/bin/python" -c '' 2>/dev/null; then
  say "using $env"
else
  install
fi
replace() { cat >"$1.$$" && mv "$1.$$" "$1"; } # as a whole: another process may be reading it
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$here" | replace "$site/clae_dist.pth"
# A file of its own, with a guard: processes that multiprocessing spawns import it again.
replace "$env/bin/clae_main.py" <<'PY'
import os
import sys

if os.path.isfile("clae_dist/cli.py"):  # a checkout: run it, whichever checkout made this environment
    sys.path.insert(0, os.getcwd())
from clae_dist.cli import run

if __name__ == "__main__":
    run()
PY
# Not `#!$env/bin/python`: such a line can hold neither spaces nor a long path.
printf '#!/usr/bin/env bash\nexec %q %q "$@"\n' "$env/bin/python" "$env/bin/clae_main.py" | replace "$env/bin/clae.new"
chmod +x "$env/bin/clae.new" && mv "$env/bin/clae.new" "$env/bin/clae"
printf '%s\n' "$env"
