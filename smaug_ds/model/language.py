"""BERT split in two: a text encoder, and a multi-modal encoder that also looks at the frames (SMAUG section 3.1).

Captions come packed: S tokens of all B captions, one caption after the other, without padding.

Letters: B captions, S tokens of all captions together, M visual tokens of one, D width, P texts that look at R frames
of K tokens each, k frames that a text sees.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smaug_ds.model.checks import MAY_BE_MISSING, require_heads, require_positive
from smaug_ds.model.layers import BertBlock, Dropout
from smaug_ds.model.packing import Packing
from smaug_ds.model.recompute import Recompute, recomputed, require_recompute


@dataclass(frozen=True)
class TextConfig:
    """Text and multi-modal encoder; the defaults are BERT-base, split 9 + 3."""

    vocab_size: int = 0  # words; 0 takes it from the tokenizer (data.tokenizer)
    width: int = 768  # D
    heads: int = 12
    mlp_width: int = 3072
    text_layers: int = 9  # without cross-attention
    fusion_layers: int = 3  # with cross-attention
    max_length: int = 32  # longest caption, tokens with [CLS] and [SEP]
    max_positions: int = 512  # size of the position table
    dropout: float = 0.1  # of embeddings, attention and residuals
    checkpoint_every: int = 0  # recompute every n-th layer in the backward pass: 0 none, 1 all
    # of such a layer, everything, or only what is cheap: norms, activations, dropout; not matrix products
    checkpoint_what: Recompute = field(default="layer", metadata=MAY_BE_MISSING)

    def __post_init__(self) -> None:
        require_positive("model.text", self, "width", "mlp_width", "text_layers", "fusion_layers")
        require_heads("model.text", self.heads, "model.text.width", self.width)
        if self.vocab_size < 0:
            raise ValueError(f"model.text.vocab_size is {self.vocab_size}: it must be 0 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.text.dropout is {self.dropout}: it must lie in [0, 1)")
        if self.max_length > self.max_positions:
            raise ValueError(
                f"model.text.max_length {self.max_length} is more than model.text.max_positions {self.max_positions}"
            )
        if self.max_length < 3:
            raise ValueError(f"model.text.max_length is {self.max_length}: [CLS], a word and [SEP] need 3")
        require_recompute("model.text", self.checkpoint_every, self.checkpoint_what)


class TextEmbedding(nn.Module):
    """Word, position and segment embeddings, normalised, as in BERT. All tokens are of the first segment."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.segment = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.drop = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """(S,) -> (S, D)."""
        x = self.word(input_ids) + self.position(packing.positions) + self.segment.weight[0]
        return self.drop(self.norm(x))


class TextEncoder(nn.Module):
    """The first layers of BERT."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embedding = TextEmbedding(config)
        self.layers = nn.ModuleList(
            BertBlock(config.width, config.heads, config.mlp_width, config.dropout) for _ in range(config.text_layers)
        )

    def forward(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """``input_ids`` (S,) -> (S, D)."""
        x = self.embedding(input_ids, packing)
        return run_layers(self.layers, x, packing, None, self.config)


class MultiModalEncoder(nn.Module):
    """The last layers of BERT, each with a cross-attention to the visual tokens."""

    def __init__(self, config: TextConfig, visual_width: int):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            BertBlock(config.width, config.heads, config.mlp_width, config.dropout, visual_width)
            for _ in range(config.fusion_layers)
        )

    def look(self, visual: Tensor, rows: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        """Keys and values, one tensor (P, k K, 2 D) a layer, of what P texts see of R frames.

        A frame is projected once a layer, however many texts look at it. Which way is cheaper depends on how many
        texts there are, which differs between ranks; ZeRO-2 adds up the gradients of ranks in the order in which the
        backward pass delivers them, so both ways deliver those of weights and biases in the same order.

        visual: (R, K, Dv). rows: (P, k) the frames that each text sees. weights: (P, k), all of them 1, that carry the
        gradient of a choice: the same as if the tokens had been multiplied by them; None where nothing was chosen.
        """
        texts, chosen = rows.shape
        flat = rows.flatten()
        projections = self._projections()
        if weights is None:
            seen = [projection(visual).index_select(0, flat) for projection in projections]
        elif len(flat) < len(visual):  # frames that nobody looks at are not projected
            visual = visual.index_select(0, flat)
            visual = visual * weights.view(-1, 1, 1).to(visual.dtype)
            seen = [_add_bias(projection, F.linear(visual, projection.weight)) for projection in projections]
        else:
            seen = [_weighted(projection, visual, flat, weights) for projection in projections]
        return [rearrange(one, "(p k) n d -> p (k n) d", p=texts, k=chosen) for one in seen]

    def project(self, visual: Tensor) -> list[Tensor]:
        """``visual`` (B, M, Dv) -> keys and values (B, M, 2 D) of each layer."""
        return [projection(visual) for projection in self._projections()]

    def _projections(self) -> list[nn.Linear]:
        return [cast(BertBlock, layer).cross_attention.key_value for layer in self.layers]

    def forward(
        self, states: Tensor, packing: Packing, seen: Sequence[Tensor] | None, rows: Tensor | None = None
    ) -> Tensor:
        """``states`` (S, D), ``seen`` from ``look`` or ``project``, or None to silence the cross-attention -> (S, D).

        With ``rows`` (R,) only these tokens of the result, (R, D): the last layer leaves the others out.
        """
        return run_layers(self.layers, states, packing, seen, self.config, rows)


def _weighted(projection: nn.Linear, visual: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The projection of ``visual[rows] * weights`` (P k, K, 2 D): the weights scale the tokens, but not the bias."""
    projected = F.linear(visual, projection.weight).index_select(0, rows)
    scale = weights.view(-1, 1, 1).to(projected.dtype)
    return torch.addcmul(projection.bias.to(projected.dtype), projected, scale)


def _add_bias(projection: nn.Linear, projected: Tensor) -> Tensor:
    """Apart from the product, as in ``_weighted``: autocast would cast, and so deliver, the bias at another time."""
    return projection.bias.to(projected.dtype) + projected


def run_layers(
    layers: nn.ModuleList,
    x: Tensor,
    packing: Packing,
    seen: Sequence[Tensor] | None,
    config: TextConfig,
    rows: Tensor | None = None,
) -> Tensor:
    """``x`` (S, D) through all ``layers``, the last one for ``rows`` (R,) alone if they are given; every n-th layer is
    recomputed in the backward pass."""
    every = config.checkpoint_every
    for number, layer in enumerate(layers, start=1):
        assert isinstance(layer, BertBlock)
        keys_values = None if seen is None else seen[number - 1]
        last = number == len(layers)
        function = functools.partial(layer.of_rows, rows=rows) if last and rows is not None else layer
        if every and number % every == 0 and torch.is_grad_enabled():
            x = recomputed(config.checkpoint_what, function, x, packing, keys_values)
        else:
            x = function(x, packing, keys_values)
    return x


class WordHead(nn.Module):
    """BERT's masked-language head; its output matrix is the word embedding."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embedding: Tensor) -> Tensor:
        """``states`` (R, D) of the places to predict, ``word_embedding`` (vocabulary, D) -> (R, vocabulary)."""
        x = self.norm(F.gelu(self.transform(states)))
        if x.device.type != "cpu" or len(x) > _FEW_ROWS:
            return F.linear(x, word_embedding, self.bias)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.to(word_embedding.dtype), word_embedding, self.bias)


# Up to so many rows a CPU spends longer on casting the whole vocabulary's weights and their gradient than it wins.
_FEW_ROWS = 64
