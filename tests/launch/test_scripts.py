"""The logic of launch/*.sbatch on a real Slurm, with a stand-in for the trainer: what is started with which
options, what is requeued, and that no name is ever executed as code.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NO_GPU = ["--gpus-per-node=0"]
STOPPED = {"status": "stopped", "step": 7, "began_at": 3, "exit_code": 75}
COMPLETED = {"status": "completed", "step": 9, "began_at": 7, "exit_code": 0}


def test_shellcheck() -> None:
    """shellcheck is installed by the dev extra."""
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program
    scripts = [
        *ROOT.glob("launch/*.sh"),
        *ROOT.glob("launch/*.sbatch"),
        ROOT / "tests/run.sh",
        ROOT / ".ci/run",
    ]
    assert len(scripts) >= 6
    subprocess.run([program, *scripts], check=True)


def test_what_is_requeued(submit: Any) -> None:
    """Only a run that stopped at the time limit and made progress is requeued. All jobs run concurrently."""
    failed = {"status": "failed", "step": 7, "began_at": 3, "exit_code": 2}
    idle = {**STOPPED, "step": 3}
    cases: dict[str, tuple[list[dict[str, Any]], list[str], int, int]] = {
        # plan, options, exit code, restarts
        "stopped": ([{"wait": True, "status": STOPPED}, {"status": COMPLETED}], [], 0, 1),
        "no progress": ([{"wait": True, "status": idle}], [], 75, 0),
        "user's error": ([{"wait": True, "status": failed, "code": 1}], [], 2, 0),
        "cap": ([{"wait": True, "status": STOPPED}], ["--max-requeues", "0"], 75, 0),
        # the second run dies before it writes a status; the status of the first must not count
        "silent": ([{"wait": True, "status": STOPPED}, {"wait": True, "code": 9}], [], 9, 1),
        "completed": ([{"wait": True, "status": COMPLETED}], [], 0, 0),
    }
    jobs = {}
    for name, (plan, options, _, _) in cases.items():
        arguments = ["--cpu-workers", "1", *options, "--run_dir", "run"]
        jobs[name] = submit("train", *arguments, sbatch=NO_GPU, plan=plan)
    for name, job in jobs.items():
        job.wait_until(job.noted)
        job.signal()
        if name == "silent":
            job.wait_until(lambda job=job: len(job.noted()) == 2)
            job.signal()
    for name, (_, _, code, restarts) in cases.items():
        state, exit_code = jobs[name].end()
        assert (exit_code, jobs[name].restarts()) == (code, restarts), f"{name}: {jobs[name].output()}"
        assert state == ("FAILED" if code else "COMPLETED")
        assert len(jobs[name].noted()) == restarts + 1
    assert "not requeued: no step" in jobs["no progress"].output()
    assert "not requeued: already requeued 0 times" in jobs["cap"].output()
    both = jobs["stopped"].output()  # one log file for both runs
    assert "attempt 1" in both and "attempt 2" in both and "DUE TO JOB REQUEUE" in both


def test_job_stopped_by_hand_is_not_requeued(submit: Any) -> None:
    by_file, by_scancel = (
        submit(
            "train",
            "--cpu-workers=1",
            "--run_dir=run",
            sbatch=NO_GPU,
            plan=[{"wait": True, "status": STOPPED}],
        )
        for _ in range(2)
    )
    for job in (by_file, by_scancel):
        job.wait_until(job.noted)
    (by_file.folder / "run/stop").touch()
    by_scancel.cluster.run("scancel", str(by_scancel.number))
    by_scancel.wait_until(lambda: "SIGTERM from Slurm" in by_scancel.output())
    by_scancel.wait_until((by_scancel.folder / "run/status.json").exists)  # saved, as the trainer would
    assert by_file.end() == ("FAILED", 75) and by_file.restarts() == 0
    assert by_scancel.end()[0] == "CANCELLED"
    time.sleep(1)
    assert by_scancel.restarts() == 0 and len(by_scancel.noted()) == 1


def test_scancel_after_the_warning_signal_ends_the_job(submit: Any) -> None:
    """While the run is still saving. `scontrol requeue` would restart a cancelled job."""
    job = submit(
        "train", "--cpu-workers=1", "--run_dir=run", sbatch=NO_GPU,
        plan=[{"wait": True, "saves_s": 2, "status": STOPPED}, {"status": COMPLETED}],
    )  # fmt: skip
    job.wait_until(job.noted)
    job.signal()
    job.wait_until((job.folder / "run/stop").exists)
    job.cluster.run("scancel", str(job.number))
    assert job.end()[0] == "CANCELLED"
    assert "stopped at step 7, started at 3; exit code 75" in job.output()
    time.sleep(8)  # a requeued job would begin after 6 s
    assert job.restarts() == 0 and len(job.noted()) == 1


def test_preemption_with_a_grace_time(submit: Any) -> None:
    """Slurm then signals only the tasks; the script requeues the job before the grace time is over."""
    job = submit(
        "train", "--cpu-workers=1", "--run_dir=run", sbatch=[*NO_GPU, "--partition=graceful"],
        plan=[{"wait": True, "status": STOPPED}, {"status": COMPLETED}],
    )  # fmt: skip
    job.wait_until(job.noted)
    everything = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64"]
    urgent = job.cluster.sbatch(*everything, "--output=/dev/null", "--wrap=sleep 1")
    assert job.end(60) == ("COMPLETED", 0), job.output()
    assert job.restarts() == 1
    assert job.cluster.wait(urgent)["JobState"] == "COMPLETED"


@pytest.mark.slow
def test_array_task_is_requeued_alone(submit: Any) -> None:
    """One task's job id is also the array's id: given that id, Slurm would requeue all tasks."""
    job = submit(
        "train", "--cpu-workers=1", "--run_dir=run", sbatch=[*NO_GPU, "--array=1-2"],
        plan=[{"wait": True, "status": STOPPED}, {"status": COMPLETED}],
    )  # fmt: skip
    job.wait_until(lambda: len(job.noted()) == 2)
    tasks = {note["env"]["SLURM_JOB_ID"]: note["env"]["SLURM_ARRAY_TASK_ID"] for note in job.noted()}
    first = tasks.pop(str(job.number))
    (other,) = tasks.values()
    (job.folder / f"run/seed-{other}/stop").touch()
    job.cluster.run("scancel", "--batch", "--signal=USR1", f"{job.number}_{first}")
    job.wait_until(lambda: len(job.noted()) == 3)
    assert job.noted()[2]["env"]["SLURM_ARRAY_TASK_ID"] == first and job.noted()[2]["life"] == 1
    job.wait_until(lambda: job.output().count("exit code 0") == 1)
    time.sleep(1)
    assert len(job.noted()) == 3


@pytest.mark.slow
def test_signal_before_the_trainer_starts_is_not_lost(submit: Any, options: Any, tmp_path: Path) -> None:
    """While the environment is set up, here by a virtual environment that is slow to activate."""
    folder = tmp_path / "early"
    (folder / ".venv/bin").mkdir(parents=True)
    slow = (
        f"touch loading; for i in 1 2 3 4 5; do sleep 0.2; done; PATH={Path(sys.executable).parent}:$PATH\n"
    )
    (folder / ".venv/bin/activate").write_text(slow)
    (folder / "run").mkdir()
    (folder / "run/stop").touch()  # left by an earlier job; must not affect this one
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    job = submit(
        "train", "--cpu-workers=1", *arguments, "--run_dir=run", sbatch=NO_GPU, folder=folder, VIRTUAL_ENV=""
    )  # fmt: skip
    job.wait_until((folder / "loading").exists)
    job.signal()
    assert job.end(60) == ("FAILED", 75), job.output()
    assert "stopped at step 0: the file run/stop" in job.output() and "no step was completed" in job.output()


NAMES = {
    "blanks": "a b  c ",
    "quotes": 'it\'s a "name" \\ `touch pwned`',
    "shell": "x; touch pwned $(touch pwned) & | > pwned # ${HOME} *",
    "newline": "x\ntouch pwned\n#SBATCH --comment=pwned",
    "foreign": "naïve 実験 ☃",
    "long": "n" * 5000,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_hostile_names_are_passed_verbatim(name: str, submit: Any, tmp_path: Path) -> None:
    """As job name, run folder, option and value: they arrive unchanged, and nothing is executed."""
    run_dir = name[:200]
    job = submit(
        "train", "--cpu-workers", "2", "--config", name, "--run_dir", run_dir, f"--data.train={name}", name,
        sbatch=[*NO_GPU, f"--job-name={name[:1000]}"], plan=[{"status": COMPLETED}],
    )  # fmt: skip
    assert job.end(30) == ("COMPLETED", 0), job.output()
    (note,) = job.noted()
    command = note["argv"][note["argv"].index("plainloop.trainer") :]
    assert command[1:] == [
        "train", "--config", name, f"--data.train={name}", name, "--device", "cpu", "--run_dir", run_dir,
    ]  # fmt: skip
    assert (job.folder / run_dir / "status.json").exists()
    assert not list(tmp_path.rglob("pwned"))


def test_hostile_node_list_is_rejected(cluster: Any, tmp_path: Path) -> None:
    line = ["sbatch", "--nodelist=n1;touch pwned", "--wrap=true"]
    assert cluster.run(*line, check=False, cwd=tmp_path).returncode != 0
    hostile = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "x; touch pwned $(touch pwned)",
        "SLURM_JOB_NUM_NODES": "1",
    }
    script = ["bash", str(ROOT / "launch/train.sbatch"), "--cpu-workers=1", "--run_dir=run"]
    done = cluster.run(*script, check=False, cwd=tmp_path, env=cluster.env | hostile)
    assert done.returncode == 2 and "does not know the nodes" in done.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_processes_and_environment(submit: Any, tmp_path: Path) -> None:
    scratch = str(tmp_path)
    gpus = submit(
        "train", "--run_dir", "run", "--seed", "1", plan=[{"status": COMPLETED}], SLURM_TMPDIR=scratch,
        sbatch=["--nodes=2", "--gpus-per-node=2", "--array=3,5"],
    )  # fmt: skip
    ranks = submit(
        "evaluate", "--launcher", "srun", "--cpu-workers=3", "--model", "m", plan=[{}],
        sbatch=["--nodes=2", *NO_GPU],
    )  # fmt: skip
    on_gpus = submit("train", "--launcher=srun", "--run_dir=r", sbatch=["--gpus-per-node=2"], plan=[{}])
    on_gpus.wait_until(lambda: len(on_gpus.noted()) == 2)
    assert {note["env"]["RANK"] for note in on_gpus.noted()} == {"0", "1"}
    ranks.wait_until(lambda: len(ranks.noted()) == 6)
    gpus.wait_until(lambda: len(gpus.noted()) == 4)
    for note in gpus.noted():  # two array tasks, on two nodes each
        argv, seed, env = note["argv"], note["env"]["SLURM_ARRAY_TASK_ID"], note["env"]
        job = int(env["SLURM_JOB_ID"])
        assert argv[:2] == ["-m", "torch.distributed.run"] and {"--nnodes=2", "--nproc-per-node=2"} <= set(
            argv
        )
        assert f"--rdzv-endpoint=n1:{20000 + job % 10000}" in argv and f"--rdzv-id={job}-0" in argv
        assert argv[-8:-6] == ["--seed", "1"] and argv[-4:] == [
            "--seed",
            seed,
            "--run_dir",
            f"run/seed-{seed}",
        ]
        assert argv[argv.index("--device") + 1] == "cuda" and env["TMPDIR"] == scratch
        assert env["HF_HUB_OFFLINE"] == "1" and int(env["SLURM_JOB_END_TIME"]) > time.time() + 3600
    assert {note["env"]["SLURM_ARRAY_TASK_ID"] for note in gpus.noted()} == {"3", "5"}
    assert sorted(int(note["env"]["RANK"]) for note in ranks.noted()) == [0, 1, 2, 3, 4, 5]
    assert sorted(note["env"]["LOCAL_RANK"] for note in ranks.noted()) == ["0", "0", "1", "1", "2", "2"]
    assert {note["env"]["WORLD_SIZE"] for note in ranks.noted()} == {"6"}
    assert ranks.noted()[0]["env"]["MASTER_ADDR"] == "n1"
    assert ranks.noted()[0]["argv"][:3] == ["-m", "plainloop.trainer", "evaluate"]


def test_invalid_usage_is_rejected(submit: Any) -> None:
    cases = {
        "--run_dir FOLDER is missing": ["--cpu-workers=1"],
        "no GPU: pass sbatch": ["--run_dir=run"],
        "--launcher mpi: must be": ["--run_dir=run", "--cpu-workers=1", "--launcher", "mpi"],
        "--max-requeues x: not": ["--run_dir=run", "--cpu-workers=1", "--max-requeues=x"],
    }
    jobs = {text: submit("train", *line, sbatch=NO_GPU, plan=[{}]) for text, line in cases.items()}
    for text, job in jobs.items():
        assert job.end(30) == ("FAILED", 2) and text in job.output() and not job.noted()
    alone = subprocess.run(["bash", ROOT / "launch/train.sbatch"], capture_output=True, text=True)
    assert alone.returncode == 2 and "this is a batch script" in alone.stderr
