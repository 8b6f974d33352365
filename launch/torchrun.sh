#!/usr/bin/env bash
# Trains on several hosts under torchrun. Start the same line on every host.
set -euo pipefail
# shellcheck source=launch/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

usage() {
  cat <<'TEXT'
usage: ./launch/torchrun.sh --nodes N|MIN:MAX --head HOST[:PORT] [options] CONFIG [key=value …]

Start the same line on every host, in any order; they meet at HOST, one of them. CONFIG, the shards and run_dir must be at the
same path on all.

  --nodes N            hosts; with MIN:MAX the run continues with fewer hosts when some are lost, from the newest checkpoint, and
                       uses hosts that return. Every number of ranks from MIN to MAX hosts must divide the batch: it is checked.
                       A host that ends two starts in a row without a new checkpoint between is excluded
  --gpus-per-node K    ranks on each host, one per GPU (default: the GPUs that torch sees; 1 without GPUs)
  --ranks-per-node K   the same for hosts without GPUs
  --head HOST[:PORT]   rendezvous (default port 29500); not needed with --nodes 1
  --id NAME            of the rendezvous, if several share a HOST:PORT (default: clae)
  --node-rank R        static rendezvous: this is host R of N (0 is HOST). Hosts are not replaced, ranks not restarted
  --max-restarts N     restarts of the ranks after a failure (default 3, with MIN:MAX one more for each host that may be left
                       out; 0 with --node-rank)
  --wait-s S           seconds that hosts wait for each other (default 600)
  --interface NAME     network for the ranks (default: by the route to HOST)
  --dry-run            print the command for this host without running it

SIGTERM, SIGUSR1 or Ctrl-C: all ranks of all hosts save and exit with code 75; the same line resumes from there.
CLAE_ENV names a Python environment to use instead of the one that launch/env.sh makes.
exit codes: those of `clae` (see clae --help): 0 done, 2 a setting, 3 data, 4 ranks failed more often than --max-restarts or
twice in the same way (7: out of memory, 8: the network), 75.
TEXT
}

nodes="" ranks="" head="" id=clae node_rank="" restarts="" wait_s=600 chosen_interface="" dry="" config="" settings=()
trap 'say "SIGUSR1: nothing had begun"; exit 75' USR1 # until there are ranks to ask
while [ $# -gt 0 ]; do
  case $1 in
    --nodes | --gpus-per-node | --ranks-per-node | --head | --id | --node-rank | --max-restarts | --wait-s | --interface)
      [ -n "${2:-}" ] || wrong "$1 needs a value; see --help."
      case $1 in
        --nodes) nodes=$2 ;;
        --gpus-per-node | --ranks-per-node) whole "$1" "$2"; ranks=$2 ;;
        --head) head=$2 ;;
        --id) id=$2 ;;
        --node-rank) node_rank=$2 ;;
        --max-restarts) restarts=$2 ;;
        --wait-s) whole "$1" "$2"; wait_s=$2 ;;
        --interface) chosen_interface=$2 ;;
      esac
      shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) take_setting "$1"; shift ;;
  esac
done
[ -n "$nodes" ] || wrong "--nodes is missing: how many hosts, such as 2, or 2:4 for any number from 2 to 4."
whole --nodes "${nodes%%:*}"; whole --nodes "${nodes##*:}"
[ "${nodes%%:*}" -le "${nodes##*:}" ] || wrong "--nodes is $nodes; the smaller number comes first."
[ "$nodes" != 1 ] || head=${head:-127.0.0.1}
[ -n "$head" ] || wrong "--head is missing: the HOST[:PORT] where the $nodes hosts meet, one of them."
split_address --head "$head" 29500
if [ -n "$node_rank" ]; then
  case $nodes in *:*) wrong "--node-rank is for a fixed number of hosts, but --nodes is $nodes; leave one of them out." ;; esac
  case $node_rank in *[!0-9]*) wrong "--node-rank is $node_rank; use 0 to $((nodes - 1))." ;; esac
  [ "$node_rank" -lt "$nodes" ] || wrong "--node-rank is $node_rank; $nodes hosts are 0 to $((nodes - 1))."
  [ "${restarts:-0}" = 0 ] || wrong "--max-restarts is $restarts, which static rendezvous (--node-rank) cannot do; leave one of them out."
fi
case ${restarts:-0} in *[!0-9]*) wrong "--max-restarts is $restarts; use 0 or more." ;; esac
check_config
find_env
find_route "$host"
if [ -z "$ranks" ]; then
  if [ "$env" = ENVIRONMENT ]; then
    ranks=RANKS
  else
    ranks=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    say "ranks: $ranks on this host (one a GPU that torch sees, 1 without; --gpus-per-node or --ranks-per-node says otherwise)"
  fi
