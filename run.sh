#!/usr/bin/env bash
# Trains and evaluates arms over the seeds, then prints mean ± sd. `bash run.sh --help` explains it.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

PAPER_SEEDS="82 23 37 84 4"
TINY=models/tiny # the embedded model, trained from random weights
TINY_LR=1e-3 TINY_EPOCHS=2 TINY_FLAGS=(--batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98)
PAPER_K="0 1 2 3 4" PAPER_LBD=".5 1 2 4" PAPER_RATES="1e-5 2e-5 4e-5 8e-5"
TINY_RATES="5e-4 1e-3 2e-3 4e-3"                                   # the paper's half, once, twice and four times its 2e-5
PAPER_FLAGS=(--lm_labels reference --max_length 512 --batch_size 4 --grad_accum 4 --lr_scheduler_type linear
  --warmup_steps 0 --weight_decay 0 --adam_beta2 0.999 --max_grad_norm 1 --dtype auto) # PROTOCOL=paper
# What run8bh200.sh sets otherwise, besides the functions it replaces.
SCRIPT=${0##*/} TRAINER=finetune.py USUAL_MODEL=$TINY USUAL_PREDICTORS=1 USUAL_LBD=1 NODES=1 LOG_MARK=""

usage() {
  cat <<HELP
usage: bash run.sh run_jepa|run_regular|run_pretrain [ARGUMENT…] [-- FLAG…]
       bash run.sh run_pretrain [ARGUMENT…] -- FLAG… -- FLAG…
       bash run.sh compare|sweep [DATASET] [MODEL] [-- FLAG… [-- FLAG…]]
With each seed, trains on datasets/DATASET_train.jsonl, evaluates on datasets/DATASET_test.jsonl and prints a line; then
mean ± sd. What is done is skipped, what was interrupted goes on. Paths are seen from the project's folder.

run_pretrain is the paper's pretraining: from random weights of the model's shape on PRETRAIN_DATASET (paraphrase)
without the chat format, with the JEPA loss, or without it with ARM=regular; then regular fine-tuning of that model on
each DATASET and an evaluation by startswith. FLAGs behind a second -- go to the fine-tuning, those before it not.

compare runs both arms on the same seeds, so with the same order of the data, and then reports them, in REPORTS_DIR.
FLAGs behind a second -- go to the JEPA arm alone: bash run.sh compare -- --lora -- --jepa_ratio 0.5

sweep picks the settings first, on rows that are not the test's: of the train file a share EVAL_SPLIT, drawn by
SPLIT_SEED, is held out. Each of LEARNING_RATES is trained on the rest without the JEPA term, with SWEEP_SEED; with the
rate that gives the best task score on the held-out rows each k of GRID_K is trained with each λ of GRID_LBD. Among equals
the smallest rate, or k, then λ, is picked, and that is said. Then each arm is trained as picked on the whole train file
over the seeds, evaluated on the test rows and reported, as in compare. Scores of all cells are in sweep.json.

Arguments, all optional, in this order ('-': the default); the variable in brackets sets the default:
  model          [MODEL]        $TINY, from random weights (--pretrain), with
                                ${TINY_FLAGS[*]}
  learning rate  [LR]           $TINY_LR with $TINY, else 2e-5; LEARNING_RATE is the same variable
  epochs         [EPOCHS]       $TINY_EPOCHS with $TINY, else 4; --max_steps among the FLAGs stands instead
  last_token     [LAST_TOKEN]   view token, an index from the view's end; not given: finetune.py finds it
  predictors     [PREDICTORS]   1
  seed           [SEEDS]        one, several with commas, or all: $PAPER_SEEDS
  lbd            [LBD]          1
  dataset        [DATASET]      synth, of run_pretrain rotten_tomatoes,yelp; one or several with commas
run_regular takes the same list but does not use last_token, predictors and lbd; compare and sweep take DATASET and MODEL
alone, the rest from the variables. FLAGs go to finetune.py and mark the run folder's name:
  bash run.sh run_jepa -- --lora --lora_rank 64
--max_length is 1024 for gsm8k and 2048 for yelp, whose rows are longer than 512 tokens, where you do not give it.

PROTOCOL=paper trains as published. It sets
  ${PAPER_FLAGS[*]:0:10}
  ${PAPER_FLAGS[*]:10}
in the JEPA arm --reference_grad_scale too, and 4 epochs also of $TINY, whose learning rates stay its own. pad = eos
where the tokenizer has no pad; dtype auto is bfloat16 where the GPU has it; seeds, k, λ and learning rates are the
defaults; the published 8 GPUs are NPROC=8. What you give yourself wins. Run folders are marked -paper.

More variables: NPROC, training processes, one a GPU (1; evaluation is always one); RUNS_DIR, where run folders go
(runs); TASK, how to score a dataset whose name does not tell (evaluate.py --task); PYTHON_BIN, an interpreter to use as
it is (default: setup.sh makes .venv); JOBS, runs at a time (1), which share the cores: with several, and always of
compare and sweep, each writes into RUNS_DIR/.logs/RUN.log, and one that fails ends the others.
run_pretrain alone: ARM, jepa or regular (jepa); PRETRAIN_DATASET (paraphrase); FINETUNE_LR and FINETUNE_EPOCHS of its
second step (those of the first).
compare and sweep alone: REPORTS_DIR (reports); ALLOW, what arms may differ in besides the method (report.py --allow).
sweep alone: GRID_K ($PAPER_K); GRID_LBD ($PAPER_LBD); LEARNING_RATES ($PAPER_RATES, with
$TINY $TINY_RATES); SWEEP_SEED (42; of several the mean decides); EVAL_SPLIT (0.2); SPLIT_SEED (42).
HELP
}

fail() { printf '%s: error: %s\n' "$SCRIPT" "$1" >&2; exit "${2:-2}"; }

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
  printf '%s: stopped; the same command goes on from here\n' "$SCRIPT" >&2
  exit "$1"
}

