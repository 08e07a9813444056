#!/usr/bin/env bash
# run.sh for models of eight billion weights on nodes of H200s. `bash run8bh200.sh --help` explains it.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
trainer=${TRAINER:-finetune8bh200.py}
. ./run.sh
LLAMA=meta-llama/Llama-3.1-8B-Instruct
TRAINER=$trainer USUAL_MODEL=$LLAMA USUAL_PREDICTORS=0 USUAL_LBD=2 # the paper's k and λ of this model on synth

usage() {
  cat <<HELP
usage: bash run8bh200.sh [run_jepa|run_regular [ARGUMENT…] [-- FLAG…]]
       bash run8bh200.sh compare [DATASET] [MODEL] [-- FLAG… [-- FLAG…]]
On each seed, trains with all GPUs of all nodes, evaluates with those of the first node and prints a line; then mean ± sd,
of compare a report. Without arguments it is compare: both arms, $LLAMA, synth, the seeds
$PAPER_SEEDS. Before the first training preflight.py names all that is missing. What is done is skipped, what was
interrupted goes on, Ctrl-C ends everything on this node at once.

Arguments, all optional, in this order ('-': the default); the variable in brackets sets the default:
  model          [MODEL]        $LLAMA
  learning rate  [LR]           2e-5
  epochs         [EPOCHS]       4
  last_token     [LAST_TOKEN]   view token, an index from the view's end; not given: the training finds it
  predictors     [PREDICTORS]   0, the paper's for this model on synth
  seed           [SEEDS]        one, several with commas, or all: $PAPER_SEEDS
  lbd            [LBD]          2, the paper's for this model on synth
  dataset        [DATASET]      synth; one or several with commas
  output folder  [RUNS_DIR]     runs; run folders go into it. With several nodes all of them must see it
FLAGs go to the training, those behind a second -- to the JEPA arm's alone, and those that memory.py knows to the
preflight: --lora, --batch_size …

A node (variables that SLURM's job gives where you do not):
  NPROC          processes, one a GPU (its GPUs)
  NNODES         nodes, each of which runs the same command (SLURM_NNODES, else 1)
  NODE_RANK      this node's number, needed with several nodes; 0 evaluates and reports (SLURM_NODEID). Training's progress
                 is shown by whichever node torchrun puts first
  MASTER_ADDR    the first node (the first of SLURM_JOB_NODELIST); needed with several nodes
  MASTER_PORT    its port for the rendezvous (29500; of a SLURM job 20000 + its number modulo 10000)
  MAX_RESTARTS   how often training starts again, from its last whole checkpoint, where a process or node fails (3)
  NODE_TIMEOUT   seconds that nodes wait for one another, evaluation on the first one included (7200)
  PREFLIGHT=no   leaves the preflight out; JOIN_LIMIT, seconds for which it waits for the other nodes (600)
  DEVICE=cpu     tries it without GPUs: DEVICE=cpu NPROC=2 MODEL=$TINY bash run8bh200.sh run_jepa
  TRAINER        the training script (finetune8bh200.py)
PROTOCOL=paper, TASK, PYTHON_BIN, REPORTS_DIR and ALLOW as in run.sh, whose --help explains them.

One node:    bash run8bh200.sh
             bash run8bh200.sh run_jepa - 2e-5 4 - 0 all 2 synth /data/runs
Two nodes:   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash run8bh200.sh      # on the first, on the other with NODE_RANK=1
SLURM:       sbatch --nodes 2 run8bh200.sbatch run_jepa
LoRA:        bash run8bh200.sh run_jepa -- --lora --lora_rank 64
HELP
}

gpus() { # how many the node has that may be used
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    printf '%s\n' "${CUDA_VISIBLE_DEVICES//,/$'\n'}" | grep -c . || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
  fi
}

node_settings() { # from the environment, SLURM's and the defaults; without GPUs 8, which the preflight then misses
  local port=29500 first="" found
  found=$(gpus)
  [ "$found" -gt 0 ] || found=8
  [ -z "${SLURM_JOB_ID:-}" ] || port=$((20000 + SLURM_JOB_ID % 10000))
  setting NODES '[1-9][0-9]*' "${NNODES:-}" "${SLURM_NNODES:-}" 1
  setting node "$whole" "${NODE_RANK:-}" "${SLURM_NODEID:-}" 0
  setting NPROC '[1-9][0-9]*' "${NPROC:-}" "$found"
  setting MASTER_PORT '[1-9][0-9]*' "${MASTER_PORT:-}" "$port"
  setting MAX_RESTARTS "$whole" "${MAX_RESTARTS:-}" 3
  setting NODE_TIMEOUT '[1-9][0-9]*' "${NODE_TIMEOUT:-}" 7200
  setting JOIN_LIMIT '[1-9][0-9]*' "${JOIN_LIMIT:-}" 600
  setting DEVICE 'cuda|cpu' "${DEVICE:-}" cuda
  setting PREFLIGHT 'yes|no' "${PREFLIGHT:-}" yes
  [ "$node" -lt "$NODES" ] || fail "NODE_RANK $node is not below NNODES $NODES"
  [ "$NODES" -gt 1 ] || return 0
  [ -n "${NODE_RANK:-}${SLURM_NODEID:-}" ] || fail "NODE_RANK, this node's number counted from 0, is missing"
  if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol cannot read SLURM_JOB_NODELIST"
    first=${first%%$'\n'*}
  fi
  MASTER_ADDR=${MASTER_ADDR:-$first}
  [ -n "$MASTER_ADDR" ] || fail "MASTER_ADDR, the name of the first of $NODES nodes, is missing"
  [ "$node" -eq 0 ] || LOG_MARK=-node$node
}

unfinished() { # how many of the runs are still to train
  local seed name method arms=${arm#run_} count=0 own
  [ "$arm" != compare ] || arms="regular jepa"
  for seed in $seeds; do
    for name in $datasets; do
      for method in $arms; do
        data "$name"
        "$method"
        own=(${extra[@]+"${extra[@]}"})
        [ "$method" = regular ] || own+=(${later[@]+"${later[@]}"})
        finished "$(run_folder "$seed" ${own[@]+"${own[@]}"})" || count=$((count + 1))
      done
    done
  done
  printf '%s\n' "$count"
}

before_seeds() { # the preflight, on every node before any of them trains or evaluates
  local files="" name given=() start=() left
  left=$(unfinished)
  if [[ $PREFLIGHT = yes && $left -gt 0 ]]; then
    for name in $datasets; do files+=${files:+,}datasets/${name}_train.jsonl,datasets/${name}_test.jsonl; done
    [ "$model" != "$TINY" ] || start=(--pretrain)
    for dataset in $datasets; do [ -z "$(longest)" ] || start+=(--max_length "$(longest)"); done # the last one counts
    start+=(${extra[@]+"${extra[@]}"})
    [ "$arm" = run_jepa ] || given=(-- --regular ${start[@]+"${start[@]}"})
    [ "$arm" = run_regular ] ||
      given+=(-- --predictors "$predictors" --lbd "$lbd" ${start[@]+"${start[@]}"} ${later[@]+"${later[@]}"})
    supervise "$python" -m llm_jepa.preflight --model_name "$model" --data_files "$files" --output_dir "${RUNS_DIR:-runs}" \
      --runs "$left" --device "$DEVICE" --nproc_per_node "$processes" --nnodes "$NODES" \
      --node_rank "$node" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT" \
      --join_limit "$JOIN_LIMIT" "${given[@]}" || fail "not ready (see above)" "$?"
  fi
}

before_training() { [ "$node" -gt 0 ] || check_scoring "$@"; } # extra flags

launcher() { # fills `launch` with torchrun; run folder, which the nodes take to know one another by
  # With a store of its own for each start, processes never find the addresses of those that died.
  launch=(env "$(threads_of_each)" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "$python" -m llm_jepa.large.launch
    --nproc_per_node "$processes" --max-restarts "$MAX_RESTARTS")
  if [ "$NODES" -eq 1 ]; then
    launch+=(--standalone)
  else
    launch+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "${1##*/}"
      --rdzv_conf "is_host=$((node == 0)),join_timeout=$NODE_TIMEOUT,read_timeout=$NODE_TIMEOUT")
  fi
}

answerer() {
  launch=("$python")
  [ "$processes" -eq 1 ] || launch=(env "$(threads_of_each)" "$python" -m llm_jepa.large.launch
    --nproc_per_node "$processes" --standalone)
}

ended() { # any node may have written run.json, and a file system that nodes share shows it a little later
  for _ in {1..60}; do
    ! finished "$1" || return 0
    [ "$NODES" -gt 1 ] && sleep 1 || return 1
  done
  return 1
}

start() {
  local arm=${1:-compare} given=() whole='0|[1-9][0-9]*' node
  [[ " $* " != *" --help "* ]] || { usage && exit; }
  [[ $arm =~ ^(run_(jepa|regular)|compare)$ ]] ||
    fail "unknown function '$arm': run_jepa, run_regular or compare (see --help)"
  [ $# -eq 0 ] || shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do given+=("$1") && shift; done
  [ "${#given[@]}" -le 9 ] || fail "too many arguments: $arm takes 9, the next is '${given[9]}'"
  [[ ${given[8]:-} =~ ^-?$ ]] || RUNS_DIR=${given[8]}
  [ "${JOBS:-1}" = 1 ] || fail "JOBS is not for $SCRIPT: a training takes all GPUs"
  node_settings
  [ -f "$TRAINER" ] || fail "there is no $TRAINER, the training script (TRAINER)"
  if [ "$node" -gt 0 ]; then # only the first node evaluates and reports
    run_seed() { train_seed "$@"; }
    conclude() { :; }
  fi
  main "$arm" ${given[@]+"${given[@]:0:8}"} "$@"
}

start "$@"
