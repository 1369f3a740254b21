#!/usr/bin/env bash
# Set up and run all checks: tests/run.sh [--slow] [pytest options]
#   --slow    the slow tests too
# Tests on real data want PLAINLOOP_REAL_DATA to name its folder; without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh dev
select=(-m "not slow")
if [ "${1:-}" = --slow ]; then
  select=()
  shift
fi
ruff check .
ruff format --check .
mypy
# Most of the time goes into imports of processes that tests start: two tests at once.
exec env OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "${select[@]}" "$@"
