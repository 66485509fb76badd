"""The four objectives (SMAUG section 3.5), and the one of question answering, as pure functions.

Every loss is a mean over the pairs of all ranks: each rank returns its share, scaled so that the average over ranks,
which the engine takes, is the value and the gradient of a single process that holds them all. Gradient accumulation
does not widen that pool: a micro step's negatives are those of the same micro step on all ranks.

Letters: B pairs of this rank, G pairs of all ranks, P projection size, R places to predict, M masked patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smaug_ds import distributed


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objectives in the sum; 0 leaves an objective out."""

    vtc: float = 1.0  # video-text contrastive
    vtm: float = 1.0  # video-text matching
    mlm: float = 1.0  # masked language modelling
    mvm: float = 1.0  # masked visual modelling
    contrastive: Literal["infonce", "sigmoid"] = "infonce"  # sigmoid: no all-gather of embeddings
    contrastive_rows: int = 0  # rows of similarities held at once, recomputed in the backward pass; 0: all
    mlm_probability: float = 0.15  # share of the words that is predicted

    def __post_init__(self) -> None:
        for name in ("vtc", "vtm", "mlm", "mvm"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}: a weight is 0 or more")
        if self.contrastive_rows < 0:
            raise ValueError(f"loss.contrastive_rows is {self.contrastive_rows}: it must be 0 (all rows) or more")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"loss.mlm_probability is {self.mlm_probability}: it must lie in (0, 1)")


