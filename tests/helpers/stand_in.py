"""Stand-in for `python` in tests of the batch scripts' own logic: record the command line, then follow the
environment variable PLAN, a JSON list with one entry for the first run of the job and one for each requeue:

wait      wait until RUN/stop exists or SIGTERM arrives
saves_s   then sleep this many seconds, as if saving
status    written to RUN/status.json (null: write nothing)
code      exit code (default: 0)
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

arguments = sys.argv[1:]
if "plainloop.trainer" not in arguments:  # the batch script's own use of python, to read status.json
    os.execv(sys.executable, [sys.executable, *arguments])
life = int(os.environ.get("SLURM_RESTART_COUNT", 0))
names = ("SLURM", "OMP", "HF_", "RANK", "WORLD", "LOCAL", "MASTER", "TMPDIR", "TRITON", "PLAINLOOP")
note = {"life": life, "argv": arguments, "env": {k: v for k, v in os.environ.items() if k.startswith(names)}}
with open(os.environ["NOTES"], "a", encoding="utf-8") as stream:
    stream.write(json.dumps(note) + "\n")
run_dir = Path(arguments[arguments.index("--run_dir") + 1]) if "--run_dir" in arguments else Path()
plan = json.loads(os.environ["PLAN"])[life]
terminated: list[int] = []
if plan.get("wait"):
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
until = time.monotonic() + 120
while plan.get("wait") and not terminated and not (run_dir / "stop").exists() and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(plan.get("saves_s", 0))
if status := plan.get("status"):
    (run_dir / "status.json").write_text(json.dumps({**status, "time": time.time()}))
sys.exit(plan.get("code", 0))
