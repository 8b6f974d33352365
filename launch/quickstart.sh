#!/usr/bin/env bash
# From a folder of images to an evaluated CLAE encoder: sets up, prepares shards, pretrains, evaluates, reports.
# About five minutes on two CPU cores after installation. Every command it runs is one that you can run yourself, and is printed
# first. After an interruption, the same command resumes.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch/quickstart.sh [--data PATH] [--run-dir DIR] [--minutes M] [--compare simclr] [--workers N] [--max-bad SHARE]
                              [--dry-run] [key=value …]

  --data PATH        your own images, anything that data_prep takes (default: CLAE_DATA; else CIFAR-10, found in
                     ../shared/data or downloaded; without a network, scikit-learn's digits)
  --run-dir DIR      where everything goes (default: runs/quickstart)
  --minutes M        of training (default: 4); a few steps are timed first, and epochs follow from their images/s
  --compare simclr   plain SimCLR, too, for the same compute: 11/6 of the epochs (about twice the time in all)
  --workers N        ranks (default: one a GPU, rounded down to a power of two; 2 without GPUs)
  --max-bad SHARE    stop above this share of images that cannot be decoded (default: 1%)
  --dry-run          print the commands in their order without running them
  key=value          settings over configs/quickstart.yaml, such as train.epochs=4

train.epochs given here is exact, and nothing is timed. Fewer than two batches of images get a smaller batch, unless
batch.global_size is given.
TEXT
}
wrong() { printf 'quickstart: %s\n' "$*" >&2; exit 2; }

given() { # given KEY: its value among the settings; fails without
  local setting
  for setting in ${settings[@]+"${settings[@]}"}; do
    [ "${setting%%=*}" != "$1" ] || { printf '%s\n' "${setting#*=}"; return 0; }
  done
  return 1
}

last_of_each() { # last_of_each SETTING …: sets words, of settings with one key the last: `clae` refuses a key that comes twice
  local -A place=()
  local setting key at
  words=()
  for setting in "$@"; do
    key=${setting%%=*}
    at=${place[$key]:-${#words[@]}}
    place[$key]=$at
    words[at]=$setting
  done
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/show.sh
source "$here/launch/show.sh"
recipe=configs/quickstart.yaml
data=() max_bad=() run_dir=$(realpath -ms runs/quickstart) compare="" workers="" dry="" minutes="" settings=() options=" "
[ -z "${CLAE_DATA:-}" ] || data=(--data "$(realpath -ms "$CLAE_DATA")")
while [ $# -gt 0 ]; do
  case $1 in
    --data | --run-dir | --minutes | --compare | --workers | --max-bad)
      [ -n "${2:-}" ] || wrong "$1 needs a value; see --help."
      case $options in *" $1 "*) wrong "$1 is given twice; keep one." ;; esac
      options+="$1 "
      case $1 in
        --data) data=(--data "$(realpath -ms "$2")") ;; # relative to where you stand, like --run-dir; links keep their names
        --run-dir) run_dir=$(realpath -ms "$2") ;;
        --minutes) minutes=$2 ;;
        --compare) compare=$2 ;;
        --workers) workers=$2 ;;
        --max-bad) max_bad=(--max-bad "$2") ;;
      esac
      shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    run_dir=*) wrong "$1 is --run-dir here." ;;
    data.shards=*) wrong "$1: the shards are made from --data here; for others, use clae train." ;;
    launch.workers=*) [ -z "$workers" ] || wrong "launch.workers is --workers here, and given twice; keep one."
      workers=${1#*=}; shift ;;
    *=*)
      ! given "${1%%=*}" >/dev/null || wrong "${1%%=*} is given twice; keep one."
      settings+=("$1"); shift ;;
    *) wrong "$1 is not an option; see --help." ;;
  esac
done
case $compare in "" | simclr) ;; *) wrong "--compare $compare is not known; use --compare simclr." ;; esac
case $workers in *[!0-9]* | 0*) wrong "--workers is $workers; use an integer from 1." ;; esac
case $minutes in *[!0-9.]* | *.*.* | . | 0 | 0.0) wrong "--minutes is $minutes; use a number above 0, such as 4." ;; esac
[ -z "$minutes" ] || ! given train.epochs >/dev/null || wrong "--minutes and train.epochs= both say how long; keep one."
minutes=${minutes:-4}
[ -z "${CLAE_CACHE:-}" ] || CLAE_CACHE=$(realpath -ms "$CLAE_CACHE")
cd "$here"

