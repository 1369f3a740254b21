"""`plainloop fetch`: on a login node, download model, tokenizer and data for nodes without network.

OUT/models/NAME/      what from_pretrained reads
OUT/data/NAME/SPLIT/  a data set from the Hub, one folder per split, as datasets.save_to_disk writes it
OUT/data/causalqa/    the CSV files of a downloaded archive

Each folder is completed by one atomic rename and has a manifest.json: source, revision, sizes, SHA-256.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from plainloop.data.readers.examples import Examples
from plainloop.trainer.config.command_options import FetchConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import fault_of, read_source, sha256, write_manifest

TOKENIZER_AND_CONFIG = ("*.json", "*.model", "*.txt", "LICENSE*", "README.md")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first pattern that matches
DATA_FILES = ("*.parquet", "*.arrow", "*.json", "*.jsonl", "*.json.gz", "*.csv", "*.zst", "README.md")


def fetch(config: FetchConfig) -> None:
    """Fetch everything requested; what is already on disk is kept. Raises InputError."""
    try:
        made = _fetch_all(config, Path(config.out_dir))
    except (IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError) as error:
        raise InputError(f"{error.filename}: {error.strerror}; choose another file or --out_dir.") from None
    print("\n".join(made))


def _fetch_all(config: FetchConfig, out: Path) -> list[str]:
    if not (config.model or config.dataset or config.causalqa):
        raise InputError("fetch needs --model NAME, --dataset NAME or --causalqa ARCHIVE (or several).")
    made: list[str] = []
    if config.causalqa:
        made += _causalqa(Path(config.causalqa), out / "data/causalqa")
    if config.model:
        name = config.model.rpartition("/")[2]
        made += _from_hub("model", config.model, config.revision, out / "models" / name, _model)
    if config.dataset:
        name = config.dataset.rpartition("/")[2]
        into = out / "data" / name

        def convert(folder: Path) -> dict[str, Any]:
            return _splits(folder, config.dataset_config)

        made += _from_hub("dataset", config.dataset, config.dataset_revision, into, convert)
    return made


def _from_hub(
    kind: str, name: str, revision: str | None, final: Path, check: Callable[[Path], dict[str, Any]]
) -> list[str]:
    """Download the files of one commit. check() validates or converts them, and returns what they hold, for
    the manifest; or raises InputError.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        info = HfApi(endpoint=constants.ENDPOINT).repo_info(name, repo_type=kind, revision=revision)
        source = {"kind": kind, "name": name, "revision": info.sha, "hub": constants.ENDPOINT}
        if final.exists():
            return _keep_existing(final, source)
        wanted = _wanted([sibling.rfilename for sibling in getattr(info, "siblings", None) or []], kind)
        temporary = final.with_name(f".tmp-{final.name}-{info.sha}")  # an interrupted download resumes here
        raw = temporary / ".raw" if kind == "dataset" else temporary
        print(f"fetch: {kind} {name} at {str(info.sha)[:12]}, {len(wanted)} files -> {final}", flush=True)
        raw.mkdir(parents=True, exist_ok=True)
        snapshot_download(
            name,
            repo_type=kind,
            revision=info.sha,
            local_dir=raw,
            allow_patterns=wanted,
            endpoint=constants.ENDPOINT,
        )
    except errors.GatedRepoError:
        raise InputError(
            f"hub: {name} is gated: accept its terms on its page, then run `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"hub: {kind} {name} has no revision {revision}.") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"hub: there is no {kind} {name}; if it is private, run `hf auth login` first."
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"hub: {name}: {' '.join(str(error).split())[:200]}") from None
    except errors.OfflineModeIsEnabled:
        raise InputError("fetch needs the network, but HF_HUB_OFFLINE is set: unset it.") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"hub: could not get {name} from {constants.ENDPOINT} ({reason}). Run fetch where there is"
            " internet, such as a login node; the same command resumes an interrupted download."
        ) from None
    return _publish(temporary, final, source | check(temporary))


def _wanted(names: list[str], kind: str) -> list[str]:
    """Choose the files to download: what from_pretrained reads (weights in one format), or the data files."""
    if kind == "dataset":
        found = [n for n in names if any(fnmatch(PurePosixPath(n).name, pattern) for pattern in DATA_FILES)]
        if not any(not n.endswith("README.md") for n in found):
            raise InputError("hub: this data set has no Parquet, JSON or CSV files, only a loading script.")
        return found
    top = [name for name in names if "/" not in name]
    weights = next((w for p in WEIGHTS if (w := [n for n in top if fnmatch(n, p)])), None)
    if weights is None:
        raise InputError("hub: this model has no PyTorch weights (model.safetensors or pytorch_model.bin).")
    return weights + [n for n in top if any(fnmatch(n, pattern) for pattern in TOKENIZER_AND_CONFIG)]


