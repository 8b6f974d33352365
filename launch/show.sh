# shellcheck shell=bash
# How scripts print a command before they run it; sourced by them, not run.

show() { # show COMMAND …: as it could be typed, but without the secrets of URLs and of pipe: commands (clae_dist/redact.py)
  local probe=${python:-} shown=() place=0 word
  [ -n "$probe" ] && [ -x "$probe" ] || probe=python3
  mapfile -d '' -t shown < <(printf '%s\0' "$@" | "$probe" -I -S "$(dirname "${BASH_SOURCE[0]}")/../clae_dist/redact.py")
  printf '$'
  for word in "$@"; do
    if [ "${shown[$place]-}" = "$word" ]; then printf ' %q' "$word"; else printf ' %s' "${shown[$place]-…}"; fi
    place=$((place + 1))
  done
  printf '\n'
}
