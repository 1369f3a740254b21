"""`plainloop export`: a trained model as a folder to use and to publish, without what only training needs.

OUT/model.safetensors, config.json, tokenizer ...   what from_pretrained reads
OUT/model.onnx, model.onnx.data                     with --onnx, instead of model.safetensors
OUT/plainloop.json                                  the options of the run, which predict and evaluate read
OUT/calibration.json                                if there was one
OUT/README.md                                       the model card, to be completed
OUT/manifest.json                                   size and SHA-256 of what can not be edited
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from plainloop.data.readers.files import find_files
from plainloop.models.onnx_spans import write_onnx
from plainloop.trainer.config.trained_options import ExportConfig
from plainloop.trainer.errors import InputError, RunError
from plainloop.trainer.publish.model_card import model_card
from plainloop.trainer.run_folder.files import MANIFEST, write_manifest
from plainloop.trainer.trained import calibration_file
from plainloop.trainer.trained.model_folder import (
    OPTIONS_FILE,
    checkpoint_path,
    is_onnx,
    recorded_in,
    trained_with,
)
from plainloop.trainer.trained.predictor import Predictor, tokenising_processes
from plainloop.trainer.trained.provenance import versions, weights_of

CARD = "README.md"
OF_TRAINING = ("optimizer.safetensors", "state.json", MANIFEST)
MAX_ONNX_DIFFERENCE = 1e-2  # of a score: the sum of two logits in fp32


def export(config: ExportConfig) -> None:
    """Write the folder, by one atomic rename. Raises InputError; RunError if --verify finds a difference."""
    if not config.run or not config.out:
        raise InputError(
            "export needs a run folder and a folder for the model: plainloop export RUN --out DIR."
        )
    out, source = Path(config.out), Path(checkpoint_path(config.run))
    trained = trained_with(str(source))
    if not trained or not (source / "state.json").is_file():
        raise InputError(f"{config.run}: not a run folder or a checkpoint of plainloop: no state.json in it.")
    if out.exists():
        raise InputError(f"--out {out}: exists; remove it or choose another folder.")
    files = find_files(config.verify) if config.verify else []
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    for left in out.parent.glob(f".tmp-{out.name}-*"):  # by a killed export
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        try:
            _fill(temporary, source, trained, config, files)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}.") from None
    say(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB, from {source}")
    say(f"complete {out / CARD} before you publish: licence, languages, intended use")


def _fill(
    folder: Path, source: Path, trained: dict[str, Any], config: ExportConfig, files: list[str]
) -> None:
    if (source / calibration_file.NAME).is_file():
        calibration_file.read(source / calibration_file.NAME, weights_of(source))
    listed = [source / name for name in (*read_manifest(source), calibration_file.NAME)]
    for file in filter(Path.is_file, listed):
        weights = config.onnx and file.name.startswith("model") and "safetensors" in file.name
        if file.name not in OF_TRAINING and not weights:
            shutil.copyfile(file, folder / file.name)
    counts = recorded_in(str(source)).get("counts")
    options = {
        "config": trained,
        "counts": counts,
        "exported_from": weights_of(source),
        "versions": versions(),
    }
    (folder / OPTIONS_FILE).write_text(json.dumps(options, indent=1), encoding="utf-8")
    if config.onnx:
        _onnx(folder, source)
        if (folder / calibration_file.NAME).is_file():
            calibration_file.move(folder / calibration_file.NAME, weights_of(source), weights_of(folder))
    write_manifest(
        folder, {"kind": "export", "weights": weights_of(source)}, without=(CARD, calibration_file.NAME)
    )
    verified = verify(str(source), str(folder), files) if files else ""
    if verified:
        say(verified)
    card = model_card(folder, source, trained, config, verified)
    (folder / CARD).write_text(card, encoding="utf-8")


def read_manifest(source: Path) -> list[str]:
    return list(json.loads((source / MANIFEST).read_text(encoding="utf-8")))


def _onnx(folder: Path, source: Path) -> None:
    predictor = Predictor.from_run(str(source), device="cpu", precision="fp32")
    if predictor.text:
        raise InputError("--onnx is for models of task span; a text model needs a decoding loop besides.")
    kept = (folder / "config.json").read_bytes()
    write_onnx(predictor.model, predictor.sample_inputs(), folder)
    (folder / "config.json").write_bytes(kept)  # the exporter writes one of its own


def verify(before: str, after: str, files: list[str]) -> str:
    """Answer the questions of these files with both models, in fp32. Return what was compared. Raises
    RunError if any answer differs.
    """
    device = "cpu" if is_onnx(after) else "auto"
    models = [Predictor.from_run(model, precision="fp32", device=device) for model in (before, after)]
    read = models[0].read(files)
    processes = tokenising_processes(models[0].config)
    exact = not is_onnx(after)
    count, largest, differing = 0, 0.0, []
    for (example, a), (_, b) in zip(*(m.stream(read, processes=processes) for m in models), strict=True):
        count += 1
        distance = abs((a.get("score") or 0.0) - (b.get("score") or 0.0))
        largest = max(largest, distance)
        same = a == b if exact else _place(a) == _place(b) and distance <= MAX_ONNX_DIFFERENCE
        if not same:
            differing.append(example.id)
    if differing:
        raise RunError(
            f"--verify: the export answers {len(differing)} of {count} questions differently, first id"
            f" {differing[0]!r}; nothing was written."
        )
    scores = "the same scores" if exact else f"scores within {largest:.1e}"
    return f"{count} questions: the same answers as the checkpoint, {scores}"


def _place(answer: dict[str, Any]) -> tuple[Any, ...]:
    return answer["answer"], answer.get("start"), answer.get("end")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