# ---- running a step, and how it ends ----

started=$SECONDS
interrupted=""
trap 'interrupted=yes' INT # the step gets Ctrl-C, too, saves and ends; then it is our turn

ended() { # ended STEP CODE
  [ -z "$interrupted" ] || set -- "$1" "$2" stopped
  case ${3:-$2} in
    0) return ;;
    stopped | 75 | 130) printf '\nquickstart: stopped during "%s"; the same command resumes from there.\n' "$1" >&2 ;;
    *) printf '\nquickstart: "%s" failed (exit code %s); see the reason above.\n' "$1" "$2" >&2 ;;
  esac
  exit "$(($2 ? $2 : 130))"
}

step() { # step HEADING COMMAND …
  local heading=$1 code=0
  shift
  printf '\n== %s' "$heading"
  [ -n "$dry" ] || printf ' (%d s)' $((SECONDS - started))
  printf '\n'
  show "$@"
  [ -z "$dry" ] || return 0
  "$@" || code=$?
  ended "$heading" $code
}

# ---- numbers ----

in_recipe() { awk -v key="$1:" '$1 == key { print $2; exit }' "$recipe"; }

product() { # product A B: A·B without an exponent, which YAML would read as a text
  LC_ALL=C awk -v a="$1" -v b="$2" 'BEGIN { text = sprintf("%.6f", a * b); sub(/\.?0+$/, "", text); print text }'
}

quotient() { # quotient A B: A/B, at least a millionth
  LC_ALL=C awk -v a="$1" -v b="$2" 'BEGIN { text = sprintf("%.6f", a / b < 1e-6 ? 1e-6 : a / b); sub(/\.?0+$/, "", text); print text }'
}

count_workers() { # sets workers: one a GPU that torch can use, rounded down to a power of two; 2 without
  local gpus
  gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)') || ended "Counting GPUs" $?
  if [ "$gpus" -eq 0 ]; then workers=2; echo "ranks: 2 (no GPU that torch can use)"; return; fi
  workers=1
  while [ $((workers * 2)) -le "$gpus" ]; do workers=$((workers * 2)); done
  echo "ranks: $workers ($(count "$gpus" GPU), rounded down to a power of two)"
}

time_steps() { # time_steps EPOCHS: trains so long on local ranks, into a folder of its own
  last_of_each "${common[@]}" ${planned[@]+"${planned[@]}"} ${settings[@]+"${settings[@]}"} launch.launcher=local tracking.name=none \
    train.epochs="$1" optim.warmup_epochs=0 train.log_every=4 train.diagnose_every=1000000 train.knn_every=0 \
    checkpoint.every_steps=0 run_dir="$probe"
  step "Speed: $steps steps are timed" clae train "$recipe" "${words[@]}" --quiet
}

measure() { # measure IMAGES: sets epochs to what --minutes is enough for
  local images=$1 per_epoch rate
  if [ -f "$run_dir/config.yaml" ]; then # a run that was interrupted keeps its length
    epochs=$(awk '$1 == "epochs:" { print $2; exit }' "$run_dir/config.yaml")
    echo "epochs: $epochs, as this run began"
    return
  fi
  per_epoch=$((batch > 0 && images >= batch ? images / batch : 1)) # images that do not fill a batch are skipped
  rm -rf "$probe"
  time_steps "$(quotient "$steps" "$per_epoch")"
  rate=$(python -c "$median_rate" "$probe/metrics.jsonl") || ended "Reading $probe/metrics.jsonl" $?
  rm -rf "$probe"
  epochs=$(quotient "$(product "$minutes" "$(product 60 "$rate")")" $((per_epoch * batch)))
  echo "epochs: $epochs, for $minutes minutes at $rate images/s"
}

# Of lines about whole intervals: the first steps start loaders and compilers.
median_rate='
import json, statistics, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
print(round(statistics.median(line["images_per_s"] for line in lines if line.get("images_per_s") and line["step"] > 4), 1))'

