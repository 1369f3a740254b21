"""Which precision `auto` is, where, and what is said and recorded of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.data.types import InputError
from plainloop.trainer import precision
from plainloop.trainer.precision import choose_precision, cpu_features, resolve_precision, slow_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """cpu_with("avx512_bf16", ...): a CPU that has these, and nothing holds oneDNN back."""

    def make(*features: str) -> None:
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        found = {"amx_bf16": False, "avx512_bf16": False, "avx2": True, "cpu_name": "amx_bf16"}
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: found | dict.fromkeys(features, True), raising=False
        )

    return make


def test_features_of_a_cpu_and_what_onednn_may_use(cpu_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_checkpoint_keeps_its_own_unless_asked_otherwise(cpu_with: Any) -> None:
    cpu_with("avx512_bf16")

    def resolved(wanted: str, recorded: str | None) -> tuple[str, str]:
        return resolve_precision(wanted, CPU, overflows_in_fp16=False, recorded=recorded)

    assert resolved("auto", None)[0] == "bf16"
    assert resolved("auto", "fp32") == ("fp32", "as in the checkpoint")
    assert resolved("fp32", "bf16") == ("fp32", "as asked for")


def test_ranks_that_differ_agree_on_what_all_can(monkeypatch: pytest.MonkeyPatch, cpu_with: Any) -> None:
    cpu_with("avx512_bf16")
    monkeypatch.setattr(precision, "all_ranks", lambda mine: torch.stack([mine, torch.tensor([2])]))
    chosen = resolve_precision("auto", CPU, overflows_in_fp16=False)
    assert chosen == ("fp32", "the ranks differ in what they can compute")


def test_a_format_that_the_cpu_emulates_is_warned_of(cpu_with: Any) -> None:
    cpu_with()
    assert slow_precision("fp32", CPU) is None and slow_precision("bf16", GPU) is None
    warning = slow_precision("bf16", CPU)
    assert warning and "times as long as in fp32" in warning
    cpu_with("amx_bf16")
    assert slow_precision("bf16", CPU) is None


def test_it_is_resolved_once_recorded_and_kept_on_another_machine(
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
    assert "precision fp32: as asked for" in capsys.readouterr().err


def test_two_ranks_and_evaluate_say_the_same(options: dict[str, Any], launch: Any) -> None:
    """ONEDNN_MAX_CPU_ISA takes bf16 from a CPU that has it."""
    result = launch(2, "train", options | {"precision": "auto", "max_steps": 2}, ONEDNN_MAX_CPU_ISA="AVX2")
    assert "precision fp32: this CPU has neither AMX nor AVX512-BF16" in result.stderr
    evaluate = {"model": options["run_dir"], "data": options["data.train"]}
    result = launch(0, "evaluate", evaluate, ONEDNN_MAX_CPU_ISA="AVX2")
    assert "precision fp32: this CPU has neither" in result.stderr
