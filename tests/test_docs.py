"""Every command and example of README.md, CONTRIBUTING.md and docs/ runs as it is written there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import docs


def test_pages_are_short_and_links_lead_somewhere() -> None:
    assert len((docs.ROOT / "README.md").read_text().split()) <= 1000
    for page in docs.PAGES:
        text = (docs.ROOT / page).read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((docs.ROOT / page).parent / link).exists(), f"{page}: {link}"
        for name in re.findall(r"`((?:tests|trainer|data|models|launch|docs)/[\w/.-]+)`", text):
            assert (docs.ROOT / name).exists(), f"{page}: {name}"


def test_every_block_has_a_language_and_the_python_blocks_name_their_file() -> None:
    for page in docs.PAGES:
        fences = [line for line in (docs.ROOT / page).read_text().splitlines() if line.startswith("```")]
        assert set(fences[::2]) <= {"```bash", "```python", "```"} and set(fences[1::2]) <= {"```"}
        assert all(block.startswith("# ") for block in docs.blocks(page, "python"))


@pytest.mark.slow
def test_commands_run_as_written(tmp_path: Path) -> None:
    """In one folder, in the order of the pages: what a page trains, the next may evaluate."""
    docs.make_folder(tmp_path)
    docs.fill_hub_cache(tmp_path / "cache", docs.make_models(tmp_path))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(
        ["git", "add", "trainer", "data", "models", "launch", "tests", "docs", "*.*"],
        cwd=tmp_path,
        check=True,
    )
    subprocess.run(["git", "add", "-f", ".pkg"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "docs"], cwd=tmp_path, check=True)
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PLAINLOOP_CACHE": str(tmp_path / "features"), "TINY": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    lines = [
        line for page in docs.PAGES if page != "docs/slurm.md" for line in docs.runnable(page, slurm=False)
    ]
    assert len(lines) > 15
    told = docs.run_script(lines, tmp_path, environment, timeout_s=900)
    assert "completed at step" in told and '"kind": "head"' not in told
    assert '"kind": "head"' in (tmp_path / "runs/watched/metrics.jsonl").read_text()
