"""`plainloop compare A B`: is the difference between two systems more than noise?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plainloop.data.errors import InputError
from plainloop.trainer.config.report_options import CompareConfig
from plainloop.trainer.report.paired import bootstrap, holm, mcnemar
from plainloop.trainer.report.results import (
    Questions,
    Results,
    common,
    read_questions,
    read_results,
    rules_for,
    scored,
)
from plainloop.trainer.report.slices import masks

FEW_UNITS = 30  # fewer paragraphs than this: the interval is too narrow to be relied on
FEW_SEEDS = 10
MOST_SLICES = 6  # named in the words; the table has all
Content = dict[str, Any]


def compare(config: CompareConfig) -> str:
    """The comparison as text or JSON. Raises InputError."""
    if not config.a or not config.b:
        raise InputError("compare needs two runs: plainloop compare A B --data FILE; see --help.")
    for side in (config.a, config.b):
        if len({Path(path).resolve() for path in side}) < len(side):
            raise InputError(f"{', '.join(side)}: the same run is given twice; give each seed once.")
    questions = read_questions(config.data, config.columns, config.a[0])
    if questions.causalqa and config.metric:
        raise InputError("--metric: no effect on CausalQA data; leave it out.")
    rules = rules_for(config.metric, config.language, config.a[0])
    read = [read_results(path, questions, texts_only=True) for path in (*config.a, *config.b)]
    read, questions = common(read, questions)
    of_each = [scored(one, questions, rules) for one in read]
    found = comparison(
        of_each[: len(config.a)], of_each[len(config.a) :], questions,
        unit=config.unit, resamples=config.resamples, seed=config.seed,
    )  # fmt: skip
    return json.dumps(found, indent=1, ensure_ascii=False) if config.json else as_text(found)


def comparison(
    a: Sequence[Results], b: Sequence[Results], questions: Questions, *, unit: str, resamples: int, seed: int
) -> Content:
    """All figures of A against B: JSON-serialisable, rounded to 6 digits after the point."""
    names, examples = questions.figures, questions.examples
    units = units_of(questions, unit)
    slices = masks(examples)
    where = np.stack([np.ones(len(examples), bool), *slices.values()])
    sides = {name: [np.stack([one.scores[name] for one in side]) for side in (a, b)] for name in names}
    rows: list[Content] = [
        {"kind": kind, "slice": name, "questions": int(mask.sum()), "units": len(np.unique(units[mask]))}
        for (kind, name), mask in zip([("all", "all"), *slices], where, strict=True)
    ]
    intervals = {
        name: bootstrap(of_a, of_b, units, where, resamples=resamples, seed=seed)
        for name, (of_a, of_b) in sides.items()
    }
    tested = [
        (name, i) for name in names for i, row in enumerate(rows) if i and row["units"] >= FEW_UNITS
    ]  # one family: slices times figures
    adjusted = dict(zip(tested, holm([intervals[name][i].p for name, i in tested]), strict=True))
    if rows[0]["units"] >= FEW_UNITS:
        adjusted |= {(name, 0): intervals[name][0].p for name in names}
    for name, (of_a, of_b) in sides.items():
        for i, (row, mask, interval) in enumerate(zip(rows, where, intervals[name], strict=True)):
            p = adjusted.get((name, i))
            row[name] = {
                "a": round(float(of_a[:, mask].mean()), 6), "b": round(float(of_b[:, mask].mean()), 6),
                **{key: round(value, 6) for key, value in interval._asdict().items()},
                "p_holm": None if p is None else round(p, 6),
            }  # fmt: skip
    found: Content = {
        "a": [one.name for one in a], "b": [one.name for one in b], "data": questions.files,
        "unit": unit, "units": int(units.max()) + 1, "resamples": resamples, "seed": seed,
        "figures": list(names), "figures_are": "fractions" if questions.causalqa else "percent",
        "tested": len(tested), "all": rows[0], "slices": rows[1:],
    }  # fmt: skip
    if len(a) == len(b) == 1:
        found["mcnemar"] = _right_and_wrong(a[0], b[0], names[0], questions.scale)
        found["f1_wins"] = _wins(a[0].scores["f1"], b[0].scores["f1"])
    else:
        found["seeds"] = {
            side: {name: [round(float(one.scores[name].mean()), 6) for one in of] for name in names}
            for side, of in (("a", a), ("b", b))
        }
    return found | {"in_words": in_words(found)}


def units_of(questions: Questions, unit: str) -> np.ndarray:
    """(N,) integers from 0: the same for questions of one paragraph, article or question.
    Raises InputError if the data has no titles or contexts to tell them by.
    """
    of_each: list[Any] = list(range(len(questions.examples)))
    if unit == "article":
        of_each = [example.title for example in questions.examples]
        if not all(of_each):
            raise InputError(f"--unit article: {questions.files[0]} has no titles; use --unit paragraph.")
    elif unit == "paragraph":  # a question without a context is alone
        of_each = [example.context or i for i, example in enumerate(questions.examples)]
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(of, len(numbers)) for of in of_each])


def _right_and_wrong(a: Results, b: Results, name: str, scale: float) -> Content:
    right_a, right_b = a.scores[name] == scale, b.scores[name] == scale
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    both, neither = int((right_a & right_b).sum()), int((~right_a & ~right_b).sum())
    p = mcnemar(only_a, only_b)
    return {"both_right": both, "only_a_right": only_a, "only_b_right": only_b, "none_right": neither, "p": p}


def _wins(a: np.ndarray, b: np.ndarray) -> Content:
    return {"a": int((a > b).sum()), "b": int((b > a).sum()), "equal": int((a == b).sum())}


def in_words(found: Content) -> list[str]:
    """What may be claimed, and what not."""
    lines = [_claim(name, found) for name in found["figures"]] + _about_slices(found)
    count = {side: len(found[side]) for side in "ab"}
    if max(count.values()) == 1:
        lines.append(
            "This is about these two trained models. Whether the method behind B is better than that behind A"
            " needs several seeds of each: plainloop compare --a A/seed-* --b B/seed-*."
        )
    elif min(count.values()) < FEW_SEEDS:
        lines.append(
            f"Runs are resampled too, but {count['a']} and {count['b']} are few: the interval is too narrow."
            f" {FEW_SEEDS} or more of each are better."
        )
    if found["unit"] == "question":
        lines.append(
            "Questions about one paragraph are treated as independent: if they share it, the interval is too"
            " narrow."
        )
    return lines


def _claim(name: str, found: Content) -> str:
    row, unit = found["all"][name], found["unit"]
    size = "" if found["figures_are"] == "fractions" else " points"
    if found["units"] < FEW_UNITS:
        number = f"only {found['units']} {unit}{'s' * (found['units'] != 1)}"
        return f"{name}: {number}: too few to say which is better (B - A is {row['difference']:+.4g}{size})."
    if row["difference"] == row["low"] == row["high"] == 0:
        return f"{name}: A and B have the same score, in every resample too."
    if row["low"] > 0 or row["high"] < 0:
        better, worse, sign = ("B", "A", 1) if row["low"] > 0 else ("A", "B", -1)
        low, high = sorted((sign * row["low"], sign * row["high"]))
        return (
            f"{name}: {better} scores higher than {worse}, by {abs(row['difference']):.4g}{size}"
            f" (95 % interval {low:.4g} to {high:.4g}, resampling {unit}s)."
        )
    return (
        f"{name}: this data does not show which is better: B - A is {row['difference']:+.4g}{size} (95 %"
        f" interval {row['low']:+.4g} to {row['high']:+.4g}, resampling {unit}s). It does not show that they"
        " are equal either."
    )


def _about_slices(found: Content) -> list[str]:
    if not found["slices"]:
        return []
    if not found["tested"]:
        return [f"No slice was tested: all have fewer than {FEW_UNITS} {found['unit']}s."]
    if 2 * found["tested"] / (found["resamples"] + 1) >= 0.05:
        return [f"Too few resamples for {found['tested']} tests of slices: none could pass."]
    clear = [
        f"{row['slice']} ({row['kind']}; {name} {row[name]['difference']:+.4g})"
        for row in found["slices"]
        for name in found["figures"]
        if (1 if row[name]["p_holm"] is None else row[name]["p_holm"]) < 0.05
    ]
    more = f"; and {len(clear) - MOST_SLICES} more" if len(clear) > MOST_SLICES else ""
    which = "; ".join(clear[:MOST_SLICES]) + more or "none"
    return [f"Slices with a difference after correcting for {found['tested']} tests: {which}."]


def as_text(found: Content) -> str:
    """The table for a terminal."""
    names, unit = found["figures"], found["unit"]
    lines = [f"A: {', '.join(found['a'])}", f"B: {', '.join(found['b'])}"]
    lines.append(
        f"{found['all']['questions']} questions, {found['units']} {found['unit']}s,"
        f" {found['resamples']} resamples; figures in {found['figures_are']}; p of slices by Holm's"
        f" correction, their intervals are not corrected (few: under {FEW_UNITS} {unit}s)"
    )
    heading = "".join(
        f"   {name + ' A':>10} {'B':>8} {'B - A':>8} {'95 % interval':>18} {'p':>7}" for name in names
    )
    lines += ["", f"{'':<15} {'':<16} {'questions':>9}{heading}"]
    for row in (found["all"], *found["slices"]):
        cells = "".join(_cells(row[name], found["resamples"]) for name in names)
        lines.append(f"{row['kind']:<15} {row['slice']:<16} {row['questions']:>9}{cells}")
    if "mcnemar" in found:
        m, wins = found["mcnemar"], found["f1_wins"]
        lines += [
            "",
            f"{names[0]}: both right {m['both_right']}, only A {m['only_a_right']},"
            f" only B {m['only_b_right']}, none {m['none_right']};"
            f" McNemar's exact test (questions as independent): p = {m['p']:.4g}",
            f"f1: A higher on {wins['a']}, B on {wins['b']}, equal on {wins['equal']}",
        ]
    else:
        lines.append("")
        for side, of in found["seeds"].items():
            several = len(found[side]) > 1
            spread = [
                f"{name} {np.mean(values):.3f}" + (f" +- {np.std(values, ddof=1):.3f}" if several else "")
                for name, values in of.items()
            ]
            kind = "runs, mean and standard deviation" if several else "run"
            lines.append(f"{side.upper()}: {len(found[side])} {kind}: {', '.join(spread)}")
    return "\n".join([*lines, "", *found["in_words"]])


def _cells(f: Content, resamples: int) -> str:
    interval = f"{f['low']:+.3f} {f['high']:+.3f}"
    p = "few" if f["p_holm"] is None else f"{f['p_holm']:.4f}"
    if f["p_holm"] is not None and f["p"] <= 2.001 / (resamples + 1):  # the lowest that so many can give
        p = f"<{p}"
    return f"   {f['a']:>10.3f} {f['b']:>8.3f} {f['difference']:>+8.3f} {interval:>18} {p:>7}"
