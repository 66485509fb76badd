"""Slow, obvious versions of what the package does fast."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaug_ds import losses
from smaug_ds.data.sample import Batch
from smaug_ds.model.language import MultiModalEncoder, TextEncoder
from smaug_ds.model.layers import BertBlock, CaptionAttention, CrossAttention, SelfAttention
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import IGNORED, Tokenizer


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
    """Mean cross-entropy over the places of ``logits`` (S, vocabulary) whose label (S,) is not -100."""
    terms = [
        -F.log_softmax(logits[place], dim=-1)[label] for place, label in enumerate(labels.tolist()) if label != -100
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


def pad_captions(packed: Tensor, lengths: list[int], value: int = 0) -> Tensor:
    """(S, ...) -> (B, L, ...), ``value`` after each caption."""
    return nn.utils.rnn.pad_sequence(packed.split(lengths), batch_first=True, padding_value=value)


def token_mask(lengths: list[int]) -> Tensor:
    """(B, L) True on tokens."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def mask_padded_tokens(
    input_ids: Tensor, noise: Tensor, probability: float, tokenizer: Tokenizer
) -> tuple[Tensor, Tensor]:
    """MLM masking of padded captions (B, L) with noise (B, L, 3): masked ids and labels, both (B, L)."""
    which, how, substitute = noise.unbind(-1)
    is_word = ~torch.isin(input_ids, torch.tensor(sorted(tokenizer.special_ids)))
    rank = which.masked_fill(~is_word, torch.inf)
    first = torch.zeros_like(is_word).scatter_(1, rank.argmin(dim=1, keepdim=True), True) & is_word
    hidden = (rank < probability) | first
    words = tokenizer.word_ids
    random_words = words[(substitute * len(words)).long().clamp_(max=len(words) - 1)]
    masked_ids = torch.where(hidden & (how < 0.8), tokenizer.mask_id, input_ids)
    masked_ids = torch.where(hidden & (how >= 0.8) & (how < 0.9), random_words, masked_ids)
    return masked_ids, torch.where(hidden, input_ids, IGNORED)


def padded_attention(attention: CaptionAttention | CrossAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor):
    """Queries (B, L, D), keys and values (B, M, D), mask (B, M) True where there is a key -> (B, L, D)."""
    size = q.shape[-1] // attention.heads
    outputs = []
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        outputs.append(torch.softmax(scores.masked_fill(~mask[:, None], -torch.inf), dim=-1) @ v[..., part])
    return attention.out(torch.cat(outputs, dim=-1))


def padded_layer(layer: BertBlock, x: Tensor, mask: Tensor, visual: Tensor | None = None) -> Tensor:
    """BERT's layer without dropout over padded captions ``x`` (B, L, D) with ``mask`` (B, L)."""
    attended = padded_attention(layer.attention, *layer.attention.qkv(x).chunk(3, dim=-1), mask)
    x = layer.attention_norm(x + attended)
    if visual is not None:
        k, v = layer.cross_attention.key_value(visual).chunk(2, dim=-1)
        everything = torch.ones(visual.shape[:2], dtype=torch.bool)
        attended = padded_attention(layer.cross_attention, layer.cross_attention.query(x), k, v, everything)
        x = layer.cross_attention_norm(x + attended)
    return layer.mlp_norm(x + layer.mlp(x))


def padded_text_encoder(encoder: TextEncoder, input_ids: Tensor, mask: Tensor) -> Tensor:
    """(B, L) -> (B, L, D)."""
    words = encoder.embedding
    x = words.norm(words.word(input_ids) + words.position.weight[: input_ids.shape[1]] + words.segment.weight[0])
    for layer in encoder.layers:
        x = padded_layer(layer, x, mask)
    return x


def padded_fusion(encoder: MultiModalEncoder, states: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
    """``states`` (B, L, D), ``visual`` (B, M, Dv) -> (B, L, D)."""
    for layer in encoder.layers:
        states = padded_layer(layer, states, mask, visual)
    return states


def padded_losses(model: SmaugModel, batch: Batch) -> dict[str, Tensor]:
    """The losses that text takes part in, of one process, with every caption padded to the longest."""
    mask, ids, noise = token_mask(batch.lengths), batch.media_ids, batch.negative_noise
    visual = model.encode_frames(batch.frames, batch.patch_noise)
    states = padded_text_encoder(model.text, pad_captions(batch.input_ids, batch.lengths), mask)
    text = F.normalize(model.text_projection(states[:, 0]).float(), dim=-1)
    temperature = (-model.logit_scale).exp()

    with torch.no_grad():
        similarity = visual.embedding @ text.T / temperature
        texts, text_valid = losses.draw_hard_negatives(similarity, ids, ids, noise[:, 0])
        videos, video_valid = losses.draw_hard_negatives(similarity.T, ids, ids, noise[:, 1])
    terms = []
    own = torch.arange(len(batch))
    for clips, captions, matched, counted in [
        (own, own, 1, torch.ones_like(text_valid)),
        (own, texts, 0, text_valid),
        (videos, own, 0, video_valid),
    ]:
        seen = model.look_at(visual.tokens[clips], states[captions, 0], batch.frame_noise)
        fused = padded_fusion(model.fusion, states[captions], mask[captions], seen)
        terms.append(-F.log_softmax(model.match_head(fused[:, 0]), dim=-1)[counted, matched])

    masked = padded_text_encoder(model.text, pad_captions(batch.masked_ids, batch.lengths), mask)
    fused = padded_fusion(model.fusion, masked, mask, model.look_at(visual.tokens, states[:, 0], batch.frame_noise))
    labels = pad_captions(batch.mlm_labels, batch.lengths, IGNORED)
    return {
        "vtc": info_nce(visual.embedding, text, ids.tolist(), temperature).squeeze(),
        "vtm": torch.cat(terms).mean(),
        "mlm": masked_words_loss(model.word_logits(fused).flatten(0, 1), labels.flatten()),
    }
