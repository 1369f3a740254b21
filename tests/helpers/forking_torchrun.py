"""torchrun's agent with ranks that are forked after all imports: they start in 0.5 s instead of 10 s.

forking_torchrun.py PROCESSES MAX_RESTARTS train ...
"""

import os
import signal
import sys
import uuid

import transformers.modeling_utils  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, BertTokenizerFast  # noqa: F401

import plainloop.trainer.run  # noqa: F401


def rank(*arguments: str) -> None:
    import faulty_train

    agent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # drop the agent's handlers
    code = faulty_train.main(list(arguments))
    sys.stderr.flush()
    if code or os.getppid() != agent:  # returning would wait for the agent
        os._exit(code)


if __name__ == "__main__":
    processes, restarts, *arguments = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), max_restarts=int(restarts),
        run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
        monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, rank)(*arguments)