supervise() { "$@" 3>&- & wait "$!"; } # in the background: only so does a signal reach `stop` at once

reap() { # waits for one of the jobs to end; one that failed ends the others
  local i code=0
  while :; do
    for i in "${!pids[@]}"; do
      ! kill -0 "${pids[i]}" 2>/dev/null || continue
      wait "${pids[i]}" || code=$?
      [ "$code" -eq 0 ] || {
        printf '%s: error: a run ended with exit code %s; the end of its log %s:\n' "$SCRIPT" "$code" "${logs[i]}"
        tail -n 5 "${logs[i]}" | tr '\r' '\n' | tail -n 5
        stop "$code"
      } >&2
      unset "pids[i]" "logs[i]"
      return
    done
    sleep 0.1
  done
}

finish() { while [ "${#pids[@]}" -gt 0 ]; do reap; done; } # waits for all jobs

job() { # runs the command behind run folder $1, at once or in the background with a log
  local log=${RUNS_DIR:-runs}/.logs/${1##*/}$LOG_MARK.log
  if [ "$quiet$jobs" = 1 ]; then
    "${@:2}"
    return
  fi
  [ "${#pids[@]}" -lt "$jobs" ] || reap
  mkdir -p "${log%/*}"
  (trap 'stop 143' TERM && "${@:2}") >>"$log" 2>&1 &
  pids+=("$!") logs+=("$log")
}

setting() { # gives variable $1 the first value after its pattern $2 that is neither empty nor '-'
  local name=$1 pattern=$2 value
  for value in "${@:3}"; do [[ $value =~ ^-?$ ]] || break; done
  [[ $value =~ ^($pattern)$ ]] || fail "$name cannot be '$value' (see --help)"
  printf -v "$name" %s "$value"
}

once() { printf '%s\n' ${1//,/ } | awk '!seen[$1]++'; } # the words of a list, each once

settings() { # from the arguments, the environment and the defaults
  local usual_lr=2e-5 usual_epochs=4
  setting model '[^-].*' "${1:-}" "${MODEL:-}" "$USUAL_MODEL"
  setting protocol '(paper)?' "${PROTOCOL:-}" ""
  model=${model%/}
  [ "$model" != "$TINY" ] || usual_lr=$TINY_LR usual_epochs=$TINY_EPOCHS usual_flags=("${TINY_FLAGS[@]}")
  [ -z "$protocol" ] || usual_epochs=4 usual_flags=("${PAPER_FLAGS[@]}")
  setting learning_rate "$number" "${2:-}" "${LR:-}" "${LEARNING_RATE:-}" "$usual_lr"
  setting epochs "$number" "${3:-}" "${EPOCHS:-}" "$usual_epochs"
  setting last_token '(-?[0-9]+)?' "${4:-}" "${LAST_TOKEN:-}" ""
  setting predictors "$whole" "${5:-}" "${PREDICTORS:-}" "$USUAL_PREDICTORS"
  setting seeds "[, ]*($whole)([, ]+($whole))*[, ]*|all" "${6:-}" "${SEEDS:-}" all
  setting lbd "$number" "${7:-}" "${LBD:-}" "$USUAL_LBD"
  setting datasets '[A-Za-z0-9_][A-Za-z0-9_.,-]*' "${8:-}" "${DATASET:-}" "$usual_dataset"
  setting processes '[1-9][0-9]*' "${NPROC:-}" 1
  setting pretrain_arm 'jepa|regular' "${ARM:-}" jepa
  setting pretrain_dataset '[A-Za-z0-9_][A-Za-z0-9_.-]*' "${PRETRAIN_DATASET:-}" paraphrase
  setting finetune_lr "$number" "${FINETUNE_LR:-}" "$learning_rate"
  setting finetune_epochs "$number" "${FINETUNE_EPOCHS:-}" "$epochs"
  setting jobs '[1-9][0-9]*' "${JOBS:-}" 1
  seeds=$(once "${seeds/all/$PAPER_SEEDS}")
  datasets=${datasets//,/ }
  [ "$arm" != run_pretrain ] || data "$pretrain_dataset" train
  for name in $datasets; do data "$name"; done
}

data() { # of dataset $1; without test rows where $2 is "train"
  dataset=$1 train_file=datasets/$1_train.jsonl test_file=datasets/$1_test.jsonl
  rows=(--train_file "$train_file") score_rows=(--input_file "$test_file")
  [ -f "$train_file" ] || fail "there is no $train_file; see datasets/README.md"
  [ "${2:-}" = train ] || [ -f "$test_file" ] || fail "there is no $test_file; see datasets/README.md"
  [ -z "$validation" ] || held_out_rows
}

regular() { method=regular details=-lr$learning_rate flags=(--regular); }
jepa() {
  method=jepa details=-lr$learning_rate-lbd$lbd-k$predictors flags=(--predictors "$predictors" --lbd "$lbd")
  [ -z "$last_token" ] || { details+=-t$last_token && flags+=(--last_token "$last_token"); }
}

checksum() { sha256sum 2>/dev/null || shasum -a 256; } # SHA-256 of standard input, in the first 64 characters

unchanged() { # whether results file $1 was made from data file $2
  grep -qF "$(checksum <"$2" | cut -c1-64)" "$1"
}

folder_name() { # of seed $1, which may be empty, with the extra flags: different settings never share a folder
  local name=$dataset-${model##*/}-$method$details-e$epochs${protocol:+-$protocol}$validation${1:+-s$1}
  [[ ! " ${*:2} " =~ $in_steps ]] || name=${name/-e$epochs/-${BASH_REMATCH[1]}steps}
  [ "$((processes * NODES))" -eq 1 ] || name+=-p$((processes * NODES))
  [ $# -eq 1 ] || name+=-x$(printf '%s\n' "${@:2}" | checksum | cut -c1-8)
  printf '%s\n' "$name"
}

run_folder() { printf '%s\n' "${RUNS_DIR:-runs}/$(folder_name "$@")"; }

longest() { # tokens of the dataset's longest chats, where those are over finetune.py's 512; nothing is ever cut
  case $dataset in yelp) echo 2048 ;; gsm8k) echo 1024 ;; esac
}

usual() { # fills `standard` with the usual flags that the extra flags neither give nor replace
  local given=" ${*%%=*} " i name value
  standard=()
  for ((i = 0; i < ${#usual_flags[@]}; i += 2)); do
    name=${usual_flags[i]} value=${usual_flags[i + 1]}
    [[ $name != --max_length || -z $(longest) ]] || continue
    [[ $given = *" $name "* || $given$name = *" --tokens_per_batch "*--batch_size ]] || standard+=("$name" "$value")
  done
  [[ -z $(longest) || $given = *" --max_length "* ]] || standard+=(--max_length "$(longest)")
  # Without accumulation there is no scale.
  [[ $protocol$method != paperjepa || " $* " =~ " --grad_accum"[=" "]"1 " ]] || standard+=(--reference_grad_scale)
}

threads_of_each() { # of this node's processes
  local threads=$(($(getconf _NPROCESSORS_ONLN) / processes / jobs))
  printf 'OMP_NUM_THREADS=%s\n' "$((threads ? threads : 1))"
}

launcher() { # fills `launch` with what starts the processes of a training; run folder
  launch=("$python")
  [ "$processes" -eq 1 ] || launch=(env "$(threads_of_each)" "$python" -m llm_jepa.large.launch
    --standalone --nproc_per_node "$processes")
}

train() { # seed $1 into run folder $2 with the extra flags that follow
  local launch command standard
  launcher "$2"
  usual "${@:3}"
  command=("$TRAINER" "${rows[@]}" --model_name "$model" --learning_rate "$learning_rate")
  [[ " ${*:3} " =~ $in_steps ]] || command+=(--num_epochs "$epochs")
  command+=(--finetune_seed "$1" "${flags[@]}" ${standard[@]+"${standard[@]}"})
  [ "$model" != "$TINY" ] || command+=(--pretrain)
  command+=(--output_dir "$2")
  [ ! -d "$2" ] || command+=(--resume)
  supervise "${launch[@]}" "${command[@]}" "${@:3}"
}

scoring() { # fills `score` with what evaluate.py must know of the test rows; extra flags of the training
  local flag value=""
  score=("${score_rows[@]}")
  [ -z "${TASK:-}" ] || score+=(--task "$TASK")
  for flag in "$@"; do
    [[ -z $value && ! $flag =~ ^--(text_field|code_field|system)(=|$) ]] || score+=("$flag")
    value=""
    [[ ! $flag =~ ^--(text_field|code_field|system)$ ]] || value=next
    [ "$flag" != --skip_bad_examples ] || score+=("$flag")
  done
}

check_scoring() { # once, refuses test rows that cannot be scored before hours are spent on training; extra flags
  [[ " $checked " != *" $dataset "* ]] || return 0
  checked+=" $dataset"
  scoring "$@"
  supervise "$python" evaluate.py --score_gold "${score[@]}" >/dev/null ||
    fail "$test_file cannot be scored; TASK says how: TASK=text for rows of your own" "$?"
}

answerer() { launch=("$python"); } # fills `launch` with what starts an evaluation

evaluate() { # run folder, extra flags of its training
  local launch
  answerer
  scoring "${@:2}"
  [[ " ${*:2} ${flags[*]} " != *" --plain "* ]] || score+=(--plain)
  [ "$arm" != run_pretrain ] || score+=(--startswith)
  supervise "${launch[@]}" evaluate.py --model_name "$1" "${score[@]}" >/dev/null # its table: a seed's line says the same
}

finished() { grep -qs '"status": "finished"' "$1/run.json"; }

ended() { finished "$1"; } # whether a training that has just ended says that it is finished

before_training() { check_scoring "$@"; } # extra flags; before the first run that is not finished

before_seeds() { :; }

train_seed() { # seed, run folder, extra flags; unless it is done
  [ ! -f "$2/args.json" ] || grep -qF "\"model_name\": \"$model\"" "$2/args.json" ||
    fail "$2 was made with another model of this name; choose another RUNS_DIR"
  if finished "$2"; then
    unchanged "$2/run.json" "$train_file" || fail "$train_file is not what $2 was trained on; choose another RUNS_DIR"
  else
    train "$@" || fail "training of seed $1 ended with exit code $?: $2" "$?"
    ended "$2" || fail "training of seed $1 ended unfinished: $2" 1
  fi
}

run_seed() { # seed, run folder, extra flags
  local before="" line metrics=$2/eval/$dataset/metrics.json
  ! finished "$2" || before=training
  train_seed "$@"
  if [ -f "$metrics" ]; then
    unchanged "$metrics" "$test_file" || fail "$test_file is not what $metrics was made from; remove ${metrics%/*}"
    ! grep -qE '"max_examples": [1-9]' "$metrics" || fail "$metrics is of some rows alone; remove ${metrics%/*}"
    [ -z "${TASK:-}" ] || grep -qF "\"task\": \"$TASK\"" "$metrics" ||
      fail "$metrics is not of TASK '$TASK'; remove ${metrics%/*}"
    before+=${before:+, }evaluation
  else
    evaluate "${@:2}" || fail "evaluation of seed $1 ended with exit code $?: $2" "$?"
  fi
  line=$("$python" -m llm_jepa.report --line "$2")
  printf '%s\n' "$line${before:+  (done before: $before)}" >&3
}

run_datasets() { # seed, extra flags
  local name folder
  for name in $datasets; do
    data "$name"
    folder=$(run_folder "$@")
    runs+=("$folder")
    finished "$folder" || before_training "${@:2}"
    job "$folder" run_seed "$1" "$folder" "${@:2}"
  done
}

run_regular() { regular && run_datasets "$@"; }
run_jepa() { jepa && run_datasets "$@"; }

run_pretrain() { # seed, extra flags of the pretraining
  local model=$model learning_rate=$learning_rate epochs=$epochs base name
  for name in $datasets; do
    data "$name"
    check_scoring ${later[@]+"${later[@]}"}
  done
  data "$pretrain_dataset" train
  "$pretrain_arm"
  flags+=(--pretrain --plain --train_all) details+=-pretrain
  base=$(run_folder "$@")
  train_seed "$1" "$base" "${@:2}"
  model=$base learning_rate=$finetune_lr epochs=$finetune_epochs
  regular
  flags+=(--plain) details+=-plain
  run_datasets "$1" ${later[@]+"${later[@]}"}
}

conclude() { # extra flags
  if [[ $arm = run_* ]]; then "$python" -m llm_jepa.report "${runs[@]}"; else report "$@"; fi
}

main() {
  local arm=${1:-} given=() extra=() later=() runs=() pids=() logs=() checked="" validation="" quiet="" seed
  local usual_dataset=synth usual_flags=() whole='0|[1-9][0-9]*' number='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?'
  local in_steps=' --max_steps[= ]([^ ]+) ' own
  [[ " $* " != *" --help "* ]] || { usage && exit; }
  [[ $arm =~ ^(run_(jepa|regular|pretrain)|compare|sweep)$ ]] ||
    fail "unknown function '$arm': run_jepa, run_regular, run_pretrain, compare or sweep (see --help)"
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do given+=("$1") && shift; done
  [[ $arm = run_* ]] || { quiet=yes && . ./compare.sh && as_of_run_jepa; }
  [ "${#given[@]}" -le 8 ] || fail "too many arguments: $arm takes 8, the next is '${given[8]}'"
  [ $# -eq 0 ] || shift # the --
  [[ ! " $* " =~ " "--(output_dir|dry_run)[=" "] ]] || fail "--${BASH_REMATCH[1]} is not for $SCRIPT; call $TRAINER"
  own='train_file|data_file|model_name|learning_rate|num_epochs|last_token|predictors|lbd|finetune_seed|regular'
  [[ ! " $* " =~ " "--($own)[=" "] ]] || fail "--${BASH_REMATCH[1]} is set by an argument or a variable (see --help)"
  while [ $# -gt 0 ] && [ "$1" != -- ]; do extra+=("$1") && shift; done
  [ $# -eq 0 ] || [[ $arm != run_[jr]* ]] || fail "a second -- is for run_pretrain, compare and sweep"
  [ $# -eq 0 ] || later=("${@:2}")
  [[ $arm = run_* || " ${extra[*]-} ${later[*]-} " != *" --tokens_per_batch"[=\ ]* ]] ||
    fail "--tokens_per_batch is not for $arm: views count towards it, so the arms would not take the same steps"
  [ "$arm" != run_pretrain ] || usual_dataset=rotten_tomatoes,yelp
  settings ${given[@]+"${given[@]}"}
  [ "$arm" != sweep ] || sweep_settings
  trap 'stop 130' INT
  trap 'stop 143' TERM
  exec 3>&1 # the runs' lines, wherever the rest of a run's output goes
  python=${PYTHON_BIN:-.venv/bin/python}
  # Threads that wait busily make a step several times slower as soon as anything else wants a core.
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
  local threads=$(($(getconf _NPROCESSORS_ONLN) / jobs))
  [ "$jobs" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads ? threads : 1))}
  if [ -z "${PYTHON_BIN:-}" ]; then
    unset PYTHONHOME PYTHONPATH # of another environment
    supervise bash setup.sh
  fi
  before_seeds
  [ "$arm" != sweep ] || pick ${extra[@]+"${extra[@]}"}
  for seed in $seeds; do "$arm" "$seed" ${extra[@]+"${extra[@]}"}; done
  finish
  conclude ${extra[@]+"${extra[@]}"}
}

[ "${BASH_SOURCE[0]}" != "$0" ] || main "$@"
