"""All user options: frozen dataclasses, one per concern, set by a YAML file and dotted overrides.

Names that are Python keywords end in an underscore here (`async_`), but not in YAML or on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from plainloop.trainer.config.model_options import ModelConfig, ParallelConfig, PeftConfig
from plainloop.trainer.config.option import option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and evaluation data."""

    train: list[str] | str | None = option(
        None,
        "training data: SQuAD or MRQA JSON, JSONL, CSV, TSV, Parquet, Label Studio's JSON, or a folder saved"
        " by `datasets`; a file, a quoted pattern, a folder, or a list; with task text also CausalQA",
    )
    dev: list[str] | str | None = option(
        None, "evaluation data, in the same formats; without it, nothing is evaluated"
    )
    columns: dict[str, str] = option(
        dict,
        "columns of your data, for those of question, context, answer, answer_start and id that have other"
        ' names: "{question: query, context: passage}"',
    )
    ambiguous: Literal["error", "skip", "first"] = option(
        "error",
        "an answer without answer_start that occurs several times in its context, or not at all: stop with an"
        " error, leave the record out, or use the first occurrence",
    )
    limit: int | None = option(
        None, "train on this many random questions, the same for every seed", minimum=1
    )
    max_length: int = option(384, "tokens per window, including the question")
    stride: int = option(128, "overlap of neighbouring windows, in tokens")
    bucket: int = option(
        50, "sort by length within chunks of bucket x batch_size rows; 0: no sorting", minimum=0
    )
    num_widths: int = option(
        0,
        "for model.compile: pad to at most this many lengths, chosen to pad least; 0: to a multiple of 8",
        minimum=0,
    )
    cache_dir: str | None = option(
        None, "cache for tokenised data and compiled code; default: $PLAINLOOP_CACHE or ~/.cache/plainloop"
    )
    processes: int | None = option(None, "processes for tokenising; default: the cores this process may use")
    workers: int = option(
        0, "data loader workers per rank; building a batch is cheap, so 0 is often best", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Task text only: input format, targets and generation."""

    dataset: str | None = option(None, "CausalQA folder: the data set (eli5, gooaq, hotpotqa, msmarco, ...)")
    split: Literal["original", "random"] = option("original", "CausalQA folder: the split")
    format: Literal["t5", "unifiedqa"] = option(
        "t5", "SQuAD input format; t5: 'question: Q context: C', unifiedqa: 'q \\n c' lower-cased"
    )
    null_target: str = option("", "SQuAD: target text of unanswerable questions, e.g. '<no answer>'")
    target: Literal["first", "most_frequent", "each"] = option(
        "first", "reference to train on; each: one row per reference"
    )
    target_column: Literal["answer", "answer_processed"] = option("answer", "CausalQA: column of the targets")
    max_source_length: int = option(
        1024, "source tokens; longer contexts are truncated, questions never", minimum=1
    )
    max_target_length: int = option(100, "target tokens, in training", minimum=1)
    stride: int = option(
        128, "SQuAD evaluation: overlap, in tokens, of the windows of a long context", minimum=0
    )
    label_smoothing: float = option(
        0.0, "label smoothing in training, over target tokens only", minimum=0, below=1
    )
    max_new_tokens: int | None = option(
        None, "maximum number of generated tokens; default: 100, SQuAD: 32", minimum=1
    )
    num_beams: int = option(1, "beam size; 1: greedy decoding", minimum=1)
    generate: int | None = option(
        None,
        "number of examples to generate per evaluation during training; default: all; 0: none",
        minimum=0,
    )


# Bytes of optimizer state per trained parameter. In 8 bits, 256 numbers share a scale. Adafactor has a few
# per row and column.
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "adafactor": 0.0}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate schedule and gradient clipping."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = option(
        "adamw",
        "adamw8bit: moments in 8 bits, a quarter of the memory; adafactor: for T5, with lr 1e-3 and schedule"
        " constant",
    )
    lr: float = option(3e-5, "peak learning rate", above=0)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "learning rate after the warm-up")
    warmup: float = option(0.1, "warm-up steps; below 1: fraction of all steps", minimum=0)
    weight_decay: float = option(0.01, "not applied to biases and norm weights", minimum=0)
    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay rates of AdamW's two moments", minimum=0, below=1
    )
    eps: float = option(1e-8, "added to AdamW's denominator", above=0)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0: no clipping", minimum=0)
    max_nonfinite_steps: int = option(10, "abort after this many NaN/Inf steps in a row; 0: never", minimum=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How, and how often, to evaluate the dev data."""

    every_steps: int | None = option(
        None, "steps between evaluations; default: once per epoch; 0: only at the end", minimum=0
    )
    tokens_per_device: int | None = option(
        None, "padded tokens per batch; default: twice that of training", minimum=1
    )
    max_answer_length: int = option(30, "maximum length of an answer, in tokens", minimum=1)
    null_threshold: float = option(0.0, "predict '' if null score - best score exceeds this")
    num_best: int = option(0, "candidates per question in nbest_predictions.json; 0: no such file", minimum=0)
    metric: Literal["squad", "mlqa"] = option(
        "squad", "how answers are compared: by SQuAD's rules for English, or by MLQA's for the language"
    )
    language: Literal["ar", "de", "en", "es", "hi", "vi", "zh"] = option(
        "en", "with metric mlqa: language of the answers"
    )
    best_metric: str = option("f1", "metric for RUN/best; higher is better unless its name ends in 'loss'")
    early_stopping: int = option(
        0, "stop after this many evaluations without an improvement of best_metric; 0: never", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints, and which to keep."""

    every_steps: int | None = option(
        None, "steps between checkpoints; default: once per epoch; 0: only at the end", minimum=0
    )
    keep_last: int = option(2, "number of latest checkpoints to keep, besides the best", minimum=1)
    keep_optimizer: Literal["all", "last"] = option(
        "all", "last: a checkpoint kept only as the best has no optimizer state; a run can't resume from it"
    )
    async_: bool = option(True, "write in the background, from a copy in host memory")
    grace_s: float = option(
        30, "grace period from signal to kill (Slurm, torchrun: 30); warn if a stop takes longer", above=0
    )
    allow_changes: list[str] = option(list, "options allowed to differ from the checkpoint on resume")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging."""

    every_steps: int = option(10, "steps between log lines on the console and in metrics.jsonl", minimum=1)
    tensorboard: bool = option(True, "write event files to RUN/tensorboard")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train, or resume the run in run_dir. batch_size is global: it is split over ranks and micro-batches.

    Example:
        plainloop train --config launch/recipes/roberta-squad2.yaml --run_dir runs/squad \\
            --data.train train-v2.0.json --data.dev dev-v2.0.json
    """

    run_dir: str = option("runs/default", "run folder; an existing run in it is resumed")
    task: str = option(
        "span",
        "span: extractive, with an encoder; text: generative, with T5, BART or similar; or a class of your"
        " own, as module:Class (see CONTRIBUTING.md)",
    )
    hooks: list[str] = option(
        list, "hooks of your own, called between steps, as [module:name, ...]; a class is instantiated"
    )
    batch_size: int = option(32, "rows per optimizer step, over all ranks", minimum=1)
    tokens_per_device: int | None = option(
        None,
        "padded tokens per micro-batch; default: 8192 (CPU: 4096); does not change the loss curve",
        minimum=1,
    )
    epochs: int = option(2, "passes over the training data", minimum=1)
    max_steps: int | None = option(
        None, "train for at most this many steps, instead of all `epochs`", minimum=1
    )
    stop_at_step: int | None = option(
        None, "stop at this step with a checkpoint to resume from; does not change the schedule", minimum=0
    )
    seed: int = option(42, "seed for the data order, dropout and a new head", minimum=0)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "autocast dtype; weights and optimizer state are fp32. auto: bf16 if the hardware supports it; else"
        " fp32, or fp16 on a GPU for models that don't overflow in it; a resumed run keeps its precision",
    )
    tf32: bool = option(True, "with fp32 on a GPU: multiply matrices in TF32, several times as fast")
    deterministic: bool = option(
        False, "on a GPU: use only bitwise deterministic algorithms, which are slower"
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "auto: a GPU if there is one")
    start_timeout_s: int = option(
        1800, "abort after this many seconds without progress, until the first step is done", minimum=1
    )
    timeout_s: int = option(
        600, "the same after the first step; must exceed anything that rank 0 does alone", minimum=1
    )
    compare_every_steps: int = option(
        500,
        "steps between checks that all ranks have equal weights and data order; 0: only at the end",
        minimum=0,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)

    def max_tokens(self, device_type: str) -> int:
        """Padded tokens of a micro-batch on a device of this type."""
        return self.tokens_per_device or {"cuda": 8192, "cpu": 4096}.get(device_type, 8192)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return min(self.max_steps or 2**62, self.epochs * steps_per_epoch)
