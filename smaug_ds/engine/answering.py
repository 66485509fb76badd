"""Question answering as one module, which the DeepSpeed engine wraps: the arithmetic of a fine-tuning step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smaug_ds import losses
from smaug_ds.data.sample import Batch
from smaug_ds.model.answers import next_words
from smaug_ds.model.smaug import SmaugModel

# Parts that answers do not depend on.
_UNUSED = (
    "pixel_decoder",
    "vision_projection",
    "text_projection",
    "match_head",
    "logit_scale",
    "logit_bias",
)


def freeze(model: SmaugModel, prefixes: tuple[str, ...]) -> None:
    """Takes the parts that no loss depends on out of training: weight decay would shrink them."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


class QuestionAnswering(nn.Module):
    """Loss of the answers to a batch of questions. Captions are the questions."""

    def __init__(self, model: SmaugModel):
        super().__init__()
        self.model = model
        freeze(model, _UNUSED)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: ``loss``, the same as ``answer``, and the share of the answers' tokens predicted right."""
        model = self.model
        visual = model.encode_frames(batch.frames, batch.patch_noise)
        text = model.encode_text(batch.input_ids, batch.lengths)
        chosen = model.look_at(visual.tokens, text.sentence, batch.frame_noise)
        questions = model.fuse(text.states, text.packing, chosen)
        states = model.answer(batch.answer_ids, batch.answer_lengths, questions, text.packing)
        rows, next_rows = next_words(batch.answer_lengths, states.device)
        logits, words = model.word_logits(states[rows]), batch.answer_ids[next_rows]
        loss = losses.answer(logits, words, [length - 1 for length in batch.answer_lengths])
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == words).float().mean()
        return {"loss": loss, "answer": loss, "answer_accuracy": accuracy}
