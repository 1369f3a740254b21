"""`plainloop predict`: the answers of evaluate with offsets, files that survive a kill, and clear errors."""

import csv
import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from plainloop.data.errors import InputError
from plainloop.data.readers.examples import read_examples
from plainloop.trainer.cli import main
from plainloop.trainer.trained.predictor import Predictor


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {}


@pytest.fixture
def trained(runs: dict[str, str], options: dict[str, Any], train: Any, tmp_path_factory: Any) -> str:
    """A run on the tiny model, once for all tests."""
    if "span" not in runs:
        runs["span"] = str(tmp_path_factory.mktemp("span") / "run")
        train(run_dir=runs["span"], epochs=6)
    return runs["span"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_texts_of_evaluate_and_right_offsets(trained: str, squad_file: Path, tmp_path: Path) -> None:
    scoring = ["evaluate", "--model", trained, "--data", str(squad_file), "--out_dir", str(tmp_path / "e")]
    assert main(scoring) == 0
    odds = json.loads((tmp_path / "e/null_odds.json").read_text())
    threshold = ["--null_threshold", str(statistics.median(odds.values()))]  # half of them get an answer
    assert main([*scoring, *threshold]) == 0
    out = tmp_path / "answers.jsonl"
    line = ["predict", "--model", trained, "--data", str(squad_file), "--out", str(out)]
    assert main([*line, *threshold]) == 0
    found, examples = lines_of(out), read_examples(squad_file)
    assert [line["id"] for line in found] == [e.id for e in examples]
    assert {line["id"]: line["answer"] for line in found} == json.loads(
        (tmp_path / "e/predictions.json").read_text()
    )
    assert len(found) / 3 < sum(line["answerable"] for line in found) < 2 * len(found) / 3
    for line, example in zip(found, examples, strict=True):
        if line["answerable"]:
            assert example.context[line["start"] : line["end"]] == line["answer"] != ""
            assert line["null_score"] - line["score"] == pytest.approx(odds[line["id"]], abs=1e-4)
        for entry in line["nbest"]:
            assert entry["text"] == "" or example.context[entry["start"] : entry["end"]] == entry["text"]
        assert 0 < sum(entry["probability"] for entry in line["nbest"]) < 1 + 1e-6  # of the 20 best
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["answers.jsonl"]


def test_an_answer_behind_the_first_window_is_found(trained: str, squad_file: Path) -> None:
    predictor = Predictor.from_run(trained, null_threshold=1e9, num_best=1000)
    example = next(e for e in read_examples(squad_file) if e.answers)
    far = "and so on . " * 200 + example.context
    answers = predictor([example.question] * 2, [far, example.context])
    assert isinstance(answers, list) and len(answers) == 2
    assert all(answer["start"] is not None for answer in answers)
    assert max(entry.get("end", 0) for entry in answers[0]["nbest"]) > 2000


def test_calls_from_threads_give_the_same_answers(trained: str, squad_file: Path) -> None:
    predictor = Predictor.from_run(trained)
    examples = read_examples(squad_file)[:6]
    expected = [predictor(e.question, e.context) for e in examples]
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = predictor(examples[i].question, examples[i].context)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(examples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(examples))] == expected


