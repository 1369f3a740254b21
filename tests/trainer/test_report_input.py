"""The report page on hostile, damaged and missing input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from helpers.chromium import write_scores, write_squad

from plainloop.trainer.cli import main

Content = dict[str, Any]


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def page_of(out: Path) -> tuple[str, Content | None]:
    """The page, and the data of its error browser."""
    text = out.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(found[1]) if found else None


HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & <!-- "quoted\' ]]> $x^2$'


def test_text_from_data_stays_text(tmp_path: Path) -> None:
    """In the data of the browser every character comes back; in the page none of it is markup."""
    astral = "𝔘𝔫𝔦 before the answer " + HOSTILE
    articles = {HOSTILE: [(astral, [("a<b", HOSTILE, "answer"), ("c", "Which \u2028 \x00 end?", "")])]}
    data = write_squad(tmp_path / "hostile.json", articles)
    texts = {"a<b": "the answer", "c": "half \ud800 of one"}
    odds = {"a<b": -1.0, "c": -2.0}
    start = astral.index("the answer")
    name = tmp_path / "run <script>alert(2)</script>"
    candidates = {"a<b": [("the answer", start)], "c": [("half \ud800 of one", 0)]}
    scores = write_scores(name, texts, odds, candidates)
    out = tmp_path / "report.html"
    assert main(["report", scores, "--data", data, "--out", str(out)]) == 0
    text, found = page_of(out)
    assert found is not None
    assert found["question"] == [HOSTILE, "Which \u2028 \x00 end?"] and found["contexts"] == [astral]
    assert found["runs"][0]["text"] == list(texts.values()) and found["id"] == ["a<b", "c"]
    assert found["runs"][0]["start"][0] == start + 3  # three characters are two units each in JavaScript
    assert found["gold"][0] == [["answer", astral.index("answer") + 3]]
    assert text.count("<script") == 2 and "<img" not in text and "alert(2)</script>" not in text
    assert "&lt;script&gt;alert(2)" in text


def test_bad_input_is_one_line(run: str, squad_file: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken/metrics.jsonl").write_text("nonsense\n{}\n")
    shutil.copytree(run, tmp_path / "moved")
    config = (tmp_path / "moved/config.yaml").read_text()
    (tmp_path / "moved/config.yaml").write_text(config.replace(str(squad_file), str(tmp_path / "gone.json")))
    for name, content in {
        "null_odds": "[]", "nbest_predictions": '{"x": 3}', "predictions": '{"x": 3', "metrics": "[]",
    }.items():  # fmt: skip
        shutil.copytree(Path(run) / "evaluation", tmp_path / name)
        (tmp_path / name / f"{name}.json").write_text(content)
    shutil.copytree(run, tmp_path / "odd")
    log = tmp_path / "odd/metrics.jsonl"
    log.write_text(log.read_text().replace('"loss": 4.', '"loss": "oops", "x": 4.') + '{"kind": "train", "st')
    for file in (tmp_path / "odd").glob("checkpoints/*/state.json"):
        file.write_text('{"environment": "x", "fingerprint": 3}')
    page = ["--out", str(tmp_path / "odd.html")]
    assert main(["report", str(tmp_path / "odd"), *page]) == 0  # what is odd there is left out
    capsys.readouterr()
    data = ["--data", str(squad_file)]
    faults = {
        "null_odds.json: must be a JSON object": [str(tmp_path / "null_odds"), *data],
        "nbest_predictions.json: 'x' is not a list": [str(tmp_path / "nbest_predictions"), *data],
        "predictions.json": [str(tmp_path / "predictions"), *data],
        "metrics.json: must be a JSON object of numbers": [str(tmp_path / "metrics"), *data],
        "report needs a run folder": [],
        "no such file or folder": [str(tmp_path / "nowhere")],
        "neither a run folder": [str(tmp_path / "empty")],
        "line 1 is not a record": [str(tmp_path / "broken")],
        "gone.json: no such file": [str(tmp_path / "moved")],
        "--scores: 2 folders for 1 runs": [run, "--scores", run, run],
    }
    out = ["--out", str(tmp_path / "report.html")]
    for message, arguments in faults.items():
        assert main(["report", *arguments, *out]) == 2, message
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert not (tmp_path / "report.html").exists()
    assert main(["report", run, "--out", str(tmp_path / "no/such/folder.html")]) == 2
    assert "choose another file" in capsys.readouterr().err
    before = (Path(run) / "metrics.jsonl").read_bytes()
    for taken in (f"{run}/metrics.jsonl", run, "/dev/null"):
        assert main(["report", run, "--out", taken]) == 2
        assert main(["data", str(squad_file), "--html", taken]) == 2
        assert capsys.readouterr().err.count("is not a page of plainloop") == 2
    assert (Path(run) / "metrics.jsonl").read_bytes() == before
    assert main(["report", run, *page]) == 0  # a page of an earlier call is replaced
