"""plainloop doctor: every check passes here, and fails with a remedy when its fault is injected."""

import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plainloop.data.errors import InputError
from plainloop.trainer.commands import doctor as doctor_module
from plainloop.trainer.commands.doctor import Doctor
from plainloop.trainer.commands.probe import TwoRanks, try_file_system, versions
from plainloop.trainer.config.command_options import DoctorConfig
from plainloop.trainer.config.parse import parse
from plainloop.trainer.errors import CheckWarning
from plainloop.trainer.run_folder.files import write_manifest


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def doctor(options: Any, tmp_path: Path) -> Callable[..., Doctor]:
    def make(**changes: Any) -> Doctor:
        config = parse(DoctorConfig, as_arguments(options | changes), program="test")
        return Doctor(config, tmp_path / "scratch")

    return make


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "plainloop.trainer", "doctor", *arguments]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_all_checks_pass_on_a_real_model_and_data(minilm: str, real_data: Path, tmp_path: Path) -> None:
    """All checks pass; no files are left behind."""
    arguments = {
        "run_dir": tmp_path / "runs/squad", "model.path": minilm,
        "data.train": real_data / "squad2/train-v2.0.subset.json",
        "data.dev": real_data / "squad2/dev-v2.0.heldout.json",
    }  # fmt: skip
    done = run(as_arguments(arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 11 and last.startswith("ready")
    assert "11578 training examples" in done.stdout and "5014 to evaluate" in done.stdout
    assert "22.6 M parameters" in done.stdout and "--signal=B:USR1@" in done.stdout
    assert not list(tmp_path.iterdir())


def test_all_faults_are_reported_at_once(options: Any) -> None:
    """A failed check does not hide other failures; exit code 1."""
    changes = {"data.train": "missing.json", "epochs": 0}
    done = run(as_arguments(options | changes), MASTER_ADDR="no.such.host")
    assert done.returncode == 1
    levels = {
        line.split(":")[0].split(maxsplit=1)[1]: line.split()[0] for line in done.stdout.splitlines()[:-1]
    }
    assert {name for name, level in levels.items() if level == "FAIL"} == {"options", "data", "host"}
    assert {name for name, level in levels.items() if level == "WARN"} == {"memory", "time"}  # not checked
    assert "missing.json: no such file" in done.stdout and "epochs is 0" in done.stdout


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch" in versions()
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.9.1" if name == "torch" else real(name)
    )
    with pytest.raises(InputError, match=r"torch 2.9.1, wanted >=2.10: pip install"):
        versions()


def test_device(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor(device="cpu").device().startswith("cpu, ")
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="PyTorch sees no GPU here"):
            doctor(device="cuda").device()
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
        with pytest.raises(InputError, match=r"the job has 2 GPU\(s\), but PyTorch .* sees none"):
            doctor(device="auto").device()


@pytest.mark.gpu
def test_on_a_gpu(options: Any, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = run(as_arguments(options | {"device": "cuda", "run_dir": tmp_path / "run"}))
    assert done.returncode == 0, done.stdout
    assert torch.cuda.get_device_name(0) in done.stdout


def test_model(doctor: Any, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "model")
    write_manifest(tmp_path / "model", {"kind": "model", "name": "user/tiny", "revision": "x"})
    path = {"model.path": str(tmp_path / "model")}
    assert "readable without network, unchanged since it was fetched" in doctor(**path).model()
    with open(tmp_path / "model/model.safetensors", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    with pytest.raises(InputError, match="model.safetensors has a different SHA-256 .*; fetch it again"):
        doctor(**path).model()
    with pytest.raises(InputError, match="no such folder"):
        doctor(**{"model.path": "./nowhere"}).model()


def test_t5_in_fp16(text_options: Any, tmp_path: Path) -> None:
    config = parse(DoctorConfig, as_arguments(text_options | {"precision": "fp16"}), program="test")
    with pytest.raises(CheckWarning, match="a t5 overflows in fp16: use --precision bf16 or fp32"):
        Doctor(config, tmp_path / "scratch").model()


def test_text_data_memory_and_time(text_options: Any, text_files: Any, tmp_path: Path) -> None:
    options = text_options | {"data.dev": str(text_files[1])}
    found = Doctor(parse(DoctorConfig, as_arguments(options), program="test"), tmp_path / "scratch")
    found.device(), found.model()
    assert "120 training examples, about 120 rows" in found.training_data()
    assert "40 to evaluate" in found.training_data()
    assert "would fit" in found.memory() and found.duration().startswith("30 steps of ")


def test_data(doctor: Any, squad_file: Path, tmp_path: Path) -> None:
    content = json.loads(squad_file.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] = " "
    (tmp_path / "bad.json").write_text(json.dumps(content))
    changed = doctor(**{"data.train": str(tmp_path / "bad.json")})
    changed.device(), changed.model()
    with pytest.raises(InputError, match=r"1 bad record\(s\)(.|\n)*the question is empty"):
        changed.training_data()


def test_disk_too_small(doctor: Any, small_disk: Path, minilm: str) -> None:
    found = doctor(run_dir=str(small_disk / "deep/run"), **{"model.path": minilm})
    found.device(), found.model()
    with pytest.raises(
        InputError, match=r"4 checkpoints of 0.27 GB, 0.0 GB free .*: lower --checkpoint.keep_last"
    ):
        found.space()
    with pytest.raises(InputError, match=r"No space left on device; choose another --run_dir"):
        found.run_folder()
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match="Read-only file system"):
        found.run_folder()


def test_file_system_without_exclusive_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_file_system(tmp_path) > 0
    (tmp_path / "other").mkdir()
    real = Path.touch
    monkeypatch.setattr(Path, "touch", lambda self, **_: real(self))
    with pytest.raises(InputError, match="two runs could write here at once"):
        try_file_system(tmp_path / "other")


def test_two_ranks(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "all-reduce of 4 MB in" in doctor().two_ranks()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    with pytest.raises(InputError, match=r"Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME .*lo"):
        doctor().two_ranks()


def test_ranks_that_do_not_connect_are_terminated() -> None:
    ranks = TwoRanks("cpu")
    ranks.ranks[1].send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="could not connect"):
        ranks.seconds(1)
    assert all(rank.wait(60) for rank in ranks.ranks)


def test_memory_and_time(doctor: Any, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    found = doctor(**{"data.dev": options["data.train"]})
    found.device(), found.model(), found.training_data()
    assert "would fit, and does not change the loss curve" in found.memory()
    assert "with --hours" in found.duration()
    patient = dataclasses.replace(found.config, hours=3.0)
    found.config, config = patient, found.config
    assert re.search("the job has 0[23]:", found.duration())
    found.config = config
    now = int(time.time())
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now - 10))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + 600))
    found.measured = dataclasses.replace(found.measured, seconds=100.0)
    with pytest.raises(CheckWarning, match=r"the job ends in .* expect about \d+ requeues: a longer --time"):
        found.duration()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1250")
    with pytest.raises(
        InputError, match=r"the job's memory per node, for all ranks: 1.3 GB; --tokens_per_device \d+ fits"
    ):
        big = doctor(tokens_per_device=20000, batch_size=300, **{"data.dev": options["data.train"]})
        big.device(), big.model(), big.training_data()
        big.memory()