fi

spare=$((${nodes##*:} - ${nodes%%:*})) # hosts that the run can do without
variables=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface" CLAE_NODES="$nodes" CLAE_AT_HEAD="$at_head")
# Not left to torchrun: host names need not resolve, and a host cannot always tell whether HOST is itself.
run=("$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks" --local-addr="$address")
if [ -n "$node_rank" ]; then
  run+=(--rdzv-backend=static --node-rank="$node_rank" --master-addr="$host" --master-port="$port" --max-restarts=0)
else
  is_host=0
  [ "$at_head" = no ] || is_host=1
  run+=(--rdzv-backend=c10d --rdzv-endpoint="$(with_port "$host" "$port")" --rdzv-id="$id" --max-restarts="${restarts:-$((3 + spare))}"
    --rdzv-conf="is_host=$is_host,timeout=$wait_s,join_timeout=$wait_s,last_call_timeout=10")
fi
# A store for each start: in the rendezvous's, ranks find the addresses of earlier ones, and a host that joins later waits forever.
[ -n "$node_rank" ] || variables+=(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
run+=(--module clae_dist train "$config" --launcher torchrun ${settings[@]+"${settings[@]}"})
say "$(count "$nodes" host) with $(count "$ranks" rank) each, rendezvous at $(with_port "$host" "$port")"
show env PYTHONPATH="$PYTHONPATH" "${variables[@]}" "${run[@]}"
if [ -n "$dry" ]; then
  say "dry run: nothing was run. The other hosts run the same, with their own interface and address, and is_host=1 on $host alone."
  exit 0
fi

if [ "$spare" -gt 0 ] && [ "$at_head" = no ]; then # the head has the rendezvous
  code=0
  CLAE_NODES=$nodes "$python" -m clae_dist.launchers.exclusion join "$config" ${settings[@]+"${settings[@]}"} || code=$?
  [ "$code" -ne 4 ] || exit 4
fi

# Ranks that end for good (done, stopped, a user's mistake) leave their exit code here: torchrun would start them again.
ending=$(mktemp)
agent="" asking="" early=""
trap 'rm -f "$ending" "$ending.failed"' EXIT
# shellcheck disable=SC2329 # called by the traps below
ask() { # hands the request on to this host's ranks until they end: one that is still starting does not hear yet
  if [ -n "$asking" ]; then
    [ "$1" != INT ] || kill -TERM "$agent" 2>/dev/null || true
    return 0
  fi
  say "SIG$1: asking the ranks to save and leave"
  (
    trap - EXIT
    while kill -0 "$agent" 2>/dev/null; do
      read -r -a ranks_here <<<"$(cat "/proc/$agent"/task/*/children 2>/dev/null)" || true
      kill -USR1 ${ranks_here[@]+"${ranks_here[@]}"} 2>/dev/null || true
      sleep 2
    done
  ) &
  asking=$!
}
for name in TERM INT USR1; do
  # shellcheck disable=SC2064
  trap "early=$name" $name
done
set -m # torchrun gets a process group of its own: it would kill the ranks on a terminal's Ctrl-C
( trap '' USR1; trap - INT TERM EXIT; exec env "${variables[@]}" CLAE_ENDING="$ending" "$python" -m clae_dist.lifetime $$ "${run[@]}" ) & # ends with this script, too
agent=$!
set +m
for name in TERM INT USR1; do
  # shellcheck disable=SC2064
  trap "ask $name" $name
done
[ -z "$early" ] || ask "$early"
code=0
while :; do
  code=0
  wait "$agent" || code=$?
  kill -0 "$agent" 2>/dev/null || break # else a signal ended the waiting, not torchrun
done
trap '' USR1 # a scheduler's signal may come again
if [ "$code" -gt 128 ]; then code=0; wait "$agent" || code=$?; fi # it ended while a trap ran: its own code
[ -z "$asking" ] || kill "$asking" 2>/dev/null || true
# A code from before a change of hosts, which stops the ranks, too, is of no account where torchrun failed.
if [ "$code" -ne 0 ]; then code=$(cat "$ending.failed" 2>/dev/null || echo 4); elif [ -s "$ending" ]; then code=$(cat "$ending"); fi
if [ "$code" -eq 4 ] && [ -s "$ending.failed" ]; then code=$(cat "$ending.failed"); fi # why ranks failed
case $code in
  0) say "finished" ;;
  75) say "stopped with everything saved (exit code 75); the same line resumes from there." ;;
  4 | 5 | 7 | 8) say "ranks failed and were not started again (exit code $code); see the reason above; the same line resumes from the newest checkpoint." >&2 ;;
  *) say "ended with exit code $code; see the reason above." >&2 ;;
esac
exit "$code"
