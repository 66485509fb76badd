"""Model and objectives as one module, which the DeepSpeed engine wraps: the arithmetic of a pre-training step.

Letters: B pairs of this rank, G pairs of all ranks, L text tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaug_ds import distributed, losses
from smaug_ds.data.sample import Batch
from smaug_ds.losses import LossConfig
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
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
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
        states, mask = self._pad(text)
        all_states, all_masks = distributed.all_gather_with_grad(states), distributed.all_gather(mask)
        texts, videos, valid = self._draw_negatives(visual, text, batch)
        pairs_visual = torch.cat([visual.tokens, visual.tokens, all_tokens[videos]])
        pairs_states = torch.cat([states, all_states[texts], states])
        pairs_mask = torch.cat([mask, all_masks[texts], mask])
        noise = batch.frame_noise.repeat(3, 1)
        chosen = self.model.look_at(pairs_visual, pairs_states[:, 0], noise)
        fused = self.model.fuse(pairs_states, pairs_mask, chosen)
        logits = self.model.match_logits(fused)
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
        masked_states = self.model.text(batch.masked_ids, batch.attention_mask)
        # the clean caption chooses the frames, as it does for matching
        chosen = self.model.look_at(visual.tokens, text.states[:, 0], batch.frame_noise)
        fused = self.model.fuse(masked_states, text.mask, chosen)
        hidden = batch.mlm_labels >= 0
        words = batch.mlm_labels[hidden]
        logits = self.model.word_logits(fused[hidden])
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == words).float().sum() / max(len(words), 1)
        return {"mlm": losses.mlm(logits, words), "mlm_accuracy": accuracy}

    def _pad(self, text: TextOutput) -> tuple[Tensor, Tensor]:
        """States (B, L, D) and mask (B, L), padded to the longest caption of any rank."""
        own = text.states.shape[1]
        # a CPU tensor: ranks agree on it without waiting for the device
        longest = int(distributed.all_reduce_max(torch.tensor(own)))
        return F.pad(text.states, (0, 0, 0, longest - own)), F.pad(text.mask, (0, longest - own))
