#!/usr/bin/env bash
# From a folder of images to an evaluated CLAE encoder: sets up, prepares shards, pretrains, evaluates, reports.
# After installation about five minutes on two CPU cores. Nothing in it is special: every line it runs is a command of the
# README, printed before it runs. Interrupted, the same command goes on where it was.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch/quickstart.sh [--data PATH] [--run-dir DIR] [--compare simclr] [--workers N] [key=value …]

  --data PATH        a folder of class folders, or an archive of one (default: CLAE_DATA; else CIFAR-10, found in
                     ../shared/data or downloaded; without a network, scikit-learn's digits)
  --run-dir DIR      where everything goes (default: runs/quickstart)
  --compare simclr   plain SimCLR, too, for the same compute: 11/6 of the epochs (about twice the time in all)
  --workers N        ranks (default: one a GPU, rounded down to a power of two; 2 without GPUs)
  key=value          settings over configs/quickstart.yaml, such as train.epochs=4
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=() run_dir=runs/quickstart compare="" workers="" settings=()
while [ $# -gt 0 ]; do
  case $1 in
    --data | --run-dir | --compare | --workers)
      [ $# -ge 2 ] || { echo "quickstart: $1 needs a value; see --help." >&2; exit 2; }
      case $1 in
        --data) data=(--data "$(realpath -m "$2")") ;;
        --run-dir) run_dir=$2 ;;
        --compare) compare=$2 ;;
        --workers) workers=$2 ;;
      esac
      shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *=*) settings+=("$1"); shift ;;
    *) echo "quickstart: $1 is not an option; see --help." >&2; exit 2 ;;
  esac
done
case $compare in "" | simclr) ;; *) echo "quickstart: --compare $compare is not known; use --compare simclr." >&2; exit 2 ;; esac
run_dir=$(realpath -m "$run_dir")
[ -z "${CLAE_DATA:-}" ] || CLAE_DATA=$(realpath -m "$CLAE_DATA")
cd "$here"

started=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); shift; printf '$ %s\n' "$*"; "$@"; }

if [ -z "$workers" ]; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  workers=2
  if [ "$gpus" -gt 0 ]; then workers=1; while [ $((workers * 2)) -le "$gpus" ]; do workers=$((workers * 2)); done; fi
fi

echo "== Environment"
env=$("$here/launch/env.sh" | tail -1)
# shellcheck disable=SC1091
source "$env/bin/activate"
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
started=$SECONDS # what comes now is the system's own time

shards=$run_dir/shards
common=(data.shards="$shards" launch.workers="$workers" tracking.uri="sqlite:///$run_dir/mlflow.db" ${settings[@]+"${settings[@]}"})

step "Shards" python -m data_prep demo "$shards" ${data[@]+"${data[@]}"}
step "Pretraining: CLAE on $workers rank(s)" clae train configs/quickstart.yaml "${common[@]}" run_dir="$run_dir"
step "Evaluation" clae evaluate "$run_dir"
report=(clae report "$run_dir")
if [ -n "$compare" ]; then
  # The same compute: an exact CLAE step costs 11 units, a SimCLR step 6 (forward of one view 1, its backward 2).
  epochs=$(clae config configs/quickstart.yaml "${common[@]}" | awk '$1 == "epochs:" { printf "%.4f", $2 * 11 / 6; exit }')
  step "Pretraining: SimCLR, the same compute" clae train configs/quickstart.yaml "${common[@]}" \
    attack.name=none train.epochs="$epochs" name=quickstart-simclr run_dir="$run_dir/simclr"
  step "Evaluation: SimCLR" clae evaluate "$run_dir/simclr"
  step "Report: SimCLR" clae report "$run_dir/simclr"
  report+=(--compare "$run_dir/simclr")
fi
step "Encoder" clae export "$run_dir"
step "Report" "${report[@]}"
printf '\nDone in %d s after installation. MLflow'"'"'s page: %s/bin/mlflow ui --backend-store-uri sqlite:///%s/mlflow.db\n' $((SECONDS - started)) "$env" "$run_dir"
