#!/usr/bin/env bash
# Runs all benchmarks on a GPU: training steps of Llama-3.2-1B's shape in bfloat16 in every layout and with each attention
# kernel, their growth, and generation. Writes one file per table to OUT. A kernel that is not installed is reported.
#
#     bash benchmarks/gpu.sh TOKENIZER [OUT]
#
# TOKENIZER: a folder with Llama 3's tokenizer. Environment variables: MODEL (a trained run; without it, generation is
# skipped), PYTHON_BIN, BATCH (examples per step), REPEATS.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=${PYTHON_BIN:-.venv/bin/python} tokenizer=${1:?a folder with Llama 3\'s tokenizer} out=${2:-bench-gpu}
batch=${BATCH:-16} repeats=${REPEATS:-5} failed=0
mkdir -p "$out"
"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu.sh: error: no GPU")'

bench() { # name, arguments of bench_step.py or of the benchmark in SCRIPT; writes the table and the JSON
  echo "== $1"
  "$python" "benchmarks/${SCRIPT:-bench_step.py}" --tokenizer "$tokenizer" --shape llama-3.2-1b --dtype bfloat16 \
    --batch_size "$batch" --repeats "$repeats" --json "$out/$1.json" "${@:2}" 2>"$out/$1.err" | tee "$out/$1.txt" ||
    { echo "gpu.sh: $1 failed, see $out/$1.err" >&2 && failed=1; }
}

bench step
for kernel in sdpa flex_attention flash_attention_2; do
  for row in 1024 4096 16384; do
    # Flash attention packs a micro-batch into one row and ignores the limit.
    [ "$kernel" != flash_attention_2 ] || [ "$row" = 4096 ] || continue
    limit=(--tokens_per_row "$row")
    [ "$kernel" != flash_attention_2 ] || limit=()
    arms=(packed "regular packed")
    [ "$kernel" != sdpa ] || arms+=("packed, in_chat") # branches need a dense mask
    bench "$kernel-$row" --arms "${arms[@]}" --attn_implementation "$kernel" ${limit[@]+"${limit[@]}"}
  done
done
SCRIPT=bench_growth.py bench growth --arms tokens pairs --png "$out/growth.png"
if [ -n "${MODEL:-}" ]; then
  "$python" benchmarks/bench_eval.py --model_name "$MODEL" --input_file datasets/synth_test.jsonl --rows 2000 \
    --batch_size 512 --repeats "$repeats" --json "$out/eval.json" | tee "$out/eval.txt" || failed=1
fi
exit "$failed"
