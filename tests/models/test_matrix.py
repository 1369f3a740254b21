"""Every model of transformers' tables of question answering and text to text, tiny and random."""

from pathlib import Path

import pytest
from helpers.matrix import NOT_INVARIANT, NOT_TEXT, check, families
from helpers.models_page import PAGE, page

from plainloop.models.families import REFUSED

# Those that once failed, and the ones that people use; the others are slow together.
ALWAYS = {"modernbert", "eurobert", "splinter", "longformer", "mpnet", "big_bird", "gptj", "qwen3_next"}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        pytest.param(kind, text, marks=() if kind in ALWAYS else pytest.mark.slow, id=f"{kind}-{text}")
        for kind, text in families()
    ],
)
def test_family(kind: str, text: bool, tmp_path: Path) -> None:
    found = check(kind, text, tmp_path)
    if "refused" in found:
        assert kind in REFUSED or (text and kind in NOT_TEXT)
        return
    assert found["resumed"] and found["reloaded"] == 0
    if kind in NOT_INVARIANT:
        assert found["padding"] > 1e-4  # else it may leave the list
    else:
        assert found["padding"] < 1e-4 and found["gradient"] < 1e-4


def test_the_page_lists_every_family() -> None:
    """The rows are those that `python tests/helpers/matrix.py` prints; the text around them is the same."""
    text = (ROOT / "docs/models.md").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("| ")]
    empty = page({}).splitlines()
    assert [line for line in lines if line] == [line for line in empty if line and not line.startswith("| ")]
    assert "{" not in text and PAGE.split("\n")[0] in text
    for kind, is_text in families():
        section = text.partition("## Text task")[2 if is_text else 0]
        assert f"| {kind} |" in section or f"| {kind}{' (text)' if is_text else ''} |" in text, kind
