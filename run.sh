#!/usr/bin/env bash
# Trains and evaluates regular fine-tuning and LLM-JEPA over seeds, then prints mean ± sd. See `bash run.sh --help`.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# The commands. For each seed and data set llm_jepa/driver.py fills in the values in braces and runs the commands that are
# not done yet. A flag whose value is empty is left out. Four names are lists of flags, which may be empty:
#   {defaults}  of the embedded model, of PROTOCOL=paper and of data sets with long examples
#   {resume}    --resume if the run folder exists
#   {flags}     the user's flags after --
#   {fields}    those of them that say how examples are read: --text_field, --code_field, --system, --skip_bad_examples
run_regular() { # regular fine-tuning
  template train_regular finetune.py --train_file {train_file} --model_name {model} --learning_rate {learning_rate} \
    --num_epochs {epochs} --finetune_seed {seed} --regular {defaults} --output_dir {run} {resume} {flags}
  template evaluate_regular evaluate.py --model_name {run} --input_file {test_file} --task {task} {fields} {plain}
}

run_jepa() { # fine-tuning with the JEPA loss of weight λ = lbd on k = predictors predictor tokens
  template train_jepa finetune.py --train_file {train_file} --model_name {model} --learning_rate {learning_rate} \
    --num_epochs {epochs} --finetune_seed {seed} --predictors {predictors} --lbd {lbd} --last_token {last_token} \
    {defaults} --output_dir {run} {resume} {flags}
  template evaluate_jepa evaluate.py --model_name {run} --input_file {test_file} --task {task} {fields} {plain}
}

run_pretrain() { # pretraining in one of two arms, then regular fine-tuning, all without the chat format
  template train_pretrain_jepa finetune.py --train_file {train_file} --model_name {model} \
    --learning_rate {learning_rate} --num_epochs {epochs} --finetune_seed {seed} --predictors {predictors} --lbd {lbd} \
    --last_token {last_token} --pretrain --plain --train_all {defaults} --output_dir {run} {resume} {flags}
  template train_pretrain_regular finetune.py --train_file {train_file} --model_name {model} \
    --learning_rate {learning_rate} --num_epochs {epochs} --finetune_seed {seed} --regular \
    --pretrain --plain --train_all {defaults} --output_dir {run} {resume} {flags}
  template train_plain finetune.py --train_file {train_file} --model_name {model} --learning_rate {learning_rate} \
    --num_epochs {epochs} --finetune_seed {seed} --regular --plain {defaults} --output_dir {run} {resume} {flags}
  template evaluate_plain evaluate.py --model_name {run} --input_file {test_file} --task {task} {fields} \
    --plain --startswith
}

sweep() { # the cells of the grid read a part of the train file each, in place of --train_file and --input_file
  template train_cell --data_file {train_file} --eval_split {eval_split} --split_seed {split_seed} --eval_strategy no
  template evaluate_cell --input_file {train_file} --process_split test --test_size {eval_split} --split_seed {split_seed}
}

launchers() {
  template check evaluate.py --score_gold --input_file {test_file} --task {task} {fields} # before the first training
  [ "${NPROC:-1}" = 1 ] || template launch_train -m llm_jepa.large.launch --standalone --nproc_per_node {nproc}
}

