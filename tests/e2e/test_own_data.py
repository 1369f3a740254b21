"""Own data end to end: six formats give the same first step; a second language trains without a warning."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.formats import rows_of, write_nested, write_rows

from plainloop.data.readers.examples import read_examples
from plainloop.trainer.cli import main


def arguments(options: dict[str, Any]) -> list[str]:
    return ["train", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def test_six_formats_give_the_same_first_step(
    real_data: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    examples = read_examples(real_data / "squad2/train-v2.0.subset.json")[:500]
    rows = rows_of(examples)
    files = [
        write_nested(tmp_path, "squad", examples), write_rows(tmp_path, "jsonl", rows),
        write_rows(tmp_path, "csv", rows), write_rows(tmp_path, "parquet", rows),
        write_rows(tmp_path, "saved", rows), write_nested(tmp_path, "label_studio", examples),
    ]  # fmt: skip
    losses = set()
    for number, path in enumerate(files):
        run_dir = tmp_path / f"run-{number}"
        changes = {"data.train": path, "run_dir": run_dir, "stop_at_step": 1}
        assert main(arguments({**options, **changes})) == 75
        (line,) = [
            json.loads(text)
            for text in (run_dir / "metrics.jsonl").read_text().splitlines()
            if '"loss"' in text
        ]
        losses.add((line["loss"], line["grad_norm"]))
    assert len(losses) == 1


def test_named_columns_and_notes_on_the_command_line(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"frage": "Who?", "text": "Ada met Bob.", "antwort": "Bob"}] * 20
    rows += [{"frage": "Who?", "text": "Ada met Ada.", "antwort": "Ada"}]
    path = write_rows(tmp_path, "csv", rows)
    columns = {"data.train": path, "data.columns": "{question: frage, answer: antwort}", "stop_at_step": 1}
    assert main(arguments({**options, **columns})) == 2
    error = capsys.readouterr().err
    assert (
        "1 answer(s) can't be located" in error and "line 22: id 'data.csv:22': 'Ada' occurs 2 times" in error
    )
    assert main(arguments({**options, **columns, "data.ambiguous": "skip"})) == 75
    error = capsys.readouterr().err
    assert "columns: question from 'frage', context from 'text', answer from 'antwort'" in error
    assert "warning: 1 record(s) left out" in error
    assert "20 questions -> 20 rows" in error


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_xquad_trains_and_evaluates_without_a_warning(
    language: str, real_data: Path, minilm: str, options: dict[str, Any], tmp_path: Path
) -> None:
    content = json.loads((real_data / f"xquad/xquad.{language}.json").read_text())
    content["data"] = content["data"][:12]
    file = tmp_path / f"xquad.{language}.json"
    file.write_text(json.dumps(content))
    questions = sum(len(p["qas"]) for article in content["data"] for p in article["paragraphs"])
    changes = {
        "model.path": minilm, "data.train": file, "data.dev": file, "max_steps": 2, "data.max_length": 256,
        "data.stride": 64, "evaluation.metric": "mlqa", "evaluation.best_metric": "f1",
        "evaluation.tokens_per_device": 8192,
    }  # fmt: skip
    if language != "en":
        changes["evaluation.language"] = language
    command = [sys.executable, "-m", "plainloop.trainer", *arguments({**options, **changes})]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "warning" not in result.stderr.lower(), result.stderr
    metrics = json.loads((Path(options["run_dir"]) / "evaluation/metrics.json").read_text())
    assert metrics["total"] == questions and "NoAns_f1" not in metrics
