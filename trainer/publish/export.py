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
from plainloop.models import adapters
from plainloop.models.load import save_network
from plainloop.models.onnx_spans import write_onnx
from plainloop.trainer.config.trained_options import ExportConfig
from plainloop.trainer.errors import InputError, RunError
from plainloop.trainer.publish.model_card import model_card
from plainloop.trainer.run_folder.files import MANIFEST, make_durable, write_manifest
from plainloop.trainer.run_folder.plain_weights import save_tensors, write_plain
from plainloop.trainer.run_folder.tensors import SHARD, has_plain_weights, open_shards
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
    adapted = (source / adapters.CONFIG_FILE).is_file()
    if config.merge and not adapted:
        raise InputError("--merge: this model has no adapters; leave it out.")
    merge = config.merge or (adapted and config.onnx)
    listed = [source / name for name in (*read_manifest(source), calibration_file.NAME)]
    for file in filter(Path.is_file, listed):
        weights = (config.onnx or merge) and "model" in file.name and "safetensors" in file.name
        of_adapters = merge and file.name == adapters.CONFIG_FILE
        if not (file.name in OF_TRAINING or SHARD.fullmatch(file.name) or weights or of_adapters):
            shutil.copyfile(file, folder / file.name)
    if adapted and not merge and not (source / adapters.WEIGHTS_FILE).is_file():
        trained_weights = open_shards(source)
        assert trained_weights is not None
        held = trained_weights.below("weights/network.")
        save_tensors(
            {adapters.peft_name(n): held.whole(n) for n in held.places}, folder / adapters.WEIGHTS_FILE
        )
    if not (adapted or config.onnx or has_plain_weights(read_manifest(source))):
        write_plain(source, folder)
    recorded = recorded_in(str(source))
    options = {
        "config": trained,
        "counts": recorded.get("counts"),
        "exported_from": weights_of(source),
        "versions": versions(),
    }
    if merge:
        options["config"] = {**trained, "peft": {}}
        if not config.onnx:
            _merge(folder, source, config.base)
    elif adapted:
        options["base"] = recorded["base"]
    (folder / OPTIONS_FILE).write_text(json.dumps(options, indent=1), encoding="utf-8")
    if config.onnx:
        _onnx(folder, source, config.base)
    before, after = weights_of(source), weights_of(folder)
    if (folder / calibration_file.NAME).is_file() and before != after:
        calibration_file.move(folder / calibration_file.NAME, before, after)
    write_manifest(
        folder, {"kind": "export", "weights": weights_of(source)}, without=(CARD, calibration_file.NAME)
    )
    verified, exact = "", not (merge or config.onnx)
    if files:
        verified = verify(str(source), str(folder), files, config.base, exact=exact)
        say(verified)
    card = model_card(folder, source, trained, config, verified)
    (folder / CARD).write_text(card, encoding="utf-8")
    make_durable(folder)


def _merge(folder: Path, source: Path, base: str | None) -> None:
    """Write the model with its adapters added to the weights of their base."""
    model = Predictor.from_run(str(source), base=base, device="cpu", precision="fp32").model
    adapters.merge_adapters(model.network)
    save_network(model.network, folder, model.state_dict())


def read_manifest(source: Path) -> list[str]:
    return list(json.loads((source / MANIFEST).read_text(encoding="utf-8")))


def _onnx(folder: Path, source: Path, base: str | None) -> None:
    predictor = Predictor.from_run(str(source), base=base, device="cpu", precision="fp32")
    if predictor.text:
        raise InputError("--onnx is for models of task span; a text model needs a decoding loop besides.")
    if adapters.has_adapters(predictor.model):
        adapters.merge_adapters(predictor.model.network)
    kept = (folder / "config.json").read_bytes()
    write_onnx(predictor.model, predictor.sample_inputs(), folder)
    (folder / "config.json").write_bytes(kept)  # the exporter writes one of its own


def verify(before: str, after: str, files: list[str], base: str | None = None, *, exact: bool = True) -> str:
    """Answer the questions of these files with both models, in fp32. Return what was compared. Raises
    RunError if any answer differs. exact: scores must be the same too.
    """
    device = "cpu" if is_onnx(after) else "auto"
    models = []
    for model in (before, after):
        own = base if (Path(model) / adapters.CONFIG_FILE).is_file() else None
        models.append(Predictor.from_run(model, precision="fp32", device=device, base=own))
    read = models[0].read(files)
    processes = tokenising_processes(models[0].config)
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
