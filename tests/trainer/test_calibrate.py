"""`plainloop calibrate`: fitted on one half, judged on the other; the file can't go with other weights."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.data.errors import InputError
from plainloop.data.readers.examples import read_examples
from plainloop.data.types import Answer, Example
from plainloop.trainer.cli import main
from plainloop.trainer.tasks.metrics import squad_scores
from plainloop.trainer.trained import calibration
from plainloop.trainer.trained.calibrate import halves
from plainloop.trainer.trained.calibration import Judged


def simulated(n: int, temperature: float, *, seed: int = 0) -> Judged:
    """Questions whose candidates are right with the probability softmax(scores / temperature)."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (n, 4))
    logits[:, :3] = -np.sort(-logits[:, :3], axis=1)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (random.random((n, 1)) > np.cumsum(p, axis=1)).sum(axis=1)
    exact = (truth == 0).astype(float)
    scores = logits * temperature
    return Judged(scores[:, :3], scores[:, 3], exact, exact, truth != 3)


def test_the_temperature_of_simulated_answers_is_found() -> None:
    for temperature in (0.5, 1.0, 3.0):
        questions = simulated(50_000, temperature)
        assert calibration.fit_temperature(questions, 0.0) == pytest.approx(temperature, rel=0.03)
        assert calibration.figures(questions, 0.0, temperature)["ece"] < 0.01
    assert calibration.figures(simulated(50_000, 3.0), 0.0, 1.0)["ece"] > 0.1


def test_the_threshold_gives_the_best_f1_of_the_official_script() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        n = int(random.integers(1, 12))
        diff = random.permutation(n) - n / 2
        answerable = random.random(n) < 0.6
        right = random.random(n) < 0.5
        examples = [
            Example(str(i), "q", "c", (Answer("yes" if right[i] else "no", 0),) if answerable[i] else ())
            for i in range(n)
        ]
        good = (answerable & right).astype(float)
        questions = Judged(np.zeros((n, 1)), diff, good, good, answerable)
        threshold = calibration.fit_threshold(questions)
        texts = {e.id: "yes" for e in examples}
        odds = {e.id: float(d) for e, d in zip(examples, diff, strict=True)}
        best = squad_scores(examples, texts, score_diff=odds)["best_f1"]
        given = {i: "" if odds[i] > threshold else "yes" for i in texts}
        assert squad_scores(examples, given)["f1"] == pytest.approx(best)
        assert calibration.figures(questions, threshold, 1.0)["f1"] == pytest.approx(best)


def test_a_wanted_precision_is_reached_with_the_most_answers() -> None:
    diff = np.array([-4.0, -3.0, -2.0, -1.0, 0.0, 1.0])
    exact = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    questions = Judged(np.zeros((6, 1)), diff, exact, exact, np.ones(6, bool))
    assert calibration.fit_threshold(questions, 0.75) == -0.5  # 3 of 4 right, between -1 and 0
    assert calibration.fit_threshold(questions, 0.9) == -2.5
    wrong = questions._replace(exact=np.zeros(6))
    with pytest.raises(InputError, match=r"no threshold reaches it; highest: 0\.000"):
        calibration.fit_threshold(wrong, 0.75)


def test_figures_by_hand() -> None:
    assert calibration.auroc(np.array([1.0, 2, 2, 3]), np.array([False, False, True, True])) == 3.5 / 4
    p, right = np.array([0.9, 0.8, 0.6, 0.6]), np.array([True, True, False, True])
    assert calibration.coverage(p, right, 0.9) == 0.5  # the two at 0.6 go together: 3 of 4
    assert calibration.coverage(p, right, 0.75) == 1.0
    assert calibration.coverage(p, ~right, 0.9) == 0.0
    # bins of 1/15: 0.9 (distance 0.1), 0.8 (0.2), and twice 0.6 (|1.2 - 1|)
    assert calibration.expected_calibration_error(p, right) == pytest.approx((0.1 + 0.2 + 0.2) / 4)
    questions = Judged(np.array([[2.0, 0.0], [0.0, -math.inf]]), np.array([1.0, 4.0]), *[np.ones(2)] * 3)
    expected = [math.e**2 / (math.e**2 + 1 + math.e**0.5), math.e**3.5 / (math.e**3.5 + 1)]
    assert calibration.confidence(questions, 0.5, 1.0) == pytest.approx(expected)


