import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.data.errors import InputError
from plainloop.data.store import build, digest, wait_for

ARRAYS = {"length": np.array([2, 3], dtype=np.int32), "input_ids": np.arange(5, dtype=np.int32)}


def test_store_is_built_once_and_rows_are_slices(tmp_path: Path) -> None:
    calls = []

    def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        calls.append(1)
        return ARRAYS, {"examples": 2}

    for _ in range(2):
        store = build(tmp_path / "cache/store", make)
    assert len(calls) == 1 and len(store) == 2 and store.meta == {"examples": 2}
    assert list(store.row("input_ids", 1)) == [2, 3, 4]
    assert isinstance(store.arrays["input_ids"], np.memmap)
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_wait_for_returns_once_the_store_exists(tmp_path: Path) -> None:
    threading.Timer(0.3, lambda: build(tmp_path / "store", lambda: (ARRAYS, {}))).start()
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
        build(tmp_path / "file/store", lambda: (ARRAYS, {}))
