"""`plainloop data`: what data_check found, as text, as JSON and as a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plainloop.trainer.commands.data_check import Content, look_at
from plainloop.trainer.config.report_options import DatasetConfig
from plainloop.trainer.report.figures import length_figure
from plainloop.trainer.report.page import Markup, element, figure, page, require_own, section, table, write
from plainloop.trainer.report.svg import inline, pyplot


def as_text_report(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines: list[str] = []
    for split in ("train", "dev"):
        if split not in found:
            continue
        of = found[split]
        lines += [f"{split}: {', '.join(of['files'])}"]
        if "faults" in of:
            lines += [f"  train would refuse it: {of['faults']}", ""]
            continue
        share = of["unanswerable"] / of["questions"]
        lines.append(
            f"  {of['questions']:,} questions, {of['unanswerable']:,} ({share:.1%}) of them unanswerable;"
            f" {of['contexts']:,} contexts, {of['articles']:,} articles;"
            f" {of['answers per answerable question']} answers per answerable question"
        )
        lines += [f"  warning: {note}" for note in of.get("notes", [])]
        lines += [f"  train would refuse it: {of['refused']}"] if "refused" in of else []
        for name, sizes in of["lengths"].items():
            lines += _histogram(f"{name}s", sizes)
        if "rows" in of:
            lines += _histogram(
                f"rows of {of['rows']['model']} ({of['rows']['rows']:,})", of["rows"]["length"]
            )
            lines += [f"  warning: {warning}" for warning in of["rows"]["warnings"]]
        lines += [line for finding in of["findings"] for line in _lines(finding)] + [""]
    if "shared" in found:
        lines += ["in both files:", *(line for finding in found["shared"] for line in _lines(finding))]
    return "\n".join(lines).rstrip()


def _lines(finding: Content) -> list[str]:
    mark = "!" if finding["count"] else " "
    return [
        f"{mark} {finding['count']:>7,} {finding['what']}",
        *(f"            {e}" for e in finding["examples"]),
    ]


def _histogram(title: str, sizes: Content) -> list[str]:
    most = max(count for _, _, count in sizes["histogram"])
    head = (
        f"  {title}, {sizes['unit']}: {sizes['min']} to {sizes['max']}, median {sizes['median']:g}, 95 % have"
        f" at most {sizes['p95']:g}"
    )
    bars = [
        f"    {f'{low} to {high}' if high > low else low:>14} {count:>8,} {'#' * round(40 * count / most)}"
        for low, high, count in sizes["histogram"]
    ]
    return [head, *bars]


def data_page(found: Mapping[str, Any], path: str) -> None:
    """The findings as a page. Raises InputError."""
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
            parts.append(table(["what", "number"], counts, f"Counts, {split}"))
            sizes = {f"{name}s": size for name, size in of["lengths"].items()}
            if "rows" in of:
                sizes["rows"] = of["rows"]["length"]
                counts = [["model", of["rows"]["model"]], ["rows", f"{of['rows']['rows']:,}"]]
                parts.append(table(["what", "value"], counts, f"Rows that the model sees, {split}", "facts"))
            drawn = inline(length_figure(sizes), f"lengths-{split}", "Histograms of lengths.", None)
            caption = "How many questions, contexts and answers have which length. The last bar has the rest."
            parts.append(figure(drawn, f"Lengths, {split}", caption))
            refused = [f"train would refuse it: {of['refused']}"] if "refused" in of else []
            notes = [*of.get("notes", []), *refused, *of.get("rows", {}).get("warnings", [])]
            parts += [element("p", f"Warning: {note}.") for note in notes]
            parts.append(_findings(of["findings"], f"What may be a mistake, {split}"))
        sections.append(section(split, split, *parts))
    if "shared" in found:
        sections.append(section("shared", "In both files", _findings(found["shared"], "Leaks")))
    write(path, page("plainloop: data", sections))
    print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def _findings(found: Sequence[Mapping[str, Any]], caption: str) -> Markup:
    rows = [
        [f["what"], f"{f['count']:,}", element("ul", *(element("li", one) for one in f["examples"]))]
        if f["examples"]
        else [f["what"], f"{f['count']:,}", ""]
        for f in found
    ]
    return table(["finding", "number", "examples"], rows, caption, "facts")


def data_report(config: DatasetConfig) -> tuple[str, int]:
    """The text or JSON to print, and the exit code: 2 if `train` would refuse the data. Raises InputError."""
    if config.html:
        pyplot()
        require_own(config.html)
    found, good = look_at(config)
    if config.html:
        data_page(found, config.html)
    return (json.dumps(found, indent=1, ensure_ascii=False) if config.json else as_text_report(found)), (
        0 if good else 2
    )
