"""`plainloop doctor`: will this run work here? A line per check with the remedy, in less than a minute."""

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

from plainloop.data.causalqa import TextOptions, data_files, read_text, row_of_each_target
from plainloop.data.samplers import total
from plainloop.data.squad import read_squad
from plainloop.data.store import Store
from plainloop.data.types import InputError
from plainloop.models.load import OVERFLOWS_IN_FP16, load_config, overflows_in_fp16
from plainloop.trainer.checkpoint import checkpoint_bytes
from plainloop.trainer.checks import check_train_config
from plainloop.trainer.config import DoctorConfig
from plainloop.trainer.deadline import Deadline, StopTime, clock
from plainloop.trainer.device import set_up_device
from plainloop.trainer.distributed import World, world_from_env
from plainloop.trainer.errors import Doubt
from plainloop.trainer.manifest import fault_of, read_source
from plainloop.trainer.memory import Pass, measure_pass, memory_of, parameters_of
from plainloop.trainer.precision import resolve_precision, slow_precision
from plainloop.trainer.probe import (
    TwoRanks,
    existing,
    job_end,
    rendezvous,
    try_file_system,
    versions,
)
from plainloop.trainer.prove import prove
from plainloop.trainer.run import TOKENS_PER_DEVICE
from plainloop.trainer.tasks import Task, make_task

SAMPLE = 256  # training examples that are tokenised
PROBE_FLOPS = 6e11  # of a pass on a CPU
TOO_LARGE = 1_000_000_000  # parameters that a CPU does not load for a check


