#!/usr/bin/env bash
# Trains and evaluates one arm over the seeds, then prints mean ± sd. `bash run.sh --help` explains it.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

PAPER_SEEDS="82 23 37 84 4"
TINY=models/tiny # the embedded model, trained from random weights
TINY_LR=1e-3 TINY_EPOCHS=2 TINY_FLAGS=(--pretrain --batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98)

usage() {
  cat <<HELP
usage: bash run.sh run_jepa|run_regular [ARGUMENT…] [-- FLAG…]
With each seed, trains on datasets/DATASET_train.jsonl, evaluates on datasets/DATASET_test.jsonl and prints a line; then
mean ± sd. What is done is skipped, what was interrupted goes on. Paths are seen from the project's folder.

Arguments, all optional, in this order ('-': the default); the variable in brackets sets the default:
  model          [MODEL]        $TINY
  learning rate  [LR]           $TINY_LR with $TINY, else 2e-5; LEARNING_RATE is the same variable
  epochs         [EPOCHS]       $TINY_EPOCHS with $TINY, else 4
  last_token     [LAST_TOKEN]   view token, an index from the view's end; not given: finetune.py finds it
  predictors     [PREDICTORS]   1
  seed           [SEEDS]        one, several with commas, or all: $PAPER_SEEDS
  lbd            [LBD]          1
  dataset        [DATASET]      synth
run_regular takes the same list but does not use last_token, predictors and lbd. FLAGs go to finetune.py and mark the
run folder's name: bash run.sh run_jepa -- --lora --lora_rank 64

More variables: NPROC, training processes, one a GPU (1; evaluation is always one); RUNS_DIR, where run folders go
(runs); TASK, how to score a dataset whose name does not tell (evaluate.py --task); PYTHON_BIN, an interpreter to use as
it is (default: setup.sh makes .venv).
HELP
}

fail() { printf 'run.sh: error: %s\n' "$1" >&2; exit "${2:-2}"; }

