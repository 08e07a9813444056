#!/usr/bin/env bash
# Runs the experiments of experiments/plans/. Finished runs are skipped, so the same command resumes.
#
#     bash experiments/terms.sh EXPERIMENT…
#
# nitp-pick nitp-sizes nitp-controls   plans/nitp.md        NITP from random weights
# terms                                plans/terms.md       which losses learn the pairs, and at what price
# combine                              plans/combine.md     clip + NITP, and Semantic Tube Prediction, at ten seeds
#
# The environment variables are JOBS (runs at a time, one thread each), OUT (folder of the runs, default runs) and
# PYTHON_BIN.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON_BIN:-.venv/bin/python} out=${OUT:-runs} jobs=${JOBS:-2}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
nitp=(--nitp --nitp_lbd 1.6 --nitp_layer 0) # picked by nitp-pick, see plans/nitp.md
parts=$out/parts                            # parts of the datasets

arm() { # the flags of an arm; NAME:λ sets the weight of the JEPA loss
  local lbd=${1#*:}
  case $1 in
  regular | longer) echo --regular ;;
  all_labels) echo --regular --lm_labels all ;;
  nitp) echo --regular "${nitp[@]}" ;;
  nitp:*) echo --regular --nitp --nitp_lbd "${lbd%:*}" --nitp_layer "${lbd#*:}" ;; # nitp:λ:layer
  random | shuffled) echo --regular "${nitp[@]}" --nitp_targets "$1" ;;
  clip_nitp) echo --predictors 1 --lbd 0.1 --jepa_loss clip "${nitp[@]}" ;;
  stp) echo --regular --stp geodesic --stp_lbd 0.02 ;;
  stop_gradient:*) echo --predictors 1 --lbd "$lbd" --stop_gradient code ;;
  center:*) echo --predictors 1 --lbd "$lbd" --center ;;
  sigreg:*) echo --predictors 1 --lbd "$lbd" --sigreg 0.05 ;;
  placebo:*) echo --predictors 1 --lbd "$lbd" --jepa_loss clip --shuffle_pairs ;;
  *) echo --predictors 1 --lbd "$lbd" --jepa_loss "${1%:*}" ;;
  esac
}

tiny=(--model_name models/tiny --pretrain --learning_rate 1e-3 --batch_size 8 --grad_accum 1 --warmup_steps 0.05
  --adam_beta2 0.98)

run() { # EXPERIMENT ARM SEED TRAIN TEST TASK FLAG…: trains and evaluates
  local run="$out/$1/$2-$(basename "$4" .jsonl)-s$3" test
  test=$(basename "$5" .jsonl)
  [ ! -f "$run/eval/$test/metrics.json" ] || return 0
  if ! grep -qs '"status": "finished"' "$run/run.json"; then
    "$python" finetune.py --train_file "$4" $(arm "$2") "${@:7}" --finetune_seed "$3" --save_strategy no \
      --output_dir "$run" --overwrite
  fi
  "$python" evaluate.py --model_name "$run" --input_file "$5" --task "$6" --overwrite \
    --output_file "$run/eval/$test/predictions.jsonl"
}

each() { # EXPERIMENT: reads lines of the other arguments of `run`, JOBS at a time; each run has a log
  mkdir -p "$out/$1/logs"
  sed "s|^|$1 |" | xargs -P "$jobs" -L 1 bash -c 'bash experiments/terms.sh run "$@" >"$0/$1/logs/$2-$3-$(basename "$4").log" 2>&1' "$out"
}

part() { # NAME SOURCE and flags of subset.py: writes a part of a dataset
  [ -f "$parts/$1.jsonl" ] || "$python" experiments/subset.py "$2" "$parts/$1.jsonl" "${@:3}"
}

nitp-pick() { # λ and layer, on training examples that the runs do not use
  part held_out datasets/synth_train.jsonl --skip 6000
  for seed in 42 43; do
    for arm in regular nitp:{0.4,0.8,1.6}:{0,1}; do
      echo "$arm $seed $parts/first1000.jsonl $parts/held_out.jsonl synth --num_epochs 8 ${tiny[*]}"
    done
  done | each nitp-pick
}

nitp-sizes() {
  for seed in {11..20}; do
    for size in 1000:8 8000:1 2000:4 500:16; do
      part "first${size%:*}" datasets/synth_train.jsonl --first "${size%:*}"
      for arm in regular nitp; do
        echo "$arm $seed $parts/first${size%:*}.jsonl $parts/fresh.jsonl synth --num_epochs ${size#*:} ${tiny[*]}"
      done
    done
  done | each nitp
}

nitp-controls() {
  for seed in {11..20}; do
    for arm in all_labels:8 random:8 shuffled:8 longer:10; do
      echo "${arm%:*} $seed $parts/first1000.jsonl $parts/fresh.jsonl synth --num_epochs ${arm#*:} ${tiny[*]}"
    done
  done | each nitp
}

combine() {
  for seed in {11..20}; do
    for arm in clip:0.1 clip_nitp stp; do
      echo "$arm $seed $parts/first1000.jsonl $parts/fresh.jsonl synth --num_epochs 8 ${tiny[*]}"
    done
  done | each nitp
}

terms() {
  for seed in {31..35}; do
    for arm in regular {cosine,l2,mse,infonce,clip,vicreg,stop_gradient,center,sigreg,placebo}:{0.1,1}; do
      echo "$arm $seed $parts/first1000.jsonl $parts/fresh.jsonl synth --num_epochs 8 ${tiny[*]}"
    done
  done | each terms
}

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 2; }
if [ "$1" = run ]; then
  run "${@:2}"
else
  mkdir -p "$parts"
  part first1000 datasets/synth_train.jsonl --first 1000 # which most experiments train on
  [ -f "$parts/fresh.jsonl" ] || "$python" experiments/fresh.py "$parts/fresh.jsonl"
  for experiment in "$@"; do "$experiment"; done
fi
