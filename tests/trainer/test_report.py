"""The report page: its figures are the official ones, text from data stays text, and each part is there."""

import base64
import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chromium import write_scores, write_squad

from plainloop.trainer.cli import main
from plainloop.trainer.report import figures
from plainloop.trainer.report.browser import OUTCOMES, browser_data, outcome
from plainloop.trainer.report.curves import published, read_runs
from plainloop.trainer.report.results import read_questions, read_results, scored
from plainloop.trainer.tasks.normalize import SQUAD

Content = dict[str, Any]


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def page_of(out: Path) -> tuple[str, Content | None]:
    """The page, and the data of its error browser."""
    text = out.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(found[1]) if found else None


@pytest.fixture
def run(options: Any, squad_file: Path) -> str:
    """A run with two evaluations that was stopped once and resumed."""
    options |= {"data.dev": str(squad_file), "evaluation.every_steps": 6, "max_steps": 12}
    options |= {"evaluation.num_best": 5, "checkpoint.every_steps": 4}
    assert main(["train", *as_arguments(options | {"stop_at_step": 5})]) == 75
    assert main(["train", *as_arguments(options)]) == 0
    return str(options["run_dir"])


def test_a_run(run: str, squad_file: Path, tmp_path: Path, metrics: Any) -> None:
    out = tmp_path / "report.html"
    assert main(["report", run, "--out", str(out), "--png", str(tmp_path / "png")]) == 0
    text, data = page_of(out)
    assert data is not None and len(data["id"]) == 120 and data["runs"][0]["name"] == run
    assert "resumed at step 5; saved at step 4, 5, 6, 8, 12" in text
    assert "2 (1 of them resumed)" in text
    digest = hashlib.sha256(squad_file.read_bytes()).hexdigest()
    assert text.count(f"SHA-256 {digest}") == 2  # training and dev data are one file here
    last = metrics(run, "evaluation")[-1]
    for name in ("exact", "f1", "HasAns_f1", "NoAns_exact", "best_f1", "pr_f1_ap"):
        assert f"{last[name]:.6g}" in text, name
    for option, value in (("optim.lr", "0.001"), ("data.max_length", "96")):
        assert f'<th scope="row">{option}</th><td>{value}</td>' in text
    for title in ("training loss", "gradient norm", "precision over recall", "reliability", "f1 by question"):
        assert title in text  # titles of the figures are text, not shapes
    assert {file.stem for file in (tmp_path / "png").iterdir()} == {
        "training", "evaluations", "thresholds", "probabilities", "slices",
    }  # fmt: skip
    assert out.stat().st_size < 1_000_000


def test_nothing_comes_from_elsewhere(run: str, tmp_path: Path) -> None:
    """The policy allows this style and this script alone; no style attribute, no handler, no address."""
    out = tmp_path / "report.html"
    assert main(["report", run, "--out", str(out)]) == 0
    text, _ = page_of(out)
    policy = html.unescape(str(re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]))  # type: ignore[index]
    for kind, element in (("style", "style"), ("script", "script")):
        inside = re.findall(rf"<{element}>(.*?)</{element}>", text, re.S)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    without_names = text.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert "http:" not in without_names and "https:" not in without_names
    assert not re.search(r'<[^>]* (style|src|on\w+)="', without_names)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    package = Path(figures.__file__).parent
    assert sum((package / name).stat().st_size for name in ("report.js", "report.css")) < 60_000


def test_areas_and_best_scores_are_the_official_ones(run: str, squad_file: Path, metrics: Any) -> None:
    last = metrics(run, "evaluation")[-1]
    questions = read_questions(None, {}, run)
    assert questions.files == [str(squad_file)]
    one = scored(read_results(run, questions), questions, SQUAD)
    assert one.scores["exact"].mean() == pytest.approx(last["exact"])
    found = figures.thresholds(one, questions, SQUAD)
    assert found is not None and found.chosen == 0
    for name in ("exact", "f1", "oracle"):
        assert figures.area(found.curves[name]) == pytest.approx(last[f"pr_{name}_ap"], rel=1e-12)
    for name in ("exact", "f1"):
        nothing = 100 * float(np.mean(~found.answerable))  # the threshold below all odds
        assert max(nothing, found.mean[name].max()) == pytest.approx(last[f"best_{name}"], rel=1e-12)
    p = figures.probabilities(one)
    assert p is not None and ((p > 0) & (p <= 1)).all()


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
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in text


def test_outcomes() -> None:
    cases = [
        ("x", True, 100, 100),
        ("x", True, 0, 40),
        ("x", True, 0, 0),
        ("x", False, 0, 0),
        ("", True, 0, 0),
    ]
    assert [outcome(*case) for case in cases] == list(range(len(OUTCOMES)))
    assert outcome("", False, 100, 100) == 0


