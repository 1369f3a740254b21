"""What the official script computes from null odds, by hand: thresholds, ties, averages, and its options."""

import json
from pathlib import Path

import pytest

from plainloop.data.types import Answer, Example
from plainloop.trainer.cli import main
from plainloop.trainer.tasks.metrics import squad_scores


def case(name: str, *texts: str) -> Example:
    return Example(name, "q", "c", tuple(Answer(text, 0) for text in texts))


EXAMPLES = [case("a", "x"), case("b"), case("c", "y"), case("d", "z")]
ODDS = {"a": -3.0, "b": -1.0, "c": 2.0, "d": 5.0}
TEXTS = {"a": "x", "b": "spoken", "c": "y", "d": "wrong"}  # right, answered in vain, right, wrong


def test_average_precision_by_hand() -> None:
    scores = squad_scores(EXAMPLES, TEXTS, score_diff=ODDS)
    # three answerable. a: precision 1, recall 1/3. b: recall stays. c: 2/3 at 2/3. d: recall stays.
    assert scores["pr_exact_ap"] == pytest.approx(100 * (1 / 3 + 2 / 3 * 1 / 3))
    # the oracle also has d: precision 3/4 at recall 1
    assert scores["pr_oracle_ap"] == pytest.approx(100 * (1 / 3 + 2 / 3 * 1 / 3 + 3 / 4 * 1 / 3))
    half = squad_scores(EXAMPLES, TEXTS | {"d": "z w"}, score_diff=ODDS)
    f1 = 2 * 0.5 * 1 / 1.5  # of "z w" against "z"
    steps = 1 / 3 + 2 / 3 * 1 / 3 + (2 + f1) / 4 * f1 / 3
    assert half["pr_f1_ap"] == pytest.approx(100 * steps)
    assert "pr_f1_ap" not in squad_scores([case("b")], {"b": ""}, score_diff={"b": 0.0})  # nothing to recall


def test_equal_odds_are_taken_in_the_order_of_the_file() -> None:
    ties = {"a": 0.0, "b": 0.0}
    right_first = squad_scores(EXAMPLES[:2], TEXTS, score_diff=ties)
    wrong_first = squad_scores(EXAMPLES[:2], TEXTS, score_diff=dict(reversed(ties.items())))
    # start: 1 of 2, b unanswered. a first: 2 of 2. b first: 0, then 1, never more than at the start
    assert (right_first["best_exact"], wrong_first["best_exact"]) == (100.0, 50.0)
    # a curve has one point for both: precision 1/2 at recall 1
    assert right_first["pr_exact_ap"] == wrong_first["pr_exact_ap"] == 50.0


def test_threshold_changes_all_averages_but_nothing_over_thresholds() -> None:
    plain = squad_scores(EXAMPLES, TEXTS, score_diff=ODDS)
    assert (plain["exact"], plain["HasAns_exact"], plain["NoAns_exact"]) == (50.0, 100 * 2 / 3, 0.0)
    strict = squad_scores(EXAMPLES, TEXTS, score_diff=ODDS, threshold=-2.0)  # b, c, d count as ""
    assert (strict["exact"], strict["HasAns_exact"], strict["NoAns_exact"]) == (50.0, 100 / 3, 100.0)
    assert (strict["f1"], strict["HasAns_f1"], strict["NoAns_f1"]) == (50.0, 100 / 3, 100.0)
    at_the_edge = squad_scores(EXAMPLES, TEXTS, score_diff=ODDS, threshold=2.0)  # > and not >=
    assert at_the_edge["HasAns_exact"] == 100 * 2 / 3
    for name in plain:
        if name.startswith(("best_", "pr_")):
            assert plain[name] == strict[name]


def test_evaluate_takes_the_threshold_and_refuses_what_has_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, value: object) -> str:
        (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path / name)

    rows = [
        {"id": e.id, "question": "q", "context": "c", "answers": [a.text for a in e.answers]}
        for e in EXAMPLES
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scoring = ["evaluate", "--data", str(tmp_path / "data.jsonl"), "--predictions", write("p.json", TEXTS)]
    odds = ["--null_odds", write("odds.json", ODDS)]

    def exact(*options: str) -> float:
        assert main([*scoring, *options]) == 0
        return float(json.loads(capsys.readouterr().out)["exact"])

    assert exact() == exact(*odds, "--na_prob_thresh", "9") == 50.0
    assert exact(*odds) == 25.0  # the official default is 1: c is not counted
    for options, message in (
        (["--null_threshold", "3"], "--null_threshold: no effect with --predictions"),
        (["--precision", "fp32", "--out_dir", "x"], "--out_dir, --precision: no effect with --predictions"),
        (["--text.num_beams", "4"], "--text.num_beams: no effect"),
        (["--rouge_bootstrap"], "--rouge_bootstrap: no effect"),
        (["--ambiguous", "skip"], "--ambiguous: no effect"),
        (["--na_prob_thresh", "2"], "--na_prob_thresh: no effect without --null_odds"),
        (["--language", "de"], "--language: no effect with --metric squad"),
        (["--null_odds", write("few.json", {"a": 1.0})], "few.json: 3 ids have no score, first b"),
    ):
        assert main([*scoring, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["evaluate", "--summary", str(tmp_path), "--data", "x"]) == 2
    assert "--data: no effect with --summary" in capsys.readouterr().err
