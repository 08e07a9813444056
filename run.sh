#!/usr/bin/env bash
# Trains and evaluates one arm over the seeds, then prints mean ± sd. `bash run.sh --help` explains it.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

PAPER_SEEDS="82 23 37 84 4"
TINY=models/tiny # the embedded model, trained from random weights
TINY_LR=1e-3 TINY_EPOCHS=2 TINY_FLAGS=(--batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98)

usage() {
  cat <<HELP
usage: bash run.sh run_jepa|run_regular|run_pretrain [ARGUMENT…] [-- FLAG…]
       bash run.sh run_pretrain [ARGUMENT…] -- FLAG… -- FLAG…
With each seed, trains on datasets/DATASET_train.jsonl, evaluates on datasets/DATASET_test.jsonl and prints a line; then
mean ± sd. What is done is skipped, what was interrupted goes on. Paths are seen from the project's folder.

run_pretrain is the paper's pretraining: from random weights of the model's shape on PRETRAIN_DATASET (paraphrase)
without the chat format, with the JEPA loss, or without it with ARM=regular; then regular fine-tuning of that model on
each DATASET and an evaluation by startswith. FLAGs behind a second -- go to the fine-tuning, those before it not.

Arguments, all optional, in this order ('-': the default); the variable in brackets sets the default:
  model          [MODEL]        $TINY
  learning rate  [LR]           $TINY_LR with $TINY, else 2e-5; LEARNING_RATE is the same variable
  epochs         [EPOCHS]       $TINY_EPOCHS with $TINY, else 4
  last_token     [LAST_TOKEN]   view token, an index from the view's end; not given: finetune.py finds it
  predictors     [PREDICTORS]   1
  seed           [SEEDS]        one, several with commas, or all: $PAPER_SEEDS
  lbd            [LBD]          1
  dataset        [DATASET]      synth, of run_pretrain rotten_tomatoes,yelp; one or several with commas
run_regular takes the same list but does not use last_token, predictors and lbd. FLAGs go to finetune.py and mark the
run folder's name: bash run.sh run_jepa -- --lora --lora_rank 64

More variables: NPROC, training processes, one a GPU (1; evaluation is always one); RUNS_DIR, where run folders go
(runs); TASK, how to score a dataset whose name does not tell (evaluate.py --task); PYTHON_BIN, an interpreter to use as
it is (default: setup.sh makes .venv). run_pretrain alone: ARM, jepa or regular (jepa); PRETRAIN_DATASET (paraphrase);
FINETUNE_LR and FINETUNE_EPOCHS of its second step (those of the first).
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
  local whole='0|[1-9][0-9]*' number='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?' usual_lr=2e-5 usual_epochs=4
  setting model '[^-].*' "${1:-}" "${MODEL:-}" "$TINY"
  model=${model%/}
  [ "$model" != "$TINY" ] || usual_lr=$TINY_LR usual_epochs=$TINY_EPOCHS usual_flags=("${TINY_FLAGS[@]}")
  setting learning_rate "$number" "${2:-}" "${LR:-}" "${LEARNING_RATE:-}" "$usual_lr"
  setting epochs "$number" "${3:-}" "${EPOCHS:-}" "$usual_epochs"
  setting last_token '(-?[0-9]+)?' "${4:-}" "${LAST_TOKEN:-}" ""
  setting predictors "$whole" "${5:-}" "${PREDICTORS:-}" 1
  setting seeds "[, ]*($whole)([, ]+($whole))*[, ]*|all" "${6:-}" "${SEEDS:-}" all
  setting lbd "$number" "${7:-}" "${LBD:-}" 1
  setting datasets '[A-Za-z0-9_][A-Za-z0-9_.,-]*' "${8:-}" "${DATASET:-}" "$usual_dataset"
  setting processes '[1-9][0-9]*' "${NPROC:-}" 1
  setting pretrain_arm 'jepa|regular' "${ARM:-}" jepa
  setting pretrain_dataset '[A-Za-z0-9_][A-Za-z0-9_.-]*' "${PRETRAIN_DATASET:-}" paraphrase
  setting finetune_lr "$number" "${FINETUNE_LR:-}" "$learning_rate"
  setting finetune_epochs "$number" "${FINETUNE_EPOCHS:-}" "$epochs"
  seeds=${seeds//,/ } seeds=${seeds/all/$PAPER_SEEDS}
  seeds=$(printf '%s\n' $seeds | awk '!seen[$1]++') # each once
  datasets=${datasets//,/ }
  [ "$arm" != run_pretrain ] || data "$pretrain_dataset" train
  for name in $datasets; do data "$name"; done
}

data() { # of dataset $1; without test rows where $2 is "train"
  dataset=$1 train_file=datasets/$1_train.jsonl test_file=datasets/$1_test.jsonl
  [ -f "$train_file" ] || fail "there is no $train_file; see datasets/README.md"
  [ "${2:-}" = train ] || [ -f "$test_file" ] || fail "there is no $test_file; see datasets/README.md"
}

regular() { method=regular details="" flags=(--regular); }
jepa() {
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
  command+=(--num_epochs "$epochs" --finetune_seed "$1" "${flags[@]}" ${usual_flags[@]+"${usual_flags[@]}"})
  [ "$model" != "$TINY" ] || command+=(--pretrain)
  command+=(--output_dir "$2")
  [ ! -d "$2" ] || command+=(--resume)
  supervise "${launch[@]}" "${command[@]}" "${@:3}"
}

scoring() { # fills `score` with what evaluate.py must know of the test rows; extra flags of the training
  local flag value=""
  score=(--input_file "$test_file")
  [ -z "${TASK:-}" ] || score+=(--task "$TASK")
  for flag in "$@"; do
    [[ -z $value && ! $flag =~ ^--(text_field|code_field|system)(=|$) ]] || score+=("$flag")
    value=""
    [[ ! $flag =~ ^--(text_field|code_field|system)$ ]] || value=next
  done
}

check_scoring() { # refuses test rows that cannot be scored before hours are spent on training; extra flags
  scoring "$@"
  supervise "$python" evaluate.py --score_gold "${score[@]}" >/dev/null ||
    fail "$test_file cannot be scored" "$?"
}

evaluate() { # run folder, extra flags of its training
  scoring "${@:2}"
  [[ " ${*:2} ${flags[*]} " != *" --plain "* ]] || score+=(--plain)
  [ "$arm" != run_pretrain ] || score+=(--startswith)
  supervise "$python" evaluate.py --model_name "$1" "${score[@]}" >/dev/null # its table: a seed's line says the same
}

finished() { grep -qs '"status": "finished"' "$1/run.json"; }

train_seed() { # seed, run folder, extra flags; unless it is done
  [ ! -f "$2/args.json" ] || grep -qF "\"model_name\": \"$model\"" "$2/args.json" ||
    fail "$2 was made with another model of this name; choose another RUNS_DIR"
  if finished "$2"; then
    unchanged "$2/run.json" "$train_file" || fail "$train_file is not what $2 was trained on; choose another RUNS_DIR"
  else
    train "$@" || fail "training of seed $1 ended with exit code $?: $2" "$?"
    finished "$2" || fail "training of seed $1 ended unfinished: $2" 1
  fi
}

run_seed() { # seed, run folder, extra flags
  local before="" line metrics=$2/eval/$dataset/metrics.json
  runs+=("$2")
  ! finished "$2" || before=training
  [ -n "$before" ] || [[ " $checked " = *" $dataset "* ]] || { check_scoring "${@:3}" && checked+=" $dataset"; }
  train_seed "$@"
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

run_datasets() { # seed, extra flags
  local name
  for name in $datasets; do
    data "$name"
    run_seed "$1" "$(run_folder "$@")" "${@:2}"
  done
}

run_regular() { regular && run_datasets "$@"; }
run_jepa() { jepa && run_datasets "$@"; }

run_pretrain() { # seed, extra flags of the pretraining
  local model=$model learning_rate=$learning_rate epochs=$epochs base name
  for name in $datasets; do
    data "$name"
    [[ " $checked " = *" $name "* ]] || { check_scoring ${later[@]+"${later[@]}"} && checked+=" $name"; }
  done
  data "$pretrain_dataset" train
  "$pretrain_arm"
  flags+=(--pretrain --plain --train_all) details+=-pretrain
  base=$(run_folder "$@")
  train_seed "$1" "$base" "${@:2}"
  regular
  flags+=(--plain) details+=-plain
  model=$base learning_rate=$finetune_lr epochs=$finetune_epochs
  run_datasets "$1" ${later[@]+"${later[@]}"}
}

main() {
  local arm=${1:-} given=() extra=() later=() runs=() checked="" usual_dataset=synth usual_flags=() seed
  [[ " $* " != *" --help "* ]] || { usage && exit; }
  [[ $arm =~ ^run_(jepa|regular|pretrain)$ ]] ||
    fail "unknown function '$arm': run_jepa, run_regular or run_pretrain (see --help)"
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do given+=("$1") && shift; done
  [ "${#given[@]}" -le 8 ] || fail "too many arguments: $arm takes 8, the next is '${given[8]}'"
  [ $# -eq 0 ] || shift # the --
  [[ ! " $* " =~ " "--(output_dir|dry_run)[=" "] ]] || fail "--${BASH_REMATCH[1]} is not for run.sh; call finetune.py"
  while [ $# -gt 0 ] && [ "$1" != -- ]; do extra+=("$1") && shift; done
  [ $# -eq 0 ] || [ "$arm" = run_pretrain ] || fail "a second -- is for run_pretrain alone"
  [ $# -eq 0 ] || later=("${@:2}")
  [ "$arm" != run_pretrain ] || usual_dataset=rotten_tomatoes,yelp
  settings ${given[@]+"${given[@]}"}
  trap 'stop 130' INT
  trap 'stop 143' TERM
  python=${PYTHON_BIN:-.venv/bin/python}
  # Threads that wait busily make a step several times slower as soon as anything else wants a core.
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
  if [ -z "${PYTHON_BIN:-}" ]; then
    unset PYTHONHOME PYTHONPATH # of another environment
    supervise bash setup.sh
  fi
  for seed in $seeds; do "$arm" "$seed" ${extra[@]+"${extra[@]}"}; done
  "$python" report.py "${runs[@]}"
}

main "$@"
