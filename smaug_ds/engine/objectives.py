"""Model and objectives as one module, which the DeepSpeed engine wraps: the arithmetic of a pre-training step.

Letters: B pairs of this rank, S text tokens of all captions of this rank, R hidden words, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smaug_ds import distributed, losses
from smaug_ds.data.sample import Batch
from smaug_ds.engine import negatives
from smaug_ds.engine.negatives import Draw
from smaug_ds.losses import LossConfig
from smaug_ds.model.packing import Packing, pick_captions, to_device
from smaug_ds.model.smaug import SmaugModel, TextOutput, VisualOutput


class Pretraining(nn.Module):
    """Losses of a batch by name. A weight of 0 leaves an objective out of the graph on all ranks."""

    def __init__(self, model: SmaugModel, config: LossConfig):
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: ``loss`` (the weighted sum), each objective's loss, and detached figures for the log."""
        model, config = self.model, self.config
        visual = model.encode_frames(batch.frames, batch.patch_noise)
        masked = None
        if config.mlm:
            text, masked = model.encode_twice(batch.input_ids, batch.masked_ids, batch.lengths)
        else:
            text = model.encode_text(batch.input_ids, batch.lengths)
        # how many tokens there are to fuse depends on the draw: while its numbers go to the host, the device has the
        # contrast to compute and the pixels to predict
        drawn = self._draw(visual, text, batch) if config.vtm else None
        results: dict[str, Tensor] = {}
        if config.vtc:
            results |= self._contrast(visual, text, batch)
        if config.mvm:
            pixels = losses.mvm(*model.predict_pixels(visual, batch.frames))
        if drawn is not None:
            results |= self._match_and_predict(visual, text, masked, drawn, batch)
        elif masked is not None:
            seen = model.look_at(visual.tokens, text.sentence, batch.frame_noise)
            results |= self._predict_words(model.fuse(masked, text.packing, seen, batch.mlm_positions), batch)
        if config.mvm:
            results["mvm"] = pixels
        objectives = ("vtc", "vtm", "mlm", "mvm")
        results["loss"] = sum(getattr(config, name) * results[name] for name in objectives if name in results)
        return results

    def _draw(self, visual: VisualOutput, text: TextOutput, batch: Batch) -> Draw:
        scale = losses.inverse_temperature(self.model.logit_scale)
        return negatives.draw(visual, text, batch, scale, self.config.contrastive_rows)

    def _contrast(self, visual: VisualOutput, text: TextOutput, batch: Batch) -> dict[str, Tensor]:
        model, ids = self.model, batch.media_ids
        if self.config.contrastive == "sigmoid":
            loss = losses.vtc_sigmoid(visual.embedding, text.embedding, ids, model.logit_scale, model.logit_bias)
        else:
            rows = self.config.contrastive_rows
            loss = losses.vtc(visual.embedding, text.embedding, ids, model.logit_scale, rows)
        with torch.no_grad():
            pieces = visual.embedding.split(self.config.contrastive_rows or len(ids))
            nearest = torch.cat([losses.similarities(piece, text.embedding).argmax(dim=1) for piece in pieces])
            accuracy = (ids[nearest] == ids).float().mean()
            temperature = 1 / losses.inverse_temperature(model.logit_scale)
        return {"vtc": loss, "vtc_accuracy": accuracy, "temperature": temperature.squeeze()}

    def _match_and_predict(
        self, visual: VisualOutput, text: TextOutput, masked: Tensor | None, drawn: Draw, batch: Batch
    ) -> dict[str, Tensor]:
        """Matching, each pair against a hard negative text for its video and a hard negative video for its text; and
        the words of the ``masked`` captions (S, D), if there are any. All of it is one pass of the multi-modal encoder.

        Captions in this order: of the pairs, negative ones, those with negative videos of this rank, the masked ones,
        those with negative videos of other ranks.
        """
        model, size, lengths = self.model, len(batch), batch.lengths
        texts, videos = negatives.fetch(drawn, visual, text)
        near = len(videos.own)
        near_states, near_lengths = pick_captions(text.states, lengths, videos.texts[:near])
        far_states, far_lengths = pick_captions(text.states, lengths, videos.texts[near:])
        states, all_lengths = [text.states, texts.states, near_states], [*lengths, *texts.lengths, *near_lengths]
        if masked is not None:
            states, all_lengths = [*states, masked], [*all_lengths, *lengths]
        packed = torch.cat([*states, far_states])
        packing = Packing.of([*all_lengths, *far_lengths], packed.device)

        own, of_texts, of_videos, near_clips = self._on_device([range(size), texts.videos, videos.texts, videos.own])
        rows, clips = torch.cat([own, of_texts, of_videos[:near]]), torch.cat([own, of_texts, near_clips])
        sentences = packed.index_select(0, packing.first_rows)
        choice = model.choose_for_pairs(visual.tokens, clips, sentences[: len(clips)], batch.frame_noise[rows])
        if masked is not None:  # they look at what the clean captions chose
            clips = torch.cat([clips, own])
            choice = None if choice is None else choice.repeat_first(size)
        tokens, foreign = visual.tokens, videos.foreign
        if distributed.world_size() > 1:
            # one tensor, so that the way back to the other ranks is taken even if nothing came from them
            tokens, foreign = torch.cat([tokens, foreign]).split([size, len(foreign)])
        seen = model.look_at_pairs(tokens, clips, choice)
        if len(foreign):
            everyone = torch.arange(len(foreign), device=foreign.device)
            noise = batch.frame_noise[of_videos[near:]]
            choice = model.choose_for_pairs(foreign, everyone, sentences[len(clips) :], noise)
            far = model.look_at_pairs(foreign, everyone, choice)
            seen = [torch.cat(pair) for pair in zip(seen, far, strict=True)]

        first = packing.first_rows.split([2 * size + near, len(clips) - 2 * size - near, len(foreign)])
        wanted = [first[0], first[2]]
        if masked is not None:
            wanted.append(batch.mlm_positions + (len(packed) - len(far_states) - len(masked)))
        fused = model.fuse(packed, packing, seen, torch.cat(wanted))
        results = self._match(fused[: 3 * size], drawn.valid_texts[of_texts], drawn.valid_videos[of_videos])
        return results | ({} if masked is None else self._predict_words(fused[3 * size :], batch))

    def _on_device(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        return [to_device(torch.tensor(list(part), dtype=torch.int64), self.model.logit_scale.device) for part in rows]

    def _match(self, fused: Tensor, valid_texts: Tensor, valid_videos: Tensor) -> dict[str, Tensor]:
        """``fused`` (3 B, D) class tokens: of the pairs, of negative texts, of negative videos."""
        logits = self.model.match_logits_of(fused)
        positive = torch.ones_like(valid_texts)
        matched = torch.cat([positive, ~positive, ~positive])
        # a positive counts even where the batch holds no negative for it
        counted = torch.cat([positive, valid_texts, valid_videos])
        with torch.no_grad():
            accuracy = ((logits.argmax(dim=1) == matched).float() * counted).sum() / counted.sum()
        return {"vtm": losses.vtm(logits, matched, counted), "vtm_accuracy": accuracy}

    def _predict_words(self, fused: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``fused`` (R, D) the hidden places of the masked captions."""
        words = batch.mlm_labels[batch.mlm_positions]
        logits = self.model.word_logits(fused)
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == words).float().sum() / max(len(words), 1)
        return {"mlm": losses.mlm(logits, words), "mlm_accuracy": accuracy}
