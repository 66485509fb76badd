"""The answer decoder of open-ended question answering, as in Singularity (arXiv 2206.03428) and ALBEF.

Layers of BERT read an answer from left to right and look at the states of its question, which have seen the clip.

An answer is ``[CLS] words [SEP]``: each token but the last predicts the next one, and ``[SEP]`` ends it.

Letters: B answers, A tokens of all answers together, L tokens of the longest one, S tokens of all questions together,
D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from smaug_ds.model.language import TextConfig
from smaug_ds.model.layers import BertBlock
from smaug_ds.model.packing import Packing


class AnswerDecoder(nn.Module):
    """Causal self-attention over an answer, and cross-attention to the states of its question."""

    def __init__(self, config: TextConfig, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            BertBlock(config.width, config.heads, config.mlp_width, config.dropout, config.width) for _ in range(layers)
        )

    def forward(self, answers: Tensor, packing: Packing, questions: Tensor, question_packing: Packing) -> Tensor:
        """``answers`` (A, D) embedded, one for each of the B questions with states ``questions`` (S, D) -> (A, D)."""
        seen, mask = question_packing.pad(questions), question_packing.mask
        packing = causal(packing)
        for layer in self.layers:
            assert isinstance(layer, BertBlock)
            answers = layer(answers, packing, layer.cross_attention.key_value(seen), mask)
        return answers


def causal(packing: Packing) -> Packing:
    """The same packing, but a token attends only to itself and those before it: the mask is (B, 1, L, L)."""
    longest = packing.mask.shape[-1]
    earlier = torch.ones(longest, longest, dtype=torch.bool, device=packing.mask.device).tril()
    return dataclasses.replace(packing, mask=packing.mask & earlier)


def next_words(lengths: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows (A - B,) of the tokens that predict one, and of those that they predict, of packed answers."""
    ends = torch.tensor(lengths, device="cpu").cumsum(0) - 1
    predicts = torch.ones(sum(lengths), dtype=torch.bool, device="cpu")
    predicts[ends] = False
    rows = predicts.nonzero().squeeze(1).to(device)
    return rows, rows + 1


def with_answer_decoder(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """``weights`` of a ``SmaugModel``, and those that an answer decoder of so many ``layers`` starts with, if they have
    none: its layers are the last ones of the multi-modal encoder.

    Keys and values of a cross-attention that looks at visual tokens of another width than the text's have no place in
    the decoder, and start at random.
    """
    started = dict(weights)
    numbers = {int(name.split(".")[2]) for name in weights if name.startswith("fusion.layers.")}
    if layers and numbers and not any(name.startswith("answers.") for name in weights):
        first = max(numbers) + 1 - layers
        for name, value in weights.items():
            _, _, number, *rest = [*name.split(".", 3), "", ""]
            if not name.startswith("fusion.layers.") or int(number) < first:
                continue
            if rest[0] == "cross_attention.key_value.weight" and value.shape[0] != 2 * value.shape[1]:
                continue
            started[f"answers.layers.{int(number) - first}.{rest[0]}"] = value.clone()
    return started
