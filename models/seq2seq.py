"""Text-to-text models (any AutoModelForSeq2SeqLM): logits at the scored positions, loss, generation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plainloop.data.errors import InputError
from plainloop.data.types import IGNORE_INDEX
from plainloop.models.cpu_dropout import MASK_TAKEN_AS_IT_IS
from plainloop.models.families import extra_inputs
from plainloop.models.load import OVERFLOWS_IN_FP16, load_config, load_network

SPECIAL_TOKENS = [
    f"{name}_token_id" for name in ("decoder_start", "bos", "eos", "pad", "forced_bos", "forced_eos")
]
# Model families that use the source mask only in attention. As bool (B, 1, 1, S), it saves a host sync.
PLAIN_ATTENTION = {"t5", "mt5", "umt5", "bart", "mbart"}


class Seq2SeqModel(nn.Module):
    """A transformers *ForConditionalGeneration network that returns only logits.

    The projection to the vocabulary, the most expensive part of the decoder for short targets, is computed
    only at the scored positions: a pre-hook selects them from the input of the output embedding.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._scored: Tensor | None = None
        head = network.get_output_embeddings()
        if isinstance(head, nn.Embedding):  # FSMT: the decoder's input embedding
            head = network.get_decoder().output_projection
        head.register_forward_pre_hook(self._pick)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, scored: Tensor
    ) -> Tensor:
        """input_ids, attention_mask (B, S); decoder_input_ids (B, T); scored (K,): positions in B * T.

        Returns logits (K, V) in the precision of the network.
        """
        visible = attention_mask
        config = self.network.config
        if config.model_type in PLAIN_ATTENTION and config._attn_implementation in MASK_TAKEN_AS_IT_IS:
            visible = (attention_mask != 0)[:, None, None, :]  # as in spans.py
        self._scored = scored
        try:
            output = self.network(
                input_ids=input_ids,
                attention_mask=visible,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
                return_dict=True,
                **extra_inputs(config, input_ids),
            )
        finally:
            self._scored = None
        logits: Tensor = output.logits[0]
        return logits

    def gather(self) -> None:
        """Does nothing by itself. To FSDP it is a forward pass, without the blocks."""

    def _pick(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """(B, T, D) -> (1, K, D); unchanged while generating."""
        if self._scored is None:
            return None
        hidden = arguments[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._scored).unsqueeze(0),)


def load_seq2seq_model(
    path: str, *, dropout: float | None = None, attention: str | None = None
) -> Seq2SeqModel:
    """Load from a folder or hub name. dropout overrides the config. Raises InputError."""
    from transformers import AutoModelForSeq2SeqLM

    overrides: dict[str, Any] = {}
    if dropout is not None:
        config = load_config(path)
        inner = config.encoder if config.model_type == "encoder-decoder" else config
        names = ("dropout_rate", "dropout", "hidden_dropout_prob")
        overrides = {next((name for name in names if hasattr(inner, name)), names[1]): dropout}
    network = load_network(AutoModelForSeq2SeqLM, path, attention=attention, **overrides)
    if network.generation_config.decoder_start_token_id is None:
        network.generation_config.decoder_start_token_id = start_token(network.config, path)
    return Seq2SeqModel(network)


def start_token(config: Any, path: str) -> int:
    """The decoder's start token: the config's, or T5's or T5Gemma's convention. Raises InputError."""
    token = getattr(config, "decoder_start_token_id", None)
    if token is None and config.model_type in ("t5gemma", "t5gemma2"):
        token = config.decoder.bos_token_id
    if token is None and config.model_type in OVERFLOWS_IN_FP16:  # T5 family: <pad>
        token = config.pad_token_id
    if token is None:
        raise InputError(f"model.path {path}: its config.json has no decoder_start_token_id; add it.")
    if config.model_type == "encoder-decoder" and config.eos_token_id is None:
        raise InputError(f"model.path {path}: its config.json has no eos_token_id; add it, or no text ends.")
    return int(token)


def token_loss_sum(logits: Tensor, labels: dict[str, Tensor], *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, summed over the target tokens of the micro-batch; fp32 scalar.

    logits: (K, V); labels target: (K,), IGNORE_INDEX for ignored ones. label_smoothing e: the target
    distribution is (1 - e) on the label plus e / V on every token (Szegedy et al. 2016).
    """
    return functional.cross_entropy(
        logits.float(),
        labels["target"],
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def generate(
    model: Seq2SeqModel,
    inputs: dict[str, Tensor],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    lockstep: bool = False,
) -> Tensor:
    """Greedy or beam search: (B, T) ids without the start token, padded after the end of each row.

    lockstep: the model is sharded by FSDP; all ranks call this, and decode as long as any of them does.

    Stops when all rows have ended. The model's own generation config, such as sampling or the minimum length
    of a summary, is ignored except for its special tokens.
    """
    from transformers import GenerationConfig

    # On a shallow copy: a checkpoint with the network's own config may be being written right now.
    network = copy.copy(model.network)
    network.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        **{name: getattr(network.generation_config, name) for name in SPECIAL_TOKENS},
    )
    source, mask = inputs["input_ids"], inputs["attention_mask"]
    extra = extra_inputs(network.config, source)
    with _unsharded(model) if lockstep else contextlib.nullcontext():
        ids: Tensor = network.generate(input_ids=source, attention_mask=mask, synced_gpus=lockstep, **extra)
    return ids[:, 1:]


@contextlib.contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    """Gather the parameters outside the blocks (embeddings, norms): `generate` does not call model.forward,
    which would. The blocks gather their own.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    if "gather" not in vars(model):
        register_fsdp_forward_method(model, "gather")
    model.gather()
    try:
        yield
    finally:
        model.reshard()


def sequence_log_probs(model: Seq2SeqModel, inputs: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Log-probability of each generated sequence (B, T), including its end token: (B,) fp32."""
    config = model.network.generation_config
    before = torch.cat([torch.full_like(ids[:, :1], config.decoder_start_token_id), ids[:, :-1]], dim=1)
    everywhere = torch.arange(ids.numel(), device=ids.device)
    logits = model(inputs["input_ids"], inputs["attention_mask"], before, everywhere).float()
    each = functional.cross_entropy(logits, ids.reshape(-1), reduction="none").view_as(ids)
    return -(each * (ids != config.pad_token_id)).sum(dim=1)
