#!/usr/bin/env bash
#
# Compare training speed and start-up on this machine with Hugging Face's Trainer, a bare DDP loop and, with --peers,
# litgpt. Usage: tests/benchmarks/run.sh [--quick|--gpu] [--peers] [OPTION...]   (--help lists the options)

set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
readonly ROOT
readonly LITGPT=litgpt==0.5.13
PEERS="${XDG_CACHE_HOME:-$HOME/.cache}/h100_dual/peers/litgpt"
readonly PEERS
# shellcheck source=run_h100_dual.sh
source "$ROOT/run_h100_dual.sh"

ensure_litgpt() { # an environment of its own, since litgpt pins other versions; PyTorch is the one that is measured
  local ours theirs package
  export LITGPT_PYTHON="$PEERS/bin/python"
  [[ ! -e $PEERS/.ready ]] || return 0
  log "📦 $LITGPT 를 $PEERS 에 설치합니다"
  "$python" -m venv --clear "$PEERS"
  ours=$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
  theirs=$("$LITGPT_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  for package in "$ours"/{torch,torchgen,functorch,torch-*.dist-info,nvidia*,triton*,cuda*}; do
    [[ ! -e $package ]] || ln -s "$package" "$theirs"
  done
  "$LITGPT_PYTHON" -m pip install --quiet --disable-pip-version-check "$LITGPT"
  touch "$PEERS/.ready"
}

main_bench() {
  find_python never
  if [[ -z $python ]]; then
    install_packages "$ROOT/requirements.txt"
    python="$VENV_DIR/bin/python"
  fi
  [[ " $* " != *" --peers "* ]] || ensure_litgpt
  PATH="$(dirname -- "$python"):$PATH" exec "$python" "$ROOT/tests/benchmarks/${BENCHMARK:-bench.py}" "$@"
}

main_bench "$@"
