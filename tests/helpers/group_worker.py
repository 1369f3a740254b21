"""Run by test_groups.py with COUNT and PORT: two forked ranks on one core enter and leave a process group
COUNT times, with a DDP step each time. A rank that hangs for 20 s dumps its stack and exits.
"""

import faulthandler
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plainloop.trainer.distributed.world import World, process_group

count, port = map(int, sys.argv[1:])
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


def enter_and_leave(rank: int) -> None:
    with process_group(World(rank, 2, rank, torch.device("cpu")), timeout_s=60):
        wrapped = DistributedDataParallel(torch.nn.Linear(4, 4))
        wrapped(torch.ones(1, 4)).sum().backward()


children = []
for rank in range(2):
    if not (child := os.fork()):
        os.environ["RANK"] = str(rank)
        for _ in range(count):
            faulthandler.dump_traceback_later(20, exit=True)
            enter_and_leave(rank)
            faulthandler.cancel_dump_traceback_later()
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
