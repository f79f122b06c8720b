#!/usr/bin/env bash
#
# Compare training speed and start-up on this machine with Hugging Face's Trainer and a bare DDP loop.
# Usage: tests/benchmarks/run.sh [--quick|--gpu|--muon] [OPTION...]   (--help lists the options)

set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
readonly ROOT
# shellcheck source=run_h100_dual.sh
source "$ROOT/run_h100_dual.sh"

main_bench() {
  find_python never
  if [[ -z $python ]]; then
    install_packages "$ROOT/requirements.txt"
    python="$VENV_DIR/bin/python"
  fi
  PATH="$(dirname -- "$python"):$PATH" exec "$python" "$ROOT/tests/benchmarks/${BENCHMARK:-bench.py}" "$@"
}

main_bench "$@"
