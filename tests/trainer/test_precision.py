"""What precision `auto` resolves to on each device, and what is logged and recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.data.errors import InputError
from plainloop.trainer import precision
from plainloop.trainer.distributed.device import cpu_features
from plainloop.trainer.precision import choose_precision, resolve_precision, warnings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """cpu_with("avx512_bf16", ...): fake a CPU with these features and no limit on oneDNN."""

    def make(*features: str) -> None:
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        found = {"amx_bf16": False, "avx512_bf16": False, "avx2": True, "cpu_name": "amx_bf16"}
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: found | dict.fromkeys(features, True), raising=False
        )

    return make


def test_cpu_features_respect_the_onednn_limit(cpu_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with()
    assert cpu_features() == []
    cpu_with("amx_bf16", "avx512_bf16")
    assert cpu_features() == ["AMX", "AVX512-BF16"]
    for limit, left in (("AVX2", []), ("avx512_core_vnni", []), ("AVX512_CORE_BF16", ["AVX512-BF16"])):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert cpu_features() == left


@pytest.mark.parametrize("overflows", [False, True])
def test_auto_on_a_cpu(cpu_with: Any, overflows: bool) -> None:
    cpu_with("avx512_bf16")
    assert choose_precision(CPU, overflows_in_fp16=overflows) == ("bf16", "this CPU has AVX512-BF16")
    cpu_with()
    chosen = choose_precision(CPU, overflows_in_fp16=overflows)
    assert chosen == ("fp32", "this CPU has neither AMX nor AVX512-BF16")


@pytest.mark.parametrize(
    ("has_bf16", "overflows", "expected"),
    [(True, True, "bf16"), (True, False, "bf16"), (False, False, "fp16"), (False, True, "fp32")],
)
def test_auto_on_a_gpu(
    has_bf16: bool, overflows: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla X")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    chosen, reason = choose_precision(GPU, overflows_in_fp16=overflows)
    assert chosen == expected and "Tesla X" in reason
    if not has_bf16:
        for recorded in (None, "bf16"):
            wanted = "bf16" if recorded is None else "auto"
            with pytest.raises(InputError, match="Tesla X has no bf16; use --precision fp16 or fp32"):
                resolve_precision(wanted, GPU, overflows_in_fp16=overflows, recorded=recorded)


def test_checkpoint_keeps_its_precision_unless_overridden(cpu_with: Any) -> None:
    cpu_with("avx512_bf16")

    def resolved(wanted: str, recorded: str | None) -> tuple[str, str]:
        return resolve_precision(wanted, CPU, overflows_in_fp16=False, recorded=recorded)

    assert resolved("auto", None)[0] == "bf16"
    assert resolved("auto", "fp32") == ("fp32", "as in the checkpoint")
    assert resolved("fp32", "bf16") == ("fp32", "as requested")


def test_differing_ranks_agree_on_a_common_precision(monkeypatch: pytest.MonkeyPatch, cpu_with: Any) -> None:
    cpu_with("avx512_bf16")
    monkeypatch.setattr(precision, "all_ranks", lambda mine: torch.stack([mine, torch.tensor([2])]))
    chosen = resolve_precision("auto", CPU, overflows_in_fp16=False)
    assert chosen == ("fp32", "the fastest that all ranks support")


def test_emulated_precision_on_a_cpu_gives_a_warning(cpu_with: Any) -> None:
    cpu_with()
    fine = {"overflows_in_fp16": False}
    assert not warnings("fp32", CPU, **fine) and not warnings("bf16", GPU, **fine)
    assert "times as long as in fp32" in warnings("bf16", CPU, **fine)[0]
    cpu_with("amx_bf16")
    assert not warnings("bf16", CPU, **fine)
    assert "this model overflows in it" in warnings("fp16", GPU, overflows_in_fp16=True)[0]


def test_auto_is_resolved_once_recorded_and_kept_on_another_machine(
    options: dict[str, Any], train: Any, cpu_with: Any, capsys: Any
) -> None:
    cpu_with("avx512_bf16")
    run_dir = Path(options["run_dir"])
    train(precision="auto", stop_at_step=2)
    assert "precision bf16: this CPU has AVX512-BF16" in capsys.readouterr().err
    assert "precision: bf16" in (run_dir / "config.yaml").read_text()
    state = json.loads((run_dir / "checkpoints/step-00000002/state.json").read_text())
    assert state["config"]["precision"] == "bf16"
    cpu_with()  # another machine
    train(precision="auto", stop_at_step=3)
    told = capsys.readouterr().err
    assert "precision bf16: as in the checkpoint" in told and "WARNING: precision bf16: this CPU" in told
    with pytest.raises(InputError, match="precision: bf16 -> fp32"):
        train(precision="fp32", stop_at_step=4)
    train(precision="fp32", stop_at_step=4, **{"checkpoint.allow_changes": "[precision]"})
    assert "precision fp32: as requested" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_and_evaluate_resolve_to_the_same_precision(options: dict[str, Any], launch: Any) -> None:
    """ONEDNN_MAX_CPU_ISA disables bf16 on a CPU that supports it."""
    result = launch(2, "train", options | {"precision": "auto", "max_steps": 2}, ONEDNN_MAX_CPU_ISA="AVX2")
    assert "precision fp32: this CPU has neither AMX nor AVX512-BF16" in result.stderr
    evaluate = {"model": options["run_dir"], "data": options["data.train"]}
    result = launch(0, "evaluate", evaluate, ONEDNN_MAX_CPU_ISA="AVX2")
    assert "precision fp32: this CPU has neither" in result.stderr
