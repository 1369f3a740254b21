"""Try every model of transformers' tables: python tests/helpers/matrix.py > docs/models.md"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.auto import modeling_auto as tables

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.architectures import config_of  # noqa: E402

from plainloop.data.errors import InputError  # noqa: E402
from plainloop.models.families import (  # noqa: E402
    REFUSED,
    UNUSED_PARAMETERS,
    input_limit,
    span_limit,
)
from plainloop.models.on_meta import read_weights, weights_later  # noqa: E402
from plainloop.models.spans import span_class  # noqa: E402
from plainloop.trainer.config.options import TrainConfig  # noqa: E402
from plainloop.trainer.config.parse import from_dict  # noqa: E402
from plainloop.trainer.distributed.parallel import first_row, local  # noqa: E402
from plainloop.trainer.distributed.world import World  # noqa: E402
from plainloop.trainer.run import train  # noqa: E402
from plainloop.trainer.run_folder.tensors import open_pretrained  # noqa: E402
from plainloop.trainer.tasks import base as tasks  # noqa: E402
from plainloop.trainer.tasks.find import find_task  # noqa: E402
from plainloop.trainer.tasks.model import load_model  # noqa: E402

QUESTION_ANSWERING = sorted(tables.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES)
TOKEN_CLASSIFICATION = sorted(
    set(tables.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES) - set(QUESTION_ANSWERING)
)
TEXT_TO_TEXT = sorted(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
NOT_TEXT = {  # their source is audio
    "audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moss_transcribe_diarize",
    "musicflamingo", "nemo_speechlm", "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral",
    "voxtral_realtime",
}  # fmt: skip
SCALE = 4  # of random weights
# Their logits depend on the padding, or on the rest of the batch, by how they are made.
NOT_INVARIANT = {
    "convbert": "convolutions run over the padding",
    "fnet": "a Fourier transform mixes all positions, padding included",
    "nystromformer": "a convolution runs over the padding",
    "yoso": "its sampled attention ignores the mask",
}
# transformers renames or joins their weights while it loads them; we read them by rows, as they are.
NOT_SHARDED = {
    "axk1", "axk2", "gte", "jina_embeddings_v3", "minimax", "mixtral", "nomic_bert", "qwen2_moe",
    "qwen3_moe", "qwen3_next", "t5gemma2", "ultrabert",
}  # fmt: skip
WORDS = (
    "who what when built moved saw found the a old stone bridge mill tower ada bob eve in on it 1702".split()
)


def write_tokenizer(folder: Path, pad: int) -> None:
    """Whole words, with CLS and SEP. pad: the id of the padding token, 0 to 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[UNK]", "[CLS]", "[SEP]"]
    special.insert(pad, "[PAD]")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **names, eos_token="[SEP]"
    )
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    fast.save_pretrained(folder)


def write_data(folder: Path) -> Path:
    """24 questions on contexts of 10 to 30 words; a third without an answer."""
    random, paragraphs = np.random.default_rng(0), []
    for number in range(24):
        words = list(random.choice(WORDS, size=random.integers(10, 30)))
        at = int(random.integers(len(words)))
        answer = {"text": words[at], "answer_start": len(" ".join(words[:at])) + (at > 0)}
        question = {
            "id": str(number),
            "question": "who " + " ".join(words[:2]),
            "answers": [answer][: number % 3],
        }
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    path = folder / "data.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


@dataclasses.dataclass
class Case:
    """A tiny model in a folder, and how to train it."""

    kind: str
    text: bool
    folder: Path

    @property
    def model_path(self) -> Path:
        return self.folder / "model"

    @property
    def path(self) -> str:
        return str(self.model_path)

    def write(self) -> None:
        """The tokenizer, the data and the model with random weights."""
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        self.model_path.mkdir(parents=True)
        write_data(self.folder)
        if self.kind in REFUSED or (self.text and self.kind in NOT_TEXT):  # some can't even be made
            write_tokenizer(self.model_path, 0)
            AutoConfig.for_model(self.kind).save_pretrained(self.model_path)
            return
        config = config_of(self.kind, self.text)
        padding = getattr(config if self.text else config.get_text_config(), "pad_token_id", None) or 0
        write_tokenizer(self.model_path, padding)
        config.sep_token_id = 2 if padding == 3 else 3
        auto = AutoModelForSeq2SeqLM if self.text else span_class(config, str(self.model_path))
        torch.manual_seed(0)
        model = auto.from_config(config)
        with torch.no_grad():  # else all but the embeddings adds next to nothing, and no fault shows
            for parameter in model.parameters():
                parameter.mul_(SCALE if parameter.dim() > 1 else 1)
        model.save_pretrained(self.model_path)

    def config(self, run: str, **changes: Any) -> TrainConfig:
        data = str(self.folder / "data.json")
        values: dict[str, Any] = {
            "run_dir": str(self.folder / run), "task": "text" if self.text else "span", "batch_size": 8,
            "tokens_per_device": 200, "max_steps": 3, "precision": "fp32", "device": "cpu",
            "compare_every_steps": 0, "model": {"path": str(self.model_path)},
            "data": {
                "train": data, "dev": data, "cache_dir": str(self.folder / "cache"), "processes": 1,
                **({} if self.text else {"max_length": 48, "stride": 8}),
            },
            "checkpoint": {"every_steps": 1, "keep_last": 3}, "log": {"tensorboard": False},
            "evaluation": {"every_steps": 0, "best_metric": "loss"}, "optim": {"lr": 1e-3},
        }  # fmt: skip
        if self.text:
            limits = {"max_source_length": 48, "max_target_length": 8, "max_new_tokens": 4}
            values["text"] = {**limits, "null_target": "it"}
        return from_dict(TrainConfig, {**values, **changes})

    def loaded(self, path: Path | None = None) -> tuple[Any, Any, Any]:
        """(task, dataset, model in evaluation mode)."""
        config, world = self.config("unused"), World(0, 1, 0, torch.device("cpu"))
        task = find_task(config.task)(config)
        data = tasks.load_split(task, "train", config.data.train or "", config, world)
        return (
            task,
            data,
            load_model(task, str(path or self.model_path), config, world, new_head=True).eval(),
        )