plan() { # plan IMAGES: sets batch, epochs, and the settings that follow from the number of train images
  local images=$1 recipe_batch factor key
  recipe_batch=$(in_recipe global_size)
  batch=$(given batch.global_size) || {
    batch=$recipe_batch
    if [ "$images" -lt "$batch" ]; then
      while [ "$batch" -gt 2 ] && [ $((batch * 2)) -gt "$images" ]; do batch=$((batch / 2)); done
      planned+=(batch.global_size="$batch")
      echo "batch: $batch, as there are only $images train images; two batches an epoch at least"
    fi
  }
  epochs=$(given train.epochs) || {
    measure "$images"
    planned+=(train.epochs="$epochs")
  }
  factor=$(LC_ALL=C awk -v a="$epochs" -v b="$(in_recipe epochs)" 'BEGIN { printf "%.9f", a / b }')
  for key in train.knn_every optim.warmup_epochs; do
    given "$key" >/dev/null || planned+=("$key=$(product "$(in_recipe "${key#*.}")" "$factor")")
  done
}

# ---- the job ----

printf '== Environment\n'
show "$here/launch/env.sh"
if [ -n "$dry" ]; then
  env=ENVIRONMENT workers=${workers:-WORKERS}
else
  code=0
  env=$("$here/launch/env.sh" | tail -1) || code=$?
  ended Environment $code
  export PATH=$env/bin:$PATH
  export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
  started=$SECONDS # what comes now is the system's own time
  [ -n "$workers" ] || count_workers
fi

shards=$run_dir/shards
step "Shards" python -m data_prep demo "$shards" ${data[@]+"${data[@]}"} ${max_bad[@]+"${max_bad[@]}"}

planned=() steps=12 probe=$run_dir/speed-probe uri=sqlite:///$run_dir/mlflow.db
common=(data.shards="$shards" launch.workers="$workers" tracking.uri="$uri")
if [ -n "$dry" ]; then
  epochs=$(given train.epochs) || { epochs=EPOCHS; time_steps PROBE_EPOCHS; }
  for setting in train.epochs=EPOCHS train.knn_every=KNN_EVERY optim.warmup_epochs=WARMUP_EPOCHS; do
    given "${setting%%=*}" >/dev/null || planned+=("$setting")
  done
else
  split=$(given data.train_split) || split=train
  images=$(python -m data_prep info "$shards" --json |
    python -c 'import json, sys; print(json.load(sys.stdin)["splits"].get(sys.argv[1], 0))' "$split") || ended "Counting images" $?
  [ "$images" -gt 0 ] || wrong "data.train_split is $split, which $shards does not have; see: python -m data_prep info $shards"
  plan "$images"
fi
common+=(${planned[@]+"${planned[@]}"} ${settings[@]+"${settings[@]}"})

last_of_each "${common[@]}" run_dir="$run_dir"
method=$(given method.name) || method=CLAE
step "Pretraining: $method on $(count "$workers" rank)" clae train "$recipe" "${words[@]}"
step "Evaluation" clae evaluate "$run_dir"
report=(clae report "$run_dir")
if [ -n "$compare" ]; then
  # The same compute: an exact CLAE step costs 11 units, a SimCLR step 6 (forward of one view 1, its backward 2).
  more="EPOCHS*11/6"
  [ "$epochs" = EPOCHS ] || more=$(product "$epochs" 1.8333333333)
  last_of_each "${common[@]}" method.name=simclr train.epochs="$more" name=quickstart-simclr run_dir="$run_dir/simclr"
  step "Pretraining: SimCLR, the same compute" clae train "$recipe" "${words[@]}"
  step "Evaluation: SimCLR" clae evaluate "$run_dir/simclr"
  step "Report: SimCLR" clae report "$run_dir/simclr"
  report+=(--compare "$run_dir/simclr")
fi
step "Encoder" clae export "$run_dir"
step "Report" "${report[@]}"

if [ -n "$dry" ]; then
  printf '\nDry run: nothing was run. Names in capitals follow from the GPUs and from the number of train images; see --help.\n'
  exit 0
fi
printf '\nDone in %d s after installation.\n' $((SECONDS - started))
if [ "$(given tracking.name || true)" != none ] && ! given tracking.uri >/dev/null; then
  printf "MLflow's page: %q -m mlflow ui --backend-store-uri %q\n" "$env/bin/python" "$uri"
fi