usage() {
  cat <<'HELP'
usage: bash run.sh run_jepa|run_regular|run_pretrain [ARGUMENT…] [-- FLAG…]
       bash run.sh run_pretrain [ARGUMENT…] -- FLAG… -- FLAG…
       bash run.sh compare|sweep [DATASET] [MODEL] [-- FLAG… [-- FLAG…]]
For each seed: trains on datasets/DATASET_train.jsonl, evaluates on datasets/DATASET_test.jsonl and prints a line. At the
end: mean ± sd. Finished steps are skipped, interrupted ones are resumed. Paths are relative to the project folder.

run_pretrain pretrains the model's architecture from random weights on PRETRAIN_DATASET without the chat format, with the
JEPA loss or (ARM=regular) without it. Then it fine-tunes that model on each DATASET without the JEPA loss and evaluates
by startswith. FLAGs before the second -- go to the pretraining, FLAGs after it to the fine-tuning.

compare runs both arms on the same seeds, so with the same data order, and writes a report. FLAGs after the second -- go
only to the JEPA arm: bash run.sh compare -- --lora -- --jepa_ratio 0.5

sweep first picks the settings on a held-out share EVAL_SPLIT of the train file, drawn with SPLIT_SEED. It trains each of
LEARNING_RATES without the JEPA loss, with SWEEP_SEED. With the best of them by the task score it trains each k of GRID_K
with each λ of GRID_LBD. Of equal cells the smallest learning rate, k and λ is picked. Then it trains both arms with the
picked settings on the complete train file and reports them as compare does. The scores of all cells are in sweep.json.

Arguments, all optional, in this order ('-' is the default). The variable in brackets sets the default:
  model          [MODEL]        models/tiny, from random weights (--pretrain), with
                                --batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98
  learning rate  [LR]           2e-5; 1e-3 for models/tiny; LEARNING_RATE is the same variable
  epochs         [EPOCHS]       4; 2 for models/tiny; --max_steps among the FLAGs replaces it
  last_token     [LAST_TOKEN]   view token as an index from the view's end; default: found by finetune.py
  predictors     [PREDICTORS]   1
  seed           [SEEDS]        one, several with commas, or all (default): 82 23 37 84 4
  lbd            [LBD]          1
  dataset        [DATASET]      synth; run_pretrain: rotten_tomatoes,yelp; one or several with commas
  output folder  [RUNS_DIR]     runs: contains the run folders
run_regular accepts the same list and ignores last_token, predictors and lbd. compare and sweep accept only DATASET and
MODEL; variables set the rest. FLAGs go to finetune.py and become part of the run folder's name:
  bash run.sh run_jepa -- --lora --lora_rank 64
Unless you give it, --max_length is 1024 for gsm8k and 2048 for yelp, which have examples of more than 512 tokens.

PROTOCOL=paper trains as published. It sets
  --lm_labels reference --max_length 512 --batch_size 4 --grad_accum 4 --lr_scheduler_type linear
  --warmup_steps 0 --weight_decay 0 --adam_beta2 0.999 --max_grad_norm 1 --dtype auto
and 4 epochs, and in the JEPA arm --reference_grad_scale. Tokenizers without a pad token use eos. dtype auto is bfloat16 if
the GPU supports it. Seeds, k, λ and learning rates are the defaults above; the published 8 GPUs are NPROC=8. Your own
arguments and FLAGs win. Run folders are marked -paper.

More variables:
  NPROC             training processes, one per GPU (1); evaluation uses one process
  JOBS              runs at a time (1), which share the cores; with several, and in compare and sweep, each run writes its
                    output to RUNS_DIR/.logs/RUN.log, and one that fails ends the others
  TASK              how to score a data set whose name is no task (evaluate.py --task)
  PYTHON_BIN        interpreter to use; default: setup.sh creates .venv
  ARM               run_pretrain: jepa or regular (jepa); PRETRAIN_DATASET (paraphrase); FINETUNE_LR and FINETUNE_EPOCHS
                    of the fine-tuning (those of the pretraining)
  REPORTS_DIR       compare, sweep: folder of the reports (reports)
  ALLOW             compare, sweep: settings in which the arms may differ besides the method (report --allow)
  GRID_K, GRID_LBD  sweep: 0 1 2 3 4 and .5 1 2 4
  LEARNING_RATES    sweep: 1e-5 2e-5 4e-5 8e-5; for models/tiny 5e-4 1e-3 2e-3 4e-3
  SWEEP_SEED        sweep: 42; the mean over several decides
  EVAL_SPLIT        sweep: 0.2; SPLIT_SEED (42)
HELP
}

fail() { printf '%s: error: %s\n' "${0##*/}" "$1" >&2; exit 2; }

template() { templates+=("$1=${*:2}"); }

drive() { # the script's arguments: runs them with all templates
  python=${PYTHON_BIN:-.venv/bin/python}
  if [ -z "${PYTHON_BIN:-}" ]; then
    unset PYTHONHOME PYTHONPATH # of another environment
    bash setup.sh
  fi
  exec "$python" -m llm_jepa.driver "${0##*/}" "${templates[@]}" -- "$@"
}

templates=()
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  [[ " $* " != *" --help "* ]] || { usage; exit; }
  unset NNODES NODE_RANK # of run8bh200.sh
  run_regular && run_jepa && run_pretrain && sweep && launchers
  drive "$@"
fi
