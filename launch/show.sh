# shellcheck shell=bash
# How scripts print a command before they run it, and numbers; sourced by them, not run.

count() { # count NUMBER NOUN: "1 rank", "2 ranks", "1:2 hosts"
  if [ "$1" = 1 ]; then printf '1 %s' "$2"; else printf '%s %ss' "$1" "$2"; fi
}

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