def test_halves_share_no_article_and_no_context() -> None:
    random = np.random.default_rng(0)
    examples = [
        Example(str(i), "q", f"context {random.integers(60)}", (), f"article {random.integers(9)}")
        for i in range(400)
    ]
    fitting = halves(examples)
    assert 150 < sum(fitting) < 250
    sides: dict[str, set[bool]] = {}
    for example, side in zip(examples, fitting, strict=True):
        sides.setdefault(example.context, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert halves(examples) == fitting
    whole = [Example(str(i), "q", f"context {i // 10}", (), f"article {i // 100}") for i in range(400)]
    of_article: dict[str, set[bool]] = {}
    for example, side in zip(whole, halves(whole), strict=True):
        of_article.setdefault(example.title, set()).add(side)
    assert all(len(side) == 1 for side in of_article.values()) and sum(halves(whole)) == 200
    assert sum(halves([Example(str(i), "q", f"context {i}", (), "one") for i in range(10)])) == 5
    with pytest.raises(InputError, match="all questions have the same context"):
        halves([Example("1", "q", "c"), Example("2", "q", "c")])


def test_calibrate_then_use_it(
    options: dict[str, Any],
    train: Any,
    squad_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(tmp_path / "run")
    train(run_dir=run, epochs=3)
    capsys.readouterr()
    data = ["--data", str(squad_file)]
    calibrated = ["--null_threshold", "calibrated"]
    assert main(["evaluate", "--model", run, *data, *calibrated]) == 2
    assert "run plainloop calibrate" in capsys.readouterr().err
    assert main(["calibrate", "--model", run, *data]) == 0
    printed = json.loads(capsys.readouterr().out)
    (path,) = Path(run).glob("checkpoints/*/calibration.json")
    stored = json.loads(path.read_text())
    assert printed == {key: value for key, value in stored.items() if key != "sha256"}
    halves_ = printed["untouched_half"], printed["fitted_half"]
    assert sum(half["questions"] for half in halves_) == len(read_examples(squad_file))
    assert halves_[1]["tuned_on_this_data"] is True
    assert halves_[1]["after"]["f1"] >= halves_[1]["before"]["f1"]
    assert printed["command"].startswith("plainloop calibrate --model ") and len(printed["weights"]) == 1

    # evaluate and predict use it when told, and only then
    assert main(["evaluate", "--model", run, *data, *calibrated, "--out_dir", str(tmp_path / "e")]) == 0
    told = capsys.readouterr()
    assert "contexts were used to fit the threshold" in told.err
    given = json.loads((tmp_path / "e/provenance.json").read_text())
    assert given["tuned_on_this_data"].startswith("all figures: ")
    assert main(["evaluate", "--summary", str(tmp_path / "e")]) == 0
    assert f"{tmp_path}/e (tuned on this data)" in capsys.readouterr().out
    number = ["--null_threshold", str(printed["null_threshold"])]
    assert main(["evaluate", "--model", run, *data, *number, "--out_dir", str(tmp_path / "n")]) == 0
    assert (tmp_path / "n/predictions.json").read_bytes() == (tmp_path / "e/predictions.json").read_bytes()
    tuned = json.loads((tmp_path / "n/provenance.json").read_text())["tuned_on_this_data"]
    assert tuned == "best_exact, best_exact_thresh, best_f1, best_f1_thresh"
    assert main(["predict", "--model", run, *data, "--out", str(tmp_path / "a.jsonl"), *calibrated]) == 0
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    texts = json.loads((tmp_path / "e/predictions.json").read_text())
    assert {line["id"]: line["answer"] for line in answers} == texts
    for line in answers:
        assert line["nbest"][0]["text"] == line["answer"]
        assert line["probability"] == max(entry["probability"] for entry in line["nbest"])

    # errors: other windows, a flipped digit, other weights
    capsys.readouterr()
    assert main(["evaluate", "--model", run, *data, *calibrated, "--max_answer_length", "5"]) == 2
    assert "was fitted with --max_answer_length 30" in capsys.readouterr().err
    text = path.read_text()
    path.write_text(text.replace('"temperature": ', '"temperature": 1'))
    assert main(["evaluate", "--model", run, *data, *calibrated]) == 2
    assert "its digest is another one" in capsys.readouterr().err
    path.write_text(text)
    weights = path.with_name("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["evaluate", "--model", str(path.parent), *data, *calibrated]) == 2
    assert "was fitted for other weights" in capsys.readouterr().err


def test_bad_options(tmp_path: Path, squad_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in (
        ([], "needs --model FOLDER and --data FILE"),
        (["--model", "x", "--data", str(tmp_path / "no.json")], "no such file"),
        (["--model", "x", "--data", str(squad_file), "--answer_precision", "1.5"], "answer_precision is 1.5"),
    ):
        assert main(["calibrate", *line]) == 2
        assert message in capsys.readouterr().err
