#!/usr/bin/env bash
# A Ray cluster of plain hosts, and training on it.
set -euo pipefail
# shellcheck source=launch/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

usage() {
  cat <<'TEXT'
usage: ./launch/ray-cluster.sh head [options]                        on the first host
       ./launch/ray-cluster.sh worker ADDRESS[:PORT] [options]       on each of the others; the head says ADDRESS:PORT
       ./launch/ray-cluster.sh submit CONFIG [key=value …]           on the head, as often as you like
       ./launch/ray-cluster.sh status | stop [options]               stop: on every host, workers first

  ./launch/ray-cluster.sh submit configs/imagenet/clae.yaml data.shards=/shared/imagenet run_dir=/shared/runs/first \
      launch.workers=32 launch.min_workers=16

submit ends when the run does; Ctrl-C, SIGTERM and SIGUSR1 save first (exit code 75), and the same line goes on from there.
launch.min_workers=M: the run goes on with as few as M ranks while hosts are missing, with every host that comes back, and leaves
a host before it is taken away (`ray drain-node`, spot instances). CONFIG, shards and run_dir must be at the same path on all hosts.

  --port N            head: of the cluster (default 6379; N + 1 and N + 2 are used, too, on every host)
  --address A         head: its address for the others (default: this host's way out)
  --interface NAME    network for the ranks (default: the one that has the address)
  --gpus N, --cpus N  what the host lends (default: all GPUs, all cores); a rank takes one GPU, or without GPUs one core
  --token-file FILE   the cluster's secret (default: RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token). The head makes it when it is
                      missing, readable by you alone; bring it to the workers, for example by scp
  --temp-dir DIR      Ray's sockets and logs (default: /tmp/clae-ray-UID-PORT); at most 45 characters
  --autoscaling-config FILE   head: of Ray's own cluster launcher (launch/ray-cluster.yaml), which starts the workers from there
  --dry-run           print what would run on this host, and run nothing
  --force             worker: join in spite of versions that differ

Whoever has the token can run code on every host: anybody without it is refused. The dashboard listens on loopback alone.
Ranks also connect to each other on ports that the system chooses, and Ray's workers to 10002-19999: open these between the hosts.
CLAE_ENV names a Python environment to use instead of the one that launch/env.sh makes.
exit codes: submit: those of `clae`; else 0, or 2 with the reason.
TEXT
}

command=${1:-}
case $command in
  head | worker | submit | status | stop | allocation) shift ;;
  -h | --help) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
  *) wrong "$command is not known; use head, worker, submit, status or stop, or see --help." ;;
esac
port=6379 address="" chosen_interface="" gpus="" cpus="" temp_dir="" autoscaling="" dry="" force="" target="" config="" settings=() nodes="" head=""
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
while [ $# -gt 0 ]; do
  case $1 in
    --port | --address | --interface | --gpus | --cpus | --token-file | --temp-dir | --autoscaling-config | --nodes | --ranks-per-node | --head)
      [ -n "${2:-}" ] || wrong "$1 needs a value; see --help."
      case $1 in
        --port) whole "$1" "$2"; port=$2 ;;
        --address) address=$2 ;;
        --interface) chosen_interface=$2 ;;
        --gpus) gpus=$2 ;;
        --cpus | --ranks-per-node) whole "$1" "$2"; cpus=$2 ;;
        --token-file) token=$2 ;;
        --temp-dir) temp_dir=$2 ;;
        --autoscaling-config) autoscaling=$2 ;;
        --nodes) nodes=$2 ;;
        --head) head=$2 ;;
      esac
      shift 2 ;;
    --dry-run) dry=yes; shift ;;
    --force) force=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *)
      case $command in
        submit | allocation) take_setting "$1" ;;
        worker) [ -z "$target" ] || wrong "$1 is a second address beside $target; see --help."
          target=$1 ;;
        *) wrong "$command takes no $1; see --help." ;;
      esac
      shift ;;
  esac
