#!/usr/bin/env bash
# Runs the experiments of RESULTS.md on labels, stopping, less data and a pretrained model. Finished runs are skipped,
# interrupted runs are resumed.
#
#     bash experiments/findings.sh EXPERIMENT…
#
# The experiments use this project's SYNTH examples and five seeds, and models/tiny except for `pretrained`:
#
# labels      regular and JEPA (k = 1, λ = 1), with published and corrected labels, from random weights
# stopping    the same on 7500 examples, from a model that has learned to stop on the other 500 examples
# controls    regular, JEPA, JEPA with λ = 0, and JEPA with shuffled pairs
# data        regular, JEPA (k chosen on held-out training examples) and STP on 500, 1000, 2000 and 8000 examples, with
#             about 1000 steps each
# pretrained  the arms of `labels` with SmolLM2-135M-Instruct (MODEL: its folder), on 500 training and 300 test examples
#
# The environment variables JOBS, SEEDS and PYTHON_BIN are those of run.sh. Reports are written to reports/.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=${PYTHON_BIN:-.venv/bin/python} tiny=models/tiny
flags=(--batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98) # the flags of run.sh for models/tiny

fail() { echo "findings.sh: error: $1" >&2 && exit 2; }

no_pad() { # copies model $1 to $2 without its pad token, so that pad = eos as in Llama 3
  [ ! -d "$2" ] || return 0
  mkdir -p "$2.part"
  cp "$1"/*.json "$1"/*.jinja "$2.part"
  [ ! -f "$1/model.safetensors" ] || cp "$1/model.safetensors" "$2.part"
  sed -i -e '/"pad_token"/d' "$2.part/tokenizer_config.json"
  sed -i -e 's/"pad_token_id": 0/"pad_token_id": 1/' "$2.part/config.json"
  mv "$2.part" "$2"
}

subset() { # NAME and flags of subset.py: writes dataset NAME from the SYNTH examples, with the SYNTH test examples
  "$python" experiments/subset.py datasets/synth_train.jsonl "datasets/$1_train.jsonl" "${@:2}"
  cp datasets/synth_test.jsonl "datasets/$1_test.jsonl"
}

no_pad_runs() { # function of run.sh, flags of finetune.py
  no_pad "$tiny" runs/models/tiny-no-pad
  MODEL=runs/models/tiny-no-pad LR=1e-3 EPOCHS=2 bash run.sh "$1" -- --pretrain "${flags[@]}" "${@:2}"
}

mark() { # flags of finetune.py: the hash of these flags in the names of the folders of no_pad_runs
  printf '%s\n' --pretrain "${flags[@]}" "$@" | sha256sum | cut -c1-8
}

labels() {
  no_pad_runs compare --lm_labels reference
  no_pad_runs compare
}

controls() {
  no_pad_runs compare # the runs of `labels`
  LBD=0 no_pad_runs run_jepa
  no_pad_runs run_jepa --shuffle_pairs
  "$python" -m llm_jepa.report runs/*-tiny-no-pad-*-x"$(mark)" runs/*-tiny-no-pad-*-x"$(mark --shuffle_pairs)" \
    --output_dir reports/controls
}

stopping() {
  subset first500 --first 500
  subset other7500 --skip 500
  LR=1e-3 EPOCHS=16 SEEDS=42 DATASET=first500 bash run.sh run_regular
  no_pad runs/first500-tiny-regular-lr1e-3-e16-s42 runs/models/tiny-stops
  export MODEL=runs/models/tiny-stops LR=1e-4 EPOCHS=1 DATASET=other7500
  bash run.sh compare -- "${flags[@]}" --lm_labels reference
  bash run.sh compare -- "${flags[@]}"
}

data() {
  local n dataset
  export LR=1e-3 LEARNING_RATES=1e-3 GRID_K="0 2" GRID_LBD=1
  for n in 500 2000 8000 1000; do
    dataset=first$n
    subset "$dataset" --first "$n"
    export EPOCHS=$((8000 / n)) DATASET=$dataset # 1000 steps of 8 examples (1008 with 500 examples)
    bash run.sh sweep
    bash run.sh run_regular -- --stp geodesic
    "$python" -m llm_jepa.report runs/"$dataset"-tiny-*-e"$EPOCHS"-s* --output_dir "reports/data-$n"
  done
}

pretrained() {
  local labels
  [ -f "${MODEL:-}/config.json" ] || fail "MODEL must be the folder of SmolLM2-135M-Instruct"
  "$python" experiments/subset.py datasets/synth_train.jsonl datasets/few_train.jsonl --first 500
  "$python" experiments/subset.py datasets/synth_test.jsonl datasets/few_test.jsonl --first 300
  export LR=2e-4 EPOCHS=1 DATASET=few
  for labels in answer reference; do
    bash run.sh compare -- --batch_size 8 --grad_accum 1 --warmup_steps 0.05 --dtype bfloat16 --save_strategy no \
      --lm_labels "$labels"
  done
}

export TASK=synth OMP_WAIT_POLICY=PASSIVE ARMS="regular jepa"
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 2; }
for experiment in "$@"; do
  [[ $experiment =~ ^(labels|stopping|controls|data|pretrained)$ ]] || fail "no experiment '$experiment'"
done
for experiment in "$@"; do ("$experiment"); done
