"""plainloop fetch with the real hub client and a local hub; CausalQA's archive; then training offline."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import hub as local_hub

from plainloop.data.errors import InputError
from plainloop.trainer.cli import main
from plainloop.trainer.commands.fetch import fetch
from plainloop.trainer.config.command_options import FetchConfig
from plainloop.trainer.run_folder.files import fault_of, read_source


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path, squad_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub with user/tiny, an encoder with extra unwanted files, and user/squad, two Parquet splits."""
    from huggingface_hub import constants

    shutil.copytree(tiny_model, tmp_path / "hub/model")
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"):
        (tmp_path / "hub/model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hub/model" / name).write_text("unwanted")
    _write_parquet(squad_file, tmp_path / "hub/squad")
    server = local_hub.Hub(
        {"model user/tiny": tmp_path / "hub/model", "dataset user/squad": tmp_path / "hub/squad"}
    )
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


def _write_parquet(squad_file: Path, folder: Path) -> None:
    from datasets import Dataset

    (folder / "data").mkdir(parents=True)
    rows = []
    for article in json.loads(squad_file.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {key: [a[key] for a in qa["answers"]] for key in ("text", "answer_start")}
                rows.append({**qa, "context": paragraph["context"], "answers": answers})
    Dataset.from_list(rows[:100]).to_parquet(folder / "data/train-00000-of-00001.parquet")
    Dataset.from_list(rows[100:]).to_parquet(folder / "data/validation-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: squad_v2\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: validation\n    path: data/validation-*\n---\n"
    )


def test_model_and_data(hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    line = ["fetch", "--out_dir", str(out), "--model", "user/tiny", "--dataset", "user/squad"]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert f"--model.path {out}/models/tiny" in told and f"{out}/data/squad/train: 100 questions" in told
    model = out / "models/tiny"
    assert {path.name for path in model.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
        "manifest.json",
    }  # fmt: skip
    source = read_source(model)
    assert source and (source["name"], source["revision"]) == ("user/tiny", local_hub.COMMIT)
    assert fault_of(model) is None and fault_of(out / "data/squad") is None
    got = (read_source(out / "data/squad") or {})["splits"]
    assert (got["train"]["rows"], "question" in got["train"]["columns"]) == (100, True)
    assert {path.name for path in out.glob("*/.*")} == set()  # no temporary folder is left

    asked = len(hub.requests)
    assert main(line) == 0 and "already fetched" in capsys.readouterr().out
    assert not any("/resolve/" in request for request in hub.requests[asked:])  # nothing is downloaded twice
    (model / "vocab.txt").write_text("x")
    assert main(line) == 2 and "vocab.txt has 1 bytes, expected" in capsys.readouterr().err
    assert (model / "vocab.txt").read_text() == "x"


def test_retry_after_failed_and_killed_fetches(hub: Any, tmp_path: Path) -> None:
    """After a nonexistent dataset config, and with leftovers of another revision."""
    config = FetchConfig(out_dir=str(tmp_path / "out"), dataset="user/squad", dataset_config="x")
    (tmp_path / "out/data/.tmp-squad-other").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(InputError, match=r"datasets can't read this \(--dataset_config\)"):
            fetch(config)
    for kind in (
        "data/.tmp-squad",
        "models/.tmp-tiny",
    ):  # killed just before the final rename
        left = tmp_path / f"out/{kind}-{local_hub.COMMIT}"
        left.mkdir(parents=True, exist_ok=True)
        (left / "manifest.json").write_text("{}")
    fetch(FetchConfig(out_dir=str(tmp_path / "out"), dataset="user/squad", model="user/tiny"))
    assert fault_of(tmp_path / "out/models/tiny") is None
    names = {path.name for path in (tmp_path / "out/data/squad").iterdir()}
    assert names == {"train", "validation", "manifest.json"}


def test_interrupted_download_resumes(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between the hub client's retries
    config = FetchConfig(out_dir=str(tmp_path / "out"), model="user/tiny")
    hub.fail_after = 2
    with pytest.raises(InputError, match="could not get user/tiny from"):
        fetch(config)
    assert not (tmp_path / "out/models/tiny").exists()
    hub.fail_after, asked = None, len(hub.requests)
    fetch(config)
    assert fault_of(tmp_path / "out/models/tiny") is None
    loaded = [request for request in hub.requests[asked:] if request.startswith("GET /user/tiny/resolve")]
    assert len(loaded) < 5  # not all five files again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "user/other"}, "there is no model user/other"),
        ({"model": "user/tiny", "revision": "v9"}, "has no revision v9"),
        ({"model": "a/b/c"}, "hub: a/b/c: "),
        ({"dataset": "user/other"}, "there is no dataset user/other"),
        ({"dataset": "user/squad", "dataset_config": "x"}, r"datasets can't read this \(--dataset_config\)"),
        ({}, "fetch needs --model NAME"),
    ],
)
def test_fetch_errors(changes: dict[str, str], message: str, hub: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fetch(FetchConfig(out_dir=str(tmp_path / "out"), **changes))


def test_without_network(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    config = FetchConfig(out_dir=str(tmp_path / "out"), model="user/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="Run fetch where there is internet"):
        fetch(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set: unset it"):
        fetch(config)


ROWS = "question_processed,context_processed,answer,answer_processed\nwhy?,since.,since,since\n"


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    def make(**members: str) -> Path:
        with zipfile.ZipFile(tmp_path / "causalqa.zip", "w") as opened:
            for name, content in members.items():
                opened.writestr(name, content)
        return tmp_path / "causalqa.zip"

    return make


GOOD = {
    "top/original/squad2_train_original_split.csv": ROWS,
    "top/original/squad2_valid_original_split.csv": ROWS,
    "top/README.md": "x",
    "__MACOSX/top/._squad2_train_original_split.csv": "x",
    "../../evil_train_x_split.csv": ROWS,
}


def test_causalqa_archive(archive: Callable[..., Path], tmp_path: Path) -> None:
    from plainloop.data.readers.causalqa import TextOptions, data_files, read_text

    config = FetchConfig(out_dir=str(tmp_path / "a/b/out"), causalqa=str(archive(**GOOD)))
    fetch(config)
    folder = tmp_path / "a/b/out/data/causalqa"
    names = ["squad2_train_original_split.csv", "squad2_valid_original_split.csv", "evil_train_x_split.csv"]
    assert {path.name for path in folder.iterdir()} == {*names, "manifest.json"}
    assert {path.name for path in tmp_path.rglob("evil*")} == {names[2]}  # only inside the folder
    options = TextOptions(dataset="squad2")
    assert len(read_text(data_files(str(folder), "train", options), options)) == 1
    fetch(config)  # already there
    archive(**GOOD, more="x")
    with pytest.raises(InputError, match=r"choose another --out_dir, or remove it"):
        fetch(config)


def test_bad_archives(archive: Callable[..., Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    doubled = {"a/x_train_original_split.csv": ROWS, "b/x_train_original_split.csv": ROWS}
    cases = {
        "more than once; repack it": archive(**doubled).rename(tmp_path / "doubled.zip"),
        "is this the CausalQA archive": archive(**{"x.csv": ROWS}).rename(tmp_path / "other.zip"),
        "no such file": tmp_path / "missing.zip",
    }
    with zipfile.ZipFile(tmp_path / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("x_train_original_split.csv", ROWS * 1000)
    deflated = bytearray((tmp_path / "deflated.zip").read_bytes())
    for at in range(60, 120):  # within the compressed data
        deflated[at] ^= 0x55
    (tmp_path / "deflated.zip").write_bytes(deflated)
    (tmp_path / "unpacked").mkdir()
    cases |= {"not a readable": tmp_path / "deflated.zip", "Is a directory; choose": tmp_path / "unpacked"}
    whole = archive(**GOOD).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.zip").write_bytes(whole.replace(b"since.,since,", b"since.,sinXe,", 1))
    cases |= {
        "Is the download complete": tmp_path / "cut.zip",
        "not a readable zip": tmp_path / "flipped.zip",
    }
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another file or --out_dir"):
        fetch(FetchConfig(out_dir=str(tmp_path / "file"), causalqa=str(archive(**GOOD))))
    for message, path in cases.items():
        with pytest.raises(InputError, match=message):
            fetch(FetchConfig(out_dir=out, causalqa=str(path)))
        assert not (tmp_path / "out/data/causalqa").exists()


NO_NETWORK = """\
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        host = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        host = host[0] if isinstance(host, tuple) else host
        if host not in ("127.0.0.1", "localhost", "::1", None) and not str(host).startswith("/"):
            open(os.environ["CALLS"], "a").write(f"{event} {host}\\n")
            os._exit(99)
sys.addaudithook(watch)
"""


@pytest.mark.slow
def test_fetch_then_train_without_network(hub: Any, options: Any, tmp_path: Path) -> None:
    """Two ranks under torchrun in a loopback-only network namespace, with an audit hook on Python's socket
    calls and no environment variable for offline mode.
    """
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("a network namespace needs root and iproute2")
    out = tmp_path / "out"
    fetch(FetchConfig(out_dir=str(out), model="user/tiny", dataset="user/squad"))
    hub.close()
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(NO_NETWORK)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "PYTHONPATH": str(tmp_path / "watch"), "CALLS": str(tmp_path / "calls"), "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "empty"), "HF_ENDPOINT": "http://hub.invalid",
    }  # fmt: skip
    options |= {
        "model.path": str(out / "models/tiny"), "data.train": str(out / "data/squad/train"),
        "data.dev": str(out / "data/squad/validation"), "log.tensorboard": "true",
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*alone, *torchrun, "-m", "plainloop.trainer", "train", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "calls").exists(), (tmp_path / "calls").read_text()
    status = json.loads((Path(options["run_dir"]) / "status.json").read_text())
    assert status["status"] == "completed" and status["step"] == 26

    # The audit hook does detect a call: here, of a model given by its hub name.
    options |= {"model.path": "user/tiny", "run_dir": str(tmp_path / "other")}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    line = [*alone, sys.executable, "-m", "plainloop.trainer", "train", *arguments]
    assert subprocess.run(line, env=environment, capture_output=True, timeout=100).returncode == 99
    assert "hub.invalid" in (tmp_path / "calls").read_text()