def test_unlabelled_data(trained: str, squad_file: Path, tmp_path: Path) -> None:
    examples = read_examples(squad_file)[:3]
    paragraphs = [{"context": e.context, "qas": [{"id": e.id, "question": e.question}]} for e in examples]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    rows = [{"id": e.id, "query": e.question, "passage": e.context} for e in examples]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = [{"id": e.id, "data": {"question": e.question, "text": e.context}} for e in examples]
    (tmp_path / "studio.json").write_text(json.dumps(tasks))
    for name in ("squad.json", "rows.jsonl", "studio.json"):
        line = [
            "predict",
            "--model",
            trained,
            "--data",
            str(tmp_path / name),
            "--out",
            str(tmp_path / f"{name}.out"),
        ]
        assert main(line) == 0
    answers = [lines_of(tmp_path / f"{name}.out") for name in ("squad.json", "rows.jsonl", "studio.json")]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 3


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_file(trained: str, squad_file: Path, tmp_path: Path) -> None:
    """Killed twice while it writes; a torn last line is cut off. Then on two ranks: the same bytes."""
    examples = read_examples(squad_file)
    rows = [
        {"id": f"{n}-{e.id}", "question": e.question, "context": e.context}
        for n in range(12)
        for e in examples
    ]
    data, out = tmp_path / "many.jsonl", tmp_path / "answers.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    line = [sys.executable, "-m", "plainloop.trainer", "predict", "--model", trained, "--data", str(data)]
    line += ["--precision", "fp32", "--processes", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    partial = out.with_name(out.name + ".part")
    for round_ in range(2):
        before = partial.stat().st_size if partial.exists() else 0
        process = subprocess.Popen([*line, "--out", str(out)], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not partial.exists() or partial.stat().st_size <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert partial.stat().st_size > before, round_
    with open(partial, "ab") as file:
        file.write(b'{"id": "torn')
    done = subprocess.run([*line, "--out", str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "continuing after" in done.stderr, done.stderr
    whole = tmp_path / "whole.jsonl"
    assert subprocess.run([*line, "--out", str(whole)], env=environment).returncode == 0
    assert out.read_bytes() == whole.read_bytes() and len(lines_of(out)) == len(rows)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *line[1:]]
    ranks = tmp_path / "ranks.jsonl"
    subprocess.run([sys.executable, *torchrun, "--out", str(ranks)], env=environment, check=True)
    assert ranks.read_bytes() == whole.read_bytes()


def test_one_process_writes_and_only_the_same_answers_are_continued(
    trained: str, squad_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["predict", "--model", trained, "--data", str(squad_file), "--out", str(tmp_path / "out")]
    with open(tmp_path / "out.part.key", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(line) == 2
        assert "another process is writing it now" in capsys.readouterr().err
    assert main(line) == 0 and main(line) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    copy = tmp_path / "copy"  # other weights under the same name: another answer
    shutil.copytree((Path(trained) / "checkpoints").glob("*").__next__(), copy)
    line[2], line[-1] = str(copy), str(tmp_path / "again")
    assert main(line) == 0
    whole = (tmp_path / "again").read_bytes()
    key = [*map(str, (tmp_path / "again", tmp_path / "again.part"))]
    os.rename(*key)
    assert main(line) == 2  # its key is gone
    assert "was begun with another model" in capsys.readouterr().err
    (tmp_path / "again.part").unlink()
    assert main(line) == 0 and (tmp_path / "again").read_bytes() == whole


def test_the_probability_does_not_depend_on_the_number_listed(trained: str, squad_file: Path) -> None:
    example = read_examples(squad_file)[0]
    found = [Predictor.from_run(trained, num_best=n)(example.question, example.context) for n in (1, 5, 20)]
    assert len({answer["probability"] for answer in found}) == 1
    assert [len(answer["nbest"]) for answer in found] == [2, 6, 21]
    with pytest.raises(InputError, match="num_best is 0"):
        Predictor.from_run(trained, num_best=0)
    with pytest.raises(InputError, match="half of a character"):
        Predictor.from_run(trained)("Who\ud800?", "Ada.")


def test_text_models(
    text_options: dict[str, Any], train: Any, text_files: tuple[Path, Path], tmp_path: Path
) -> None:
    train(**text_options, max_steps=3)
    predictor = Predictor.from_run(text_options["run_dir"])
    found = predictor("why ?", "it is so because of ice")
    assert found.keys() == {"answer", "answerable", "log_probability"} and found["log_probability"] < 0
    assert predictor("why ?", "")["answer"] is not None  # a context is optional

    # CausalQA's own file, and its questions and contexts alone: the texts of evaluate
    run, dev = text_options["run_dir"], str(text_files[1])
    precision = ["--precision", "fp32"]
    assert (
        main(["evaluate", "--model", run, "--data", dev, "--out_dir", str(tmp_path / "e"), *precision]) == 0
    )
    texts = json.loads((tmp_path / "e/results.json").read_text())["predictions"]
    assert main(["predict", "--model", run, "--data", dev, "--out", str(tmp_path / "a"), *precision]) == 0
    assert [line["answer"] for line in lines_of(tmp_path / "a")] == texts
    with open(dev, newline="") as stream:
        rows = list(csv.DictReader(stream))
    asked = [row["question_processed"].upper() for row in rows]  # questions are lower-cased, as in the corpus
    contexts = [row["context_processed"] for row in rows]
    predictor = Predictor.from_run(run, precision="fp32")
    assert [answer["answer"] for answer in predictor(asked, contexts)] == texts


def test_one_question_and_its_context(
    trained: str, squad_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = read_examples(squad_file)[0]
    (tmp_path / "page.txt").write_text(example.context)
    printed = []
    for context in (example.context, str(tmp_path / "page.txt")):
        assert (
            main(["predict", "--model", trained, "--question", example.question, "--context", context]) == 0
        )
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1] and printed[0]["nbest"]


def test_at_a_terminal(trained: str, squad_file: Path, tmp_path: Path) -> None:
    import pty

    example = read_examples(squad_file)[0]
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "plainloop.trainer", "predict", "--model", trained, "--null_threshold", "1e9"],
        stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    os.write(outer, f"{example.context}\n\n{example.question}\n{example.question}\n\n".encode())
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and told.count("[probability") == 2


def test_bad_input_is_one_line(
    trained: str, squad_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(*changes: dict[str, Any]) -> str:
        base = {"id": "1", "question": "Who?", "context": "Ada."}
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(json.dumps({**base, **change}) for change in changes))
        return str(path)

    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "there.jsonl").write_text("")
    data, out = ["--data", str(squad_file)], ["--out", str(tmp_path / "out.jsonl")]
    for options, message in (
        ([], "give --question and --context"),
        (["--question", "Who?"], "belong together"),
        (["--parallel", "fsdp", *data, *out], "parallel fsdp: needs several processes; start with torchrun"),
        (["--question", "", "--context", "Ada."], "the question is empty"),
        (["--question", "Who?", "--context", "  "], "the context is empty"),
        (["--question", "who " * 400, "--context", "Ada."], "the question has 400 tokens"),
        (["--question", "Who?", "--context", str(tmp_path / "binary.txt")], "not UTF-8: not a text file"),
        (data, "belong together"),
        ([*data, *out, "--question", "Who?"], "no effect with --data"),
        ([*data, "--out", str(tmp_path / "there.jsonl")], "this file exists"),
        ([*data, "--out", str(tmp_path / "no/where.jsonl")], "No such file"),
        (["--data", rows({"question": " "}), *out], "the question is empty"),
        (["--data", rows({"context": ""}), *out], "the context is empty"),
        (["--data", rows({"question": "who " * 400}), *out], "id '1': the question has 400 tokens"),
        (["--data", str(tmp_path / "nowhere"), *out], "no such file"),
        (
            ["--text.num_beams", "3", "--question", "Who?", "--context", "Ada."],
            "--text: no effect with task span",
        ),
    ):
        assert main(["predict", "--model", trained, *options]) == 2, options
        errors = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("plainloop: error")
        ]
        assert len(errors) == 1 and message in errors[0], errors
        (tmp_path / "out.jsonl.part").unlink(missing_ok=True)
        (tmp_path / "out.jsonl.part.key").unlink(missing_ok=True)
    assert main(["predict"]) == 2 and "needs --model" in capsys.readouterr().err
    (tmp_path / "out.jsonl.part").write_text("{}\n")
    assert main(["predict", "--model", trained, *data, *out]) == 2
    assert "was begun with another model" in capsys.readouterr().err
    with pytest.raises(InputError, match="2 questions, but 1 contexts"):
        Predictor.from_run(trained)(["a", "b"], ["c"])
