#!/usr/bin/env bash
# Trains and evaluates the arms of an experiment over seeds and compares them. See `bash run.sh --help`.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# The commands. For each seed and dataset llm_jepa/driver.py replaces the names in braces by their values and runs the
# commands that are not finished yet. It omits a flag whose value is empty. These names are lists of flags:
#   {arm}       the flags of an arm in the table below
#   {defaults}  flags of the tiny model, of PROTOCOL=paper and of datasets with long examples
#   {resume}    --resume if the run folder exists
#   {flags}     the user's flags after --
#   {fields}    the user's flags that set how examples are read, such as --text_field and --skip_bad_examples
#   {plain}     --plain if it is one of the user's flags
#   {eval_flags} the flags of evaluate.py in EVAL_FLAGS; {scoring}: --spider_path and --allow_code_execution of them

arms() { # one per line: NAME[:λ, or the arm whose λ it has] and its flags
  local views=(--predictors {predictors} --lbd {lbd} --last_token {last_token}) # λ = lbd, k = predictors
  arm regular --regular                                                         # regular fine-tuning
  arm "jepa:${jepa_lbd:-1}" "${views[@]}"                                       # the JEPA loss as published: cosine
  arm clip:0.1 "${views[@]}" --jepa_loss clip                                   # contrasts each pair with the others
  arm nitp:0.8 --regular --nitp --nitp_lbd {lbd}                                # next-latent prediction
  arm placebo:clip "${views[@]}" --jepa_loss clip --shuffle_pairs               # clip on pairs that do not match
}

run_arm() { # fine-tuning with one of the arms, after a check that the test examples can be scored
  template check evaluate.py --score_gold --input_file {test_file} --task {task} {fields} {scoring}
  template train "${TRAINER:-finetune.py}" --train_file {train_file} --model_name {model} \
    --learning_rate {learning_rate} --num_epochs {epochs} --finetune_seed {seed} {arm} {defaults} --output_dir {run} \
    {resume} {flags}
  template evaluate evaluate.py --model_name {run} --input_file {test_file} --task {task} {fields} {plain} {eval_flags}
}

run_pretrain() { # pretraining of the arm ARM, then regular fine-tuning, all without the chat format
  template train_pretrain finetune.py --train_file {train_file} --model_name {model} --learning_rate {learning_rate} \
    --num_epochs {epochs} --finetune_seed {seed} {arm} --pretrain --plain --train_all {defaults} --output_dir {run} \
    {resume} {flags}
  template train_plain finetune.py --train_file {train_file} --model_name {model} --learning_rate {learning_rate} \
    --num_epochs {epochs} --finetune_seed {seed} {arm} --plain {defaults} --output_dir {run} {resume} {flags}
  template evaluate_plain evaluate.py --model_name {run} --input_file {test_file} --task {task} {fields} \
    --plain --startswith {eval_flags}
}

sweep() { # the cells of the grid use these flags instead of --train_file and --input_file
  template train_cell --data_file {train_file} --eval_split {eval_split} --split_seed {split_seed} --eval_strategy no
  template evaluate_cell --input_file {train_file} --process_split test --test_size {eval_split} --split_seed {split_seed}
}

launchers() {
  [ "${NPROC:-1}" = 1 ] || template launch_train -m llm_jepa.large.launch --standalone --nproc_per_node {nproc}
}

