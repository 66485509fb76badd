"""Multiple choice as one module, which the DeepSpeed engine wraps: the arithmetic of a fine-tuning step.

Letters: B questions, one clip each, C texts of all questions together.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from smaug_ds import losses
from smaug_ds.data.sample import Batch
from smaug_ds.engine.answering import freeze
from smaug_ds.model.packing import pick_captions
from smaug_ds.model.smaug import SmaugModel

# Parts that match scores do not depend on.
_UNUSED = (
    "pixel_decoder",
    "vision_projection",
    "text_projection",
    "word_head",
    "answers",
    "logit_scale",
    "logit_bias",
)


class MultipleChoice(nn.Module):
    """Loss of telling the right text of a clip from the wrong ones that are given with it, by their match scores.

    It is what the evaluation asks (``evaluation/multiple_choice.py``): matching against negatives of the batch, which
    are other clips' captions, says little about texts that differ in a word.
    """

    def __init__(self, model: SmaugModel):
        super().__init__()
        self.model = model
        freeze(model, _UNUSED)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: ``loss``, the same as ``choice``, and the share of the questions answered right."""
        model = self.model
        counts = [1 + wrong for wrong in batch.wrong_counts]
        visual = model.encode_frames(batch.frames, batch.patch_noise)
        ids, lengths = pick_captions(
            torch.cat([batch.input_ids, batch.wrong_ids]), [*batch.lengths, *batch.wrong_lengths], right_first(counts)
        )
        text = model.encode_text(ids, lengths)
        clips = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts)).to(ids.device)  # (C,)
        choice = model.choose_for_pairs(visual.tokens, clips, text.sentence, batch.frame_noise[clips])
        seen = model.look_at_pairs(visual.tokens, clips, choice)  # a clip is projected once for all of its texts
        logits = model.match_logits_of(model.fuse(text.states, text.packing, seen, text.packing.first_rows))
        scores = logits[:, 1] - logits[:, 0]
        loss = losses.choice(scores, counts)
        with torch.no_grad():
            right = torch.stack([(part[0] > part[1:]).all() for part in scores.split(counts)])
        return {"loss": loss, "choice": loss, "choice_accuracy": right.float().mean()}


def right_first(counts: list[int]) -> list[int]:
    """The order that puts each question's right text before its wrong ones, ``counts`` of both, where the texts are all
    right ones, then all wrong ones."""
    wrong = itertools.count(len(counts))
    return [number for row, count in enumerate(counts) for number in (row, *itertools.islice(wrong, count - 1))]
