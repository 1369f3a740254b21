"""Paired tests: known values, planted differences, an interval that covers the truth; and the command."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chromium import write_squad
from scipy import stats

from plainloop.trainer.cli import main
from plainloop.trainer.report.paired import bootstrap, holm, mcnemar
from plainloop.trainer.report.slices import question_word


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (3, 11), (10, 7), (250, 301), (2000, 2100), (6000, 5873)])
def test_mcnemar_is_the_binomial_test(pair: tuple[int, int]) -> None:
    expected = stats.binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1.0
    assert mcnemar(*pair) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(*pair) == mcnemar(*pair[::-1])


def test_known_values_by_hand() -> None:
    assert mcnemar(0, 5) == 2 / 32  # all five heads or all five tails
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert [question_word(q) for q in ("In which year?", "How Many?", "Whose?", "Showing what", "Qui?")] == [
        "which", "how many", "who", "what", "other",
    ]  # fmt: skip


def test_bootstrap_of_independent_questions_is_the_normal_interval() -> None:
    """2,000 units of one question: the interval is 1.96 standard errors wide on both sides."""
    random = np.random.Generator(np.random.Philox(key=3))
    a, b = random.random((2, 2000))
    (found,) = bootstrap(a[None], b[None], np.arange(2000), np.ones((1, 2000), bool), resamples=4000, seed=1)
    error = (b - a).std() / math.sqrt(2000)
    assert found.difference == pytest.approx((b - a).mean())
    assert found.high - found.difference == pytest.approx(1.96 * error, rel=0.05)
    assert found.difference - found.low == pytest.approx(1.96 * error, rel=0.05)
    z = abs(found.difference) / error
    assert found.p == pytest.approx(2 * stats.norm.sf(z), abs=0.03)


def test_slices_and_seeds_are_those_that_were_asked_for() -> None:
    """Two slices with constant differences, and runs whose means differ: known without any resampling."""
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    a = np.zeros((1, 4))
    b = np.array([[1.0, 1, 2, 2]])
    first, second = bootstrap(a, b, np.array([7, 7, 9, 9]), mask, resamples=500, seed=0)
    assert first[:3] == (1, 1, 1) and second[:3] == (2, 2, 2)
    runs = np.repeat([[0.0], [1.0]], 4, axis=1)  # two runs of B, at 0 and 1: their mean is 0, 1/2 or 1
    (found,) = bootstrap(a, runs, np.arange(4), np.ones((1, 4), bool), resamples=2000, seed=0)
    # Stretched by the square root of two, since two runs vary too little.
    assert found[:3] == pytest.approx((0.5, 0.5 - math.sqrt(0.5), 0.5 + math.sqrt(0.5)))
    assert found.p == pytest.approx(0.5, abs=0.08)  # a quarter of the resamples is below 0


def simulated(seed: int, paragraphs: int = 100, each: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two systems of equal quality. How they differ is mostly a matter of the paragraph."""
    random = np.random.Generator(np.random.Philox(key=seed))
    unit = np.repeat(np.arange(paragraphs), each)
    effect = random.normal(0, 0.25, (2, paragraphs))[:, unit]
    a, b = random.random((2, paragraphs * each)) < np.clip(0.5 + effect, 0, 1)
    return a[None].astype(float), b[None].astype(float), unit


@pytest.mark.slow
def test_the_interval_covers_the_truth() -> None:
    """In 500 simulated pairs without a true difference, 95 % of the intervals hold 0: 0.92 to 0.98 are three
    standard errors. Those over questions do not.
    """
    covered = {"paragraphs": 0, "questions": 0}
    for seed in range(500):
        a, b, unit = simulated(seed)
        for name, units in (("paragraphs", unit), ("questions", np.arange(len(unit)))):
            mask = np.ones((1, len(unit)), bool)
            (found,) = bootstrap(a, b, units, mask, resamples=1000, seed=seed)
            covered[name] += found.low <= 0 <= found.high
    print(covered)
    assert 0.92 <= covered["paragraphs"] / 500 <= 0.98
    assert covered["questions"] / 500 < 0.88


