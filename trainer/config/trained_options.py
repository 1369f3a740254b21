"""Options of the commands for trained models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from plainloop.trainer.config.option import option


@dataclass(frozen=True, kw_only=True)
class ScoreTextConfig:
    """Text models only: overrides of the options that the model was trained with."""

    dataset: str | None = option(None, "CausalQA folder: the data set")
    split: Literal["original", "random"] | None = option(None, "CausalQA folder: the split")
    format: Literal["t5", "unifiedqa"] | None = option(None, "SQuAD input format")
    null_target: str | None = option(None, "SQuAD: target text of unanswerable questions")
    max_source_length: int | None = option(None, "source tokens")
    stride: int | None = option(None, "overlap, in tokens, of the windows of a SQuAD context")
    max_new_tokens: int | None = option(None, "maximum number of generated tokens")
    num_beams: int | None = option(None, "beam size; 1: greedy decoding")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score a checkpoint or a predictions file offline, with the official SQuAD or CausalQA metrics.

    Example:
        plainloop evaluate --model runs/squad --data dev-v2.0.json --out_dir scores
    """

    summary: list[str] | None = option(
        None, "score nothing; print mean and standard deviation over these run folders (or --out_dir folders)"
    )
    data: list[str] | str | None = option(
        None, "the questions and answers: a file, a quoted pattern, a folder or a list, as in train"
    )
    columns: dict[str, str] = option(
        dict, 'columns of the data with other names, as in train: "{question: query, context: passage}"'
    )
    ambiguous: Literal["error", "skip", "first"] = option(
        "error", "with --model, what to do with an answer that can't be located, as in train"
    )
    model: str | None = option(None, "checkpoint folder, run folder (uses its best checkpoint), or Hub name")
    base: str | None = option(None, "base model of a model with adapters; default: where it was in training")
    task: str | None = option(
        None,
        "of the model; default: as it was trained. A task of your own must be named here: its code is run",
    )
    predictions: str | None = option(
        None, "score this file instead of a model: {id: text}, or for CausalQA a list of texts in row order"
    )
    null_odds: str | None = option(
        None, "file {id: score} to go with predictions, for the metrics best_* and pr_*"
    )
    na_prob_thresh: float = option(
        1.0, "with null_odds: a question with a higher score counts as predicted unanswerable"
    )
    metric: Literal["squad", "mlqa"] = option(
        "squad", "how answers are compared: by SQuAD's rules for English, or by MLQA's for the language"
    )
    language: Literal["ar", "de", "en", "es", "hi", "vi", "zh"] = option(
        "en", "with metric mlqa: language of the answers"
    )
    strict: bool = option(False, "treat an id without a prediction as an error, not as an empty prediction")
    out_dir: str | None = option(None, "output folder for metrics.json and the files with the predictions")
    max_length: int | None = option(None, "tokens per window; default: as in training, else 384")
    stride: int | None = option(
        None, "overlap of neighbouring windows, in tokens; default: as in training, else 128"
    )
    max_answer_length: int = option(30, "maximum length of an answer, in tokens")
    null_threshold: float | Literal["calibrated"] = option(
        0.0,
        "predict '' if null score - best score exceeds this; calibrated: as plainloop calibrate has fitted",
    )
    num_best: int = option(20, "candidates per question in nbest_predictions.json; 0: no such file")
    tokens_per_device: int = option(8192, "padded tokens per batch")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "under torchrun: each rank holds the whole model (ddp), or a share of it (fsdp)"
    )
    rouge_bootstrap: bool = option(
        False, "CausalQA: report ROUGE-L as the median of 1,000 bootstrap resamples, as published"
    )
    text: ScoreTextConfig = field(default_factory=ScoreTextConfig)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "precision of the forward pass; auto: chosen for this device, as in train"
    )
    tf32: bool = option(True, "with fp32 on a GPU: multiply matrices in TF32")
    device: Literal["auto", "cuda", "cpu"] = option("auto", "device to run the model on")
    cache_dir: str | None = option(
        None, "cache for tokenised data; default: $PLAINLOOP_CACHE or ~/.cache/plainloop"
    )
    timeout_s: int = option(600, "seconds that a rank waits for the others before it aborts")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Answer questions with a trained model: one, a file of them, or at a terminal one after another.

    Example:
        plainloop predict --model runs/squad --question "Who built it?" --context page.txt
        plainloop predict --model runs/squad --data questions.jsonl --out answers.jsonl
    """

    model: str | None = option(None, "checkpoint folder, run folder (uses its best checkpoint), or Hub name")
    base: str | None = option(None, "base model of a model with adapters; default: where it was in training")
    question: str | None = option(None, "one question, about --context; the answer is printed as JSON")
    context: str | None = option(None, "a text file, or the text itself")
    data: list[str] | str | None = option(
        None, "questions with contexts, in any format that train reads; answers are not needed"
    )
    columns: dict[str, str] = option(dict, "columns of the data with other names, as in train")
    out: str | None = option(
        None, "JSON lines file for the answers to --data; OUT.part until it is complete, and continued"
    )
    max_length: int | None = option(None, "tokens per window; default: as in training, else 384")
    stride: int | None = option(None, "overlap of neighbouring windows; default: as in training, else 128")
    max_answer_length: int = option(30, "maximum length of an answer, in tokens", minimum=1)
    null_threshold: float | Literal["calibrated"] = option(
        0.0,
        "predict '' if null score - best score exceeds this; calibrated: as plainloop calibrate has fitted",
    )
    num_best: int = option(5, "candidates per question to list", minimum=1)
    text: ScoreTextConfig = field(default_factory=ScoreTextConfig)
    tokens_per_device: int = option(8192, "padded tokens per batch", minimum=1)
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "under torchrun: each rank holds the whole model (ddp), or a share of it (fsdp)"
    )
    processes: int | None = option(
        None, "processes for tokenising; default: the cores this process may use", minimum=1
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "precision of the forward pass; auto: chosen for this device, as in train"
    )
    tf32: bool = option(True, "with fp32 on a GPU: multiply matrices in TF32")
    device: Literal["auto", "cuda", "cpu"] = option("auto", "device to run the model on")
    timeout_s: int = option(600, "seconds that a rank waits for the others before it aborts", minimum=1)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Fit when to answer, and how probable an answer is, on half of the data; report figures of the other.
    The result is kept beside the weights. evaluate and predict use it with --null_threshold calibrated.

    Example:
        plainloop calibrate --model runs/squad --data dev-v2.0.json
    """

    model: str | None = option(None, "checkpoint folder, or run folder (uses its best checkpoint)")
    base: str | None = option(None, "base model of a model with adapters; default: where it was in training")
    data: list[str] | str | None = option(
        None, "questions with answers, in any format that train reads; halved by article"
    )
    columns: dict[str, str] = option(dict, "columns of the data with other names, as in train")
    ambiguous: Literal["error", "skip", "first"] = option(
        "error", "what to do with an answer that can't be located, as in train"
    )
    answer_precision: float | None = option(
        None,
        "answer while this share of the answers is exactly right; default: best F1",
        above=0,
        below=1,
    )
    metric: Literal["squad", "mlqa"] = option("squad", "how answers are compared, as in evaluate")
    language: Literal["ar", "de", "en", "es", "hi", "vi", "zh"] = option("en", "with metric mlqa")
    max_length: int | None = option(None, "tokens per window; default: as in training, else 384")
    stride: int | None = option(None, "overlap of neighbouring windows; default: as in training, else 128")
    max_answer_length: int = option(30, "maximum length of an answer, in tokens", minimum=1)
    tokens_per_device: int = option(8192, "padded tokens per batch", minimum=1)
    processes: int | None = option(
        None, "processes for tokenising; default: the cores this process may use", minimum=1
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "precision of the forward pass; auto: chosen for this device, as in train"
    )
    tf32: bool = option(True, "with fp32 on a GPU: multiply matrices in TF32")
    device: Literal["auto", "cuda", "cpu"] = option("auto", "device to run the model on")
    timeout_s: int = option(600, "seconds that a rank waits for the others before it aborts", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained model into a folder to use and to publish: weights, tokenizer, options, a model card.

    Example:
        plainloop export runs/squad --out models/squad --verify dev-v2.0.json
    """

    run: str | None = option(
        None, "run folder (uses its best checkpoint) or checkpoint folder; the first word"
    )
    out: str | None = option(None, "folder to write")
    onnx: bool = option(
        False, "write model.onnx instead of model.safetensors, for onnxruntime; task span only; extra [onnx]"
    )
    verify: list[str] | str | None = option(
        None, "questions to answer with the checkpoint and with the export; any difference is an error"
    )
    merge: bool = option(
        False, "add the adapters to the weights of their base model: a folder that needs neither it nor PEFT"
    )
    base: str | None = option(None, "base model of a model with adapters; default: where it was in training")
    scores: list[str] = option(list, "folders of evaluate --out_dir whose figures go into the model card")


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload an exported folder to the Hugging Face Hub, where there is internet, after `hf auth login`.

    Example:
        plainloop push models/squad user/roberta-squad
    """

    folder: str | None = option(None, "folder written by plainloop export; the first word")
    repo: str | None = option(None, "USER/NAME on the Hub; the second word")
    private: bool = option(True, "create the repository as a private one")
    message: str = option("Upload with plainloop", "commit message")


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Copy the curves of runs to a tracker, at any time: each value once, however often a run was requeued.

    A second call adds only what is new. Example:
        plainloop track runs/sweep/* --to trackio
    """

    runs: list[str] = option(list, "run folders; the words before the first option")
    to: Literal["tensorboard", "trackio", "wandb", "mlflow"] | None = option(
        None, "the tracker; all but tensorboard need the extra of the same name"
    )
    project: str = option("plainloop", "project, or for mlflow the experiment")
    group: str | None = option(None, "group of the runs; default: the name of the folder that each one is in")
    dir: str | None = option(
        None,
        "where the tracker keeps its files; default: tracking/, for trackio its own folder, for mlflow the"
        " server of MLFLOW_TRACKING_URI if that is set",
    )
