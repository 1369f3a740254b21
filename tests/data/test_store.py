import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.data.errors import InputError
from plainloop.data.store import FEATURES_VERSION, Writer, build, digest, wait_for

ARRAYS = {"length": np.array([2, 3], dtype=np.int32), "input_ids": np.arange(5, dtype=np.int32)}


def test_store_is_built_once_and_rows_are_slices(tmp_path: Path) -> None:
    calls = []

    def fill(writer: Writer) -> dict[str, Any]:
        calls.append(1)
        for part in (slice(0, 2), slice(2, None)):  # joined along the first axis
            writer.append({"input_ids": ARRAYS["input_ids"][part]})
        writer.append({"length": ARRAYS["length"]})
        return {"examples": 2}

    for _ in range(2):
        store = build(tmp_path / "cache/store", fill)
    assert len(calls) == 1 and len(store) == 2 and store.meta == {"examples": 2}
    assert list(store.row("input_ids", 1)) == [2, 3, 4]
    assert isinstance(store.arrays["input_ids"], np.memmap)
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_wait_for_returns_once_the_store_exists(tmp_path: Path) -> None:
    threading.Timer(
        0.3, lambda: build(tmp_path / "store", lambda writer: writer.append(ARRAYS) or {})
    ).start()
    assert len(wait_for(tmp_path / "store", poll_s=0.05)) == 2


def test_digest_depends_on_content_not_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    assert digest(tmp_path / "a", 1) == digest(tmp_path / "b", 1)
    assert digest(tmp_path / "a", 1) != digest(tmp_path / "a", 2)
    (tmp_path / "b").write_text("other")
    assert digest(tmp_path / "a", 1) != digest(tmp_path / "b", 1)


def test_unwritable_cache_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="data.cache_dir"):
        build(tmp_path / "file/store", lambda writer: writer.append(ARRAYS) or {})


# The arrays of a fixed sample for each FEATURES_VERSION. If this fails, what the readers or the tokenisation
# produce has changed: raise FEATURES_VERSION in data/store.py and add the new digest here.
DIGESTS = {"span": {1: "61e832016df787db"}, "text": {2: "1fd521974b8eb76a"}}
CONTEXT = (
    "Ada Holm built the stone bridge of Fernbay in 1702. Few of the letters have survived. It was moved."
)


def test_changed_features_need_a_new_version(tmp_path: Path) -> None:
    """Real readers and tokenisation, with a tokenizer that is kept in the repository."""
    from plainloop.data.readers.causalqa import TextOptions, read_text, row_of_each_target
    from plainloop.data.readers.examples import read_examples
    from plainloop.data.span_features import span_windows
    from plainloop.data.text_features import pair_rows
    from plainloop.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(Path(__file__).parents[1] / "fixtures/checkpoint_format_2/step-00000003"))
    answers = [{"text": "Ada Holm", "answer_start": 0}, {"text": "the stone bridge", "answer_start": 15}]
    qas = [
        {"id": "a", "question": "Who built the bridge?", "answers": answers[:1]},
        {"id": "b", "question": "What did Ada Holm build?", "answers": answers[1:]},
        {"id": "c", "question": "Who moved the mill?", "answers": []},
    ]
    (tmp_path / "squad.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": " " + CONTEXT[1:], "qas": qas[1:]}]}]})
    )
    rows = [{"id": "d", "query": "Who built it?", "passage": CONTEXT, "answer": ["Ada Holm"]}]
    rows += [{**rows[0], "id": "e", "answer": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "causal.csv").write_text(
        "question_processed,context_processed,answer,answer_processed\n"
        f'why was it moved ?,"{CONTEXT.lower()}",of ice\tof frost,ice\nwhy ?,,None,None\n'
    )
    examples = read_examples([str(tmp_path / name) for name in ("squad.json", "rows.jsonl")])
    spans = span_windows(examples, tokenizer, max_length=64, stride=16)
    texts = [
        pair_rows(
            row_of_each_target(read_text([str(tmp_path / name)], TextOptions(target=target, format=form))),
            tokenizer, max_source_length=64, max_target_length=4, stride=stride,
        )
        for name, stride, target, form in (
            ("squad.json", 8, "first", "t5"), ("squad.json", None, "most_frequent", "unifiedqa"),
            ("causal.csv", None, "each", "t5"),
        )
    ]  # fmt: skip
    found = {}
    for kind, parts in (("span", [spans]), ("text", texts)):
        running = hashlib.sha256()
        for arrays in parts:
            for name in sorted(arrays):
                running.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
                running.update(np.ascontiguousarray(arrays[name]).tobytes())
        found[kind] = running.hexdigest()[:16]
    assert len(spans["length"]) > 3 and len(texts[0]["length"]) > 3
    assert {kind: DIGESTS[kind][FEATURES_VERSION[kind]] for kind in found} == found


def test_arrays_of_another_kind_are_refused(tmp_path: Path) -> None:
    for first, second in ((np.arange(2), np.arange(2.0)), (np.ones((2, 3)), np.ones((2, 2)))):

        def fill(writer: Writer, parts: Any = (first, second)) -> dict[str, Any]:
            for part in parts:
                writer.append({"x": part})
            return {}

        with pytest.raises(InputError, match="'x' has dtype"):
            build(tmp_path / "store", fill)
        assert list(tmp_path.iterdir()) == []