def check(kind: str, text: bool, folder: Path) -> dict[str, Any]:
    """All that is promised, for one family, or {"refused": reason}. Raises AssertionError."""
    case = Case(kind, text, folder)
    try:
        case.write()
        task, data, model = case.loaded()
    except InputError as error:
        assert str(error).count("\n") == 0 and str(case.model_path) in str(error)
        reason = str(error).partition(f"{case.model_path}: ")[2]
        return {"refused": (reason.partition(": it ")[2] or reason).rstrip(".")}
    assert kind not in REFUSED
    found = {
        "padding": padding_difference(task, data, model),
        "gradient": gradient_difference(task, data, model),
    }
    try:
        assert reads_by_rows(case, model) and kind not in NOT_SHARDED
    except InputError as error:
        assert kind in NOT_SHARDED and "use --parallel ddp" in str(error)
    train(case.config("run"))
    found["resumed"] = resumes_to_the_same_bits(case)
    found["reloaded"] = reload_difference(case)
    metrics = json.loads((case.folder / "run/evaluation/metrics.json").read_text())
    assert metrics["total"] == 24 and np.isfinite(metrics["loss"])
    config = model.network.config
    found["limit"] = min(input_limit(config), 2**31) if text else span_limit(config)
    found["class"] = type(model.network).__name__
    return found


def reads_by_rows(case: Case, model: Any) -> bool:
    """Whether a model that is built without weights and reads them later, as for sharding, is the same."""
    task, weights = find_task(case.config("unused").task)(case.config("unused")), open_pretrained(case.path)
    with weights_later(weights):
        later: Any = task.load_model(case.path)
    read_weights(later.network, weights, torch.device("cpu"), first_row=first_row, local=local)
    one, two = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, later))
    head = {f"network.{name}" for name in model.network.new_parameters}
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one.keys() - head)


def padding_difference(task: Any, data: Any, model: Any) -> float:
    """Largest difference of a logit, in standard deviations, when rows get 4 or 12 positions of padding."""
    batch = task.collate(data.store)(np.arange(8))
    pad = task.tokenizer.pad_token_id
    visible = batch.inputs["attention_mask"] != 0
    difference = 0.0
    for width in (4, 12):
        inputs = dict(batch.inputs)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in inputs:
                more = torch.full((8, width), pad if name == "input_ids" else 0)
                inputs[name] = torch.cat([inputs[name], more], dim=1)
        with torch.no_grad():
            short, long = model(**batch.inputs), model(**inputs)
        if "scored" not in inputs:
            short, long = short[visible], long[:, : visible.shape[1]][visible]
        difference = max(difference, float((short - long).abs().max() / short.std()))
    return difference


def gradient_difference(task: Any, data: Any, model: Any) -> float:
    """Relative difference of the gradients of eight rows as one micro-batch and as two."""

    def gradient(parts: list[np.ndarray]) -> torch.Tensor:
        model.zero_grad()
        for rows in parts:
            batch = task.collate(data.store)(rows)
            task.loss_sum(model(**batch.inputs), batch.labels).backward()
        without = any(p.grad is None for p in model.parameters())
        assert without == (model.network.config.model_type in UNUSED_PARAMETERS)  # DDP has to know
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    rows = np.argsort(data.store.lengths[:8])
    one, two = gradient([rows]), gradient([rows[:4], rows[4:]])
    assert one.isfinite().all() and one.norm() > 0
    return float((one - two).norm() / one.norm())


def resumes_to_the_same_bits(case: Case) -> bool:
    """Continue a copy of the run from its second step; compare the files of its third."""
    shutil.copytree(case.folder / "run", case.folder / "again", symlinks=True)
    shutil.rmtree(case.folder / "again/checkpoints/step-00000003")
    train(case.config("again"))
    one, two = (case.folder / run / "checkpoints/step-00000003" for run in ("run", "again"))
    names = ["optimizer.safetensors", *sorted(file.name for file in one.glob("model*.safetensors"))]
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def reload_difference(case: Case) -> float:
    """Largest difference between our logits and those of the class that transformers loads by itself."""
    from transformers import AutoModelForSeq2SeqLM

    path = case.folder / "run/checkpoints/step-00000003"
    task, data, model = case.loaded(path)
    auto = AutoModelForSeq2SeqLM if case.text else span_class(model.network.config, str(path))
    plain = type(model)(auto.from_pretrained(path, dtype=torch.float32)).eval()
    inputs = task.collate(data.store)(np.arange(8)).inputs
    with torch.no_grad():
        return float((model(**inputs) - plain(**inputs)).abs().max())


def families() -> Iterator[tuple[str, bool]]:
    yield from ((kind, False) for kind in [*QUESTION_ANSWERING, *TOKEN_CLASSIFICATION])
    yield from ((kind, True) for kind in TEXT_TO_TEXT)


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for kind, text in families():
        with tempfile.TemporaryDirectory() as folder:
            results[kind, text] = check(kind, text, Path(folder))
        print(f"{kind}: {results[kind, text]}", file=sys.stderr)
    from helpers.models_page import page

    print(page(results), end="")


if __name__ == "__main__":
    main()
