#!/usr/bin/env bash
# Set up and run all checks: tests/run.sh [--slow] [pytest options]
#   --slow    include the slow tests
# Tests on real data need PLAINLOOP_REAL_DATA set to its folder; otherwise they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh dev
select=(-m "not slow")
if [ "${1:-}" = --slow ]; then
  select=()
  shift
fi
# The check of accessibility and the linter of the report page; without npm, their tests are skipped.
if command -v npm >/dev/null && [ ! -d tests/page/node_modules ]; then
  timeout 90 npm install --prefix tests/page --silent --no-audit --no-fund --no-package-lock --fetch-retries=0 ||
    echo "note: npm install failed; tests of the report page's style are skipped" >&2
fi
ruff check .
ruff format --check .
mypy
# Most of the time goes into imports in the tests' subprocesses, so run two tests in parallel.
exec env OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "${select[@]}" --durations=10 "$@"
