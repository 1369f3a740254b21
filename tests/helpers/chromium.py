"""A headless Chromium for tests of pages, driven by Selenium; and score folders to make pages of."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
AXE = Path(__file__).parents[1] / "page/node_modules/axe-core/axe.min.js"


def is_there() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator[Any]:
    """A window of this size; narrow ones are phones. Messages of the console: get_log("browser")."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(shutil.which("chromedriver"), log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        if width < 600:
            size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield driver
    finally:
        driver.quit()


def write_scores(
    folder: Path, answers: dict[str, str], odds: dict[str, float], candidates: dict[str, list[Any]]
) -> str:
    """A folder as evaluate --out_dir writes it, without metrics. candidates: id -> (text, start)."""
    folder.mkdir(parents=True, exist_ok=True)
    nbest = {}
    for i, found in candidates.items():
        share = 0.9 / max(1, len(found))
        listed = [
            {"text": t, "score": 5.0 - k, "start": s, "end": s + len(t), "probability": share}
            for k, (t, s) in enumerate(found)
        ]
        nbest[i] = [*listed, {"text": "", "score": 5.0 + odds[i], "probability": 0.1}]
    files = {"predictions": answers, "null_odds": odds, "nbest_predictions": nbest, "metrics": {}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def write_squad(path: Path, articles: dict[str, list[tuple[str, list[tuple[str, str, str]]]]]) -> str:
    """title -> (context, (id, question, answer; "" for none)). An answer must be in its context."""

    def record(context: str, i: str, question: str, answer: str) -> dict[str, Any]:
        answers = [{"text": answer, "answer_start": context.index(answer)}] if answer else []
        return {"id": i, "question": question, "is_impossible": not answer, "answers": answers}

    data = [
        {
            "title": title,
            "paragraphs": [
                {"context": context, "qas": [record(context, *asked) for asked in questions]}
                for context, questions in paragraphs
            ],
        }
        for title, paragraphs in articles.items()
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return str(path)


def write_many(folder: Path, questions: int) -> tuple[str, str, str]:
    """(data, two score folders): so many questions, ten about each context of SQuAD's usual length."""
    articles: dict[str, Any] = {}
    answers: tuple[dict[str, str], dict[str, str]] = ({}, {})
    odds, candidates = {}, {}
    for number in range(questions // 10):
        words = " ".join(f"w{number}x{k}" for k in range(110))
        asked = []
        for k in range(10):
            i, answer = f"q{number}-{k}", "" if k % 3 == 0 else f"w{number}x{7 * k}"
            asked.append((i, f"{('Who', 'What', 'When')[k % 3]} is thing {k} of page {number}?", answer))
            odds[i] = ((number * 7 + k * 13) % 41 - 20) / 4
            best = answer if (number + k) % 2 else f"w{number}x3"
            candidates[i] = [(t, words.find(t)) for t in (best or f"w{number}x1", f"w{number}x5")]
            answers[0][i] = "" if odds[i] > 0 else candidates[i][0][0]
            answers[1][i] = "" if odds[i] > 1 else candidates[i][0][0]
        articles.setdefault(f"article {number // 40}", []).append((words, asked))
    data = write_squad(folder / "many.json", articles)
    first, second = (write_scores(folder / f"many-{n}", a, odds, candidates) for n, a in enumerate(answers))
    return data, first, second
