"""Matplotlib figures as inline SVG: no style attributes (the page's policy forbids them), text in the page's
colour, ids that are unique in the page.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from plainloop.data.errors import InputError

INK = "#010203"  # stands for the colour of the text, which depends on the reader's scheme
# Okabe and Ito's palette, told apart by readers who see fewer colours, without its yellow and black.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LINES = ("-", "--", ":", "-.")
SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
STYLE: Any = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": INK, "grid.alpha": 0.15, "axes.grid": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none", "font.size": 9,
    "font.family": "sans-serif", "legend.frameon": False, "lines.linewidth": 1.3, "svg.fonttype": "none",
    "svg.hashsalt": "plainloop", "axes.titlesize": 10, "figure.max_open_warning": 0,
    "text.parse_math": False,
}  # fmt: skip


def pyplot() -> Any:
    """matplotlib.pyplot with our style, without a screen. Raises InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "the figures need matplotlib: pip install 'plainloop[report]' (or matplotlib)."
        ) from None
    matplotlib.use("agg")
    from cycler import cycler
    from matplotlib import pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update({**STYLE, "axes.prop_cycle": cycler(color=PALETTE)})
    return plt


def style_of(number: int) -> tuple[str, str]:
    """Colour and line style of run `number`: 24 that differ."""
    return PALETTE[number % len(PALETTE)], LINES[number // len(PALETTE) % len(LINES)]


def inline(figure: Any, name: str, description: str, png: Path | None) -> str:
    """The figure as an <svg> element; closes it. name: unique in the page. png: a folder that gets it too.
    Raises InputError if that can't be written.
    """
    from matplotlib import pyplot as plt

    if png is not None:
        try:
            png.mkdir(parents=True, exist_ok=True)
            figure.savefig(png / f"{name}.png", dpi=200, facecolor="white")
        except OSError as error:
            raise InputError(f"--png {png}: {error.strerror or error}.") from None
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return _cleaned(stream.getvalue(), name, description)


def _cleaned(text: str, name: str, description: str) -> str:
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", HREF[1:].partition("}")[0])
    root = ElementTree.fromstring(text)
    for child in list(root):
        if child.tag.endswith("metadata"):
            root.remove(child)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{SVG}style":
                parent.remove(child)
    for element in root.iter():
        for declaration in element.attrib.pop("style", "").split(";"):
            key, _, value = declaration.partition(":")
            if value:
                element.set(key.strip(), value.strip())
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == HREF:
                element.set(key, f"#{name}-{value[1:]}")
            else:
                value = re.sub(r"url\(#", f"url(#{name}-", value)
                element.set(key, "currentColor" if value == INK else value)
    for key in ("width", "height"):  # the page says how wide
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", description)
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
    return ElementTree.tostring(root, encoding="unicode")