done
if [ "$command" = worker ]; then
  [ -n "$target" ] || wrong "worker needs the head's ADDRESS[:PORT], which the head says when it starts."
  case $target in *:*) port=${target##*:} target=${target%:*} ;; esac
  whole "the port of $target" "$port"
fi
temp_dir=${temp_dir:-/tmp/clae-ray-$(id -u)-$port}
[ ${#temp_dir} -le 45 ] || wrong "--temp-dir is $temp_dir, ${#temp_dir} characters; Ray's sockets in it need a path of at most 45."
case $token in /*) ;; *) token=$PWD/$token ;; esac

# ---- what all commands need ----

check_token() {
  local mode
  [ -f "$token" ] || wrong "$token is missing: it is the cluster's secret, which the head made; bring it here (scp HEAD:$token $token) or name it with --token-file."
  mode=$(stat -Lc %a "$token")
  case $mode in ?00) ;; *) wrong "$token can be read by others (mode $mode), who could then run code on all hosts; chmod 600 $token" ;; esac
}

make_token() {
  [ ! -f "$token" ] || return 0
  (umask 077; mkdir -p "$(dirname "$token")"; "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token")
  say "made the cluster's secret, $token (mode 600)"
}

ray_variables=(RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0)
ask_ray() { env "${ray_variables[@]}" "$python" -m clae_dist.launchers.ray_cluster "$@"; }

known_address() { # of the cluster that this host is part of
  [ -f "$temp_dir/address" ] || wrong "no cluster was started on this host (no $temp_dir/address); start one with head or worker, or name its --port or --temp-dir."
  cat "$temp_dir/address"
}

# ---- a host of the cluster ----

start_node() { # start_node WHAT OPTION …: in the background, until `stop`
  local what=$1 attempt waited
  shift
  local run=(env PYTHONPATH="$PYTHONPATH" "${ray_variables[@]}" GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface"
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m ray.scripts.scripts start --block "$@"
    --node-ip-address="$address" --node-manager-port="$((port + 1))" --object-manager-port="$((port + 2))"
    --object-store-memory=200000000 --disable-usage-stats ${cpus:+--num-cpus="$cpus"} ${gpus:+--num-gpus="$gpus"})
  say "ports: cluster $port (head), node $((port + 1)), objects $((port + 2)), Ray's workers 10002-19999; logs: $temp_dir"
  show "${run[@]}"
  [ -z "$dry" ] || return 0
  mkdir -p "$temp_dir"
  [ ! -f "$temp_dir/pid" ] || ! kill -0 "$(cat "$temp_dir/pid")" 2>/dev/null ||
    wrong "$temp_dir is in use by a cluster that runs here; stop it ($0 stop --temp-dir $temp_dir), or use another --port."
  for ((attempt = 1; ; attempt++)); do
    : >"$temp_dir/ray.log" # what an earlier start said is not this one's
    # Without SIGUSR1: Slurm sends it to every process of a job step, and it is for the run alone.
    (trap '' USR1; exec setsid "${run[@]}" >"$temp_dir/ray.log" 2>&1 </dev/null) &
    echo $! >"$temp_dir/pid"
    for ((waited = 0; waited < 600; waited++)); do
      ! grep -q "Ray runtime started" "$temp_dir/ray.log" || return 0
      kill -0 "$(cat "$temp_dir/pid")" 2>/dev/null || break
      sleep 0.2
    done
    tail -n 15 "$temp_dir/ray.log" >&2
    stop_node
    # Ray gives its own processes 30 s, whatever the machine is busy with.
    if [ $attempt -eq 3 ] || ! grep -q "timed out during startup" "$temp_dir/ray.log"; then
      wrong "Ray did not start as $what; the reason stands above. A port in use? --port takes another."
    fi
    say "Ray was not up within its 30 s; trying again (attempt $((attempt + 1)) of 3)." >&2
  done
}

stop_node() { # Not `ray stop`, which ends every Ray of this machine.
  local pid waited=0
  pid=$(cat "$temp_dir/pid" 2>/dev/null || true)
  if [ -n "$pid" ]; then # all that it started is in its session
    kill -TERM "$pid" 2>/dev/null || true
    while pgrep -s "$pid" >/dev/null && [ $waited -lt 50 ]; do sleep 0.2; waited=$((waited + 1)); done
    pkill -KILL -s "$pid" 2>/dev/null || true
  fi
  rm -f "$temp_dir/pid" "$temp_dir/address"
}

start_head() {
  if [ -n "$address" ]; then
    local wanted=$address
    find_route "$wanted"
    [ "$at_head" = yes ] || wrong "--address is $wanted, which is not this host's; use the address of one of its interfaces."
  else
    find_route 192.0.2.1 "name this host's address for the others with --address" # nobody's address: the way out
  fi
  if [ -n "$dry" ]; then say "token: $token (made when it is missing)"; else make_token; check_token; fi
  start_node "head" --head --port="$port" --temp-dir="$temp_dir" --dashboard-host=127.0.0.1 \
    ${autoscaling:+--autoscaling-config="$autoscaling"}
  [ -z "$dry" ] || return 0
  echo "$address:$port" >"$temp_dir/address"
  ask_ray announce "$address:$port" || { stop_node; exit 2; }
  say "the cluster is at $address:$port. On each other host, with the same environment and $token brought there:"
  say "    ./launch/ray-cluster.sh worker $address:$port"
}

start_worker() {
  find_route "$target"
  [ -n "$dry" ] || {
    check_token
    ask_ray check "$target:$port" || [ -n "$force" ] || { say "this host does not join (--force would)." >&2; exit 2; }
  }
  start_node "a worker of $target:$port" --address="$target:$port" --temp-dir="$temp_dir"
  [ -z "$dry" ] || return 0
  echo "$target:$port" >"$temp_dir/address"
  say "joined $target:$port"
}

train() { # train ADDRESS
  local run=(env PYTHONPATH="$PYTHONPATH" "${ray_variables[@]}" RAY_ADDRESS="$1"
    "$python" -m clae_dist train "$config" --launcher ray ${settings[@]+"${settings[@]}"})
  show "${run[@]}"
  [ -n "$dry" ] || exec "${run[@]}"
}

lead_allocation() { # the first node: head, then the run, then everybody's end
  local code=0
  address=$head
  if [ -n "$dry" ]; then start_head; train "$head:$port"; return 0; fi
  trap 'say "SIGUSR1: nothing had begun"; exit 75' USR1
  trap 'trap "" USR1; touch "$token.done"; stop_node' EXIT # Slurm's signal, sent again and again, would kill what stops the node
  start_head
  ask_ray wait "$head:$port" "$nodes" 300 || exit 2
  ask_ray compare "$head:$port" || exit 2
  (trap '' USR1; train "$head:$port") & # ignored until `clae` listens
  run_pid=$!
  trap 'kill -USR1 $run_pid 2>/dev/null || true' USR1 TERM
  while :; do
    code=0
    wait "$run_pid" || code=$?
    kill -0 "$run_pid" 2>/dev/null || break
  done
  if [ "$code" -gt 128 ]; then code=0; wait "$run_pid" || code=$?; fi # it ended while a trap ran: its own code
  exit "$code"
}

follow_allocation() { # the other nodes: join when the head is there, and leave when it is done
  local waited=0
  trap '' USR1 # Slurm sends it to what this script starts, too
  trap : TERM
  trap stop_node EXIT
  until [ -f "$token" ] && ask_ray check "$head:$port" 2>"/tmp/clae-check-$$"; do
    [ $waited -lt 120 ] || { cat "/tmp/clae-check-$$" >&2; exit 2; }
    sleep 2; waited=$((waited + 1))
  done
  rm -f "/tmp/clae-check-$$"
  target=$head
  start_worker
  while [ ! -f "$token.done" ] && kill -0 "$(cat "$temp_dir/pid")" 2>/dev/null; do sleep 1 || true; done
}

find_env
case $command in
  head) start_head ;;
  worker) start_worker ;;
  status) check_token; ask_ray status "$(known_address)" ;;
  stop)
    if [ -n "$dry" ]; then say "would end every process of $temp_dir"; exit 0; fi
    stop_node
    say "stopped" ;;
  submit)
    check_config
    if [ -n "$dry" ]; then train "${head:-ADDRESS:PORT}"; exit 0; fi
    check_token
    cluster=$(known_address)
    ask_ray compare "$cluster" || exit 2
    train "$cluster" ;;
  allocation) # in slurm.sbatch, on every node: cluster, run and end
    case $head in *:*) port=${head##*:} head=${head%:*} ;; *) wrong "allocation is for slurm.sbatch; see --help." ;; esac
    check_config
    temp_dir=/tmp/clae-ray-${SLURM_JOB_ID:-JOB}-${SLURM_NODEID:-NODE}
    find_route "$head"
    if [ "$at_head" = yes ] || [ -n "$dry" ]; then lead_allocation; else follow_allocation; fi ;;
esac
[ -z "$dry" ] || say "dry run: nothing was run."