@pytest.fixture
def files(squad_file: Path, tmp_path: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Predictions that are all right, and others with 7 planted flips; the questions of the data."""
    data = json.loads(squad_file.read_text())["data"]
    questions = [qa for article in data for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    right = {qa["id"]: qa["answers"][0]["text"] if qa["answers"] else "" for qa in questions}
    flipped = right | {qa["id"]: "entirely wrong" for qa in questions[10:80:10]}
    for name, content in (("a", right), ("b", flipped)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path / "a.json", tmp_path / "b.json", questions


def test_planted_flips(files: Any, squad_file: Path, capsys: Any) -> None:
    a, b, questions = files
    command = ["compare", str(a), str(b), "--data", str(squad_file), "--resamples", "1000", "--json"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["mcnemar"] == {
        "both_right": 113, "only_a_right": 7, "only_b_right": 0, "none_right": 0, "p": pytest.approx(2 / 2**7)
    }  # fmt: skip
    assert found["f1_wins"] == {"a": 7, "b": 0, "equal": 113}
    exact = found["all"]["exact"]
    assert exact["a"] == 100 and exact["difference"] == pytest.approx(-700 / 120, abs=1e-6)
    assert exact["high"] < 0 and exact["p"] < 0.05 and found["units"] == 40
    assert "exact: A scores higher than B, by 5.833" in found["in_words"][0]
    by_name = {(row["kind"], row["slice"]): row for row in found["slices"]}
    flipped = sum(bool(qa["answers"]) for qa in questions[10:80:10])
    total = sum(bool(qa["answers"]) for qa in questions)
    answerable = by_name["answerable", "answerable"]
    assert answerable["questions"] == total
    assert answerable["exact"]["difference"] == pytest.approx(-100 * flipped / total, abs=1e-6)
    assert main(command) == 0
    assert capsys.readouterr().out == printed  # the same seed, the same bytes


def test_a_file_against_itself(files: Any, squad_file: Path, capsys: Any) -> None:
    a = str(files[0])
    for unit in ("paragraph", "question", "article"):
        command = ["compare", a, a, "--data", str(squad_file), "--unit", unit, "--resamples", "200"]
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["mcnemar"]["p"] == 1
        for row in (found["all"], *found["slices"]):
            assert (
                row["f1"]["difference"] == row["f1"]["low"] == row["f1"]["high"] == 0 and row["f1"]["p"] == 1
            )
        assert main(command) == 0
        said = capsys.readouterr().out
        assert ("A and B have the same score" if unit != "article" else "too few to say") in said


def test_seeds_are_a_level_of_their_own(files: Any, squad_file: Path, tmp_path: Path, capsys: Any) -> None:
    a, b, _ = map(str, files)
    copies = [str(shutil.copy(a, tmp_path / name)) for name in ("a-1.json", "b-2.json")]
    command = ["compare", "--a", a, copies[0], "--b", b, copies[1], "--data", str(squad_file)]
    assert main([*command, "--resamples", "500"]) == 0
    text = capsys.readouterr().out
    assert "B: 2 runs, mean and standard deviation: exact 97.083 +- 4.125" in text
    assert "2 and 2 are few" in text and "does not show which is better" in text  # one run of B is as good
    assert main(["compare", "--a", a, "--b", b, copies[1], "--data", str(squad_file)]) == 0
    assert "A: 1 run: exact 100.000, f1 100.000\n" in capsys.readouterr().out


@pytest.mark.slow
def test_few_seeds_cover_almost_as_often_as_many() -> None:
    """300 simulated pairs of 4 runs each, whose means differ by chance alone. Weights that are not stretched
    would give about 0.83.
    """
    covered, mask = 0, np.ones((1, 40), bool)
    for seed in range(300):
        random = np.random.Generator(np.random.Philox(key=seed))
        runs = 0.5 + random.normal(0, 0.1, (8, 1)) + random.normal(0, 0.01, (8, 40))
        (found,) = bootstrap(runs[:4], runs[4:], np.arange(40), mask, resamples=400, seed=seed)
        covered += found.low <= 0 <= found.high
    print(covered / 300)
    assert 0.86 <= covered / 300 <= 0.97


def test_few_paragraphs_claim_nothing(tmp_path: Path, capsys: Any) -> None:
    """One question that only B answers: no p-value, no claim."""
    data = write_squad(tmp_path / "one.json", {"t": [("Ada built it.", [("q", "Who built it?", "Ada")])]})
    for name, text in (("a", "x"), ("b", "Ada")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"q": text}))
    command = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--data", data]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "only 1 paragraph: too few to say" in text and "higher" not in text.replace("A higher on", "")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all"]["exact"]["p_holm"] is None and found["mcnemar"]["p"] == 1


def test_bad_input_is_one_line(files: Any, squad_file: Path, tmp_path: Path, capsys: Any) -> None:
    a, b, questions = files
    fewer = json.loads(b.read_text())
    del fewer[questions[3]["id"]]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    (tmp_path / "list.json").write_text('{"x": 1}')
    (tmp_path / "run").mkdir()
    (tmp_path / "short.json").write_text('["x", "y"]')
    data = ["--data", str(squad_file)]
    faults = {
        "needs two runs": [str(a), *data],
        f"has no prediction for '{questions[3]['id']}'": [str(a), str(tmp_path / "fewer.json"), *data],
        "no predictions.json": [str(a), str(tmp_path / "run"), *data],
        "no such file or folder": [str(a), "nowhere", *data],
        "does not say which data": [str(a), str(b)],
        "has no prediction for any question": [str(tmp_path / "list.json")] * 2 + data,
        "--language: no effect": [str(a), str(b), "--language", "de", *data],
        "resamples": [str(a), str(b), *data, "--resamples", "3"],
        "given twice": ["--a", str(a), str(a), "--b", str(b), *data],
        "a list of 120 texts": [str(tmp_path / "short.json"), str(a), *data],
    }
    for message, arguments in faults.items():
        assert main(["compare", *arguments]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    (tmp_path / "no.json").write_text(json.dumps(fewer))
    assert main(["compare", str(tmp_path / "fewer.json"), str(tmp_path / "no.json"), *data]) == 0
    assert "warning: 119 of 120 questions have predictions" in capsys.readouterr().err
