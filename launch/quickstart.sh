#!/usr/bin/env bash
# Set up and run the demo: launch/quickstart.sh [--run_dir FOLDER ...]
# Creates a virtual environment .venv in the repository unless one is active.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh demo
exec plainloop demo "$@"
