#!/usr/bin/env bash
# Takes every measurement that needs a GPU (one H100 or H200), in at most 15 minutes (14 without vLLM), without network.
#
#     bash benchmarks/gpu.sh [OUT [STAGE…]]
#     REHEARSE=1 bash benchmarks/gpu.sh rehearsal        # the same stages on a CPU, with small shapes
#
# Stages run in the order below, the most valuable first, each under its own time limit. A finished stage has written
# OUT/STAGE.txt (and .json; score: OUT/score/metrics.json). A stage that failed or was cut has left OUT/STAGE.part and
# OUT/STAGE.err, with the figures of the arms that did not fail in OUT/STAGE.json, or of the rounds before the cut in
# OUT/STAGE.json.part. The stage scratch leaves its model (5 GB), or the last checkpoint of a cut run (15 GB), which
# score, eval and vllm then read. A rerun skips the finished stages, resumes scratch and evaluates its new model. The
# exit code is 1 if a stage failed.
#
# Environment variables: TOKENIZER (a folder with Llama 3's tokenizer; by default that of models/tiny, which is enough for
# times and memory, as the shapes keep their vocabulary), MODEL (a trained run to evaluate; by default that of the stage
# scratch), EPOCHS of the stage scratch, PYTHON_BIN, VLLM_PYTHON, BATCH (examples per step), REPEATS.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=${PYTHON_BIN:-.venv/bin/python} tokenizer=${TOKENIZER:-models/tiny} out=${1:-bench-gpu} failed=0
vllm=${VLLM_PYTHON:-.venv-vllm/bin/python} wanted=("${@:2}")
export HF_HUB_OFFLINE=1 REHEARSE=${REHEARSE:-}
if [ -n "$REHEARSE" ]; then
  slower=20 shape=5m large=5m dtype=float32 batch=${BATCH:-2} few=2 repeats=1 steps=1 kernels=(sdpa)
  brief=(--max_steps 2 --batch_size 2 --grad_accum 1 --save_steps 1) rows=4 new_tokens=8 tokens=512 large_steps=3
  train=$out/train.jsonl memory=(--skip_memory)
else
  slower=1 shape=llama-3.2-1b large=llama-3.1-8b dtype=bfloat16 batch=${BATCH:-256} repeats=${REPEATS:-5} steps=4
  few=8 # the reference computes all logits of 3 rows of 512 tokens per example, and each arm of TRL has a model of its own
  brief=(--num_epochs "${EPOCHS:-2}" --batch_size 32 --grad_accum 4 --save_steps 48)
  rows=512 new_tokens=128 tokens=4096 large_steps=8
  kernels=(flash_attention_2 flex_attention) train=datasets/synth_train.jsonl memory=()
  "$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu.sh: error: no GPU")'
fi
mkdir -p "$out"
[ -z "$REHEARSE" ] || head -n 64 datasets/synth_train.jsonl >"$train"
trap 'rm -rf "$out/work"' EXIT

stage() { # name, seconds, command: writes OUT/name.txt
  local name=$1 limit=$2 code=0
  shift 2
  [ "${#wanted[@]}" = 0 ] || [[ " ${wanted[*]} " == *" $name "* ]] || return 0
  if [ -e "$out/$name.txt" ]; then echo "== $name: finished before"; return; fi
  echo "== $name (at most $((limit * slower)) s)"
  timeout -k 5 $((limit * slower)) "$@" >"$out/$name.part" 2>"$out/$name.err" || code=$?
  cat "$out/$name.part"
  if [ "$code" = 0 ]; then
    mv "$out/$name.part" "$out/$name.txt"
  else
    echo "gpu.sh: $name: exit code $code, see $out/$name.err" >&2
    failed=1
  fi
}

