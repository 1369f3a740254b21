"""`plainloop report RUN ...`: one page with options, curves, figures, and every question with its answer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from plainloop.data.errors import InputError
from plainloop.trainer.config.report_options import ReportConfig
from plainloop.trainer.report import figures
from plainloop.trainer.report.browser import browser_data
from plainloop.trainer.report.curves import Run, evaluation_figure, read_runs, training_figure
from plainloop.trainer.report.page import element, figure, page, require_own, section, write
from plainloop.trainer.report.results import (
    Questions,
    Results,
    common,
    has_answers,
    null_threshold,
    read_questions,
    read_results,
    rules_for,
    scored,
)
from plainloop.trainer.report.svg import inline, pyplot
from plainloop.trainer.report.tables import (
    TUNED,
    Section,
    comparison_section,
    figures_table,
    options_section,
    titles,
)
from plainloop.trainer.tasks.normalize import Rules


def report(config: ReportConfig) -> None:
    """Write the page. Raises InputError."""
    if not config.runs:
        raise InputError("report needs a run folder: plainloop report RUN --out report.html; see --help.")
    if config.scores and len(config.scores) != len(config.runs):
        raise InputError(
            f"--scores: {len(config.scores)} folders for {len(config.runs)} runs; give one each, separated by"
            " blanks."
        )
    pyplot()
    require_own(config.out)
    names = titles(config.runs)
    runs = read_runs(config.runs, names)
    png = Path(config.png) if config.png else None
    scores = config.scores or config.runs
    answered = [i for i, path in enumerate(scores) if has_answers(path)]
    sections: list[Section] = []
    data = None
    if answered:
        given = [scores[i] for i in answered]
        questions = read_questions(config.data, config.columns, given[0])
        if questions.causalqa and config.metric:
            raise InputError("--metric: no effect on CausalQA data; leave it out.")
        rules = rules_for(config.metric, config.language, given[0])
        read, questions = common([read_results(path, questions) for path in given], questions)
        all_of = [
            dataclasses.replace(scored(one, questions, rules), name=names[i])
            for one, i in zip(read, answered, strict=True)
        ]
        lacking = [name for i, name in enumerate(names) if i not in answered]
        notes = [element("p", f"{name} has no evaluation yet.", class_="note") for name in lacking]
        table = figures_table(runs, all_of, given, questions, rules)
        sections.append(section("figures", "Figures", *table, *notes))
        if len(all_of) == 2:
            sections.append(comparison_section(all_of, questions, config.resamples))
        sections.append(_plots(all_of, given, questions, rules, png))
        data = browser_data(all_of, questions)
        hint = element("p", "This part needs JavaScript.")
        sections.append(section("questions", "Questions", element("div", hint, id="browser")))
    elif not runs:
        raise InputError(
            f"{scores[0]}: neither a run folder, nor a folder of evaluate --out_dir, nor a predictions file."
        )
    else:
        say(f"note: {scores[0]} has no predictions yet: the page has curves only")
    if runs:
        sections.append(_training(runs, png))
    sections.append(options_section(dict(zip(names, config.runs, strict=True)), runs, scores))
    write(config.out, page(f"plainloop: {', '.join(names)}", sections, data))
    say(f"{config.out}: {Path(config.out).stat().st_size / 1e6:.1f} MB")


def _training(runs: Sequence[Run], png: Path | None) -> Section:
    notes = []
    for run in runs:
        marks = {name: steps for name, steps in run.marks().items() if steps}
        listed = "; ".join(f"{name} at step {', '.join(map(str, s))}" for name, s in marks.items())
        notes.append(element("p", f"{run.name}: {listed or 'no save yet'}.", class_="note"))
    parts = [
        figure(inline(training_figure(runs), "training", "Six curves over the steps of training.", png),
               "Curves of training", "Training. A gap is a value of NaN or Inf."),
        *notes,
    ]  # fmt: skip
    if (drawn := evaluation_figure(runs)) is not None:
        text = "The figures of each evaluation over the steps."
        parts.append(
            figure(inline(drawn, "evaluations", text, png), "Evaluations", "Evaluations during training.")
        )
    return section("training", "Training", *parts)


def _plots(
    all_of: Sequence[Results], scores: Sequence[str], questions: Questions, rules: Rules, png: Path | None
) -> Section:
    """The figures about the answers."""
    parts: list[str] = []
    found = [
        figures.thresholds(one, questions, rules, null_threshold(path))
        for one, path in zip(all_of, scores, strict=True)
        if one.odds is not None and not questions.causalqa
    ]
    if found:
        caption = (
            "All thresholds on the null odds, as in the official script. The dots are the best thresholds, "
            f"{TUNED}. The outermost bars hold the rest."
        )
        if not all(one.complete for one in found):
            caption += (
                " Of a run without n-best lists, the answers above its threshold are not known: it has no"
                " precision of answers, and no scores above the threshold."
            )
        text = (
            "Precision over recall, null odds of answerable and other questions, scores over the threshold."
        )
        drawn = inline(figures.threshold_figure(found), "thresholds", text, png)
        parts.append(figure(drawn, "Thresholds", caption))
    sure = {one.name: known for one in all_of if (known := figures.probabilities(one, questions)) is not None}
    if sure:
        left = [
            f"{len(questions.examples) - len(p):,} of {name}" for name, (p, _) in sure.items()
            if len(p) < len(questions.examples)
        ]  # fmt: skip
        caption = "The probability is that of the given answer among its n-best list and no answer."
        caption += f" Left out, since their lists lack it: {', '.join(left)}." if left else ""
        text = "Share of right answers over their probability, and risk over coverage."
        drawn = inline(figures.probability_figure(sure), "probabilities", text, png)
        parts.append(figure(drawn, "Probabilities", caption))
    if without := [one.name for one in all_of if one.name not in sure and one.odds is not None]:
        note = "No reliability and risk without nbest_predictions.json, which evaluate --out_dir writes"
        parts.append(element("p", f"{note}: {', '.join(without)}.", class_="note"))
    text = "Each figure by answer length, question word and context length."
    drawn = inline(figures.slice_figure(all_of, questions), "slices", text, png)
    caption = "In brackets: questions. Answer length: words of the first gold answer. Context: characters."
    parts.append(figure(drawn, "Slices", caption))
    return section("plots", "Where it is right", *parts)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
