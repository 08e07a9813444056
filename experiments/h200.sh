#!/usr/bin/env bash
# Findings on one large GPU, a part at a time; what is done is skipped, what was interrupted goes on, so that several
# short loans of a GPU make one experiment.
#
#     bash experiments/h200.sh PART…
#
# random   Llama-3.2-1B's shape from random weights on SYNTH: regular and JEPA (k = 3, λ = 2, the paper's Table 2), labels
#          as published and corrected. Needs TOKENIZER, a folder with Llama 3's tokenizer.
# smollm2  SmolLM2-135M-Instruct on SYNTH, TURK and Spider: regular, JEPA (k = 1, λ = 1), STP. Needs MODEL, its folder.
#
# Spider is scored on the databases of spider_data.zip: put the official file in its place first.
#
# DATA: a folder with the authors' rows, synth_train.jsonl, synth_test.jsonl … (default: datasets). MINUTES: stop after so
# many (25). SEEDS, JOBS, EPOCHS, PYTHON_BIN as in run.sh. Runs go to runs/, with predictions and metrics; reports to
# reports/.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=${PYTHON_BIN:-.venv/bin/python} ends=$((SECONDS + 60 * ${MINUTES:-25}))
fail() { echo "h200.sh: error: $1" >&2 && exit 2; }

within() { # runs a command for as long as there is time; run.sh goes on from there another time
  local left=$((ends - SECONDS)) code=0
  [ "$left" -gt 60 ] || { echo "h200.sh: no time left; the same command goes on from here" >&2 && exit 0; }
  timeout --signal=INT "$left" "$@" || code=$?
  [ "$code" -ne 124 ] || { echo "h200.sh: time is up; the same command goes on from here" >&2 && exit 0; }
  return "$code"
}

rows() { # makes dataset gpu-NAME of DATA's rows
  local part
  for part in train test; do
    [ -f "${DATA:-datasets}/$1_$part.jsonl" ] || fail "there is no ${DATA:-datasets}/$1_$part.jsonl; see DATA"
    cp "${DATA:-datasets}/$1_$part.jsonl" "datasets/gpu-$1_$part.jsonl"
  done
  export DATASET=gpu-$1 TASK=$1
}

shape() { # Llama-3.2-1B's configuration with the tokenizer of TOKENIZER, at $1
  [ -f "${TOKENIZER:-}/tokenizer.json" ] || fail "TOKENIZER must be a folder with Llama 3's tokenizer"
  mkdir -p "$1"
  cp "$TOKENIZER"/*token* "$TOKENIZER"/*.jinja "$1" 2>/dev/null || cp "$TOKENIZER"/*token* "$1"
  cat >"$1/config.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
 "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
 "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": true,
 "bos_token_id": 128000, "eos_token_id": 128009, "dtype": "bfloat16"}
JSON
}

random() {
  shape runs/models/llama-3.2-1b
  rows synth
  export MODEL=runs/models/llama-3.2-1b LR=8e-5 PREDICTORS=3 LBD=2 EPOCHS=${EPOCHS:-4}
  for labels in answer reference; do # the paper's 128 examples a step
    within bash run.sh compare -- --pretrain --batch_size 64 --grad_accum 2 --save_strategy no --lm_labels "$labels"
  done
}

smollm2() {
  [ -f "${MODEL:-}/config.json" ] || fail "MODEL must be the folder of SmolLM2-135M-Instruct"
  export LR=${LR:-2e-4} EPOCHS=${EPOCHS:-4}
  for name in synth turk spider; do
    rows "$name"
    within bash run.sh compare -- --batch_size 32 --grad_accum 1 --save_strategy no
    within bash run.sh run_regular -- --batch_size 32 --grad_accum 1 --save_strategy no --stp geodesic
    within "$python" -m llm_jepa.report runs/gpu-"$name"-"${MODEL##*/}"-* --output_dir "reports/gpu-$name-${MODEL##*/}"
  done
}

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 2; }
for part in "$@"; do [[ $part =~ ^(random|smollm2)$ ]] || fail "no part '$part': random or smollm2"; done
for part in "$@"; do ("$part"); done
