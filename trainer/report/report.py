"""`plainloop report RUN ...`: one page with options, curves, figures, and every question with its answer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plainloop.data.errors import InputError
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import flatten
from plainloop.trainer.config.report_options import ReportConfig
from plainloop.trainer.report import figures
from plainloop.trainer.report.browser import browser_data
from plainloop.trainer.report.compare import comparison
from plainloop.trainer.report.curves import Run, evaluation_figure, published, read_runs, training_figure
from plainloop.trainer.report.page import Markup, element, figure, page, section, table, write
from plainloop.trainer.report.results import (
    Questions,
    Results,
    common,
    read_metrics,
    read_questions,
    read_results,
    rules_for,
    scored,
)
from plainloop.trainer.report.svg import inline, pyplot
from plainloop.trainer.run_folder.files import sha256
from plainloop.trainer.tasks.normalize import Rules

Section = tuple[str, str, Markup]
TUNED = "tuned on this data, so too good for other data"


def report(config: ReportConfig) -> None:
    """Write the page. Raises InputError."""
    if not config.runs:
        raise InputError("report needs a run folder: plainloop report RUN --out report.html; see --help.")
    if config.scores and len(config.scores) != len(config.runs):
        raise InputError(
            f"--scores: {len(config.scores)} folders for {len(config.runs)} runs; give one each."
        )
    pyplot()
    png = Path(config.png) if config.png else None
    runs, scores = read_runs(config.runs), config.scores or config.runs
    sections: list[Section] = []
    data = None
    if any(_has_answers(path) for path in scores):
        questions = read_questions(config.data, config.columns, scores[0])
        rules = rules_for(config.metric, config.language, scores[0])
        read, questions = common([read_results(path, questions) for path in scores], questions)
        all_of = [
            dataclasses.replace(scored(one, questions, rules), name=name)
            for one, name in zip(read, config.runs, strict=True)
        ]
        sections += _evaluation(runs, all_of, questions, rules, config, png)
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
    sections.append(_options(runs, scores))
    title = f"plainloop: {', '.join(Path(run).name or run for run in config.runs)}"
    write(config.out, page(title, sections, data))
    say(f"{config.out}: {Path(config.out).stat().st_size / 1e6:.1f} MB")


def _has_answers(path: str) -> bool:
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder.")
    names = ("predictions.json", "results.json")
    return place.is_file() or any(
        (folder / name).is_file() for folder in (place, place / "evaluation") for name in names
    )


def _options(runs: Sequence[Run], scores: Sequence[str]) -> Section:
    """What was trained, on what, where; and the options that differ from the defaults."""
    default = flatten(dataclasses.asdict(TrainConfig()))
    parts: list[str] = []
    if runs:
        about = {run.name: _about(run) for run in runs}
        names = dict.fromkeys(name for of in about.values() for name in of)
        rows = [[name, *(of.get(name, "") for of in about.values())] for name in names]
        parts.append(table(["run", *about], rows, "The runs"))
        names = dict.fromkeys(n for run in runs for n, v in run.options.items() if v != default.get(n))
        rows = [[name, *(str(run.options.get(name, default.get(name))) for run in runs)] for name in names]
        parts.append(table(["option", *about], rows, "Options that differ from the defaults"))
    for path in scores:
        if (Path(path) / "provenance.json").is_file():
            from plainloop.data.readers.files import read_json

            origin = flatten(read_json(Path(path) / "provenance.json"))
            rows = [[name, str(value)] for name, value in origin.items() if not name.startswith("options.")]
            parts.append(table(["what", "value"], rows, f"Where the figures of {path} come from"))
    return section("options", "Options and provenance", *parts)


def _about(run: Run) -> dict[str, str]:
    environment = run.state.get("environment") or {}
    about = {"status": str(run.status.get("status", "unknown"))}
    if "step" in run.status:
        about["steps"] = f"{run.status['step']} of {run.status.get('total_steps', '?')}"
    starts = sum(record["kind"] == "warm_up" for record in run.records)
    about["starts"] = f"{starts} ({max(0, starts - 1)} of them resumed)"
    skipped = sum(record.get("skipped") or 0 for record in run.records if record["kind"] == "train")
    about["skipped steps"] = str(skipped)
    about |= {name: str(value) for name, value in environment.items() if value not in (None, "")}
    for split in ("train", "dev"):
        paths = run.options.get(f"data.{split}")
        for path in [paths] if isinstance(paths, str) else paths or []:
            there = Path(path).is_file()
            digest = f"SHA-256 {sha256(Path(path))}" if there else "not a file of this machine now"
            about[f"{split} data"] = f"{about.get(f'{split} data', '')} {path}: {digest}".strip()
    if prepared := (run.state.get("fingerprint") or {}).get("data"):
        about["digest of the tokenised training data"] = str(prepared)
    return about


def _training(runs: Sequence[Run], png: Path | None) -> Section:
    notes = []
    for run in runs:
        marks = {name: steps for name, steps in run.marks().items() if steps}
        listed = "; ".join(f"{name} at step {', '.join(map(str, s))}" for name, s in marks.items())
        notes.append(element("p", f"{run.name}: {listed or 'no save yet'}.", class_="note"))
    parts = [
        figure(inline(training_figure(runs), "training", "Six curves over the steps of training.", png),
               "Curves of training", "Training. A gap is a loss of NaN or Inf."),
        *notes,
    ]  # fmt: skip
    if (drawn := evaluation_figure(runs)) is not None:
        text = "The figures of each evaluation over the steps."
        parts.append(
            figure(inline(drawn, "evaluations", text, png), "Evaluations", "Evaluations during training.")
        )
    return section("training", "Training", *parts)


def _evaluation(
    runs: Sequence[Run], all_of: Sequence[Results], questions: Questions, rules: Rules, config: ReportConfig,
    png: Path | None,
) -> list[Section]:  # fmt: skip
    """The table of figures, the comparison of two runs, and the figures."""
    found = [section("figures", "Figures", *_table(runs, all_of, questions))]
    if len(all_of) == 2:
        found.append(_comparison(all_of, questions, config.resamples))
    parts: list[str] = []
    curves = [
        t for one in all_of if not questions.causalqa and (t := figures.thresholds(one, questions, rules))
    ]
    if curves:
        text = (
            "Precision over recall, null odds of answerable and other questions, scores over the threshold."
        )
        parts.append(figure(
            inline(figures.threshold_figure(curves), "thresholds", text, png), "Thresholds",
            "As in the official script: all thresholds on the null odds. The dots are the best thresholds, "
            + TUNED + ".",
        ))  # fmt: skip
    name = questions.figures[0]
    sure = [
        (one.name, p, one.scores[name] == questions.scale)
        for one in all_of
        if (p := figures.probabilities(one)) is not None
    ]
    if sure:
        text = "Share of right answers over their probability, and risk over coverage."
        parts.append(figure(
            inline(figures.probability_figure(sure), "probabilities", text, png), "Probabilities",
            "The probability is that of the given answer among the candidates of the n-best list.",
        ))  # fmt: skip
    elif curves:
        parts.append(element(
            "p", "Reliability and risk need nbest_predictions.json, which evaluate --out_dir writes.",
            class_="note",
        ))  # fmt: skip
    text = "Each figure by answer length, question word and context length."
    parts.append(figure(
        inline(figures.slice_figure(all_of, questions), "slices", text, png), "Slices",
        "In brackets: questions. Answer length in words of the first gold answer, context in characters.",
    ))  # fmt: skip
    return [*found, section("plots", "Where it is right", *parts)]


def _table(runs: Sequence[Run], all_of: Sequence[Results], questions: Questions) -> list[str]:
    """The official keys; of several runs, mean and standard deviation too; published figures if known."""
    columns: dict[str, Mapping[str, float]] = {}
    for one in all_of:
        own = {name: float(values.mean()) for name, values in one.scores.items()}
        columns[one.name] = read_metrics(one) or {**own, "total": len(questions.examples)}
    names = list(dict.fromkeys(name for of in columns.values() for name in of))
    head, notes = ["figure", *columns], []
    known = published(runs[0].options) if runs else None
    rows = []
    for name in names:
        values = [of.get(name) for of in columns.values()]
        marked = name + (" *" if name.startswith("best_") else "")
        row = [marked, *("" if value is None else f"{value:.6g}" for value in values)]
        numbers = [value for value in values if value is not None]
        if len(all_of) > 1:
            spread = np.std(numbers, ddof=1) if len(numbers) > 1 else 0.0
            skip = name.endswith(("thresh", "total"))
            row.append("" if skip else f"{np.mean(numbers):.6g} ± {spread:.2g}")
        if known:
            row.append(f"{known[0][name]:g}" if name in known[0] else "")
        rows.append(row)
    if len(all_of) > 1:
        head.append("mean ± standard deviation")
    if known:
        head.append("published")
        notes.append(element("p", f"Published: {known[1]}.", class_="note"))
    if any(name.startswith("best_") for name in names):
        notes.append(element("p", f"* {TUNED}.", class_="note"))
    data = f"On {', '.join(questions.files)}: {len(questions.examples):,} questions."
    return [table(head, rows, data), *notes]


def _comparison(all_of: Sequence[Results], questions: Questions, resamples: int) -> Section:
    """What `plainloop compare` says about the two runs."""
    found = comparison(all_of[:1], all_of[1:], questions, unit="paragraph", resamples=resamples, seed=0)
    names = found["figures"]
    head = ["questions", "number", *(f"{n}, {c}" for n in names for c in ("A", "B", "B - A", "95 %", "p"))]
    rows = []
    for row in (found["all"], *found["slices"]):
        cells = [f"{row['kind']}: {row['slice']}" if row["kind"] != "all" else "all", f"{row['questions']:,}"]
        for name in names:
            of = row[name]
            p = "few" if of["p_holm"] is None else f"{of['p_holm']:.3f}"
            interval = f"{of['low']:+.2f} to {of['high']:+.2f}"
            cells += [f"{of['a']:.2f}", f"{of['b']:.2f}", f"{of['difference']:+.2f}", interval, p]
        rows.append(cells)
    m = found["mcnemar"]
    counts = (
        f"Both right: {m['both_right']:,}; only A: {m['only_a_right']:,}; only B: {m['only_b_right']:,};"
        f" none: {m['none_right']:,}. McNemar's exact test, questions as independent: p = {m['p']:.3g}."
    )
    caption = f"A: {all_of[0].name}; B: {all_of[1].name}. Paragraphs resampled; p of slices by Holm."
    lines = [element("li", line) for line in found["in_words"]]
    return section(
        "compare", "Comparison", element("ul", *lines), element("p", counts), table(head, rows, caption)
    )


def data_page(found: Mapping[str, Any], path: str) -> None:
    """The findings of `plainloop data` as a page. Raises InputError."""
    sections = []
    for split in ("train", "dev"):
        if split not in found:
            continue
        of = found[split]
        parts: list[str] = [element("p", ", ".join(of["files"]))]
        if "faults" in of:
            parts.append(element("p", f"train would refuse it: {of['faults']}", class_="text"))
        else:
            counts = [[k, f"{v:,}"] for k, v in of.items() if isinstance(v, (int, float))]
            parts.append(table(["what", "number"], counts, "Counts"))
            sizes = {f"{name}s": size for name, size in of["lengths"].items()}
            if "rows" in of:
                sizes |= {f"rows of {of['rows']['model']}": of["rows"]["length"]}
            drawn = figures.length_figure(sizes)
            parts.append(
                figure(
                    inline(drawn, f"lengths-{split}", "Histograms of lengths.", None), "Lengths", "Lengths."
                )
            )
            notes = [*of.get("notes", []), *of.get("rows", {}).get("warnings", [])]
            parts += [element("p", f"Warning: {note}.") for note in notes]
            parts.append(_findings(of["findings"], "To check"))
        sections.append(section(split, split, *parts))
    if "shared" in found:
        sections.append(section("shared", "In both files", _findings(found["shared"], "Leaks")))
    write(path, page("plainloop: data", sections))
    say(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB")


def _findings(found: Sequence[Mapping[str, Any]], caption: str) -> Markup:
    rows = [[f["what"], f"{f['count']:,}", "\n".join(f["examples"])] for f in found]
    return table(["finding", "number", "examples"], rows, caption)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