def global_mean(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of the ``valid`` ones of ``values`` (n,) over all ranks, as this rank's share; n may differ by rank."""
    weights = torch.ones_like(values) if valid is None else valid.to(values.dtype)
    count = distributed.all_reduce_sum(weights.sum().detach())
    return (values * weights).sum() * distributed.world_size() / count.clamp(min=1)


def vtc(video: Tensor, text: Tensor, media_ids: Tensor, logit_scale: Tensor, rows_at_once: int = 0) -> Tensor:
    """Symmetric InfoNCE with the negatives of all ranks (SMAUG equation 6; ALBEF equation 1 without momentum).

    video, text: (B, P) unit length. media_ids: (B,); pairs of the same id are positives of each other and share
    the target evenly. logit_scale: (1,) log of the inverse temperature. rows_at_once: with it only so many rows of the
    (B, G) similarities exist at a time, in the backward pass, too; 0: all. Returns a scalar.
    """
    scale = inverse_temperature(logit_scale)
    all_video, all_text = distributed.all_gather_with_grad(video), distributed.all_gather_with_grad(text)
    all_ids = distributed.all_gather(media_ids)
    if not 0 < rows_at_once < len(video):
        return global_mean(_info_nce(video, text, media_ids, all_video, all_text, all_ids, scale))
    own = zip(*(x.split(rows_at_once) for x in (video, text, media_ids)), strict=True)
    terms = [
        checkpoint(_info_nce, *rows, all_video, all_text, all_ids, scale, use_reentrant=False, preserve_rng_state=False)
        for rows in own
    ]
    return global_mean(torch.cat(terms))


def _info_nce(
    video: Tensor, text: Tensor, ids: Tensor, all_video: Tensor, all_text: Tensor, all_ids: Tensor, scale: Tensor
) -> Tensor:
    """Mean of both directions for each of the R rows ``video``, ``text`` (R, P), ``ids`` (R,), against all G: (R,)."""
    positives = (ids[:, None] == all_ids[None, :]).to(video.dtype)  # (R, G)
    targets = positives / positives.sum(dim=1, keepdim=True)
    video_to_text = F.cross_entropy(similarities(scale * video, all_text), targets, reduction="none")
    text_to_video = F.cross_entropy(similarities(scale * text, all_video), targets, reduction="none")
    return (video_to_text + text_to_video) / 2


def vtc_sigmoid(video: Tensor, text: Tensor, media_ids: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sigmoid contrastive loss (Zhai et al. 2023, equation 2): texts go round the ring of ranks, nothing is gathered.

    Arguments as ``vtc``; logit_bias: (1,). Sum over the texts of all ranks, mean over their videos.
    """
    scale = inverse_temperature(logit_scale)
    total = video.new_zeros(len(video))
    text_ids = media_ids
    for hop in range(distributed.world_size()):
        if hop:
            text = distributed.exchange_with_neighbour(text)
            text_ids = distributed.exchange_with_neighbour(text_ids)
        signs = 2.0 * (media_ids[:, None] == text_ids[None, :]) - 1.0
        total = total - F.logsigmoid(signs * (similarities(scale * video, text) + logit_bias)).sum(dim=1)
    return global_mean(total)


def similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """Products of (R, P) and (G, P), unit vectors or scaled ones: (R, G), in float32 under autocast, too.

    In bfloat16 cosines would come in steps of 1/256, which an inverse temperature of 100 makes 0.4 of a logit. It is
    the rows that are to be scaled: (R, G) products before the temperature would be held for the backward pass, too.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def inverse_temperature(logit_scale: Tensor) -> Tensor:
    """exp of the learnt scale, at most 100 (CLIP section 2.5); (1,) float32."""
    return logit_scale.float().exp().clamp(max=100.0)


def draw_hard_negatives(
    similarity: Tensor, row_ids: Tensor, column_ids: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """One negative column for each row, drawn in proportion to exp(similarity) (ALBEF section 3.2).

    similarity: (B, G) logits. row_ids (B,), column_ids (G,): equal ids are positives and never drawn. noise: (B,)
    uniform in [0, 1). Returns ``columns`` (B,) and ``valid`` (B,), False where every column is a positive. The draw
    inverts the cumulative distribution in the order of the columns, so it does not depend on the number of ranks.
    """
    negative = row_ids[:, None] != column_ids[None, :]
    logits = similarity.double().masked_fill(~negative, -torch.inf)
    # double precision: sums of many weights must not round away the small ones
    weights = (logits - logits.amax(dim=1, keepdim=True).clamp(min=-1e300)).exp()
    cumulative = weights.cumsum(dim=1)
    threshold = noise.double()[:, None] * cumulative[:, -1:]
    columns = (cumulative <= threshold).sum(dim=1).clamp(max=similarity.shape[1] - 1)
    return columns, negative.any(dim=1)


def vtm(logits: Tensor, matched: Tensor, valid: Tensor) -> Tensor:
    """Video-text matching (SMAUG equation 7): mean over valid pairs. logits (n, 2), matched (n,), valid (n,) bool."""
    return global_mean(F.cross_entropy(logits, matched.long(), reduction="none"), valid)


def mlm(logits: Tensor, words: Tensor) -> Tensor:
    """Masked language modelling (SMAUG equation 8), mean over the hidden words. logits (R, vocabulary), words (R,)."""
    return global_mean(F.cross_entropy(logits, words, reduction="none"))


def mvm(prediction: Tensor, target: Tensor) -> Tensor:
    """Masked visual modelling (SMAUG equation 5): mean squared error over the masked patches. Both (..., 3 P P)."""
    squared = (prediction.float() - target.float()).pow(2).mean(dim=-1)
    return global_mean(squared.flatten())


def choice(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiple choice: cross-entropy of a question's right text among its texts, mean over the questions of all ranks.

    scores: (texts,), question after question, ``counts`` of each; the first text of a question is the right one.
    """
    parts = scores.split(list(counts))
    return global_mean(torch.stack([part.logsumexp(dim=0) - part[0] for part in parts]))


def answer(logits: Tensor, words: Tensor, lengths: Sequence[int]) -> Tensor:
    """Answer generation: minus the log-likelihood of an answer, its words added up, mean over the answers of all ranks.

    logits: (R, vocabulary). words: (R,) to predict, one answer after the other, ``lengths`` (B,) words of each.
    """
    surprise = F.cross_entropy(logits, words, reduction="none")
    return global_mean(torch.stack([part.sum() for part in surprise.split(list(lengths))]))
