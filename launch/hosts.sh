# shellcheck shell=bash
# Functions that the scripts for several hosts share. Sourced by them, not run.

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo "hosts.sh has the functions that torchrun.sh, ray-cluster.sh and slurm.sbatch share; it does nothing by itself. See their --help."
  case ${1:-} in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/show.sh
source "$here/launch/show.sh"
script=$(basename "$0" .sh)
say() { printf '%s: %s\n' "$script" "$*"; }
wrong() { printf '%s: %s\n' "$script" "$*" >&2; exit 2; }

whole() { # whole OPTION VALUE: wrong unless VALUE is a positive integer
  case $2 in "" | *[!0-9]* | 0*) wrong "$1 is '$2'; use an integer from 1." ;; esac
}

split_address() { # split_address WHAT HOST[:PORT] DEFAULT_PORT: sets host and port; an IPv6 address with a port has brackets
  port=$3
  case $2 in
    \[*\]:*) host=${2#\[} host=${host%\]:*} port=${2##*\]:} ;;
    \[*\]) host=${2#\[} host=${host%\]} ;;
    *:*:*) host=$2 ;;
    *:*) host=${2%:*} port=${2##*:} ;;
    *) host=$2 ;;
  esac
  [ -n "$host" ] || wrong "$1 is '$2', which names no host."
  whole "the port of $1" "$port"
  [ "$port" -le 65535 ] || wrong "the port of $1 is $port; use 1 to 65535."
}

with_port() { # with_port HOST PORT: as a URL writes it, an IPv6 address in brackets
  case $1 in *:*) printf '[%s]:%s\n' "$1" "$2" ;; *) printf '%s:%s\n' "$1" "$2" ;; esac
}

take_setting() { # take_setting WORD: CONFIG, then settings
  case $1 in
    -*) wrong "$1 is not an option; see --help." ;;
    *=*) settings+=("$1") ;;
    *) [ -z "$config" ] || wrong "$1 is a second recipe beside $config; settings are written key=value."
      config=$1 ;;
  esac
}

check_config() {
  [ -n "$config" ] || wrong "no recipe was named; try configs/cifar10/clae.yaml, or see --help."
  [ -f "$config" ] || wrong "$config is no file here ($PWD); every host needs the recipe at the same path."
}

find_env() { # sets python and the environment of every command; dry: nothing is installed
  if [ -n "${CLAE_ENV:-}" ]; then
    [ -x "$CLAE_ENV/bin/python" ] || wrong "CLAE_ENV is $CLAE_ENV, which has no bin/python; name an environment that has this package's dependencies."
    env=$CLAE_ENV
  elif [ -n "${dry:-}" ]; then
    env=ENVIRONMENT
  else
    env=$("$here/launch/env.sh" | tail -1) || wrong "the environment could not be created; see the reason above."
  fi
  python=$env/bin/python
  export PATH=$env/bin:$PATH
  export PYTHONSAFEPATH=1 # this checkout, not the one that the caller stands in
  export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
}

find_route() { # find_route HOST [WAY_OUT]: sets address, interface and at_head ("yes" where HOST is this machine)
  local found probe=$python
  [ -x "$probe" ] || probe=python3
  if ! found=$("$probe" -m clae_dist.launchers.route "$1"); then
    [ -n "${dry:-}" ] || wrong "${2:+$2: }$found"
    say "$found A dry run needs none: ADDRESS and INTERFACE are this host's on the way to $1."
    found="ADDRESS INTERFACE no"
  fi
  # shellcheck disable=SC2034 # for the script that sources this one
  read -r address interface at_head <<<"$found"
  if [ -n "${chosen_interface:-}" ]; then
    say "interface: $chosen_interface (--interface; the route to $1 would be $interface)"
    interface=$chosen_interface
  else
    say "interface: $interface, address $address (this host's way to $1)"
  fi
}
