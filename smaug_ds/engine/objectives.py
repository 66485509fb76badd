"""Model and objectives as one module, which the DeepSpeed engine wraps: the arithmetic of a pre-training step.

Letters: B pairs of this rank, G pairs of all ranks, S text tokens of all captions of this rank, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaug_ds import distributed, losses
from smaug_ds.data.sample import Batch
from smaug_ds.losses import LossConfig
from smaug_ds.model.packing import Packing, pick_captions
from smaug_ds.model.smaug import SmaugModel, TextOutput, VisualOutput


class Pretraining(nn.Module):
    """Losses of a batch by name. A weight of 0 leaves an objective out of the graph on all ranks."""

    def __init__(self, model: SmaugModel, config: LossConfig):
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: ``loss`` (the weighted sum), each objective's loss, and detached figures for the log."""
        visual = self.model.encode_frames(batch.frames, batch.patch_noise)
        text = self.model.encode_text(batch.input_ids, batch.lengths)
        results: dict[str, Tensor] = {}
        if self.config.vtc:
            results |= self._contrast(visual, text, batch)
        if self.config.vtm:
            results |= self._match(visual, text, batch)
        if self.config.mlm:
            results |= self._predict_words(visual, text, batch)
        if self.config.mvm:
            results["mvm"] = losses.mvm(*self.model.predict_pixels(visual, batch.frames))
        objectives = ("vtc", "vtm", "mlm", "mvm")
        results["loss"] = sum(getattr(self.config, name) * results[name] for name in objectives if name in results)
        return results

    def _contrast(self, visual: VisualOutput, text: TextOutput, batch: Batch) -> dict[str, Tensor]:
        model, ids = self.model, batch.media_ids
        if self.config.contrastive == "sigmoid":
            loss = losses.vtc_sigmoid(visual.embedding, text.embedding, ids, model.logit_scale, model.logit_bias)
        else:
            loss = losses.vtc(visual.embedding, text.embedding, ids, model.logit_scale)
        with torch.no_grad():
            nearest = (visual.embedding @ text.embedding.T).argmax(dim=1)
            accuracy = (ids[nearest] == ids).float().mean()
            temperature = 1 / losses.inverse_temperature(model.logit_scale)
        return {"vtc": loss, "vtc_accuracy": accuracy, "temperature": temperature.squeeze()}

    def _match(self, visual: VisualOutput, text: TextOutput, batch: Batch) -> dict[str, Tensor]:
        """Each pair against a hard negative text for its video and a hard negative video for its text."""
        all_tokens = distributed.all_gather_with_grad(visual.tokens)  # (G, T, K, D)
        all_states, all_lengths = gather_texts(text)
        texts, videos, valid = self._draw_negatives(visual, text, batch)
        # tolist waits for the device: how many tokens there are to fuse depends on the draw
        negative_states, negative_lengths = pick_captions(all_states, all_lengths, texts.tolist())
        pairs_visual = torch.cat([visual.tokens, visual.tokens, all_tokens[videos]])
        pairs_states = torch.cat([text.states, negative_states, text.states])
        packing = Packing.of([*batch.lengths, *negative_lengths, *batch.lengths], pairs_states.device)
        noise = batch.frame_noise.repeat(3, 1)
        chosen = self.model.look_at(pairs_visual, packing.first(pairs_states), noise)
        fused = self.model.fuse(pairs_states, packing, chosen)
        logits = self.model.match_logits(fused, packing)
        matched = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        matched[: len(batch)] = True
        # a positive counts even where the batch holds no negative for it
        counted = torch.cat([torch.ones_like(valid[0]), *valid])
        with torch.no_grad():
            accuracy = ((logits.argmax(dim=1) == matched).float() * counted).sum() / counted.sum()
        return {"vtm": losses.vtm(logits, matched, counted), "vtm_accuracy": accuracy}

    @torch.no_grad()
    def _draw_negatives(
        self, visual: VisualOutput, text: TextOutput, batch: Batch
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Columns (B,) among the pairs of all ranks: a text per video, a video per text; and which are valid."""
        all_ids = distributed.all_gather(batch.media_ids)
        scale = losses.inverse_temperature(self.model.logit_scale)
        video_to_text = scale * visual.embedding @ distributed.all_gather(text.embedding).T
        text_to_video = scale * text.embedding @ distributed.all_gather(visual.embedding).T
        noise = batch.negative_noise
        texts, text_valid = losses.draw_hard_negatives(video_to_text, batch.media_ids, all_ids, noise[:, 0])
        videos, video_valid = losses.draw_hard_negatives(text_to_video, batch.media_ids, all_ids, noise[:, 1])
        return texts, videos, [text_valid, video_valid]

    def _predict_words(self, visual: VisualOutput, text: TextOutput, batch: Batch) -> dict[str, Tensor]:
        masked_states = self.model.text(batch.masked_ids, text.packing)
        # the clean caption chooses the frames, as it does for matching
        chosen = self.model.look_at(visual.tokens, text.sentence, batch.frame_noise)
        fused = self.model.fuse(masked_states, text.packing, chosen)
        words = batch.mlm_labels[batch.mlm_positions]
        logits = self.model.word_logits(fused[batch.mlm_positions])
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == words).float().sum() / max(len(words), 1)
        return {"mlm": losses.mlm(logits, words), "mlm_accuracy": accuracy}


def gather_texts(text: TextOutput) -> tuple[Tensor, list[int]]:
    """States of the captions of all ranks, one after the other, and the G captions' lengths.

    The gradient of a state sums what all ranks' losses ask of it.
    """
    # CPU tensors: ranks tell each other without waiting for the device
    lengths = distributed.all_gather(torch.tensor(text.packing.lengths))
    sizes = lengths.view(distributed.world_size(), -1).sum(dim=1).tolist()
    # ranks hold different numbers of tokens, but gather equal ones: all send as many as the fullest
    filled = F.pad(text.states, (0, 0, 0, max(sizes) - len(text.states)))
    shares = distributed.all_gather_with_grad(filled).split(max(sizes))
    return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)]), lengths.tolist()
