#!/usr/bin/env bash
# Runs the experiments of experiments/plans/nitp.md. Finished runs are skipped, so the same command resumes.
#
#     bash experiments/nitp.sh pick|sizes|controls…
#
# The environment variables are JOBS (runs at a time, one thread each) and OUT (folder of the runs, runs/nitp).
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON_BIN:-.venv/bin/python} out=${OUT:-runs/nitp} jobs=${JOBS:-2}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
lbd=0.8 layer=0 # replaced by the picked values, see the plan

part() { # NAME and flags of subset.py: writes a part of the SYNTH training examples
  [ -f "$out/data/$1.jsonl" ] || "$python" experiments/subset.py datasets/synth_train.jsonl "$out/data/$1.jsonl" "${@:2}"
}

arm() { # the flags of an arm
  case $1 in
  regular | longer) echo --regular ;;
  all_labels) echo --regular --lm_labels all ;;
  nitp) echo --regular --nitp --nitp_lbd $lbd --nitp_layer $layer ;;
  random | shuffled) echo --regular --nitp --nitp_lbd $lbd --nitp_layer $layer --nitp_targets "$1" ;;
  *) IFS=: read -r _ weight at <<<"$1" && echo --regular --nitp --nitp_lbd "$weight" --nitp_layer "$at" ;; # nitp:λ:layer
  esac
}

run() { # ARM EXAMPLES EPOCHS SEED TEST: trains on the first examples and evaluates
  local run="$out/$1-$2-s$4" flags
  [ ! -f "$run/eval/$(basename "$5" .jsonl)/metrics.json" ] || return 0
  read -ra flags <<<"$(arm "$1")"
  if ! grep -qs '"status": "finished"' "$run/run.json"; then
    "$python" finetune.py --train_file "$out/data/first$2.jsonl" --model_name models/tiny --pretrain \
      --learning_rate 1e-3 --num_epochs "$3" --batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98 \
      --finetune_seed "$4" --save_strategy no --output_dir "$run" --overwrite "${flags[@]}"
  fi
  "$python" evaluate.py --model_name "$run" --input_file "$5" --task synth --overwrite \
    --output_file "$run/eval/$(basename "$5" .jsonl)/predictions.jsonl"
}

each() { # reads lines of arguments of `run`, JOBS at a time; each run has a log
  xargs -P "$jobs" -L 1 bash -c 'bash experiments/nitp.sh run "$@" >"$0.$1-$2-s$4.log" 2>&1' "$out/logs/nitp"
}

pick() { # λ and layer, on training examples that the runs do not use
  for seed in 42 43; do
    echo regular 1000 8 $seed "$out/data/held_out.jsonl"
    for weight in 0.4 0.8 1.6; do for at in 0 1; do echo "nitp:$weight:$at 1000 8 $seed $out/data/held_out.jsonl"; done; done
  done | each
}

sizes() {
  for seed in {11..20}; do
    for size in 1000:8 8000:1 2000:4 500:16; do
      for arm in regular nitp; do echo "$arm ${size/:/ } $seed $out/data/fresh.jsonl"; done
    done
  done | each
}

controls() {
  for seed in {11..20}; do
    for arm in all_labels random shuffled; do echo "$arm 1000 8 $seed $out/data/fresh.jsonl"; done
    echo longer 1000 10 $seed "$out/data/fresh.jsonl"
  done | each
}

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 2; }
if [ "$1" = run ]; then
  run "${@:2}"
else
  mkdir -p "$out/logs" "$out/data"
  for size in 500 1000 2000 8000; do part first$size --first $size; done
  part held_out --skip 6000
  [ -f "$out/data/fresh.jsonl" ] || "$python" experiments/fresh.py "$out/data/fresh.jsonl"
  for experiment in "$@"; do "$experiment"; done
fi
