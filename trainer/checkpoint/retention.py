"""Which checkpoints stay, and what of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from plainloop.trainer.checkpoint.folder import PREFIX, holds_optimizer
from plainloop.trainer.run_folder.files import MANIFEST, sweep, sync, write_atomically
from plainloop.trainer.run_folder.tensors import has_plain_weights

DOOMED = ".tmp-delete-"


def drop_optimizer(path: Path) -> None:
    """Rank 0 only. Delete the optimizer state, and say so in the manifest first. Raises OSError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        names = [name for name in manifest if holds_optimizer(name)]
    except (ValueError, TypeError):
        return  # it is damaged, which verify will say
    if not has_plain_weights(manifest):
        return  # shards saved before this checkpoint was the best: they are its only weights
    if any(manifest[name] is not None for name in names):
        content = json.dumps({**manifest, **dict.fromkeys(names)}, indent=1)
        write_atomically(path / MANIFEST, content, durable=True)
        sync(path)
    for name in names:
        (path / name).unlink(missing_ok=True)


def retain(folder: Path, *, keep_last: int, best_step: int | None, keep_optimizer: bool = True) -> None:
    """Rank 0 only. Delete all but the last K (by step) and the best. keep_optimizer: whether the best keeps
    its optimizer state when it is not among the last K.
    """
    old = sorted(folder.glob(f"{PREFIX}*"))[:-keep_last]
    best = folder / f"{PREFIX}{best_step or -1:08d}"
    for path in old:
        if path != best:
            doomed = path.with_name(f"{DOOMED}{path.name}")
            os.rename(path, doomed)  # rename first: a kill during deletion leaves no partial checkpoint
    sweep(folder, DOOMED)  # a save may be in progress in another temporary folder
    if best in old and not keep_optimizer:  # last, since it writes, for which a full disk has room only now
        drop_optimizer(best)
