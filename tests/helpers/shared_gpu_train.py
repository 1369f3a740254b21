"""Run by test_gpu.py: `plainloop train` whose ranks share one GPU, over gloo, since NCCL refuses to."""

import sys
from typing import Any

import torch.distributed as dist

from plainloop.trainer.cli import main_of_process
from plainloop.trainer.distributed import device

init_process_group = dist.init_process_group


def over_gloo(backend: str, **options: Any) -> None:
    init_process_group("gloo", **options)


dist.init_process_group = over_gloo
device.require_own_gpus = lambda digests: None
main_of_process(["train", *sys.argv[1:]])