def test_a_model_that_only_fits_in_shards(doctor: Any, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    from plainloop.trainer.commands import memory

    def too_large(*arguments: Any) -> None:
        raise memory.TooLarge("not even the weights fit into memory")

    monkeypatch.setattr(memory, "_measure", too_large)
    for mode, expected in (("ddp", InputError), ("fsdp", CheckWarning)):
        found = doctor(parallel=mode, **{"data.dev": options["data.train"]})
        found.device(), found.model(), found.training_data()
        with pytest.raises(expected, match="not even the weights fit"):
            found.memory()


@pytest.mark.slow
def test_memory_estimate_is_close_to_the_measured_peak(
    minilm: str, real_data: Path, tmp_path: Path, options: Any
) -> None:
    """The estimate is 0.7 to 1.6 times the peak of a real run of a few steps."""
    tokens = 2048
    options |= {
        "model.path": minilm, "precision": "bf16", "batch_size": 16, "data.limit": 300,
        "data.train": str(real_data / "squad2/train-v2.0.subset.json"), "data.max_length": 384,
        "data.stride": 128, "tokens_per_device": tokens, "max_steps": 2,
    }  # fmt: skip
    found = Doctor(parse(DoctorConfig, as_arguments(options), program="test"), tmp_path / "scratch")
    found.device(), found.model()
    with pytest.raises(CheckWarning, match="no data.dev"):
        found.training_data()
    found.memory()
    assert found.measured
    estimate = found.measured.memory(tokens, "adamw") / 1e9
    line = [sys.executable, "-m", "plainloop.trainer", "train", *as_arguments(options)]
    subprocess.run(line, check=True, capture_output=True, timeout=300)
    records = [json.loads(t) for t in (Path(options["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    peak = max(record.get("memory_gb", 0) for record in records)
    print(f"estimate {estimate:.2f} GB, peak {peak:.2f} GB")
    assert 0.7 < estimate / peak < 1.6


def test_all_checks_are_run() -> None:
    """Every public method is in the list of checks to run."""
    methods = {n for n, v in vars(Doctor).items() if callable(v) and not n.startswith("_")} - {"run"}
    source = Path(str(doctor_module.__file__)).read_text()
    assert all(f"self.{name})" in source or f"self.{name}," in source for name in methods)
