"""Run by test_resume.py: `plainloop train` that records which rows this rank collates in each step."""

import json
import os
import sys
from typing import Any

from plainloop.data import loader
from plainloop.trainer.cli import main_of_process

record = open(os.environ["RECORD"] + os.environ.get("RANK", "0"), "a")
get_item = loader.Steps.__getitem__


def noting(self: loader.Steps, step: int) -> Any:
    collate, rows = self.collate, []
    self.collate = lambda chosen: rows.extend(map(int, chosen)) or collate(chosen)  # type: ignore[func-returns-value]
    try:
        return get_item(self, step)
    finally:
        self.collate = collate
        record.write(json.dumps([step, rows]) + "\n")
        record.flush()


loader.Steps.__getitem__ = noting  # type: ignore[method-assign]
main_of_process(["train", *sys.argv[1:]])
