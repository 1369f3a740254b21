"""The report in a headless Chromium: no console error, filters, search, keyboard, two runs, hostile text."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.chromium import AXE, chromium, is_there, write_many, write_scores, write_squad

from plainloop.trainer.cli import main

BIOME = Path(__file__).parent / "node_modules/.bin/biome"
pytestmark = pytest.mark.skipif(not is_there(), reason="chromium or chromedriver is not installed")
SCRIPT = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
HEBREW = "הנהר זורם צפונה אל הים התיכון."
CHINESE = "长江是亚洲最长的河流，全长约六千三百公里。"


def open_page(driver: Any, out: Path) -> None:
    driver.get(out.as_uri())
    assert driver.execute_script("return document.documentElement.dataset.ready") == "true"


def js(driver: Any, code: str, *arguments: Any) -> Any:
    return driver.execute_script(code, *arguments)


def count(driver: Any) -> int:
    text = js(driver, "return document.querySelector('[role=status]').textContent")
    return int(text.split()[0].replace(",", ""))


def detail(driver: Any) -> str:
    return str(js(driver, "return document.querySelector('.detail').textContent"))


def choose(driver: Any, label: str, text: str) -> None:
    """Choose the option that starts with this text in the select of this label, as a user does."""
    code = """
    const label = [...document.querySelectorAll('label')]
      .find(l => l.firstChild.textContent === arguments[0]);
    const select = label.querySelector('select');
    select.value = [...select.options].find(o => o.textContent.startsWith(arguments[1])).value;
    select.dispatchEvent(new Event('change', {bubbles: true}));"""
    js(driver, code, label, text)


def search(driver: Any, text: str) -> None:
    import time

    from selenium.webdriver.common.by import By

    box = driver.find_element(By.CSS_SELECTOR, "input[type=search]")
    box.clear()
    box.send_keys(text)
    time.sleep(0.5)  # the page waits for a pause in typing


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run and two runs on 7 questions: each outcome once, text that is markup, Hebrew, Chinese, 1 MB."""
    folder = tmp_path_factory.mktemp("pages")
    long = "x " * 500_000 + "the needle " + "y " * 50_000
    articles = {
        "article": [
            ("Ada built the old mill in 1820.", [
                ("right", "Who built it?", "Ada"), ("boundary", "When was it built?", "in 1820"),
                ("span", "What did she build?", "the old mill"), ("empty", "Why was it built?", ""),
            ]),
            (SCRIPT + " is a text", [("markup", f"What is {SCRIPT}?", "a text")]),
            (HEBREW, [("rtl", "לאן זורם הנהר?", "הים התיכון")]),
            (CHINESE, [("cjk", "长江有多长？", "六千三百公里")]),
            (long, [("long", "Where is it?", "needle")]),
        ]
    }  # fmt: skip
    data = write_squad(folder / "data.json", articles)
    first = {
        "right": "Ada", "boundary": "1820", "span": "Ada", "empty": "the mill", "markup": "",
        "long": "needle", "rtl": "הים התיכון", "cjk": "六千三百公里",
    }  # fmt: skip
    second = first | {"right": "1820", "markup": SCRIPT, "empty": ""}
    contexts = {i: c for c, asked in articles["article"] for i, *_ in asked}
    scores = []
    for name, texts in (("first", first), ("second", second)):
        odds = {i: -1.0 - k if t else 1.0 for k, (i, t) in enumerate(texts.items())}
        best = {i: [(t, contexts[i].find(t))] if t in contexts[i] and t else [] for i, t in texts.items()}
        scores.append(write_scores(folder / name, texts, odds, best))
    one, two = folder / "one.html", folder / "two.html"
    assert main(["report", scores[0], "--data", data, "--out", str(one)]) == 0
    assert main(["report", *scores, "--data", data, "--out", str(two), "--resamples", "200"]) == 0
    return one, two


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as window:
        yield window


