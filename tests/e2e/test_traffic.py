"""What the ranks really send, over gloo, against trainer/distributed/traffic.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plainloop.trainer.distributed.traffic import Cluster, Network, ddp_bytes, fsdp_bytes, step_seconds

WORKER = Path(__file__).parents[1] / "helpers/traffic_worker.py"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 M parameters: large against what else the ranks send."""
    from transformers import AutoConfig, BertConfig, BertForQuestionAnswering

    folder = tmp_path_factory.mktemp("traffic")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    words = AutoConfig.from_pretrained(tiny_model).vocab_size
    config = BertConfig(
        vocab_size=words, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=128,
    )  # fmt: skip
    BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux only")
@pytest.mark.parametrize(
    ("ranks", "mode", "shards", "tokens"),
    [
        (2, "ddp", 0, 300),
        (4, "ddp", 0, 10**6),
        (2, "fsdp", 0, 300),
        (4, "fsdp", 0, 10**6),
        (4, "fsdp", 2, 10**6),
    ],
)
def test_bytes_sent(
    ranks: int, mode: str, shards: int, tokens: int, model: Path, squad_file: Path, tmp_path: Path
) -> None:
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        WORKER,
    ]
    line += [model, squad_file, tmp_path, mode, str(shards), str(tokens)]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (text,) = [text for text in done.stdout.splitlines() if text.startswith("{")]
    found: dict[str, Any] = json.loads(text)
    assert (found["micro_batches"] > 1) == (tokens == 300)
    network = Network(found["parameters"], found["parameters"], found["outside"])
    expected = ddp_bytes(network, ranks)
    if mode == "fsdp":
        batches = found["micro_batches"]
        options: dict[str, Any] = {"shards": shards or ranks, "micro_batches": batches, "reduce_factor": 2}
        expected = sum(fsdp_bytes(network, ranks, **options))
    each = found["bytes"] / ranks
    print(f"{mode} {ranks} ranks, {shards} shards: {each / 1e6:.2f} MB, by paper {expected / 1e6:.2f} MB")
    assert each == pytest.approx(expected, rel=0.001)


def test_the_model_on_paper() -> None:
    network = Network(1e9, 1e9, 0)
    assert ddp_bytes(network, 1) == 0 and ddp_bytes(network, 2) == 4e9
    assert fsdp_bytes(network, 2) == (0.5 * 12e9, 0)
    assert fsdp_bytes(network, 8, shards=2) == (0.5 * 12e9, 2 * 0.75 * 4e9 / 2)
    assert fsdp_bytes(Network(1e9, 0, 1e9, gather_bytes=2), 2, micro_batches=3) == (3e9, 0)
    one, two = Cluster(1, 8, 100, 1e11, 1e10), Cluster(16, 8, 100, 1e11, 1e10)
    assert step_seconds(network, one, 1e4, mode="ddp") == pytest.approx(6e9 * 1e4 / 1e14)
    assert step_seconds(network, one, 1e4, mode="ddp", recompute=True) == pytest.approx(8e9 * 1e4 / 1e14)
    assert step_seconds(network, two, 1, mode="ddp") == pytest.approx(2 * 15 / 16 * 4e9 / 1e10)
    within = step_seconds(network, two, 1, mode="fsdp", shards=8)
    assert within == pytest.approx(7 / 8 * 12e9 / 1e11 + 4e9 / 8 / 1e10)
    assert within < step_seconds(network, two, 1, mode="fsdp")
    frozen = Network(1e9, 1e7, 0)
    assert step_seconds(frozen, two, 1e4, mode="ddp") < step_seconds(network, two, 1e4, mode="ddp")