usage() {
  cat <<'HELP'
usage: bash run.sh run_regular|run_jepa|run_clip|run_nitp|run_placebo [ARGUMENT…] [-- FLAG…]
       bash run.sh run_pretrain [ARGUMENT…] -- FLAG… -- FLAG…
       bash run.sh compare|sweep [DATASET] [MODEL] [-- FLAG… [-- FLAG…]]
For each seed: trains on datasets/DATASET_train.jsonl, evaluates on datasets/DATASET_test.jsonl and prints a line. At the
end: prints mean ± sd. Finished trainings and evaluations are skipped, interrupted ones are resumed. Paths are relative to
the project folder.

These are the arms, with their default λ:
  regular        regular fine-tuning
  jepa     1     the JEPA loss as published: the cosine of Text and Code (LLM-JEPA)
  clip     0.1   --jepa_loss clip, which contrasts each pair with the other pairs of its batch
  nitp     0.8   --regular --nitp: each token's state predicts the embedding of the next token; λ is --nitp_lbd
  placebo  clip  clip with --shuffle_pairs: each Text is paired with the Code of another example (λ: that of clip)
run_ARM trains one of them.

compare trains the arms of ARMS with the same seeds, which also gives them the same data order, and writes a report. These
are arms × seeds = 25 trainings by default. ARMS="regular jepa clip:0.3" chooses and orders the arms and sets λ of clip;
regular, with which the report compares the others, must be one of them. FLAGs before a second -- go to all arms, FLAGs
after it to all but regular: ARMS="regular jepa" bash run.sh compare -- --lora -- --jepa_ratio 0.5

run_pretrain pretrains the model's architecture from random weights on PRETRAIN_DATASET without the chat format, with the
JEPA loss or (ARM=regular) without it. Then it fine-tunes that model on each DATASET without the JEPA loss and evaluates
by startswith. FLAGs before the second -- go to the pretraining, FLAGs after it to the fine-tuning.

sweep first picks the settings on a held-out fraction EVAL_SPLIT of the train file, drawn with SPLIT_SEED. It trains each
learning rate of LEARNING_RATES without the JEPA loss, with SWEEP_SEED. With the learning rate of the best primary score it
trains the arm SWEEP_ARM with each k of GRID_K (nitp has no k) and each λ of GRID_LBD. Of settings with equal scores it
picks the smallest learning rate, k and λ. Then it trains regular and SWEEP_ARM with the picked settings on the complete
train file and reports them as compare does. By default these are 34 trainings. The scores of all settings are in
sweep.json.

Arguments, all optional, in this order ('-' selects the default). The variable in brackets sets the default:
  model          [MODEL]        models/tiny, from random weights (--pretrain), with
                                --batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98
  learning rate  [LR]           2e-5; 1e-3 for models/tiny; LEARNING_RATE is another name of the variable
  epochs         [EPOCHS]       4; 1 for models/tiny; a FLAG --max_steps replaces it
  last_token     [LAST_TOKEN]   view token as an index from the view's end; default: found by finetune.py
  predictors     [PREDICTORS]   1
  seed           [SEEDS]        one, several with commas, or all (default): 82 23 37 84 4
  lbd            [LBD]          λ of the arm; in compare only of jepa
  dataset        [DATASET]      synth; run_pretrain: rotten_tomatoes,yelp; one or several with commas
  output folder  [RUNS_DIR]     runs: contains the run folders
run_regular and run_nitp ignore last_token and predictors, run_regular also lbd. compare and sweep accept only DATASET and
MODEL; variables set the others. FLAGs go to finetune.py, and the name of the run folder has a hash of them:
  bash run.sh run_jepa -- --lora --lora_rank 64
The default of --max_length is 1024 for gsm8k and 2048 for yelp and mbpp, which have examples of more than 512 tokens.

PROTOCOL=paper trains as published. It sets
  --lm_labels reference --max_length 512 (1024 or 2048 for the datasets above) --batch_size 4 --grad_accum 4 --lr_scheduler_type linear
  --warmup_steps 0 --weight_decay 0 --adam_beta2 0.999 --max_grad_norm 1 --dtype auto
and 4 epochs, for arms with a JEPA loss --reference_grad_scale, and for compare ARMS="regular jepa". Tokenizers without
a pad token use eos. dtype auto is bfloat16 if the GPU supports it. Seeds, k, λ and learning rates are the defaults above.
Set NPROC=8 for the published 8 GPUs. Your own arguments and FLAGs override these settings. The names of the run folders
contain -paper.

More variables (one that looks like a misspelled variable of this page is an error):
  NPROC             training processes, one per GPU (1); evaluation uses one process
  JOBS              runs at a time (1; 2 for models/tiny), which share the cores. A run that fails ends the others. With
                    several, and in compare and sweep without a terminal, each run's output goes to RUNS_DIR/.logs/RUN.log
  TASK              task that scores a dataset without the name of a task (evaluate.py --task)
  EVAL_FLAGS        more flags of evaluate.py: EVAL_FLAGS='--max_new_tokens 512 --engine vllm' bash run.sh run_jepa
  PYTHON_BIN        interpreter to use; default: that of .venv, which setup.sh creates
  ARMS              compare: arms, in order, each with its λ after a colon if it is not the default
                    (regular jepa clip nitp placebo)
  ARM               run_pretrain: arm of the pretraining, jepa or regular (jepa)
  PRETRAIN_DATASET  run_pretrain: dataset of the pretraining (paraphrase)
  FINETUNE_LR, FINETUNE_EPOCHS  run_pretrain: learning rate and epochs of the fine-tuning (those of the pretraining)
  REPORTS_DIR       compare, sweep: folder of the reports (reports)
  ALLOW             compare, sweep: settings in which the arms may differ besides the method (report --allow)
  SWEEP_ARM         sweep: arm whose k and λ are picked (jepa)
  GRID_K            sweep: values of k (0 1 2 3 4)
  GRID_LBD          sweep: values of λ (.5 1 2 4, which suits jepa; the other arms need smaller ones)
  LEARNING_RATES    sweep: learning rates (1e-5 2e-5 4e-5 8e-5; for models/tiny 5e-4 1e-3 2e-3 4e-3)
  SWEEP_SEED        sweep: seed of the trainings that pick the settings (42); with several, their mean score decides
  EVAL_SPLIT, SPLIT_SEED        sweep: held-out fraction of the train file (0.2) and seed of this split (42)
HELP
}

fail() { printf '%s: error: %s\n' "${0##*/}" "$1" >&2; exit 2; }
arm() { template "arm_$1" "${@:2}"; }
template() { templates+=("$1=${*:2}"); }

drive() { # the script's arguments: runs them with all templates
  if [ -z "${PYTHON_BIN:-}" ]; then
    unset PYTHONHOME PYTHONPATH # of another environment
    bash setup.sh
  fi
  exec "${PYTHON_BIN:-.venv/bin/python}" -m llm_jepa.driver "${0##*/}" "${templates[@]}" -- "$@"
}

templates=()
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  case " $* " in *" -h "* | *" --help "*) usage && exit ;; esac
  unset NNODES NODE_RANK TRAINER # of run8bh200.sh
  arms && run_arm && run_pretrain && sweep && launchers
  drive "$@"
fi
