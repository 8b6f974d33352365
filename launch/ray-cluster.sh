#!/usr/bin/env bash
# Starts a Ray cluster on plain hosts, and trains on it.
set -euo pipefail
# shellcheck source=launch/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

usage() {
  cat <<'TEXT'
usage: ./launch/ray-cluster.sh head [options]                        on the first host
       ./launch/ray-cluster.sh worker ADDRESS[:PORT] [options]       on each other host; the head prints ADDRESS:PORT
       ./launch/ray-cluster.sh submit CONFIG [key=value …]           on the head, for each run
       ./launch/ray-cluster.sh status | stop [options]               stop: on every host, workers first

  ./launch/ray-cluster.sh submit configs/imagenet/clae.yaml data.shards=/shared/imagenet run_dir=/shared/runs/first \
      launch.workers=32 launch.min_workers=16

submit returns when the run ends. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and stop the run (exit code 75); the same
command resumes it.
With launch.min_workers=M the run continues on as few as M ranks while hosts are missing, uses hosts that return, and moves off
a host that is being drained (`ray drain-node`, spot instances). CONFIG, shards and run_dir must be at the same path on all hosts.

  --port N            head: port of the cluster (default 6379); every host also uses N + 1 and N + 2
  --address A         head: address that other hosts connect to (default: that of the default route)
  --interface NAME    network interface of the ranks (default: the one with that address)
  --gpus N, --cpus N  resources this host offers (default: all); a rank uses one GPU, or one core on hosts without GPUs.
                      --cpus 0 keeps ranks off a host without GPUs, such as a head that only submits
  --token-file FILE   the cluster's secret (default: RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token). The head creates a
                      missing one, readable only by you; copy it to the workers, for example with scp
  --temp-dir DIR      folder of this host's process ID, address, Ray sockets and logs (default:
                      /tmp/clae-ray-UID-PORT); private to you (mode 700), at most 43 characters
  --autoscaling-config FILE   head: configuration of Ray's own cluster launcher (launch/ray-cluster.yaml), which
                      then starts the workers
  --dry-run           print the commands for this host without running them
  --force             worker: join although versions differ

Anyone who has the token can run code on every host; connections without it are refused. The dashboard listens on loopback only.
The head also listens on port 10001 (Ray client, which needs the token as well). Ray's workers use ports 10002-19999, and ranks
connect to each other on ports that the system chooses: open these between the hosts. launch/README.md lists all ports.
CLAE_ENV names a Python environment to use instead of the one that launch/env.sh creates.
exit codes: submit returns those of `clae`; the other commands return 0, or 2 after printing the reason.
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
        --cpus) [ "$2" = 0 ] || whole "$1" "$2"; cpus=$2 ;;
        --ranks-per-node) whole "$1" "$2"; cpus=$2 ;;
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
  split_address worker "$target" "$port"
  target=$host
