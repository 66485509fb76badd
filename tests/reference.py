"""Slow, obvious versions of what the package does fast."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from smaug_ds.model.layers import SelfAttention


def attention_matrix(attention: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, L, D) and the full softmax matrix (B, H, L, L) of a self-attention, one head at a time."""
    width = x.shape[-1]
    size = width // attention.heads
    q, k, v = attention.qkv(x).split(width, dim=-1)
    matrices, outputs = [], []
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        matrix = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size), dim=-1)
        matrices.append(matrix)
        outputs.append(matrix @ v[..., part])
    return attention.out(torch.cat(outputs, dim=-1)), torch.stack(matrices, dim=1)


def keep_and_fuse(x: Tensor, ids: Tensor, matrix: Tensor, keep_rate: float, fused_id: int) -> tuple[Tensor, list]:
    """``x`` (B, 1 + n, D) with the class token, ``matrix`` (B, H, 1 + n, 1 + n); clip by clip, token by token."""
    rows, row_ids = [], []
    for clip in range(len(x)):
        scores = [matrix[clip, :, 0, 1 + token].mean().item() for token in range(x.shape[1] - 1)]
        keep = math.ceil(round(keep_rate * len(scores), 6))
        order = sorted(range(len(scores)), key=lambda token: -scores[token])
        kept, dropped = sorted(order[:keep]), order[keep:]
        tokens = [x[clip, 0]] + [x[clip, 1 + token] for token in kept]
        fused = sum(matrix[clip, :, 0, 1 + token].mean() * x[clip, 1 + token] for token in dropped)
        rows.append(torch.stack([*tokens, fused]))
        row_ids.append([int(ids[clip, token]) for token in kept] + [fused_id])
    return torch.stack(rows), row_ids


def info_nce(video: Tensor, text: Tensor, media_ids: list[int], temperature: float) -> Tensor:
    """Symmetric contrastive loss, pair by pair; pairs of one media share the target evenly."""
    total = video.new_zeros(())
    for anchors, others in ((video, text), (text, video)):
        for row, anchor in enumerate(anchors):
            logits = torch.stack([anchor @ other for other in others]) / temperature
            positives = [column for column, media in enumerate(media_ids) if media == media_ids[row]]
            log_denominator = torch.logsumexp(logits, dim=0)
            total = total + sum(log_denominator - logits[column] for column in positives) / len(positives)
    return total / (2 * len(video))


def sigmoid_loss(video: Tensor, text: Tensor, media_ids: list[int], scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid contrastive loss, pair by pair."""
    total = video.new_zeros(())
    for row in range(len(video)):
        for column in range(len(text)):
            sign = 1.0 if media_ids[row] == media_ids[column] else -1.0
            logit = scale.exp() * (video[row] @ text[column]) + bias
            total = total + torch.log1p(torch.exp(-sign * logit)).squeeze()
    return total / len(video)


def masked_words_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the places of ``logits`` (B, L, vocabulary) whose label (B, L) is not -100."""
    terms = [
        -F.log_softmax(logits[row, place], dim=-1)[labels[row, place]]
        for row in range(labels.shape[0])
        for place in range(labels.shape[1])
        if labels[row, place] != -100
    ]
    return torch.stack(terms).mean()


def masked_pixels_loss(prediction: Tensor, target: Tensor, masked: list[list[int]]) -> Tensor:
    """Mean squared error over the patches ``masked[row]`` of (B, T, N, P) prediction and target."""
    terms = [
        (prediction[row, frame, patch] - target[row, frame, patch]).pow(2).mean()
        for row in range(prediction.shape[0])
        for frame in range(prediction.shape[1])
        for patch in masked[row]
    ]
    return torch.stack(terms).mean()