def _model(folder: Path) -> dict[str, Any]:
    """Check here, not on a compute node, that config and tokenizer can be loaded."""
    from plainloop.models.load import load_config, load_tokenizer

    shutil.rmtree(folder / ".cache", ignore_errors=True)  # left by the download
    config = load_config(str(folder))
    load_tokenizer(str(folder), fast=not config.is_encoder_decoder)
    return {"model_type": config.model_type}


def _splits(folder: Path, name: str | None) -> dict[str, Any]:
    """Convert a data set's files to one folder per split with the `datasets` library, without network. Return
    the rows and columns of each.
    """
    import datasets

    datasets.disable_progress_bars()
    raw, cache = folder / ".raw", folder / ".cache"
    for rest in folder.iterdir():  # left by an interrupted attempt, perhaps with another configuration
        if rest.is_file():
            rest.unlink()
        elif rest != raw:
            shutil.rmtree(rest)
    try:
        found = datasets.load_dataset(str(raw), name, cache_dir=str(cache))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        hint = " (--dataset_config)" if "config" in str(error).lower() else ""
        raise InputError(
            f"{folder}: datasets can't read this{hint}: {' '.join(str(error).split())[:300]}"
        ) from None
    for split, rows in found.items():
        rows.save_to_disk(str(folder / str(split)))
    splits = {str(split): {"rows": len(r), "columns": r.column_names} for split, r in found.items()}
    del found
    shutil.rmtree(raw)
    shutil.rmtree(cache)
    return {"config": name, "splits": splits}


def _causalqa(archive: Path, final: Path) -> list[str]:
    """Extract the CSV files of a zip into one folder; their names give data set, part and split."""
    source = {"kind": "causalqa", "name": archive.name, "revision": None}
    try:
        source["revision"] = sha256(archive)
        if final.exists():
            return _keep_existing(final, source)
        temporary = final.with_name(f".tmp-{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with zipfile.ZipFile(archive) as opened:
            members = [m for m in opened.infolist() if _is_csv(m.filename)]
            names = [PurePosixPath(m.filename).name for m in members]
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(f"{archive}: contains {doubled[0]} more than once; repack it.")
            if not any(fnmatch(name, "*_train_*_split.csv") for name in names):
                raise InputError(f"{archive}: no *_train_*_split.csv in it; is this the CausalQA archive?")
            size, free = sum(m.file_size for m in members), shutil.disk_usage(temporary).free
            if size > free:
                raise InputError(f"{archive}: {size / 1e9:.1f} GB unpacked, but {free / 1e9:.1f} GB free.")
            for member, name in zip(members, names, strict=True):
                with opened.open(member) as compressed, open(temporary / name, "xb") as stream:
                    shutil.copyfileobj(compressed, stream)
    # RuntimeError: encrypted; NotImplementedError: a compression method that Python does not support.
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive}: not a readable zip file ({error}). Is the download complete?") from None
    except FileNotFoundError:
        raise InputError(f"{archive}: no such file.") from None
    return _publish(temporary, final, source)


def _is_csv(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".csv" and "__MACOSX" not in path.parts and not path.name.startswith(".")


def _keep_existing(final: Path, source: dict[str, Any]) -> list[str]:
    """Keep an existing folder. Raises InputError if it is not what was asked for: the user decides."""
    there = read_source(final)
    if there is None:
        raise InputError(f"{final}: was not made by fetch; choose another --out_dir.")
    if any(there.get(key) != source[key] for key in ("kind", "name", "revision")):
        raise InputError(
            f"{final}: has {there.get('name')} at {str(there.get('revision'))[:12]}, not {source['name']}"
            f" at {str(source['revision'])[:12]}; choose another --out_dir, or remove it."
        )
    if fault := fault_of(final):
        raise InputError(f"{final}: {fault}; remove the folder and fetch again.")
    return [f"{final}: already fetched, and all files are unchanged", *_hints(final, source["kind"])]


def _publish(temporary: Path, final: Path, source: dict[str, Any]) -> list[str]:
    write_manifest(temporary, {**source, "fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    os.rename(temporary, final)
    size = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
    return [f"{final}: {size / 1e6:.1f} MB", *_hints(final, source["kind"])]


def _hints(final: Path, kind: str) -> list[str]:
    """Return lines that show which options take the folder."""
    if kind == "model":
        return [f"  --model.path {final}"]
    if kind == "causalqa":
        return [f"  --data.train {final} --data.dev {final} --text.dataset NAME"]
    lines = []
    for split in sorted(path for path in final.iterdir() if path.is_dir()):
        try:
            count = sum(1 for _ in Examples([str(split)]))
            lines.append(f"  {split}: {count} questions (--data.train, --data.dev)")
        except InputError as error:
            lines.append(f"  WARNING: {split}: can't be used for training: {str(error).splitlines()[0]}")
    return lines
