"""docs/models.md, from the results of matrix.py."""

from __future__ import annotations

import textwrap
from typing import Any

import transformers
from helpers.matrix import NOT_INVARIANT, NOT_SHARDED, NOT_TEXT

PAGE = """\
# Models

`--model.path` takes any text model that transformers can load with a question-answering head (or, where it
has none, a token-classification head with two labels, start and end), and for task text any text-to-text
model. The table is the result of `python tests/helpers/matrix.py`, which tries every entry of the tables of
transformers {version} with a tiny model of random weights; `tests/models/test_matrix.py` asserts the same.

Each family that works was trained for three steps and evaluated; one micro-batch and two gave the same
gradient; padding did not change the logits of the other positions; a run that was continued from a
checkpoint ended with the same bits; and the class in the table loaded the checkpoint with equal logits.

- A checkpoint of ours is loaded by `AutoModelForQuestionAnswering.from_pretrained(folder)`; for a class
  named `...ForTokenClassification` by `AutoModelForTokenClassification`, whose two logits of a token are its
  scores as start and as end; for task text by `AutoModelForSeq2SeqLM`.
- Without a CLS token, the score of "no answer" is read at the first token. In a decoder-only model the first
  token sees nothing of the question, so that this score can't depend on it.
- BigBird and BigBird-Pegasus use full attention: which sparse blocks they use depends on the batches before.
- Switch Transformers train in one process only: an expert has no gradient on the ranks that did not use it.
- No layer is dropped at random (`layerdrop` in a config is set to 0): the ranks would drop different ones.
- `--parallel fsdp` reads the weights as they are in the files. It refuses the families whose weights
  transformers renames or joins while loading:
  {not_sharded}
- `--model.attention eager` or `flash_attention_2` chooses another implementation of attention, where the
  family has one.

## Span task

| `model_type` | class | longest input | padding |
| --- | --- | --- | --- |
{span}

## Text task

| `model_type` | class | longest source | padding |
| --- | --- | --- | --- |
{text}

## Refused

| `model_type` | because it |
| --- | --- |
{refused}
"""


def page(results: dict[tuple[str, bool], dict[str, Any]]) -> str:
    """docs/models.md."""
    rows: dict[str, list[str]] = {"span": [], "text": [], "refused": []}
    for (kind, text), found in results.items():
        if "refused" in found:
            reason = "takes audio, not text" if kind in NOT_TEXT and text else found["refused"]
            rows["refused"].append(f"| {kind}{' (text)' if text else ''} | {reason} |")
            continue
        limit = {64: "as its config says", 2**31: "no limit"}.get(found["limit"])
        limit = limit or f"{64 - found['limit']} less than its config says"
        padding = NOT_INVARIANT.get(kind, "no effect")
        rows["text" if text else "span"].append(f"| {kind} | {found['class']} | {limit} | {padding} |")
    parts = {name: "\n".join(lines) for name, lines in rows.items()}
    listed = "\n  ".join(textwrap.wrap(", ".join(sorted(NOT_SHARDED)) + ".", 100))
    return PAGE.format(version=transformers.__version__, not_sharded=listed, **parts)
