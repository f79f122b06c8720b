#!/usr/bin/env bash
#
# The first hour on a machine: what has to be seen there, item by item, expected beside seen.
# Usage: tests/benchmarks/first_hour.sh [--no-record] [ITEM...]   (--help lists the items; by default all)

set -euo pipefail

export BENCHMARK=first_hour.py OMP_WAIT_POLICY=passive # as a run on a CPU sets it
exec "$(dirname -- "${BASH_SOURCE[0]}")/run.sh" "$@"