fi
unset RAY_AUTH_TOKEN # Ray would take it instead of the file
temp_dir=${temp_dir:-/tmp/clae-ray-$(id -u)-$port}
[ ${#temp_dir} -le 43 ] || wrong "--temp-dir is $temp_dir, ${#temp_dir} characters; Ray's sockets in it need a path of at most 43."
case $token in /*) ;; *) token=$PWD/$token ;; esac

# ---- what all commands need ----

own_folder() { # own_folder DIR: makes it, or checks that nobody else can write to it: what is in it is believed
  local mode
  mkdir -p "$(dirname "$1")"
  mkdir -m 700 "$1" 2>/dev/null || check_own_folder "$1"
}

check_own_folder() { # check_own_folder DIR
  [ ! -L "$1" ] && [ -d "$1" ] && [ -O "$1" ] || wrong "$1 is not a folder of yours (another user may have made it); name another with --temp-dir."
  mode=$(stat -c %a "$1")
  case $mode in *[1-7]? | *[1-7]) wrong "$1 can be used by others (mode $mode), who could put another address or process there; remove it or chmod 700 $1, or name another with --temp-dir." ;; esac
}

check_token() {
  local mode
  [ -f "$token" ] || wrong "$token is missing: it is the cluster's secret, which the head made; bring it here (scp HEAD:$token $token) or name it with --token-file."
  [ -O "$token" ] || wrong "$token is another user's file, who knows this secret; name a file of yours with --token-file."
  mode=$(stat -Lc %a "$token")
  if [ "$token" = "$HOME/.ray/auth_token" ] && [[ $mode == ?[04]4 || $mode == ?40 ]]; then # so Ray itself leaves it
    chmod 600 "$token"
    say "$token, which Ray made, could be read by others (mode $mode); it is yours alone now (600). If others use this host, replace the secret: remove the file, then stop and start the cluster." >&2
    return 0
  fi
  case $mode in ?00) ;; *) wrong "$token can be read by others (mode $mode), who could then run code on all hosts; chmod 600 $token" ;; esac
}

make_token() {
  [ ! -f "$token" ] || return 0
  (umask 077; set -o noclobber; mkdir -p "$(dirname "$token")"; "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token")
  say "made the cluster's secret, $token (mode 600)"
}

ray_variables=(RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0)
ask_ray() { env "${ray_variables[@]}" "$python" -m clae_dist.launchers.ray_cluster "$@"; }

known_address() { # of the cluster that this host is part of
  [ ! -e "$temp_dir" ] || check_own_folder "$temp_dir"
  [ -f "$temp_dir/address" ] || wrong "no cluster was started on this host (no $temp_dir/address); start one with head or worker, or name its --port or --temp-dir."
  cat "$temp_dir/address"
}

# ---- a host of the cluster ----

start_time() { # start_time PID: of a process, in ticks since the machine's start; nothing without the process
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  read -r -a fields <<<"${stat##*) }" # what follows the program's name, which may hold anything
  echo "${fields[19]}"
}

note_node() { # note_node PID: which process this host's part of the cluster is
  echo "$1 $(start_time "$1")" >"$temp_dir/pid"
}

node_pid() { # the process that was noted, unless it has ended: its number may be another process's by now
  local pid="" began=""
  [ -f "$temp_dir/pid" ] || return 0
  read -r pid began <"$temp_dir/pid" || true
  case $pid in "" | *[!0-9]*) return 0 ;; esac
  [ -z "$began" ] || [ "$(start_time "$pid")" != "$began" ] || echo "$pid"
}

start_node() { # start_node WHAT OPTION …: in the background, until `stop`
  local what=$1 attempt waited client=""
  shift
  local run=(env PYTHONPATH="$PYTHONPATH" "${ray_variables[@]}" GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface"
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m ray.scripts.scripts start --block "$@"
    --node-ip-address="$address" --node-manager-port="$((port + 1))" --object-manager-port="$((port + 2))"
    --object-store-memory=200000000 --disable-usage-stats ${cpus:+--num-cpus="$cpus"} ${gpus:+--num-gpus="$gpus"})
  [ "$what" != head ] || client=", Ray's client 10001"
  say "ports: cluster $port, node $((port + 1)), objects $((port + 2))$client, Ray's workers 10002-19999; all need the token. Logs: $temp_dir"
  show "${run[@]}"
  [ -z "$dry" ] || return 0
  own_folder "$temp_dir"
  [ -z "$(node_pid)" ] ||
    wrong "$temp_dir is in use by a cluster that runs here; stop it ($0 stop --temp-dir $temp_dir), or use another --port."
  for ((attempt = 1; ; attempt++)); do
    : >"$temp_dir/ray.log" # what an earlier start said is not this one's
    # Without SIGUSR1: Slurm sends it to every process of a job step, and it is for the run alone.
    (trap '' USR1; exec setsid "${run[@]}" >"$temp_dir/ray.log" 2>&1 </dev/null) &
    note_node $!
    for ((waited = 0; waited < 600; waited++)); do
      ! grep -q "Ray runtime started" "$temp_dir/ray.log" || return 0
      [ -n "$(node_pid)" ] || break
      sleep 0.2
    done
    tail -n 15 "$temp_dir/ray.log" >&2
    stop_node
    # Ray gives its own processes 30 s, whatever the machine is busy with.
    if [ $attempt -eq 3 ] || ! grep -q "timed out during startup" "$temp_dir/ray.log"; then
      wrong "Ray did not start as $what; see the reason above. A port in use? --port takes another."
    fi
    say "Ray was not up within its 30 s; trying again (attempt $((attempt + 1)) of 3)." >&2
  done
}

stop_node() { # Not `ray stop`, which ends every Ray of this machine.
  local pid session waited=0
  [ -e "$temp_dir" ] || return 0
  check_own_folder "$temp_dir"
  pid=$(node_pid)
  [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true
  # All that it started is in its session, whose number stays its own for as long as one of them lives.
  session=$pid
  [ -n "$pid" ] || [ ! -f "$temp_dir/pid" ] || { read -r session _ <"$temp_dir/pid" || true; }
  case $session in *[!0-9]*) session="" ;; esac
  if [ -n "$session" ] && { [ -n "$pid" ] || [ ! -e "/proc/$session" ]; }; then
    while pgrep -s "$session" -U "$(id -u)" >/dev/null && [ $waited -lt 50 ]; do sleep 0.2; waited=$((waited + 1)); done
    pkill -KILL -s "$session" -U "$(id -u)" 2>/dev/null || true
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
  start_node "head" --head --port="$port" --temp-dir="$temp_dir/r" --dashboard-host=127.0.0.1 --ray-client-server-port=10001 \
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
  start_node "a worker of $target:$port" --address="$target:$port" --temp-dir="$temp_dir/r"
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
  own_folder "$temp_dir"
  until [ -f "$token" ] && ask_ray check "$head:$port" 2>"$temp_dir/check"; do
    [ $waited -lt 120 ] || { cat "$temp_dir/check" >&2; exit 2; }
    sleep 2; waited=$((waited + 1))
  done
  target=$head
  start_worker
  while [ ! -f "$token.done" ] && [ -n "$(node_pid)" ]; do sleep 1 || true; done
}

find_env
case $command in
  head) start_head ;;
  worker) start_worker ;;
  status)
    check_token
    cluster=$(known_address)
    ask_ray status "$cluster" ;;
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
