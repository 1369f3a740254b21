"""The code blocks of README.md, CONTRIBUTING.md and docs/, and a folder in which they can be run."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

from helpers.formats import rows_of, write_rows
from helpers.tiny_models import tiny_bert, tiny_t5_for

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
# Commands that are not run here, and why: they install the package, or another test runs them as they are.
ELSEWHERE = {
    "tests/run.sh": "CI starts with it",
    "git clone": "CI starts with it",
    "python -m venv": "tests/run.sh does it",
    "launch/quickstart.sh": "it installs, and then is `plainloop demo`",
    "plainloop demo --task text": "tests/e2e/test_demo.py",
}
# What makes a command small enough for a test: the same command on tiny data, without a GPU.
SMALL = {
    r"python (\S+speed\.py) --device cuda": r"TINY=1 python \1 --device cpu --variants ours c",
    r"--gpus-per-node=\d": "--gpus-per-node=0",
    r"launch/(train|evaluate)\.sbatch": r"launch/\1.sbatch --cpu-workers 1",
    r"^plainloop fetch": "env -u HF_HUB_OFFLINE plainloop fetch",
}
MODELS = {
    "roberta-base": "bert", "FacebookAI/roberta-base": "bert", "google-t5/t5-base": "t5",
    "allenai/unifiedqa-v2-t5-base-1363200": "t5",
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / page).read_text())


def commands(page: str) -> list[str]:
    """The shell commands of a page, one line each, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip() for line in lines]
    return [line for line in stripped if line]


def runnable(page: str, *, slurm: bool) -> list[str]:
    """The commands of a page, made small. slurm: those for Slurm, and all of its own page."""
    found = [line for line in commands(page) if not line.startswith(tuple(ELSEWHERE))]
    if page != "docs/slurm.md":
        found = [line for line in found if line.startswith("sbatch") == slurm]
    for pattern, small in SMALL.items():
        found = [re.sub(pattern, small, line) for line in found]
    return found


def make_folder(folder: Path) -> None:
    """A copy of the repository with small data under the names that the pages use."""
    from plainloop.data.demo import write_demo, write_text_demo
    from plainloop.data.readers.examples import read_examples

    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(".pkg/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["ln", "-s", f"{ROOT}/.pkg", folder / ".pkg"], check=True)
    train, dev = write_demo(folder / "made", contexts=16)
    train.rename(folder / "train-v2.0.json")
    dev_file = dev.rename(folder / "dev-v2.0.json")
    (folder / "causalqa").mkdir()
    for source, split in zip(
        write_text_demo(folder / "made", rows=24, dev_rows=8), ("train", "valid"), strict=True
    ):
        source.rename(folder / f"causalqa/squad2_{split}_original_split.csv")
    with zipfile.ZipFile(folder / "webis-causalqa-22.zip", "w") as archive:
        for file in (folder / "causalqa").iterdir():
            archive.write(file, f"input/original/{file.name}")
    with open(folder / "causalqa/squad2_valid_original_split.csv", newline="") as stream:
        (folder / "texts.json").write_text(json.dumps([row["answer"] for row in csv.DictReader(stream)]))
    examples = read_examples(dev_file)
    (folder / "page.txt").write_text(examples[0].context)
    asked = [{"id": e.id, "question": e.question, "context": e.context} for e in examples]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    rows = [row | {"asked": row["question"], "page": row["context"]} for row in rows_of(examples)]
    rows = [{name: row[name] for name in ("id", "asked", "page", "answers")} for row in rows]
    (folder / "parts").mkdir()
    write_rows(folder, "csv", rows).rename(folder / "questions.csv")
    for number in range(2):
        write_rows(folder, "jsonl", rows[number::2]).rename(folder / f"parts/{number}.jsonl")
    for page in PAGES:
        for block in blocks(page, "python"):  # the first line names the file
            (folder / block.split("\n")[0].removeprefix("# ")).write_text(block)


def make_models(folder: Path) -> dict[str, Path]:
    tiny_bert(folder / "bert", folder / "train-v2.0.json", positions=512)
    tiny_t5_for(folder / "t5", folder / "causalqa/squad2_train_original_split.csv")
    return {name: folder / kind for name, kind in MODELS.items()}


def fill_hub_cache(cache: Path, models: dict[str, Path]) -> None:
    """Make `from_pretrained(NAME)` find the tiny models, as if they had been downloaded."""
    for name, model in models.items():
        repository = cache / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("0" * 40)
        shutil.copytree(model, repository / "snapshots" / ("0" * 40))


def run_script(lines: list[str], folder: Path, environment: dict[str, Any], *, timeout_s: int) -> str:
    """Run the lines in one shell; return what it printed. The failing command is the last that it echoed."""
    echoed = [f"echo '+++' {shlex.quote(line)} >&2\n{line}\n" for line in lines]
    script = "set -euo pipefail\n" + "".join(echoed)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr
