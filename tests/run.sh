#!/usr/bin/env bash
#
# The one test command: sets up .venv where something is missing, then checks style and runs the tests.
# Usage: tests/run.sh [--all] [PYTEST_ARGUMENT...]     --all runs the slow tests too, with the tools that they need.

set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
# shellcheck source=run_h100_dual.sh
source ./run_h100_dual.sh

tests_are_ready() { # tests_are_ready REQUIREMENTS...: whether .venv holds every pinned version
  [[ -x .venv/bin/python && ! -e .venv/.installing ]] && .venv/bin/python - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        name, _, pin = line.partition("#")[0].strip().partition("==")
        try:
            if name and version(name).partition("+")[0] != pin:
                sys.exit(1)
        except PackageNotFoundError:
            sys.exit(1)
PYTHON
}

main_tests() {
  local arguments=(-m "not slow") requirements=(requirements.txt tests/requirements.txt) path
  if [[ ${1-} == --all ]]; then
    arguments=()
    requirements+=(tests/requirements-export.txt)
    shift
  fi
  find_python never
  tests_are_ready "${requirements[@]}" || install_packages "${requirements[@]}"
  export PATH="$ROOT/.venv/bin:$PATH"
  ruff check .
  ruff format --check .
  local scripts=(run_h100_dual.sh)
  for path in tests/*.sh tests/benchmarks/*.sh .ci/run; do
    [[ -e $path ]] && scripts+=("$path")
  done
  shellcheck "${scripts[@]}"
  shfmt -d -i 2 -ci "${scripts[@]}"
  # Tests of real runs wait a lot: three files at a time, in the order of tests/conftest.py.
  python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "${arguments[@]}" "$@"
}

main_tests "$@"