def test_filters_search_and_outcomes(driver: Any, pages: tuple[Path, Path]) -> None:
    open_page(driver, pages[0])
    assert count(driver) == 8
    expected = {
        "right": 4,
        "boundary off": 1,
        "wrong span": 1,
        "should be empty": 1,
        "should not be empty": 1,
    }
    for name, number in expected.items():
        choose(driver, "outcome", name)
        assert count(driver) == number, name
    choose(driver, "outcome", "all")
    choose(driver, "question word", "when")
    assert count(driver) == 1 and "boundary off" in detail(driver)
    choose(driver, "question word", "all")
    search(driver, "OLD MILL")  # in the context of four questions
    assert count(driver) == 4
    search(driver, "长江")
    assert count(driver) == 1 and "长江有多长" in detail(driver)
    search(driver, "nothing has this")
    assert count(driver) == 0 and "No question fits" in detail(driver)
    search(driver, "")
    choose(driver, "sort", "surest mistakes")
    rows = js(driver, "return [...document.querySelectorAll('.row .note')].map(row => row.textContent)")
    assert [row.startswith("right") for row in rows] == [False] * 4 + [True] * 4
    assert driver.get_log("browser") == []


def test_marks_are_where_the_answers_are(driver: Any, pages: tuple[Path, Path]) -> None:
    open_page(driver, pages[0])
    choose(driver, "question word", "when")
    marks = (
        "return [...document.querySelectorAll('.detail .text mark')].map(m => [m.className, m.textContent])"
    )
    assert js(driver, marks) == [["gold", "in "], ["gold answer", "1820"]]
    choose(driver, "question word", "all")
    for text, gold in (("לאן", "הים התיכון"), ("长江", "六千三百公里")):
        search(driver, text)
        assert js(driver, marks) == [["gold answer", gold]]
    search(driver, "")
    direction = "return getComputedStyle(document.querySelector('.detail div.text')).direction"
    assert js(driver, direction) == "ltr"
    search(driver, "לאן")
    assert js(driver, direction) == "rtl"


def test_markup_in_data_is_shown_as_text(driver: Any, pages: tuple[Path, Path]) -> None:
    for page in pages:
        open_page(driver, page)
        search(driver, "window.broken")
        assert SCRIPT in detail(driver) and js(driver, "return window.broken") is None
        assert js(driver, "return document.querySelectorAll('img, .detail script').length") == 0
        assert driver.get_log("browser") == []


@pytest.mark.slow
def test_a_context_of_a_megabyte(driver: Any, pages: tuple[Path, Path]) -> None:
    """It is cut around the marks, and shown in full on request."""
    open_page(driver, pages[0])
    choose(driver, "question word", "where")
    assert len(detail(driver)) < 10_000
    assert js(driver, "return document.querySelector('.detail .text mark').textContent") == "needle"
    js(driver, "document.querySelector('.detail .text button').click()")
    assert len(detail(driver)) > 1_000_000