tree() { # process $1 and all below it
  local child
  echo "$1"
  for child in $(pgrep -P "$1" 2>/dev/null || cat /proc/"$1"/task/*/children 2>/dev/null); do tree "$child"; done
}

stop() { # ends every process started here, torchrun's workers too, then the script with exit code $1
  trap '' INT TERM HUP
  local job pids
  pids=$(for job in $(jobs -p); do tree "$job"; done)
  kill -TERM $pids 2>/dev/null || true
  for _ in {1..50}; do kill -0 $pids 2>/dev/null && sleep 0.1 || break; done # 5 s to go by themselves
  kill -KILL $pids 2>/dev/null || true
  printf 'run.sh: stopped; the same command goes on from here\n' >&2
  exit "$1"
}

supervise() { "$@" & wait "$!"; } # in the background: only so does a signal reach `stop` at once

setting() { # gives variable $1 the first value after its pattern $2 that is neither empty nor '-'
  local name=$1 pattern=$2 value
  for value in "${@:3}"; do [[ $value =~ ^-?$ ]] || break; done
  [[ $value =~ ^($pattern)$ ]] || fail "$name cannot be '$value' (see --help)"
  printf -v "$name" %s "$value"
}

settings() { # from the arguments, the environment and the defaults
  local whole='0|[1-9][0-9]*' number='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?' usual_lr=2e-5 usual_epochs=4 file
  setting model '[^-].*' "${1:-}" "${MODEL:-}" "$TINY"
  model=${model%/}
  [ "$model" != "$TINY" ] || usual_lr=$TINY_LR usual_epochs=$TINY_EPOCHS
  setting learning_rate "$number" "${2:-}" "${LR:-}" "${LEARNING_RATE:-}" "$usual_lr"
  setting epochs "$number" "${3:-}" "${EPOCHS:-}" "$usual_epochs"
  setting last_token '(-?[0-9]+)?' "${4:-}" "${LAST_TOKEN:-}" ""
  setting predictors "$whole" "${5:-}" "${PREDICTORS:-}" 1
  setting seeds "[, ]*($whole)([, ]+($whole))*[, ]*|all" "${6:-}" "${SEEDS:-}" all
  setting lbd "$number" "${7:-}" "${LBD:-}" 1
  setting dataset '[A-Za-z0-9_][A-Za-z0-9_.-]*' "${8:-}" "${DATASET:-}" synth
  setting processes '[1-9][0-9]*' "${NPROC:-}" 1
  seeds=${seeds//,/ } seeds=${seeds/all/$PAPER_SEEDS}
  seeds=$(printf '%s\n' $seeds | awk '!seen[$1]++') # each once
  train_file=datasets/${dataset}_train.jsonl test_file=datasets/${dataset}_test.jsonl
  for file in "$train_file" "$test_file"; do [ -f "$file" ] || fail "there is no $file; see datasets/README.md"; done
}

run_regular() { method=regular details="" flags=(--regular); }
run_jepa() {
  method=jepa details=-lbd$lbd-k$predictors flags=(--predictors "$predictors" --lbd "$lbd")
  [ -z "$last_token" ] || { details+=-t$last_token && flags+=(--last_token "$last_token"); }
}

checksum() { sha256sum 2>/dev/null || shasum -a 256; } # SHA-256 of standard input, in the first 64 characters

unchanged() { # whether results file $1 was made from data file $2
  grep -qF "$(checksum <"$2" | cut -c1-64)" "$1"
}

run_folder() { # of seed $1 with the extra flags that follow: different settings never share a folder
  local name=$dataset-${model##*/}-$method-lr$learning_rate$details-e$epochs-s$1
  [ "$processes" -eq 1 ] || name+=-p$processes
  [ $# -eq 1 ] || name+=-x$(printf '%s\n' "${@:2}" | checksum | cut -c1-8)
  printf '%s\n' "${RUNS_DIR:-runs}/$name"
}

train() { # seed $1 into run folder $2 with the extra flags that follow
  local launch=("$python") command threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
  [ "$processes" -eq 1 ] || launch=(env "OMP_NUM_THREADS=$((threads ? threads : 1))" "$python" -m torch.distributed.run
    --standalone --nproc_per_node "$processes")
  command=(finetune.py --train_file "$train_file" --model_name "$model" --learning_rate "$learning_rate")
  command+=(--num_epochs "$epochs" --finetune_seed "$1" "${flags[@]}")
  [ "$model" != "$TINY" ] || command+=("${TINY_FLAGS[@]}")
  command+=(--output_dir "$2")
  [ ! -d "$2" ] || command+=(--resume)
  supervise "${launch[@]}" "${command[@]}" "${@:3}"
}

evaluate() { # run folder, extra flags of its training
  local command=("$python" evaluate.py --model_name "$1" --input_file "$test_file")
  [ -z "${TASK:-}" ] || command+=(--task "$TASK")
  [[ " ${*:2} " != *" --plain "* ]] || command+=(--plain)
  supervise "${command[@]}" >/dev/null # its table: a seed's line says the same
}

finished() { grep -qs '"status": "finished"' "$1/run.json"; }

run_seed() { # seed, run folder, extra flags
  local before="" line metrics=$2/eval/$dataset/metrics.json
  [ ! -f "$2/args.json" ] || grep -qF "\"model_name\": \"$model\"" "$2/args.json" ||
    fail "$2 was made with another model of this name; choose another RUNS_DIR"
  if finished "$2"; then
    unchanged "$2/run.json" "$train_file" || fail "$train_file is not what $2 was trained on; choose another RUNS_DIR"
    before=training
  else
    train "$@" || fail "training of seed $1 ended with exit code $?: $2" "$?"
    finished "$2" || fail "training of seed $1 ended unfinished: $2" 1
  fi
  if [ -f "$metrics" ]; then
    unchanged "$metrics" "$test_file" || fail "$test_file is not what $metrics was made from; remove ${metrics%/*}"
    [ -z "${TASK:-}" ] || grep -qF "\"task\": \"$TASK\"" "$metrics" ||
      fail "$metrics is not of TASK '$TASK'; remove ${metrics%/*}"
    before+=${before:+, }evaluation
  else
    evaluate "${@:2}" || fail "evaluation of seed $1 ended with exit code $?: $2" "$?"
  fi
  line=$("$python" report.py --line "$2")
  printf '%s\n' "$line${before:+  (done before: $before)}"
}

main() {
  local arm=${1:-} given=() runs=() seed run
  [[ " $* " != *" --help "* ]] || { usage && exit; }
  [[ $arm =~ ^run_(jepa|regular)$ ]] || fail "unknown function '$arm': run_jepa or run_regular (see --help)"
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do given+=("$1") && shift; done
  [ "${#given[@]}" -le 8 ] || fail "too many arguments: $arm takes 8, the next is '${given[8]}'"
  [ $# -eq 0 ] || shift # the --
  [[ ! " $* " =~ " "--(output_dir|dry_run)[=" "] ]] || fail "--${BASH_REMATCH[1]} is not for run.sh; call finetune.py"
  settings ${given[@]+"${given[@]}"}
  "$arm"
  trap 'stop 130' INT
  trap 'stop 143' TERM
  python=${PYTHON_BIN:-.venv/bin/python}
  if [ -z "${PYTHON_BIN:-}" ]; then
    unset PYTHONHOME PYTHONPATH # of another environment
    supervise bash setup.sh
  fi
  for seed in $seeds; do
    run=$(run_folder "$seed" "$@")
    runs+=("$run")
    run_seed "$seed" "$run" "$@"
  done
  "$python" report.py "${runs[@]}"
}

main "$@"