class Doctor:
    """Each check is a method that returns its line, or raises InputError (FAIL) or Doubt (WARN)."""

    def __init__(self, config: DoctorConfig, scratch: Path) -> None:
        self.config, self.scratch, self.failed = config, scratch, False
        # Data is tokenised in part, and not into the cache of the run.
        self.data = replace(config.data, cache_dir=str(scratch), processes=1)
        self.world: World | None = None
        self.task: Task | None = None
        self.rows: Store | None = None
        self.examples = 0
        self.parameters = 0
        self.measured: Pass | None = None
        self.write_speed = 0.0  # bytes per second
        self.ranks: TwoRanks | None = None

    def run(self) -> int:
        """Exit code 1 when a check fails."""
        on_gpus = self.config.device != "cpu" and torch.cuda.device_count() > 1
        # They start while the rest is looked at. But a GPU in exclusive mode takes one process at a time.
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
            except Doubt as doubt:
                level, text = "WARN", str(doubt)
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: CUDA's, with a long tail
                text = str(error) if isinstance(error, InputError) else str(error).partition("\n")[0]
                level, self.failed = "FAIL", True
            print(f"{level:4}  {name}: {text}", flush=True)
        if self.config.prove and not self.failed and self.world is not None:
            self.failed = not prove(self.config, self.world.device, self.scratch)
        return int(self.failed)

    def options(self) -> str:
        check_train_config(self.config)
        return f"task {self.config.task}, {self.config.batch_size} rows a step"

    def device(self) -> str:
        self.world = world_from_env(self.config.device)
        set_up_device(self.world, tf32=self.config.tf32, deterministic=self.config.deterministic)
        overflows = False
        with contextlib.suppress(InputError):  # which the next check tells
            overflows = overflows_in_fp16(self.config.model.path)
        wanted, device = self.config.precision, self.world.device
        precision, why = resolve_precision(wanted, device, overflows_in_fp16=overflows)
        self.config = replace(self.config, precision=cast(Any, precision))
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if self.world.device.type == "cpu":
            if gpus.isdigit() and int(gpus) and self.config.device == "auto":
                raise InputError(
                    f"the job has {gpus} GPU(s), PyTorch {torch.__version__} sees none: a build for CPUs?"
                )
            text = f"cpu, {len(os.sched_getaffinity(0))} cores, {precision} ({why})"
            if slow := slow_precision(precision, self.world.device):
                raise Doubt(f"{text}; {slow}")
            return text
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {precision} ({why})"

    def model(self) -> str:
        path = self.config.model.path
        world = self.world or World(0, 1, 0, torch.device("cpu"))
        task = make_task(self.config.task, self.config.model, self.data, self.config.text, world)
        found = load_config(path)
        fetched = read_source(Path(path))
        if fetched and (fault := fault_of(Path(path))):
            raise InputError(f"{path}: {fault}; fetch it again.")
        self.task = task
        self.parameters = parameters_of(found)
        size = f"about {self.parameters / 1e6:.1f} M parameters"
        text = f"{path}: {found.model_type}, {size}, readable without network"
        if self.config.precision == "fp16" and found.model_type in OVERFLOWS_IN_FP16:
            raise Doubt(f"{text}, but a {found.model_type} overflows in fp16: use --precision bf16 or fp32")
        return text + (", as it was fetched" if fetched else "")

    def training_data(self) -> str:
        config, task = self.config, self._need(self.task, "the model")
        rows = task.prepare("train", config.data.train or "", limit=min(SAMPLE, config.data.limit or SAMPLE))
        for folder in (Path(str(config.data.train)), Path(str(config.data.train)).parent):
            if read_source(folder) and (fault := fault_of(folder)):
                raise InputError(f"{folder}: {fault}; fetch it again.")
        self.examples = min(self._count("train", config.data.train), config.data.limit or 2**62)
        self.rows = rows
        text = f"{self.examples} training examples, about {self._rows()} rows of {self._length():.0f} tokens"
        if not config.data.dev:
            raise Doubt(f"{text}; no data.dev: nothing will be evaluated")
        task.prepare("dev", config.data.dev, limit=SAMPLE)
        return f"{text}; {self._count('valid', config.data.dev)} to evaluate"

    def run_folder(self) -> str:
        """In a folder of its own beside the checkpoints, or where the run folder would be made."""
        place = existing(Path(self.config.run_dir))
        folder = place / f".tmp-doctor-{os.getpid()}"
        try:
            folder.mkdir()
            self.write_speed = try_file_system(folder)
        except OSError as error:
            raise InputError(f"{place}: {error.strerror or error}; choose another --run_dir.") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return f"{place}: rename, sync, locks and links work; {self.write_speed / 1e6:.0f} MB/s written"

    def space(self) -> str:
        place = existing(Path(self.config.run_dir))
        needed = self._checkpoint_bytes()
        keep = self.config.checkpoint.keep_last + 2  # the best, and one under way
        there = sum(f.stat().st_size for f in place.glob("checkpoints/*/*") if f.is_file())
        free = shutil.disk_usage(place).free + (there if place == Path(self.config.run_dir) else 0)
        text = f"{keep} checkpoints of {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB free in {place}"
        if needed * keep > free:
            raise InputError(f"{text}: lower --checkpoint.keep_last, or choose another --run_dir.")
        return f"{text} (a quota may be less: see your cluster's quota command)"

    def host(self) -> str:
        head = rendezvous()
        try:
            address = str(socket.getaddrinfo(head, 0, proto=socket.IPPROTO_TCP)[0][4][0])
        except OSError:
            raise InputError(
                f"the first node's name {head} has no address here: set MASTER_ADDR to one that has, or ask"
                " your cluster's support."
            ) from None
        if int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) > 1 and address.startswith("127."):
            raise Doubt(f"{head} is {address}, which other nodes can't reach: see /etc/hosts")
        return f"{head} is {address}"

    def two_ranks(self) -> str:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        try:
            seconds = (self.ranks or TwoRanks("cpu")).seconds(45)
        except InputError as error:
            raise InputError(
                f"{error}. Name the network interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, one of"
                f" {', '.join(name for _, name in socket.if_nameindex())}."
            ) from None
        return f"a sum of 4 MB in {seconds * 1e3:.0f} ms over {interface or 'the default interface'}"

    def memory(self) -> str:
        """Of a rank, by a pass of the largest micro-batch that the sample makes (on a CPU: a smaller one)."""
        task, rows = self._need(self.task, "the model"), self._need(self.rows, "the data")
        world, config = self._need(self.world, "the device"), self.config
        memory, where = memory_of(world)
        if world.device.type == "cpu" and self.parameters > TOO_LARGE:
            raise Doubt(f"not measured: {self.parameters / 1e9:.1f} G parameters, and no GPU here")
        given = config.tokens_per_device or TOKENS_PER_DEVICE[world.device.type]
        wanted = min(given, config.batch_size * int(total(rows.lengths).max()))
        tokens = min(wanted, int(PROBE_FLOPS / 6 / self.parameters)) if world.device.type == "cpu" else wanted
        model = task.load_model(config.model.path, new_head=True)
        while self.measured is None:
            largest = task.steps(rows, batch_size=config.batch_size, seed=0, tokens=tokens).largest()[0]
            try:
                self.measured = measure_pass(model, task, largest, world, config)
            except InputError:  # out of memory; a part of it tells what would fit
                if tokens < 1024:
                    raise
                tokens //= 4
        needed = self.measured.memory(wanted, config.optim.name)
        fits = self.measured.fitting(int(0.9 * memory), config.optim.name)
        text = (
            f"a rank needs about {needed / 1e9:.1f} GB with micro-batches of {wanted} tokens,"
            f" {where}: {memory / 1e9:.1f} GB"
        )
        if needed > memory:
            remedy = f"--tokens_per_device {fits} fits" if fits else "not even 256 tokens fit"
            raise InputError(f"{text}; {remedy}; --model.activation_checkpointing true needs less.")
        return f"{text}; --tokens_per_device {fits} would fit, with the same curve"

    def duration(self) -> str:
        measured, config = self._need(self.measured, "the memory"), self.config
        steps = min(config.max_steps or 2**62, config.epochs * -(-self._rows() // config.batch_size))
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
            f"{steps} steps of {step_s:.2f} s on {devices} device(s): about {clock(needed)},"
            f" evaluations apart; a stop takes {stop_time}: --signal=B:USR1@{stop_time.signal_s} is early"
            " enough"
        )
        job_end()
        deadline = Deadline.from_env(stop_time)
        if config.hours:
            deadline = Deadline(time.time(), time.time() + 3600 * config.hours, stop_time)
        if deadline is None:
            return f"{text}; how often will it be requeued? --hours says how long the job may take"
        outlook = deadline.outlook(needed)
        if told := deadline.warning(outlook, needed):
            raise Doubt(f"{text}; {told}: a longer --time, or let launch/train.sbatch requeue it")
        return f"{text}; the job has {clock(outlook['job_left_s'])}"

    def _need(self, value: Any, what: str) -> Any:
        if value is None:
            raise Doubt(f"not checked: {what} comes first")
        return value

    def _count(self, part: str, path: Any) -> int:
        if self.config.task == "span":
            return len(read_squad(path))
        names = TextOptions.__dataclass_fields__
        options = TextOptions(**{name: getattr(self.config.text, name) for name in names})
        found = read_text(data_files(path, part, options), options)
        return len(row_of_each_target(found)) if part == "train" else len(found)

    def _rows(self) -> int:
        rows = self._need(self.rows, "the data")
        return round(len(rows) / rows.meta["examples"] * self.examples)

    def _length(self) -> float:
        return float(total(self._need(self.rows, "the data").lengths).mean())

    def _devices(self) -> int:
        if self.world is None or self.world.device.type == "cpu":
            return 1
        return int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) * torch.cuda.device_count()

    def _checkpoint_bytes(self) -> int:
        if not self.parameters:
            raise Doubt("not checked: the model comes first")
        return checkpoint_bytes(self.parameters)


def doctor(config: DoctorConfig) -> int:
    """Print all checks of `plainloop train` with this config; exit code 1 when one fails."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # one process, even where srun starts it as a rank
        os.environ.pop(name, None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plainloop-doctor-") as scratch:
        code = Doctor(config, Path(scratch)).run()
    print(f"{'something must be mended' if code else 'ready'} ({time.monotonic() - started:.0f} s)")
    return code