def test_two_runs_and_seeds(run: str, options: Any, tmp_path: Path, capsys: Any) -> None:
    """Two runs: the comparison, and both answers of each question. Runs that differ in the seed: one mean."""
    other = str(tmp_path / "other")
    assert main(["train", *as_arguments(options | {"run_dir": other, "seed": 7})]) == 0
    (Path(other) / "evaluation/nbest_predictions.json").unlink()
    out = tmp_path / "two.html"
    assert main(["report", run, other, "--out", str(out), "--resamples", "200"]) == 0
    text, data = page_of(out)
    assert data is not None and [of["name"] for of in data["runs"]] == [run, other]
    assert data["runs"][0]["nbest"] and data["runs"][1]["nbest"] is None
    assert 'id="compare"' in text and "McNemar&#x27;s exact test" in text
    assert "mean of 2, one standard deviation" in text and "mean ± standard deviation" in text
    capsys.readouterr()
    assert main(["compare", run, other, "--json", "--resamples", "200"]) == 0
    said = json.loads(capsys.readouterr().out)
    for line in said["in_words"]:
        assert html.escape(line) in text
    labels = {of.label for of in read_runs([run, other])}
    assert len(labels) == 1
    score = str(tmp_path / "score")
    evaluate = ["evaluate", "--model", run, "--data", options["data.train"], "--out_dir", score]
    assert main([*evaluate, "--cache_dir", str(tmp_path / "c"), "--precision", "fp32"]) == 0
    assert main(["report", run, "--scores", score, "--out", str(out)]) == 0
    text, data = page_of(out)
    assert data is not None and data["runs"][0]["nbest"] and "plainloop evaluate --data" in text


def test_text_task(text_options: Any, text_files: Any, tmp_path: Path) -> None:
    """CausalQA: its three figures, an evaluation of a subset in training, and no thresholds."""
    options = text_options | {"data.dev": str(text_files[1]), "max_steps": 2, "text.generate": 15}
    assert main(["train", *as_arguments(options)]) == 0
    out = tmp_path / "report.html"
    assert main(["report", options["run_dir"], "--out", str(out)]) == 0
    text, data = page_of(out)
    assert data is not None and data["figures"] == ["em", "f1", "rougeL_f1"] and len(data["id"]) == 15
    assert "rougeL_f1 by answer length" in text and "precision over recall" not in text
    results = json.loads((Path(options["run_dir"]) / "evaluation/results.json").read_text())
    assert data["runs"][0]["text"] == results["predictions"]
    mean = np.mean(data["runs"][0]["scores"][1])
    assert mean == pytest.approx(results["metrics"]["f1"], abs=1e-4)


def test_published_figures_of_a_recipe(run: str, tmp_path: Path) -> None:
    """A run by the recipe is recognised, also from a local model folder; one with another rate is not."""
    import yaml

    from plainloop.trainer.config.parse import flatten

    recipe = Path(figures.__file__).parents[2] / "launch/recipes/roberta-squad2.yaml"
    options = flatten(yaml.safe_load(recipe.read_text())) | {
        "model.path": "/data/models/roberta-base",
        "seed": 3,
    }
    found = published(options)
    assert found is not None and found[0] == {"exact": 79.93, "f1": 82.95}
    assert "deepset/roberta-base-squad2" in found[1]
    assert published(options | {"optim.lr": 1e-5}) is None
    text = re.sub(r"(?m)^# published: .*", "", recipe.read_text())
    assert text != recipe.read_text()


def test_only_curves_while_nothing_is_evaluated(options: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", *as_arguments(options | {"max_steps": 3})]) == 0
    out = tmp_path / "report.html"
    assert main(["report", options["run_dir"], "--out", str(out)]) == 0
    assert "curves only" in capsys.readouterr().err
    text, data = page_of(out)
    assert data is None and "training loss" in text


def test_data_as_a_page(squad_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.html"
    assert main(["data", str(squad_file), str(squad_file), "--html", str(out)]) == 0
    text, data = page_of(out)
    assert data is None and "120" in text and "dev questions whose context is in train" in text


def test_bad_input_is_one_line(run: str, squad_file: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken/metrics.jsonl").write_text("nonsense\n{}\n")
    shutil.copytree(run, tmp_path / "moved")
    config = (tmp_path / "moved/config.yaml").read_text()
    (tmp_path / "moved/config.yaml").write_text(config.replace(str(squad_file), str(tmp_path / "gone.json")))
    capsys.readouterr()
    faults = {
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


def test_browser_data_is_compact(tmp_path: Path) -> None:
    """Contexts once each; the data of 2,000 questions takes less than 400 bytes per question."""
    from helpers.chromium import write_many

    data, first, _ = write_many(tmp_path, 2000)
    questions = read_questions(data, {}, first)
    one = scored(read_results(first, questions), questions, SQUAD)
    found = browser_data([one], questions)
    assert len(found["contexts"]) == 200
    assert len(json.dumps(found, separators=(",", ":"))) / 2000 < 400
