"""Speed of looking at results: python tests/bench/report.py

- `compare`: 10,000 resamples of 11,873 questions, by paragraph and by question (target: under 5 s).
- `data`: about 130,000 questions (target: under 30 s).
- `report`: a page of 12,000 questions and two runs: its size, and in Chromium the time until it is ready
  (target: under 2 s) and until a filter, a sort and a jump in the list are drawn.

With PLAINLOOP_REAL_DATA, on SQuAD's dev set with Google's published predictions, and those with 300 of them
emptied; else, and with TINY=1, on small generated data.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.chromium import chromium, is_there, write_many

from plainloop.trainer.cli import main as plainloop

TINY = "TINY" in os.environ
ROUNDS = 1 if TINY else 3


def seconds(*arguments: str) -> list[float]:
    """Run a command of the package a few times in this process."""
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert plainloop(list(arguments)) == 0
        found.append(time.perf_counter() - started)
    return found


def show(what: str, found: list[float]) -> None:
    listed = ", ".join(f"{value:.2f}" for value in found)
    print(f"{what}: {statistics.median(found):.2f} s (median of {len(found)}: {listed})", flush=True)


def dev_set(folder: Path) -> tuple[str, str, str]:
    """(data, predictions, other predictions)."""
    real = os.environ.get("PLAINLOOP_REAL_DATA")
    if not real or TINY:
        data, first, second = write_many(folder, 200)
        return data, f"{first}/predictions.json", f"{second}/predictions.json"
    known = Path(real) / "known/bert_dev_predictions.json"
    predictions = json.loads(known.read_text())
    for i in list(predictions)[::40]:
        predictions[i] = ""
    (folder / "other.json").write_text(json.dumps(predictions))
    return f"{real}/squad2/dev-v2.0.full-rebuilt.json", str(known), str(folder / "other.json")


def large(folder: Path, data: str, questions: int) -> str:
    """Copies of the data with other ids, contexts and questions, until there are so many questions."""
    content = json.loads(Path(data).read_text())
    count = sum(len(p["qas"]) for a in content["data"] for p in a["paragraphs"])
    articles: list[Any] = []
    for number in range(-(-questions // count)):
        for article in copy.deepcopy(content["data"]):
            article["title"] += f" {number}"
            for paragraph in article["paragraphs"]:
                paragraph["context"] += f" {number}."
                for question in paragraph["qas"]:
                    question["id"] += f"-{number}"
                    question["question"] += f" {number}"
            articles.append(article)
    (folder / "large.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    return str(folder / "large.json")


ACTION = """
const done = arguments[1], started = performance.now();
eval(arguments[0]);
requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));"""
SELECT = """(name, text) => { const label = [...document.querySelectorAll('label')]
.find(l => l.firstChild.textContent === name); const s = label.querySelector('select');
s.value = [...s.options].find(o => o.textContent.startsWith(text)).value;
s.dispatchEvent(new Event('change')); }"""
SCROLL = """const l = document.querySelector('.list'), done = arguments[0], frames = [];
let last = performance.now();
function step() { const now = performance.now(); frames.push(now - last); last = now; l.scrollTop += 700;
if (frames.length < 120) requestAnimationFrame(step); else done(frames.sort((a, b) => a - b)); }
requestAnimationFrame(step);"""


def page(folder: Path) -> None:
    data, first, second = write_many(folder, 200 if TINY else 12_000)
    out = folder / "report.html"
    show("report", seconds("report", first, second, "--data", data, "--out", str(out), "--resamples", "1000"))
    print(f"page: {out.stat().st_size / 1e6:.1f} MB")
    if not is_there():
        print("ready: not measured, since chromium and chromedriver are not installed")
        return
    ready, actions = [], {}
    for _ in range(ROUNDS):
        with chromium() as window:
            started = time.perf_counter()
            window.get(out.as_uri())
            assert window.execute_script("return document.documentElement.dataset.ready") == "true"
            ready.append(time.perf_counter() - started)
            for name, code in {
                "filter": f"({SELECT})('outcome', 'right')", "sort": f"({SELECT})('sort', 'surest first')",
                "jump": "const l = document.querySelector('.list'); l.scrollTop = l.scrollHeight / 2",
            }.items():  # fmt: skip
                actions.setdefault(name, []).append(window.execute_async_script(ACTION, code) / 1000)
            frames = window.execute_async_script(SCROLL)
    for name, found in actions.items():
        show(name, found)
    print(f"scrolling: frames of {frames[60]:.0f} ms (median), {frames[114]:.0f} ms (95th percentile)")
    show("ready", ready)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, a, b = dev_set(folder)
        for unit in ("paragraph", "question"):
            show(f"compare by {unit}", seconds("compare", a, b, "--data", data, "--unit", unit))
        many = large(folder, data, 500 if TINY else 130_000)
        show("data", seconds("data", many, data))
        page(folder)


if __name__ == "__main__":
    main()
