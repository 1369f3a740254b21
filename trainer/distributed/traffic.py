"""What the ranks send each other in an optimizer step, and how long a step takes: a model on paper.

docs/scaling.md shows its figures. tests/e2e/test_traffic.py compares the bytes with those that gloo sends.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Parameters of a model. trained: those with gradients. outside: those outside its blocks, which FSDP
    gathers once per pass, not twice. gather_bytes: per parameter that FSDP gathers.
    """

    parameters: float
    trained: float
    outside: float
    gather_bytes: float = 4.0


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind. tflops: of matrix products in bf16, as a training step reaches them, not the peak.
    within and between: bytes per second that a GPU sends inside its node and to other nodes.
    """

    gpus: int
    per_node: int
    tflops: float
    within: float
    between: float

    def speed(self, ranks: int) -> float:
        """Bytes per second of a ring over this many consecutive GPUs: its slowest link decides."""
        return self.within if ranks <= self.per_node else self.between


def ring(ranks: int) -> float:
    """The share of a tensor that each rank of a ring sends to gather or reduce it (Patarasuk & Yuan 2009)."""
    return (ranks - 1) / ranks


def ddp_bytes(network: Network, ranks: int) -> float:
    """Bytes that each rank sends in a step with DDP: one all-reduce of the gradients in fp32, however many
    micro-batches there are.
    """
    return 2 * ring(ranks) * 4 * network.trained


def fsdp_bytes(
    network: Network,
    ranks: int,
    *,
    shards: int | None = None,
    micro_batches: int = 1,
    reduce_factor: float = 1.0,
) -> tuple[float, float]:
    """Bytes that each rank sends in a step with FSDP: to the ranks that share its copy of the model, and to
    those that hold the same shard of other copies.

    Every micro-batch gathers the weights of the blocks for forward and again for backward, those outside
    once, and reduces the gradients in fp32. reduce_factor: 1 for NCCL, which sends each shard to its owner;
    2 for gloo, which reduces whole tensors on all ranks.
    """
    shards = shards or ranks
    gathered = network.gather_bytes * (2 * network.parameters - network.outside)
    reduced = reduce_factor * 4 * network.trained
    inside = ring(shards) * (gathered + reduced)
    across = 2 * ring(ranks // shards) * 4 * network.trained / shards
    return micro_batches * inside, micro_batches * across


def step_seconds(
    network: Network, cluster: Cluster, tokens: float, *, mode: str, shards: int | None = None,
    micro_batches: int = 1, recompute: bool = False,
) -> float:  # fmt: skip
    """Seconds of a step in which each GPU computes `tokens` in all. Computing and sending overlap, so the
    longer one counts; attention's own products are left out.

    2 FLOPs per parameter and token forward, 2 for the gradient of the input, 2 for that of the weight if it
    is trained (Kaplan et al. 2020); recompute: forward twice.
    """
    per_token = (4 + 2 * recompute) * network.parameters + 2 * network.trained
    computing = per_token * tokens / (cluster.tflops * 1e12)
    if cluster.gpus == 1:
        return computing
    if mode == "ddp":
        sending = ddp_bytes(network, cluster.gpus) / cluster.speed(cluster.gpus)
    else:
        shards = shards or cluster.gpus
        inside, across = fsdp_bytes(network, cluster.gpus, shards=shards, micro_batches=micro_batches)
        sending = inside / cluster.speed(shards) + across / cluster.speed(cluster.gpus)
    return max(computing, sending)
