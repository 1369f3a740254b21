"""The normalisers of SQuAD and MLQA, by hand from the published scripts, and XQuAD scored with both."""

import json
from pathlib import Path

import pytest

from plainloop.data.readers.examples import read_examples
from plainloop.data.types import Answer, Example
from plainloop.trainer.cli import main
from plainloop.trainer.tasks.metrics import squad_scores
from plainloop.trainer.tasks.normalize import metric_rules


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "The  Cat, a DOG’s", "cat dogs"),  # Unicode punctuation too
        ("en", "$5 + x", "5 x"),  # and ASCII symbols, which Unicode does not count as punctuation
        ("en", "€5 ± x", "€5 ± x"),
        ("de", "Das Haus des Müllers", "haus müllers"),
        ("de", "dass", "dass"),
        ("es", "¿La casa de los Reyes?", "casa de reyes"),
        ("vi", "Những chiếc thuyền của là", "thuyền"),
        ("hi", "द हिंदू।", "द हिंदू"),
        ("ar", "الكتاب والقلم", "كتاب و قلم"),  # also inside a word
        ("zh", "《红楼 梦》abc DE，12年", "红 楼 梦 abc de12 年"),
        ("zh", "the cat", "the cat"),  # no articles
    ],
)
def test_mlqa(language: str, text: str, expected: str) -> None:
    assert metric_rules("mlqa", language).normalize(text) == expected


def test_mlqa_scores_by_hand() -> None:
    chinese = [Example("1", "q", "c", (Answer("红楼梦", 0),))]
    assert squad_scores(chinese, {"1": "红楼"})["f1"] == 0
    scores = squad_scores(chinese, {"1": "红楼"}, rules=metric_rules("mlqa", "zh"))
    assert scores["f1"] == pytest.approx(100 * 2 * 1 * (2 / 3) / (1 + 2 / 3)) and scores["exact"] == 0
    # Two texts of articles alone: an exact match, but without a common token the script's F1 is 0.
    spanish = [Example("1", "q", "c", (Answer("la", 0),))]
    scores = squad_scores(spanish, {"1": "el"}, rules=metric_rules("mlqa", "es"))
    assert (scores["exact"], scores["f1"]) == (100.0, 0.0)
    # MLQA has no unanswerable questions; for those of other data, SQuAD's rule.
    assert squad_scores([Example("1", "q", "c")], {}, rules=metric_rules("mlqa", "es"))["f1"] == 100.0


def test_gold_answers_of_real_chinese_data(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = real_data / "xquad/xquad.zh.json"
    golds = {e.id: e.answers[0].text for e in read_examples(file)}
    (tmp_path / "golds.json").write_text(json.dumps(golds))
    scoring = ["evaluate", "--data", str(file), "--predictions", str(tmp_path / "golds.json")]
    for metric in ([], ["--metric", "mlqa", "--language", "zh"]):
        assert main([*scoring, *metric]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["exact"] == json.loads(out)["f1"] == 100.0 and not err
