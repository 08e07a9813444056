#!/usr/bin/env bash
# run.sh for 8B-parameter models on one or more nodes of H200 GPUs. See `bash run8bh200.sh --help`.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. ./run.sh # arms, run_arm, template, fail and drive; its functions of the same name are replaced here

jepa_lbd=2 # of the arm jepa: the paper's value for Llama-3.1-8B-Instruct on synth

launchers() {
  local nodes=(--standalone) waiting="join_timeout=$NODE_TIMEOUT,read_timeout=$NODE_TIMEOUT"
  [ "$NNODES" -eq 1 ] ||
    nodes=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id {name}
      --rdzv_conf "is_host=$((NODE_RANK == 0)),$waiting")
  template launch_train -m llm_jepa.large.launch --nproc_per_node {nproc} --max-restarts "$MAX_RESTARTS" "${nodes[@]}"
  [ "$NPROC" -eq 1 ] || template launch_evaluate -m llm_jepa.large.launch --nproc_per_node {nproc} --standalone
  [ "$PREFLIGHT" = no ] ||
    template preflight -m llm_jepa.preflight --model_name {model} --data_files {data_files} --output_dir {runs_dir} \
      --runs {left} --device "$DEVICE" --nproc_per_node {nproc} --nnodes "$NNODES" --node_rank "$NODE_RANK" \
      --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT" --join_limit "$JOIN_LIMIT" {trainings}
}

usage() {
  cat <<'HELP'
usage: bash run8bh200.sh run_regular|run_jepa|run_clip|run_nitp|run_placebo [ARGUMENT…] [-- FLAG…]
       bash run8bh200.sh [compare [DATASET] [MODEL] [-- FLAG… [-- FLAG…]]]
For each seed: trains on all GPUs of all nodes, evaluates on all GPUs of the first node and prints a line. At the end:
prints mean ± sd, and for compare writes a report. The default is compare: the arms regular and jepa of
meta-llama/Llama-3.1-8B-Instruct on synth over the seeds 82 23 37 84 4. Before the first training the preflight reports
all problems. Finished trainings and evaluations are skipped, interrupted ones are resumed. Ctrl-C ends all processes of
this node.

Arguments, all optional, in this order ('-' selects the default). The variable in brackets sets the default:
  model          [MODEL]        meta-llama/Llama-3.1-8B-Instruct
  learning rate  [LR]           2e-5
  epochs         [EPOCHS]       4
  last_token     [LAST_TOKEN]   view token as an index from the view's end; default: found by the training script
  predictors     [PREDICTORS]   0, the paper's value for this model on synth
  seed           [SEEDS]        one, several with commas, or all (default): 82 23 37 84 4
  lbd            [LBD]          λ of the arm; jepa: 2, the paper's value for this model on synth
  dataset        [DATASET]      synth; one or several with commas
  output folder  [RUNS_DIR]     runs: contains the run folders; all nodes need access to it
FLAGs go to the training, and FLAGs after a second -- to all arms but regular. The preflight also gets the flags that
affect the memory, for example --lora and --batch_size.

Variables of a node. Under SLURM the job sets the defaults:
  NPROC          processes, one per GPU (number of GPUs)
  NNODES         number of nodes; each of them runs the same command (SLURM_NNODES, else 1)
  NODE_RANK      index of this node (SLURM_NODEID); required if NNODES > 1. Node 0 evaluates and writes the report. The node
                 that torchrun ranks first shows the progress of the training
  MASTER_ADDR    first node (the first of SLURM_JOB_NODELIST); required if NNODES > 1
  MASTER_PORT    port of the first node for the rendezvous (29500; under SLURM 20000 + job id modulo 10000)
  MAX_RESTARTS   restarts from the last complete checkpoint after a process or node has failed (3)
  NODE_TIMEOUT   seconds that nodes wait for each other, including the evaluation on the first one (7200)
  PREFLIGHT=no   skips the preflight
  JOIN_LIMIT     seconds that the preflight waits for the other nodes (600)
  DEVICE=cpu     runs without GPUs: DEVICE=cpu NPROC=2 MODEL=models/tiny bash run8bh200.sh run_jepa
  TRAINER        training script (finetune8bh200.py)
`bash run.sh --help` explains the arms and ARMS (here by default regular jepa), PROTOCOL=paper, TASK, EVAL_FLAGS (flags of
evaluate.py), PYTHON_BIN, REPORTS_DIR and ALLOW.

One node:    bash run8bh200.sh
             bash run8bh200.sh run_jepa - 2e-5 4 - 0 all 2 synth /data/runs
Two nodes:   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash run8bh200.sh      # NODE_RANK=1 on the second node
SLURM:       sbatch --nodes 2 run8bh200.sbatch run_jepa
LoRA:        bash run8bh200.sh run_jepa -- --lora --lora_rank 64
HELP
}

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    printf '%s\n' "${CUDA_VISIBLE_DEVICES//,/$'\n'}" | grep -c . || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
  fi
}

default() { # name, pattern, value: sets a variable that is empty, then checks it
  [ -n "${!1:-}" ] || printf -v "$1" %s "$3"
  [[ ${!1} =~ ^($2)$ ]] || fail "$1 cannot be '${!1}' (see --help)"
  export "${1?}"
}

node_variables() {
  local whole='0|[1-9][0-9]*' count='[1-9][0-9]*' gpus port=29500
  gpus=$(count_gpus)
  [ "$gpus" -gt 0 ] || gpus=8 # the preflight then reports that they are missing
  [ -z "${SLURM_JOB_ID:-}" ] || port=$((20000 + SLURM_JOB_ID % 10000))
  [ "${JOBS:-1}" = 1 ] || fail "JOBS is not for ${0##*/}: a training uses all GPUs"
  export JOBS=1
  default MODEL '.*' meta-llama/Llama-3.1-8B-Instruct
  default PREDICTORS '.*' 0
  default ARMS '.*' 'regular jepa'
  default TRAINER '.*' finetune8bh200.py
  default NPROC "$count" "$gpus"
  default NNODES "$count" "${SLURM_NNODES:-1}"
  [ "$NNODES" -eq 1 ] || [ -n "${NODE_RANK:-}${SLURM_NODEID:-}" ] || fail "NODE_RANK, the index of this node, is missing"
  default NODE_RANK "$whole" "${SLURM_NODEID:-0}"
  default MASTER_PORT "$count" "$port"
  default MAX_RESTARTS "$whole" 3
  default NODE_TIMEOUT "$count" 7200
  default JOIN_LIMIT "$count" 600
  default DEVICE 'cuda|cpu' cuda
  default PREFLIGHT 'yes|no' yes
  [ "$NODE_RANK" -lt "$NNODES" ] || fail "NODE_RANK $NODE_RANK must be below NNODES $NNODES"
  [ -f "$TRAINER" ] || fail "TRAINER $TRAINER does not exist"
  if [ "$NNODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol cannot read SLURM_JOB_NODELIST"
    MASTER_ADDR=${MASTER_ADDR%%$'\n'*}
  fi
  [ "$NNODES" -eq 1 ] || [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR, the name of the first node, is missing"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  case " $* " in *" -h "* | *" --help "*) usage && exit ;; esac
  node_variables
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # each restart gets a new store, without the addresses of dead processes
  arms && run_arm && launchers
  drive "${@:-compare}"
fi
