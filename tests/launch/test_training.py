"""The trainer in a real Slurm: two nodes, time limits, requeues by the batch script and by Slurm."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
NO_GPU = ["--gpus-per-node=0"]


def as_arguments(options: dict[str, Any], **changes: Any) -> list[str]:
    return [text for name, value in (options | changes).items() for text in (f"--{name}", str(value))]


def lives(output: str) -> list[tuple[int, int]]:
    """(step at the start, step at the end) of each run of the job, from the log file."""
    found = re.findall(r"train.sbatch: \w+ at step (\d+), started at (\d+);", output)
    return [(int(began), int(ended)) for ended, began in found]


def test_two_nodes_match_two_processes(
    submit: Any, options: Any, launch: Any, metrics: Any, tensors: Any, assert_same_bits: Any
) -> None:
    """The run folder and the job have a hostile name, which must not be executed."""
    dev = options["data.train"]
    launch(2, "train", options | {"data.dev": dev})
    hostile = 'a "run" on $(touch pwned) two; nodes ☃'
    job = submit(
        "train", "--cpu-workers", "1", *as_arguments(options, **{"run_dir": hostile, "data.dev": dev}),
        sbatch=["--nodes=2", f"--job-name={hostile}", *NO_GPU],
    )  # fmt: skip
    assert job.end() == ("COMPLETED", 0), job.output()
    run_dir = job.folder / hostile
    assert not list(job.folder.rglob("pwned"))
    alone, slurm = metrics(options["run_dir"], "train"), metrics(run_dir, "train")
    assert [line["loss"] for line in slurm] == [line["loss"] for line in alone] and len(slurm) == 30
    assert_same_bits(tensors(options["run_dir"], 30), tensors(run_dir, 30))
    scored = submit(
        "evaluate", "--cpu-workers=1", "--launcher=srun", "--data", dev,
        "--model", str(run_dir / "checkpoints/step-00000030"),
        "--precision", "fp32", "--num_best", "0", "--out_dir", "scores", sbatch=["--nodes=2", *NO_GPU],
    )  # fmt: skip
    assert scored.end() == ("COMPLETED", 0), scored.output()
    # The file, since srun mixes the lines of the two streams in the log.
    shown = json.loads((scored.folder / "scores/metrics.json").read_text())
    known = metrics(options["run_dir"], "evaluation")[-1]
    for name, value in shown.items():  # logits differ in their last bits: batches and padding differ
        rounded = name == "loss" or name.endswith("thresh")
        assert value == (pytest.approx(known[name], rel=1e-5) if rounded else known[name])


def test_repeated_requeues(
    submit: Any, options: Any, launch: Any, tensors: Any, assert_same_bits: Any
) -> None:
    """By the warning signal (in an evaluation, in a save), by scontrol requeue, and by preemption."""
    options |= {
        "data.dev": options["data.train"], "evaluation.every_steps": 8,
        "evaluation.tokens_per_device": 400, "checkpoint.every_steps": 10, "checkpoint.async": "false",
    }  # fmt: skip
    launch(2, "train", options)
    job = submit(
        "train", "--cpu-workers", "1", *as_arguments(options, run_dir="run"),
        sbatch=["--nodes=2", *NO_GPU],
        fault={"slow_step_s": 0.1, "slow_batch_s": 0.3, "slow_save_s": 2},
    )  # fmt: skip
    run_dir = job.folder / "run"

    def in_life(number: int, text: str) -> Any:
        return lambda: text in job.output().partition(f"attempt {number},")[2]

    job.wait_until(in_life(1, "step 8/30"))
    job.signal()
    job.wait_until(in_life(1, "asked to stop during an evaluation"))
    job.wait_until(in_life(2, "step 10/30"))
    job.wait_until(lambda: list((run_dir / "checkpoints").glob(".tmp-*")))
    job.signal()
    job.wait_until(in_life(3, "step 14/30"))
    job.cluster.run("scontrol", "requeue", str(job.number))
    job.wait_until(in_life(4, "step 19/30"))
    everything = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64"]
    urgent = job.cluster.sbatch(*everything, "--output=/dev/null", "--wrap=sleep 1")
    job.wait_until(in_life(4, "SIGTERM from Slurm"))
    assert job.end() == ("COMPLETED", 0), job.output()
    assert job.cluster.wait(urgent)["JobState"] == "COMPLETED"
    assert job.restarts() == 4
    found = lives(job.output())
    assert len(found) == 5 and [began for began, _ in found] == [0, *(ended for _, ended in found[:-1])]
    assert found[0][1] == 8 and found[-1][1] == 30
    assert job.output().count("guaranteed: the same bits as a run that never stopped") == 4
    assert_same_bits(tensors(options["run_dir"], 30), tensors(run_dir, 30))


def test_requeue_at_the_time_limit(
    submit: Any, options: Any, launch: Any, tensors: Any, assert_same_bits: Any
) -> None:
    """Two minutes; Slurm sends its warning 30 to 60 s before the end. Ranks come from Slurm's environment."""
    launch(2, "train", options)
    status = {"step": 7, "began_at": 3, "exit_code": 75}
    unwarned = submit(  # no warning signal: after SIGTERM there is still time to save and to requeue
        "train", "--cpu-workers=1", "--run_dir=run", sbatch=["--time=1", "--signal=CONT@1", *NO_GPU],
        plan=[{"wait": True, "status": {**status, "status": "stopped"}}, {"status": {"status": "completed"}}],
    )  # fmt: skip
    job = submit(
        "train", "--launcher", "srun", "--cpu-workers", "2", *as_arguments(options, run_dir="run"),
        sbatch=["--time=2", "--signal=B:USR1@30", *NO_GPU], fault={"slow_step_s": 4, "life": 0},
    )  # fmt: skip
    assert job.end(240) == ("COMPLETED", 0), job.output()
    output = job.output()
    assert job.restarts() == 1 and output.count("the time limit is near: asking for a stop") == 1
    assert re.search(r"the job ends in 00:01:\d\d, the run needs about .* expect about .* requeue", output)
    assert "--signal=B:USR1@70 is early enough" in output  # 60 s, a 4 s step, a save
    (first, second) = lives(output)
    assert first[0] == 0 < first[1] < 30 and second == (first[1], 30)
    assert_same_bits(tensors(options["run_dir"], 30), tensors(job.folder / "run", 30))
    assert unwarned.end() == ("COMPLETED", 0) and unwarned.restarts() == 1, unwarned.output()
    assert "SIGTERM from Slurm: the time limit is reached" in unwarned.output()


def test_user_error_is_not_requeued(submit: Any, options: Any) -> None:
    missing = str(Path(options["data.train"]).parent / "missing.json")
    job = submit(
        "train", "--cpu-workers", "1", *as_arguments(options, **{"data.train": missing}), sbatch=NO_GPU
    )  # fmt: skip
    assert job.end() == ("FAILED", 2) and job.restarts() == 0
    assert f"plainloop: error: {missing}: no such file." in job.output()


def test_batch_scripts_of_the_wheel(submit: Any, options: Any, installed_wheel: Any) -> None:
    """The time limit is not reached: no requeue."""
    _, target = installed_wheel
    job = submit(
        "train", "--cpu-workers", "1", *as_arguments(options, max_steps=3, run_dir="run"), sbatch=NO_GPU,
        scripts=target / "plainloop/launch", PYTHONPATH=str(target),
    )  # fmt: skip
    assert job.end() == ("COMPLETED", 0), job.output()
    assert lives(job.output()) == [(0, 3)] and job.restarts() == 0
    code = "import plainloop.trainer.run as run; print(run.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=job.folder, env={"PYTHONPATH": str(target)}, capture_output=True
    )
    assert where.stdout.decode().startswith(str(target))
