"""`plainloop doctor`: will a run work here? One line per check, with the fix, in less than a minute."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from plainloop.data.samplers import total_lengths
from plainloop.models.load import OVERFLOWS_IN_FP16, load_config, overflows_in_fp16
from plainloop.trainer.checkpoint.folder import checkpoint_bytes
from plainloop.trainer.commands.memory import OF_DDP, SAMPLE, Pass, estimate, measure, memory_of
from plainloop.trainer.commands.probe import (
    TwoRanks,
    nearest_existing,
    rendezvous,
    set_job_end,
    try_file_system,
    versions,
)
from plainloop.trainer.commands.prove import prove
from plainloop.trainer.config.command_options import DoctorConfig
from plainloop.trainer.config.validate import validate
from plainloop.trainer.distributed.deadline import Deadline, StopTime
from plainloop.trainer.distributed.device import set_up_device
from plainloop.trainer.distributed.world import World, world_from_env
from plainloop.trainer.errors import CheckWarning, InputError
from plainloop.trainer.precision import resolve_precision, warnings
from plainloop.trainer.run_folder.files import fault_of, read_source
from plainloop.trainer.run_folder.log import format_duration
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.base import Dataset, Task
from plainloop.trainer.tasks.find import find_hooks, find_task
from plainloop.trainer.tasks.model import shape_model

PROBE_FLOPS = 6e11  # of one pass on a CPU, at most
TOO_LARGE = 1_000_000_000  # parameters; above this, no model is loaded on a CPU for a check


class Doctor:
    """Each check is a method that returns its line, or raises InputError (FAIL) or CheckWarning (WARN)."""

    def __init__(self, config: DoctorConfig, scratch: Path) -> None:
        self.config, self.scratch, self.failed = config, scratch, False
        self.world: World | None = None
        self.task: Task | None = None
        self.rows: Dataset | None = None
        self.examples = 0
        self.parameters = self.trained = 0
        self.measured: Pass | None = None
        self.write_speed = 0.0  # bytes per second
        self.ranks: TwoRanks | None = None

    def run(self) -> int:
        """Run all checks; return exit code 1 if one fails."""
        on_gpus = self.config.device != "cpu" and torch.cuda.device_count() > 1
        # They start while the other checks run; but a GPU in exclusive mode allows one process at a time.
        with contextlib.closing(TwoRanks("cuda" if on_gpus else "cpu")) as self.ranks:
            if on_gpus:
                self.ranks.wait(45)
            return self._run()

    def _run(self) -> int:
        checks: list[tuple[str, Callable[[], str]]] = [
            ("options", self.options), ("versions", versions), ("device", self.device), ("model", self.model),
            ("data", self.training_data), ("run folder", self.run_folder), ("space", self.space),
            ("host", self.host), ("two ranks", self.two_ranks), ("memory", self.memory),
            ("time", self.duration),
        ]  # fmt: skip
        for name, check in checks:
            try:
                level, text = "ok", check()
            except CheckWarning as doubt:
                level, text = "WARN", str(doubt)
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: from CUDA, with a long tail
                text = str(error) if isinstance(error, InputError) else str(error).partition("\n")[0]
                level, self.failed = "FAIL", True
            print(f"{level:4}  {name}: {text}", flush=True)
        if self.config.prove and not self.failed and self.world is not None:
            self.failed = not prove(self.config, self.world.device, self.scratch)
        return int(self.failed)

    def options(self) -> str:
        task = find_task(self.config.task)
        validate(self.config, uses=task.uses, metric_names=task.metric_names)
        find_hooks(self.config.hooks)
        return f"task {self.config.task}, {self.config.batch_size} rows per step"

    def device(self) -> str:
        self.world = world_from_env(self.config.device)
        set_up_device(self.world, tf32=self.config.tf32, deterministic=self.config.deterministic)
        overflows = False
        with contextlib.suppress(InputError):  # the next check reports it
            overflows = overflows_in_fp16(self.config.model.path)
        wanted, device = self.config.precision, self.world.device
        precision, why = resolve_precision(wanted, device, overflows_in_fp16=overflows)
        self.config = replace(self.config, precision=cast(Any, precision))
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if self.world.device.type == "cpu":
            if gpus.isdigit() and int(gpus) and self.config.device == "auto":
                raise InputError(
                    f"the job has {gpus} GPU(s), but PyTorch {torch.__version__} sees none: a CPU-only build?"
                )
            text = f"cpu, {len(os.sched_getaffinity(0))} cores, {precision} ({why})"
            if slow := warnings(precision, self.world.device, overflows_in_fp16=False):
                raise CheckWarning(f"{text}; {slow[0]}")
            return text
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {precision} ({why})"

    def model(self) -> str:
        path = self.config.model.path
        task = find_task(self.config.task)(self._local())
        found = load_config(path)
        fetched = read_source(Path(path))
        if fetched and (fault := fault_of(Path(path))):
            raise InputError(f"{path}: {fault}; fetch it again.")
        self.task = task
        shapes = shape_model(task, self.config)
        self.parameters = sum(p.numel() for p in shapes.parameters())
        self.trained = sum(p.numel() for p in shapes.parameters() if p.requires_grad)
        size = f"{self.parameters / 1e6:.1f} M parameters"
        text = f"{path}: {found.model_type}, {size}, readable without network"
        if self.config.precision == "fp16" and found.model_type in OVERFLOWS_IN_FP16:
            raise CheckWarning(
                f"{text}, but a {found.model_type} overflows in fp16: use --precision bf16 or fp32"
            )
        return text + (", unchanged since it was fetched" if fetched else "")

    def training_data(self) -> str:
        config, task = self._local(), self._need(self.task, "the model")
        one, train = World(0, 1, 0, torch.device("cpu")), config.data.train or ""
        limit = min(SAMPLE, config.data.limit or SAMPLE)
        self.rows = tasks.load_split(task, "train", train, config, one, limit=limit)
        for folder in (Path(str(config.data.train)), Path(str(config.data.train)).parent):
            if read_source(folder) and (fault := fault_of(folder)):
                raise InputError(f"{folder}: {fault}; fetch it again.")
        known = self.rows.store.meta.get("available")  # not in features cached by version 0.1
        count = known or sum(1 for _ in task.read(task.files(train, "train")))
        self.examples = min(count, config.data.limit or 2**62)
        text = f"{self.examples} training examples, about {self._rows()} rows of {self._length():.0f} tokens"
        if not config.data.dev:
            raise CheckWarning(f"{text}; no data.dev: nothing will be evaluated")
        dev = tasks.load_split(task, "dev", config.data.dev, config, one, limit=SAMPLE)
        tasks.require_metric(task, dev, config.evaluation.best_metric)
        return f"{text}; {len(dev.examples)} to evaluate"

    def run_folder(self) -> str:
        """Test in a temporary subfolder of the run folder, or of where the run folder would be created."""
        place = nearest_existing(Path(self.config.run_dir))
        folder = place / f".tmp-doctor-{os.getpid()}"
        try:
            folder.mkdir()
            self.write_speed = try_file_system(folder)
        except OSError as error:
            raise InputError(f"{place}: {error.strerror or error}; choose another --run_dir.") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return f"{place}: rename, fsync, locks and links work; write speed {self.write_speed / 1e6:.0f} MB/s"

    def space(self) -> str:
        place = nearest_existing(Path(self.config.run_dir))
        needed = self._checkpoint_bytes()
        keep = self.config.checkpoint.keep_last + 2  # the best, and one being written
        there = sum(f.stat().st_size for f in place.glob("checkpoints/*/*") if f.is_file())
        free = shutil.disk_usage(place).free + (there if place == Path(self.config.run_dir) else 0)
        plain = 2 * 4 * self.trained if self.config.parallel.mode == "fsdp" else 0  # of the best and the last
        more = f" and {plain / 1e9:.2f} GB of plain weights" if plain else ""
        text = f"{keep} checkpoints of {needed / 1e9:.2f} GB{more}, {free / 1e9:.1f} GB free in {place}"
        if needed * keep + plain > free:
            raise InputError(f"{text}: lower --checkpoint.keep_last, or choose another --run_dir.")
        return f"{text} (your quota may be lower: see your cluster's quota command)"

    def host(self) -> str:
        head = rendezvous()
        try:
            address = str(socket.getaddrinfo(head, 0, proto=socket.IPPROTO_TCP)[0][4][0])
        except OSError:
            raise InputError(
                f"the first node's name {head} does not resolve here: set MASTER_ADDR to one that does, or"
                " ask your cluster's support."
            ) from None
        if int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) > 1 and address.startswith("127."):
            raise CheckWarning(f"{head} resolves to {address}, which other nodes can't reach: see /etc/hosts")
        return f"{head} resolves to {address}"

    def two_ranks(self) -> str:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        try:
            seconds = (self.ranks or TwoRanks("cpu")).seconds(45)
        except InputError as error:
            raise InputError(
                f"{error}. Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface, one of"
                f" {', '.join(name for _, name in socket.if_nameindex())}."
            ) from None
        return f"all-reduce of 4 MB in {seconds * 1e3:.0f} ms over {interface or 'the default interface'}"

    def memory(self) -> str:
        """Estimate a rank's memory by a pass of the sample's largest micro-batch (CPU: a smaller one)."""
        task, rows = self._need(self.task, "the model"), self._need(self.rows, "the data")
        world, config = self._need(self.world, "the device"), self.config
        memory, where = memory_of(world)
        if world.device.type == "cpu" and self.parameters > TOO_LARGE:
            size = f"{self.parameters / 1e9:.1f} B parameters"
            raise CheckWarning(f"not measured: {size}, and no GPU here; to estimate, give --gpu_gb")
        wanted = min(
            config.max_tokens(world.device.type),
            config.batch_size * int(total_lengths(rows.store.row_lengths).max()),
        )
        tokens = min(wanted, int(PROBE_FLOPS / 6 / self.parameters)) if world.device.type == "cpu" else wanted
        self.measured = measure(task, rows, config, world, tokens)
        needed = self.measured.memory(wanted, config.optim.name)
        fits = self.measured.fitting(int(0.9 * memory), config.optim.name)
        text = f"a rank needs about {needed / 1e9:.1f} GB with micro-batches of {wanted} tokens;"
        text += f" {where}: {memory / 1e9:.1f} GB"
        if config.parallel.mode == "fsdp":
            return f"{text}; {OF_DDP}"
        if needed > memory:
            remedy = f"--tokens_per_device {fits} fits" if fits else "not even 256 tokens fit"
            raise InputError(f"{text}; {remedy}; --model.activation_checkpointing true needs less.")
        return f"{text}; --tokens_per_device {fits} would fit, and does not change the loss curve"

    def duration(self) -> str:
        measured, config = self._need(self.measured, "the memory"), self.config
        steps = config.total_steps(-(-self._rows() // config.batch_size))
        devices = self._devices()
        step_s = config.batch_size * self._length() * measured.seconds / measured.tokens / devices
        batch = config.evaluation.tokens_per_device or 2 * measured.tokens
        stop_time = StopTime(
            step_s=step_s,
            batch_s=batch / measured.tokens * measured.seconds / 3 if config.data.dev else 0.0,  # no backward
            save_s=self._checkpoint_bytes() / (self.write_speed or 1e8),
        )
        needed = steps * step_s
        text = (
            f"{steps} steps of {step_s:.2f} s on {devices} device(s): about {format_duration(needed)},"
            f" plus evaluations; a stop takes {stop_time}: --signal=B:USR1@{stop_time.signal_s} is early"
            " enough"
        )
        set_job_end()
        deadline = Deadline.from_env(stop_time)
        if config.hours:
            deadline = Deadline(time.time(), time.time() + 3600 * config.hours, stop_time)
        if deadline is None:
            return f"{text}; to estimate the number of requeues, give the time limit with --hours"
        outlook = deadline.outlook(needed)
        if warning := deadline.warning(outlook, needed):
            raise CheckWarning(
                f"{text}; {warning}: a longer --time needs fewer; launch/train.sbatch requeues itself"
            )
        return f"{text}; the job has {format_duration(outlook['job_left_s'])} left"

    def _need(self, value: Any, what: str) -> Any:
        if value is None:
            raise CheckWarning(f"not checked: depends on {what}")
        return value

    def _local(self) -> DoctorConfig:
        """The config with data in a scratch cache: only a sample is tokenised, not for the run."""
        data = replace(self.config.data, cache_dir=str(self.scratch), processes=1)
        return replace(self.config, data=data)

    def _rows(self) -> int:
        store = self._need(self.rows, "the data").store
        return round(len(store) / store.meta["examples"] * self.examples)

    def _length(self) -> float:
        return float(total_lengths(self._need(self.rows, "the data").store.row_lengths).mean())

    def _devices(self) -> int:
        if self.world is None or self.world.device.type == "cpu":
            return 1
        return int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) * torch.cuda.device_count()

    def _checkpoint_bytes(self) -> int:
        if not self.parameters:
            raise CheckWarning("not checked: depends on the model")
        return checkpoint_bytes(self.trained, self.config.optim.name)


def doctor(config: DoctorConfig) -> int:
    """Print all checks of `plainloop train` with this config; return exit code 1 if one fails."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # a single process, even if srun starts it as a rank
        os.environ.pop(name, None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plainloop-doctor-") as scratch:
        if config.gpu_gb:
            return estimate(config, Path(scratch))
        code = Doctor(config, Path(scratch)).run()
    print(f"{'fix the FAIL lines' if code else 'ready'} ({time.monotonic() - started:.0f} s)")
    return code
