"""The report page: its figures are the official ones, text from data stays text, and each part is there."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.trainer.cli import main
from plainloop.trainer.report import figures
from plainloop.trainer.report.browser import OUTCOMES, browser_data, is_near, outcome
from plainloop.trainer.report.curves import published, read_runs
from plainloop.trainer.report.results import null_threshold, read_questions, read_results, scored
from plainloop.trainer.report.tables import titles
from plainloop.trainer.tasks.metrics import average_precision
from plainloop.trainer.tasks.normalize import SQUAD

Content = dict[str, Any]


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def page_of(out: Path) -> tuple[str, Content | None]:
    """The page, and the data of its error browser."""
    text = out.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(found[1]) if found else None


def test_a_run(run: str, squad_file: Path, tmp_path: Path, metrics: Any) -> None:
    out = tmp_path / "report.html"
    assert main(["report", run, "--out", str(out), "--png", str(tmp_path / "png")]) == 0
    text, data = page_of(out)
    assert data is not None and len(data["id"]) == 120 and data["runs"][0]["name"] == "run"
    assert "resumed at step 5; saved at step 4, 5, 6, 8, 12" in text
    assert "2, of which resumed: 1" in text
    digest = hashlib.sha256(squad_file.read_bytes()).hexdigest()
    assert text.count(f"SHA-256 of the file now: {digest}") == 2  # training and dev data are one file here
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
    found = figures.thresholds(one, questions, SQUAD, null_threshold(run))
    assert found.complete and found.chosen == 0
    for name in ("exact", "f1", "oracle"):
        assert average_precision(found.curves[name]) == pytest.approx(last[f"pr_{name}_ap"], rel=1e-12)
    for name in ("exact", "f1"):
        nothing = 100 * float(np.mean(~found.answerable))  # the threshold below all odds
        assert max(nothing, found.mean[name].max()) == pytest.approx(last[f"best_{name}"], rel=1e-12)
    known = figures.probabilities(one, questions)
    assert known is not None and len(known[0]) == 120 and ((known[0] > 0) & (known[0] <= 1)).all()
    assert known[1].sum() == pytest.approx(last["exact"] * 1.2)


def test_without_candidates_nothing_is_made_up(run: str, metrics: Any, tmp_path: Path) -> None:
    """Answers above the threshold are empty in the predictions: no average precision is drawn from these."""
    (Path(run) / "evaluation/nbest_predictions.json").unlink()
    questions = read_questions(None, {}, run)
    one = scored(read_results(run, questions), questions, SQUAD)
    found = figures.thresholds(one, questions, SQUAD, 0.0)
    last = metrics(run, "evaluation")[-1]
    assert not found.complete and list(found.curves) == ["oracle"]
    assert average_precision(found.curves["oracle"]) == pytest.approx(last["pr_oracle_ap"], rel=1e-12)
    assert len(found.mean["f1"]) == (one.odds <= 0).sum()
    assert found.mean["f1"][-1:] == pytest.approx([last["f1"]] * bool(len(found.mean["f1"])))
    out = tmp_path / "report.html"
    assert main(["report", run, "--out", str(out)]) == 0
    text = out.read_text()
    assert "no scores above the threshold" in text and "No reliability and risk without" in text
    assert f"{last['pr_f1_ap']:.6g}" in text  # the table has the evaluation's own


def test_figures_of_other_data_are_not_shown(run: str, squad_file: Path, tmp_path: Path) -> None:
    """On a part of the data, the table is computed from the predictions."""
    part = json.loads(squad_file.read_text())
    part["data"][0]["paragraphs"] = part["data"][0]["paragraphs"][:5]
    part["data"] = part["data"][:1]
    (tmp_path / "part.json").write_text(json.dumps(part))
    out = tmp_path / "report.html"
    assert main(["report", run, "--data", str(tmp_path / "part.json"), "--out", str(out)]) == 0
    text = out.read_text()
    assert "part.json: 15 questions" in text and '<th scope="row">total</th><td>15</td>' in text
    assert "its metrics.json is of other data" in text


def test_outcomes() -> None:
    cases = [("x", True, 1, True), ("x", True, 0, True), ("x", True, 0, False), ("x", False, 0, False)]
    assert [outcome(*case) for case in [*cases, ("", True, 0, False)]] == list(range(len(OUTCOMES)))
    assert outcome("", False, 100, True) == 0
    assert is_near(4, "coal", [["wood or coal", 0]], 0) and not is_near(20, "or", [["wood or coal", 0]], 40)
    assert is_near(-1, "or", [["wood or coal", 0]], 40) and not is_near(-1, "or", [["wood", 0]], 0)


def test_names_are_short_and_distinct() -> None:
    long = "/scratch/" + "very-long-name/" * 12
    found = titles([f"{long}seed-0", f"{long}seed-1", f"{long}seed-1"])
    assert found == ["A: seed-0", "B: seed-1", "C: seed-1"]
    assert titles(["runs/_x"]) == ["_x"] and len(titles(["x" * 200])[0]) < 40
    assert titles(["a/b", "a"]) == ["A: b", "B: a"]
    assert titles(["ev\x01x\udcff", "y"])[0] == "A: ev\ufffdx\ufffd"


def test_two_runs_and_seeds(run: str, options: Any, tmp_path: Path, capsys: Any) -> None:
    """Two runs: the comparison, and both answers of each question. Runs that differ in the seed: one mean."""
    other = str(tmp_path / "other")
    assert main(["train", *as_arguments(options | {"run_dir": other, "seed": 7})]) == 0
    (Path(other) / "evaluation/nbest_predictions.json").unlink()
    out = tmp_path / "two.html"
    assert main(["report", run, other, "--out", str(out), "--resamples", "200"]) == 0
    text, data = page_of(out)
    assert data is not None and [of["name"] for of in data["runs"]] == ["A: run", "B: other"]
    assert data["runs"][0]["nbest"] and data["runs"][1]["nbest"] is None
    assert 'id="compare"' in text and "McNemar&#x27;s exact test" in text
    assert "mean of 2 seeds, one standard deviation" in text and "mean of 2 ± standard deviation" in text
    capsys.readouterr()
    assert main(["compare", run, other, "--json", "--resamples", "200"]) == 0
    said = json.loads(capsys.readouterr().out)
    for line in said["in_words"]:
        assert html.escape(line) in text
    assert len({of.label for of in read_runs([run, other], ["A", "B"])}) == 1
    third = str(tmp_path / "third")
    assert main(["train", *as_arguments(options | {"run_dir": third, "optim.lr": 1e-4})]) == 0
    assert main(["report", run, third, other, "--out", str(out)]) == 0
    text, _ = page_of(out)
    assert "mean of 2 ± standard deviation (optim.lr 0.001)" in text and 'id="compare"' not in text
    score = str(tmp_path / "score")
    evaluate = ["evaluate", "--model", run, "--data", options["data.train"], "--out_dir", score]
    assert main([*evaluate, "--cache_dir", str(tmp_path / "c"), "--precision", "fp32"]) == 0
    assert main(["report", run, "--scores", score, "--out", str(out)]) == 0
    text, data = page_of(out)
    assert data is not None and data["runs"][0]["nbest"] and "plainloop evaluate --data" in text
    assert main(["report", run, run, "--scores", score, run, "--out", str(out), "--resamples", "100"]) == 0
    text, data = page_of(out)
    assert data is not None and [of["name"] for of in data["runs"]] == ["A: run", "B: run"]
    assert '<th scope="col">A: run</th><th scope="col">B: run</th>' in text


def test_a_run_without_an_evaluation_beside_others(run: str, options: Any, tmp_path: Path) -> None:
    """In any order, it has curves; the others have figures."""
    new = str(tmp_path / "new")
    changes = {"run_dir": new, "max_steps": 2}
    assert (
        main(["train", *as_arguments({k: v for k, v in (options | changes).items() if k != "data.dev"})]) == 0
    )
    for number, runs in enumerate(([run, new], [new, run])):
        out = tmp_path / f"{number}.html"
        assert main(["report", *runs, "--out", str(out)]) == 0
        text, data = page_of(out)
        assert data is not None and len(data["runs"]) == 1 and "new has no evaluation yet" in text


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


def test_browser_data_is_compact(tmp_path: Path) -> None:
    """Contexts once each; the data of 2,000 questions takes less than 400 bytes per question."""
    from helpers.chromium import write_many

    data, first, _ = write_many(tmp_path, 2000)
    questions = read_questions(data, {}, first)
    one = scored(read_results(first, questions), questions, SQUAD)
    found = browser_data([one], questions)
    assert len(found["contexts"]) == 200
    assert len(json.dumps(found, separators=(",", ":"))) / 2000 < 400