def test_keyboard(driver: Any, pages: tuple[Path, Path]) -> None:
    """Tab reaches the list; arrows, Home and End move in it; a screen reader is told where."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(driver, pages[0])
    box = driver.find_element(By.CSS_SELECTOR, ".list")
    driver.find_element(By.CSS_SELECTOR, "input[type=search]").send_keys(Keys.TAB * 6)
    assert driver.switch_to.active_element == box
    current = """
    const list = document.querySelector('.list');
    const row = document.getElementById(list.getAttribute('aria-activedescendant'));
    return [row.ariaPosInSet, row.ariaSelected, row.firstChild.textContent]"""
    for keys, place in ((Keys.ARROW_DOWN * 2, "3"), (Keys.ARROW_UP, "2"), (Keys.END, "8"), (Keys.HOME, "1")):
        box.send_keys(keys)
        position, selected, question = js(driver, current)
        assert (position, selected) == (place, "true") and question in detail(driver)
    box.send_keys(Keys.ENTER)
    part = driver.find_element(By.CSS_SELECTOR, ".detail")
    assert driver.switch_to.active_element == part
    part.send_keys(Keys.TAB)
    driver.switch_to.active_element.send_keys(Keys.TAB)
    driver.switch_to.active_element.send_keys(Keys.ENTER * 2)  # Next, which keeps the focus
    assert js(driver, current)[0] == "3"
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert driver.switch_to.active_element == box


def test_rows_follow_the_font_size(driver: Any, pages: tuple[Path, Path]) -> None:
    open_page(driver, pages[0])
    js(driver, "document.documentElement.style.fontSize = '32px'; dispatchEvent(new Event('resize'))")
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    tops = js(driver, "return [...document.querySelectorAll('.row')].map(r => [r.offsetTop, r.offsetHeight])")
    assert tops[1] == [128, 128] and tops[2][0] == 256


def test_two_runs_side_by_side(driver: Any, pages: tuple[Path, Path]) -> None:
    open_page(driver, pages[1])
    rows = js(driver, "return [...document.querySelectorAll('.row .note')].map(row => row.textContent)")
    assert all(("A right" in row) != ("B right" in row) for row in rows[:2]), rows  # disagreements first
    assert js(driver, "return document.querySelectorAll('.detail .runs > div').length") == 2
    boxes = js(
        driver, "return [...document.querySelectorAll('.runs > div')].map(d => d.getBoundingClientRect().top)"
    )
    assert boxes[0] == boxes[1]
    letters = "return [...document.querySelectorAll('.detail .text sup')].map(s => s.textContent).sort()"
    search(driver, "Who built it")
    assert js(driver, letters) == ["A", "B"]  # two answers at two places
    search(driver, "")
    choose(driver, "outcome of", "B")
    choose(driver, "outcome", "wrong span")
    assert count(driver) == 3 and "wrong span" in detail(driver)
    choose(driver, "outcome", "right")
    assert count(driver) == 4
    assert driver.get_log("browser") == []


@pytest.mark.slow
def test_twelve_thousand_questions(driver: Any, tmp_path: Path) -> None:
    """Only the rows in sight exist, at the top, in the middle and at the end."""
    data, first, second = write_many(tmp_path, 12_000)
    out = tmp_path / "many.html"
    arguments = ["report", first, second, "--data", data, "--out", str(out), "--resamples", "100"]
    assert main(arguments) == 0
    open_page(driver, out)
    assert count(driver) == 12_000
    for share in (0, 0.5, 1):
        code = "const l = document.querySelector('.list'); l.scrollTop = arguments[0] * l.scrollHeight;"
        js(driver, code, share)
        driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        places = js(driver, "return [...document.querySelectorAll('.row')].map(r => Number(r.ariaPosInSet))")
        assert 8 < len(places) < 60
        assert abs(places[len(places) // 2] - share * 12_000) < 60
    search(driver, "page 1199?")
    assert count(driver) == 10
    assert driver.get_log("browser") == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_accessibility(pages: tuple[Path, Path], width: int, dark: bool) -> None:
    """axe-core finds no violation; nothing is wider than the screen."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed (npm install --prefix tests/page)")
    with chromium(width, 844, dark=dark) as window:
        for page in pages:
            open_page(window, page)
            assert js(window, "return document.documentElement.scrollWidth <= innerWidth")
            js(window, AXE.read_text())
            found = window.execute_async_script(
                "const done = arguments[0]; axe.run().then(r => done([r.passes.length, r.violations.map(v =>"
                " [v.id, v.nodes.map(n => n.html.slice(0, 200))])]))"
            )
            assert found[0] > 20 and found[1] == [], json.dumps(found[1], indent=1)


def test_script_and_style_are_linted() -> None:
    if not BIOME.is_file() or not shutil.which("node"):
        pytest.skip("biome is not installed (npm install --prefix tests/page)")
    here = Path(__file__).parent
    files = [str(here.parents[1] / f"trainer/report/report.{kind}") for kind in ("js", "css")]
    command = [str(BIOME), "check", "--error-on-warnings", "--config-path", str(here), *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