bench_steps() { # name, seconds, flags of bench_step.py
  stage "$1" "$2" "$python" benchmarks/bench_step.py --tokenizer "$tokenizer" --shape "$shape" --dtype "$dtype" \
    --input_file "$train" --batch_size "$batch" --steps "$steps" --repeats "$repeats" "${memory[@]}" \
    --json "$out/$1.json" "${@:3}"
}

with_shape() { # shape, command: runs it when OUT/shape has the shape's configuration and the tokenizer
  [ -e "$out/$1/config.json" ] ||
    "$python" benchmarks/bench_step.py --tokenizer "$tokenizer" --shape "$1" --write_shape "$out/$1"
  exec "${@:2}"
}
export -f with_shape
export out python tokenizer
with_shape=(bash -euc 'with_shape "$@"' bash)

stage facts 20 bash -c 'nvidia-smi || [ -n "$REHEARSE" ]; "$0" -m torch.utils.collect_env' "$python"
mapfile -t files < <(grep -rl "mark\.gpu" tests --include "test_*.py")
stage tests 90 "$python" -m pytest -n 0 -v -m gpu "${files[@]}"
bench_steps step 100 --arms "regular packed" packed "packed, in_chat" clip "clip, in_chat" "regular + nitp"
bench_steps reference 50 --batch_size "$few" --arms "regular packed" packed "reference layout"
stage large 120 "${with_shape[@]}" "$large" "$python" benchmarks/bench_large.py --model_name "$out/$large" \
  --work "$out/work" --input_file "$train" --arms "lora jepa" --tokens_per_batch "$tokens" --steps "$large_steps" \
  --json "$out/large.json"
rm -rf "$out/work" # the 8B model: 16 GB
bench_steps trl 50 --batch_size "$few" --arms "regular packed" "TRL padded" "TRL padding-free" "TRL packed"
bench_steps compile 50 --arms "regular packed" packed "packed, compiled"
for kernel in "${kernels[@]}"; do
  bench_steps "$kernel" 40 --arms "regular packed" packed --attn_implementation "$kernel"
done
bench_steps rows 30 --arms "regular packed" packed --tokens_per_row 1024
resume=()
[ ! -e "$out/scratch/args.json" ] || resume=(--resume)
if [ ! -e "$out/scratch.txt" ] && grep -qs '"status": "finished"' "$out/scratch/run.json"; then
  touch "$out/scratch.txt" # it was cut after its last step
fi
stage scratch 120 "${with_shape[@]}" "$shape" "$python" finetune.py --model_name "$out/$shape" --pretrain \
  --predictors 1 --lbd 1 --train_file "$train" --lm_labels reference --learning_rate 8e-5 --finetune_seed 82 \
  --save_strategy steps "${brief[@]}" --output_dir "$out/scratch" "${resume[@]}"
model=$out/scratch
[ -e "$out/scratch.txt" ] || model=$(printf '%s\n' "$model"/checkpoint-*/complete.json | sort -V | tail -n 1)
model=${MODEL:-${model%/complete.json}}
for name in score eval vllm; do
  [ ! "$out/scratch.txt" -nt "$out/$name.txt" ] || rm -f "$out/$name.txt" # that of a checkpoint
done
prompts=(--model_name "$model" --input_file datasets/synth_test.jsonl --batch_size 128 --max_new_tokens "$new_tokens")
stage score 50 "$python" evaluate.py "${prompts[@]}" --max_examples "$rows" --task synth \
  --output_file "$out/score/predictions.jsonl" --overwrite
bench_eval=("$python" benchmarks/bench_eval.py "${prompts[@]}" --rows "$rows" --repeats 1)
stage eval 35 "${bench_eval[@]}" --json "$out/eval.json" --arms "padded batches" evaluate.py
if [ -x "$vllm" ]; then
  stage vllm 100 "${bench_eval[@]}" --json "$out/vllm.json" --arms vLLM
else
  echo "== vllm: skipped, $vllm does not exist (bash setup.sh --vllm)"
fi
exit "$failed"
