"""The tables of the report page: options and provenance, the figures, the comparison of two runs."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from plainloop.data.readers.files import read_json
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import flatten
from plainloop.trainer.report.compare import FEW_UNITS, comparison
from plainloop.trainer.report.curves import Run, published
from plainloop.trainer.report.figures import best_texts
from plainloop.trainer.report.page import Markup, element, section, table
from plainloop.trainer.report.results import Questions, Results, read_metrics
from plainloop.trainer.run_folder.files import sha256
from plainloop.trainer.tasks.metrics import squad_scores
from plainloop.trainer.tasks.normalize import Rules
from plainloop.trainer.trained.summary import labels, read_options

Section = tuple[str, str, Markup]
TUNED = "tuned on this data, so too good for other data"
LONGEST_NAME = 32
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def titles(paths: Sequence[str]) -> list[str]:
    """A short name for each run, not twice the same: a letter, and what its path does not share."""
    parts = [os.path.normpath(path) for path in paths]
    if len(parts) == 1:
        return [_short(Path(parts[0]).name or parts[0])]
    shared = os.path.commonpath([os.path.abspath(part) for part in parts])
    own = [os.path.relpath(os.path.abspath(part), shared) for part in parts]
    return [
        f"{letter(i)}: {_short(Path(part).name if rest == '.' else rest)}"
        for i, (part, rest) in enumerate(zip(parts, own, strict=True))
    ]


def letter(number: int) -> str:
    """A, B, ... Z, R27, R28, ..."""
    return chr(ord("A") + number) if number < 26 else f"R{number + 1}"


def _short(name: str) -> str:
    name = _NOT_SHOWN.sub("\ufffd", name)
    half = LONGEST_NAME // 2 - 1
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def options_section(names: Mapping[str, str], runs: Sequence[Run], scores: Sequence[str]) -> Section:
    """What was trained, on what, where; options that differ from the defaults. names: title -> path."""
    default = flatten(dataclasses.asdict(TrainConfig()))
    parts: list[str] = [table(["run", "folder"], [list(pair) for pair in names.items()], "The runs", "facts")]
    if runs:
        about = {run.name: _about(run) for run in runs}
        keys = dict.fromkeys(name for of in about.values() for name in of)
        rows = [[name, *(of.get(name, "") for of in about.values())] for name in keys]
        parts.append(table(["fact", *about], rows, "How they were trained", "facts"))
        keys = dict.fromkeys(n for run in runs for n, v in run.options.items() if v != default.get(n))
        rows = [[name, *(str(run.options.get(name, default.get(name))) for run in runs)] for name in keys]
        parts.append(table(["option", *about], rows, "Options that differ from the defaults", "facts"))
    for path in dict.fromkeys(scores):
        if (Path(path) / "provenance.json").is_file():
            origin = flatten(read_json(Path(path) / "provenance.json"))
            rows = [[name, str(value)] for name, value in origin.items() if not name.startswith("options.")]
            parts.append(table(["what", "value"], rows, f"Where the figures of {path} come from", "facts"))
    return section("options", "Options and provenance", *parts)


def _about(run: Run) -> dict[str, str]:
    environment, fingerprint = (run.state.get(key) for key in ("environment", "fingerprint"))
    about = {"status": str(run.status.get("status", "unknown"))}
    if "step" in run.status:
        about["steps"] = f"{run.status['step']} of {run.status.get('total_steps', '?')}"
    starts = sum(record["kind"] == "warm_up" for record in run.records)
    about["starts"] = f"{starts}, of which resumed: {len(run.marks()['resumed'])}"
    about["skipped steps"] = f"{sum(run.series('train', 'skipped')[1]):g}"
    if isinstance(environment, dict):
        about |= {name: str(value) for name, value in environment.items() if value not in (None, "")}
    for split in ("train", "dev"):
        paths = run.options.get(f"data.{split}")
        for path in [paths] if isinstance(paths, str) else paths or []:
            there = Path(path).is_file()
            digest = f"SHA-256 of the file now: {sha256(Path(path))}" if there else "no file of this machine"
            about[f"{split} data"] = f"{about.get(f'{split} data', '')} {path}; {digest}".strip()
    if isinstance(fingerprint, dict) and fingerprint.get("data"):
        about["digest of the tokenised training data"] = str(fingerprint["data"])
    return about


def figures_table(
    runs: Sequence[Run], all_of: Sequence[Results], scores: Sequence[str], questions: Questions, rules: Rules
) -> list[str]:
    """The official keys of each run; the mean over each group of seeds; published figures if known."""
    columns: list[Mapping[str, float]] = []
    notes = []
    for one in all_of:
        known, own = read_metrics(one), _metrics(one, questions, rules)
        same = all(
            abs(known.get(name, own[name]) - own[name]) < 1e-6 for name in (*questions.figures, "total")
        )
        columns.append(known if known and same else own)
        if known and not same:
            notes.append(f"{one.name}: computed here; its metrics.json is of other data or another metric.")
    names = list(dict.fromkeys(name for of in columns for name in of))
    means = _groups(scores)
    known_for = next(((run.name, found) for run in runs if (found := published(run.options))), None)
    rows = []
    for name in names:
        row = [name + " *" * name.startswith("best_")]
        row += [f"{of[name]:.6g}" if name in of else "" for of in columns]
        for members in means.values():
            values = [columns[i][name] for i in members if name in columns[i]]
            shown = len(values) > 1 and not name.endswith(("thresh", "total"))
            row.append(f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" if shown else "")
        if known_for:
            row.append(f"{known_for[1][0][name]:g}" if name in known_for[1][0] else "")
        rows.append(row)
    head = ["figure", *(one.name for one in all_of)]
    head += [
        f"mean of {len(m)} ± standard deviation{f' ({label})' if label else ''}" for label, m in means.items()
    ]
    if known_for:
        head.append(f"published, for {known_for[0]}")
        notes.append(f"Published: {known_for[1][1]}.")
    if any(name.startswith("best_") for name in names):
        notes.append(f"* {TUNED}.")
    data = f"On {', '.join(questions.files)}: {len(questions.examples):,} questions."
    return [table(head, rows, data), *(element("p", note, class_="note") for note in notes)]


def _metrics(one: Results, questions: Questions, rules: Rules) -> dict[str, float]:
    """What metrics.json has, computed from the predictions."""
    if questions.causalqa:
        means = {name: float(values.mean()) for name, values in one.scores.items()}
        return {**means, "total": len(questions.examples)}
    ids = [example.id for example in questions.examples]
    texts = dict(zip(ids, (text or "" for text in one.texts), strict=True))
    odds = None if one.odds is None else dict(zip(ids, map(float, one.odds), strict=True))
    best = dict(zip(ids, best_texts(one), strict=True))
    return squad_scores(questions.examples, texts, score_diff=odds, best_texts=best, rules=rules)


def _groups(scores: Sequence[str]) -> dict[str, list[int]]:
    """Label -> places of the runs that differ in the seed alone, for groups of at least two."""
    options = {str(i): read_options(Path(p)) if Path(p).is_dir() else {} for i, p in enumerate(scores)}
    if not all(options.values()):
        return {}
    groups: dict[str, list[int]] = {}
    for place, label in labels(options).items():
        groups.setdefault(label, []).append(int(place))
    return {label: members for label, members in groups.items() if len(members) > 1}


def comparison_section(all_of: Sequence[Results], questions: Questions, resamples: int) -> Section:
    """What `plainloop compare` says about the two runs."""
    found = comparison(all_of[:1], all_of[1:], questions, unit="paragraph", resamples=resamples, seed=0)
    names, digits = found["figures"], 2 if questions.scale == 100 else 4
    head = ["questions", "number", *(f"{n}, {c}" for n in names for c in ("A", "B", "B - A", "95 %", "p"))]
    rows = []
    for row in (found["all"], *found["slices"]):
        cells = [f"{row['kind']}: {row['slice']}" if row["kind"] != "all" else "all", f"{row['questions']:,}"]
        for name in names:
            of = row[name]
            cells += [f"{of['a']:.{digits}f}", f"{of['b']:.{digits}f}", f"{of['difference']:+.{digits}f}"]
            cells += [f"{of['low']:+.{digits}f} to {of['high']:+.{digits}f}", _p(of["p_holm"])]
        rows.append(cells)
    m = found["mcnemar"]
    counts = (
        f"Both right: {m['both_right']:,}; only A: {m['only_a_right']:,}; only B: {m['only_b_right']:,};"
        f" none: {m['none_right']:,}. McNemar's exact test, questions as independent: p = {m['p']:.3g}."
    )
    caption = (
        f"{all_of[0].name}, {all_of[1].name}. Paragraphs are resampled. p of slices: Holm's correction; few:"
        f" under {FEW_UNITS} paragraphs, so no p."
    )
    lines = [element("li", line) for line in found["in_words"]]
    return section(
        "compare", "Comparison", element("ul", *lines), element("p", counts), table(head, rows, caption)
    )


def _p(value: float | None) -> str:
    return "few" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
