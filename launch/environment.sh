# shellcheck shell=bash disable=SC1091
# Sourced by quickstart.sh and tests/run.sh with the name of an extra. Installs the package into the active
# virtual environment, or into .venv, with the versions of constraints.txt.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -d .venv ] || python3 -m venv .venv
  source .venv/bin/activate
fi
wanted="$1 $(cat setup.cfg constraints.txt | sha256sum)"
if [ "$(cat "$VIRTUAL_ENV/.plainloop-$1" 2>/dev/null)" != "$wanted" ]; then
  # Install torch first, at its exact version: otherwise pip may try newer builds of several gigabytes.
  python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]"
  echo "$wanted" >"$VIRTUAL_ENV/.plainloop-$1"
fi
