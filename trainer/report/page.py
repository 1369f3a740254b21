"""One HTML page: escaped text, styles and a script of our own, and a policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plainloop.data.errors import InputError
from plainloop.trainer.run_folder.files import write_atomically

HERE = Path(__file__).parent
START = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta name="generator" content="plainloop">\n'
_SURROGATE = re.compile("[\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already. Any other text is escaped by `element`."""


def element(tag: str, *content: str, **attributes: Any) -> Markup:
    """`element("p", "a < b", class_="note")` -> `<p class="note">a &lt; b</p>`."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
    )
    inside = "".join(part if isinstance(part, Markup) else html.escape(part) for part in content)
    return Markup(f"<{tag}{given}>{inside}</{tag}>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "numbers") -> Markup:
    """The first cell of each row is its heading. A wide table scrolls by itself. kind: numbers or facts."""
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in rows
    ]
    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
        element("tbody", *body),
        class_=kind,
    )
    return _scrolling(content, caption)


def figure(svg: str, name: str, caption: str) -> Markup:
    """name: short, for a screen reader at the part that scrolls on a small screen."""
    return element("figure", _scrolling(Markup(svg), name), element("figcaption", caption))


def _scrolling(content: Markup, name: str) -> Markup:
    return element("div", content, class_="scroll", role="group", aria_label=name, tabindex="0")


def section(name: str, title: str, *content: str) -> tuple[str, str, Markup]:
    """(id, title, HTML)."""
    heading = element("h2", title, id=f"{name}-title")
    return name, title, element("section", heading, *content, id=name, aria_labelledby=f"{name}-title")


def page(title: str, sections: Sequence[tuple[str, str, Markup]], data: Any = None) -> str:
    """The whole file. data: for the error browser, as JSON that can't end its element."""
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none';"
        " form-action 'none'"
    )
    links = element("ul", *(element("li", element("a", name, href=f"#{id_}")) for id_, name, _ in sections))
    scripts = ""
    if data is not None:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        text = _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)
        scripts = f'<script type="application/json" id="data">{text}</script>\n'
    scripts += f"<script>{script}</script>\n"
    return (
        f'{START}<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"{element('title', title)}\n<style>{style}</style>\n</head>\n<body>\n"
        f"{element('header', element('h1', title), element('nav', links, aria_label='Sections'))}\n"
        f"<main>\n{''.join(content for *_, content in sections)}\n</main>\n{scripts}</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def require_own(path: str) -> None:
    """Raise InputError if there is something else than an earlier page at this path."""
    place = Path(path)
    try:
        if place.exists() and (not place.is_file() or not place.read_bytes().startswith(START.encode())):
            raise InputError(f"--out {path}: exists, and is not a page of plainloop; choose another name.")
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror or error}.") from None


def write(path: str, text: str) -> None:
    """Write a page. Raises InputError, also if it would replace another file."""
    require_own(path)
    try:
        write_atomically(Path(path).resolve(), text.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; choose another file to write.") from None
