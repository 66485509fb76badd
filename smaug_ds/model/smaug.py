"""SMAUG: sparse masked autoencoder for video-language pre-training (arXiv 2211.11446), assembled.

Reads like section 3 of the paper: encode frames, encode text, reconstruct pixels, choose frames, fuse, predict.

Letters: B batch, T frames, k chosen frames, N patches, K tokens of a frame, S text tokens of all captions together,
D width, P projection size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from smaug_ds.model.answers import AnswerDecoder
from smaug_ds.model.beit import BeitEncoder
from smaug_ds.model.checks import require_heads, require_positive
from smaug_ds.model.frame_selector import FrameChoice, FrameSelector, SelectorConfig
from smaug_ds.model.language import MultiModalEncoder, TextConfig, TextEncoder, WordHead
from smaug_ds.model.layers import init_weights
from smaug_ds.model.packing import Packing, pick_captions
from smaug_ds.model.pixel_decoder import PixelDecoder, PixelDecoderConfig, pixel_targets
from smaug_ds.model.pretrained import Pretrained
from smaug_ds.model.temporal import TemporalConfig, TemporalEncoder
from smaug_ds.model.vision import VisionConfig, VisionEncoder, normalise_pixels, patchify


@dataclass(frozen=True)
class ModelConfig:
    """The whole architecture; a checkpoint carries it. ``size`` names the preset that fills what is not given."""

    size: str = "base"  # base (the paper's) or tiny (for CPUs): defaults of all numbers below
    frames: int = 1  # frames of a clip: 1 in the single-frame stage, 4 in the multi-frame stage
    frames_kept: int = 1  # frames that the multi-modal encoder sees
    answer_layers: int = 0  # of the answer decoder, which only question answering needs; 0: none
    projection: int = 256  # size of the contrastive space
    temperature: float = 0.07  # of the contrastive losses at the start; learnt from there, at least 0.01
    vision: VisionConfig = field(default_factory=VisionConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames_kept < 1:
            raise ValueError(
                f"model.frames is {self.frames} and model.frames_kept is {self.frames_kept}: both must be at least 1"
            )
        if self.frames_kept > self.frames:
            raise ValueError(
                f"model.frames_kept is {self.frames_kept}, but a clip has only model.frames = {self.frames}: "
                "lower model.frames_kept or raise model.frames"
            )
        require_positive("model", self, "projection")
        if not 0 <= self.answer_layers <= self.text.fusion_layers:
            raise ValueError(
                f"model.answer_layers is {self.answer_layers}: it must be from 0 to model.text.fusion_layers, which is "
                f"{self.text.fusion_layers}, since the decoder starts from those layers"
            )
        if self.frames > 1:
            require_heads("model.temporal", self.temporal.heads, "model.vision.width", self.vision.width)
        if self.frames > self.frames_kept:
            require_heads("model.selector", self.selector.heads, "model.vision.width", self.vision.width)
        if not 0.01 <= self.temperature <= 1:
            raise ValueError(f"model.temperature is {self.temperature}: it must lie in [0.01, 1]")

    @classmethod
    def of_size(cls, size: str) -> ModelConfig:
        """The preset called ``size``. Raises ValueError for an unknown name."""
        if size == "base":
            return cls()
        if size == "tiny":
            return cls(
                size="tiny",
                projection=128,
                vision=VisionConfig(
                    image_size=64, patch_size=8, width=128, depth=6, heads=4, mlp_width=512, sparsify_layers=(2, 4, 5)
                ),
                temporal=TemporalConfig(depth=2, heads=4),
                decoder=PixelDecoderConfig(width=64, depth=3, heads=4),
                selector=SelectorConfig(depth=2, heads=2, mlp_width=512),
                text=TextConfig(
                    width=128, heads=4, mlp_width=512, text_layers=3, fusion_layers=3, max_positions=64, dropout=0.0
                ),
            )
        raise ValueError(f"model.size is {size!r}: it must be base or tiny")


@dataclass
class VisualOutput:
    """A batch of encoded clips."""

    tokens: Tensor  # (B, T, K, D) for the fusion, after the temporal encoder; class token first
    embedding: Tensor  # (B, P) unit length
    spatial_tokens: Tensor  # (B, T, K, D) before the temporal encoder, for the pixel decoder
    kept_ids: Tensor  # (B, T, K - 1) patch of each token after the class token; N for a fused token
    visible_ids: Tensor | None  # (B, V) patches that were seen; None without a mask
    masked_ids: Tensor | None  # (B, N - V)
    layer_ids: list[Tensor]  # kept_ids after each sparsification

    def index(self, rows: Tensor) -> VisualOutput:
        """The clips ``rows`` (R,), in that order."""

        def pick(value):
            if isinstance(value, list):
                return [pick(item) for item in value]
            return value[rows] if isinstance(value, Tensor) else value

        picked = {item.name: pick(getattr(self, item.name)) for item in dataclasses.fields(self)}
        return dataclasses.replace(self, **picked)


@dataclass
class TextOutput:
    """A batch of encoded captions."""

    states: Tensor  # (S, D)
    packing: Packing  # which of the states belong to which caption
    embedding: Tensor  # (B, P) unit length

    @property
    def sentence(self) -> Tensor:
        """The state of each caption's class token, (B, D)."""
        return self.packing.first(self.states)

    def index(self, rows: Sequence[int]) -> TextOutput:
        """The captions ``rows`` (R,), in that order."""
        states, lengths = pick_captions(self.states, self.packing.lengths, rows)
        return TextOutput(states, Packing.of(lengths, states.device), self.embedding[rows])

    def to(self, device: torch.device | str) -> TextOutput:
        """The same captions on ``device``."""
        return TextOutput(self.states.to(device), Packing.of(self.packing.lengths, device), self.embedding.to(device))


class SmaugModel(Pretrained):
    """Deterministic given weights and batch (dropout apart): every random number comes in with the batch."""

    config_class = ModelConfig
    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.text.vocab_size < 1:
            raise ValueError(f"model.text.vocab_size is {config.text.vocab_size}: take it from the tokenizer first")
        self.config = config
        vision, text = config.vision, config.text
        self.vision = BeitEncoder(vision) if vision.layout == "beit" else VisionEncoder(vision)
        self.pixel_decoder = PixelDecoder(config.decoder, vision.width, vision.patches, vision.patch_size)
        self.text = TextEncoder(text)
        self.fusion = MultiModalEncoder(text, vision.width)
        if config.frames > 1:
            self.temporal = TemporalEncoder(config.temporal, vision.width, config.frames)
        if config.frames > config.frames_kept:
            self.selector = FrameSelector(config.selector, vision.width, text.width)
        if config.answer_layers:
            self.answers = AnswerDecoder(text, config.answer_layers)
        self.vision_projection = nn.Linear(vision.width, config.projection)
        self.text_projection = nn.Linear(text.width, config.projection)
        self.match_head = nn.Linear(text.width, 2)
        self.word_head = WordHead(text)
        # shape [1], not []: ZeRO cannot partition a parameter without a dimension
        self.logit_scale = nn.Parameter(torch.tensor([1 / config.temperature]).log())
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))  # of the sigmoid loss (Zhai et al. 2023, section 3.2)
        self._init_weights()

    def _init_weights(self) -> None:
        self.apply(init_weights)
        for part in (self.vision, self.pixel_decoder, getattr(self, "temporal", None)):
            if part is not None:
                part.init_weights()

    def encode_frames(self, frames: Tensor, patch_noise: Tensor | None = None) -> VisualOutput:
        """``frames`` (B, T, 3, H, W) uint8; ``patch_noise`` (B, N) uniform draws the tube mask, None masks nothing.

        A clip of one frame (an image) does not pass the temporal encoder. Raises ValueError on a wrong image size, and
        on clips for a model of single frames.
        """
        size = self.config.vision.image_size
        if frames.shape[-2:] != (size, size):
            raise ValueError(f"frames are {tuple(frames.shape[-2:])} pixels, but model.vision.image_size is {size}")
        if frames.shape[1] > 1 and self.config.frames == 1:
            raise ValueError(f"clips have {frames.shape[1]} frames, but model.frames is 1: it has no temporal encoder")
        encoded = self.vision(self.patchify(frames), patch_noise)
        tokens = self.temporal(encoded.tokens) if frames.shape[1] > 1 else encoded.tokens
        embedding = self.vision_projection(tokens[:, :, 0].mean(dim=1))
        return VisualOutput(
            tokens=tokens,
            embedding=F.normalize(embedding.float(), dim=-1),
            spatial_tokens=encoded.tokens,
            kept_ids=encoded.kept_ids,
            visible_ids=encoded.visible_ids,
            masked_ids=encoded.masked_ids,
            layer_ids=encoded.layer_ids,
        )

    def encode_text(self, input_ids: Tensor, lengths: Sequence[int]) -> TextOutput:
        """``input_ids`` (S,) of B captions, one after the other, of ``lengths`` tokens each."""
        packing = Packing.of(lengths, input_ids.device)
        return self._project_text(self.text(input_ids, packing), packing)

    def encode_twice(self, input_ids: Tensor, masked_ids: Tensor, lengths: Sequence[int]) -> tuple[TextOutput, Tensor]:
        """Captions (S,) as ``encode_text`` has them, and the states (S, D) of the same with words hidden."""
        packing = Packing.of(lengths, input_ids.device)
        both = Packing.of([*lengths, *lengths], input_ids.device)
        clean, masked = self.text(torch.cat([input_ids, masked_ids]), both).chunk(2)
        return self._project_text(clean, packing), masked

    def _project_text(self, states: Tensor, packing: Packing) -> TextOutput:
        embedding = self.text_projection(packing.first(states))
        return TextOutput(states, packing, F.normalize(embedding.float(), dim=-1))

    def predict_pixels(self, visual: VisualOutput, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Masked visual modelling: prediction and target (B, T, M, 3 P P) of the masked patches that are decoded.

        Raises ValueError when the clips were encoded without a mask.
        """
        if visual.masked_ids is None:
            raise ValueError("masked visual modelling needs a mask: raise model.vision.mask_ratio or set loss.mvm to 0")
        share = self.config.decoder.predicted_share
        count = max(1, round(share * visual.masked_ids.shape[1]))
        predict_ids = visual.masked_ids[:, :count]
        prediction = self._decode(visual, predict_ids, visual.visible_ids)
        targets = self.pixel_targets(frames)
        wanted = repeat(predict_ids, "b m -> b t m p", t=frames.shape[1], p=targets.shape[-1])
        return prediction, targets.gather(2, wanted)

    def reconstruct(self, visual: VisualOutput) -> Tensor:
        """The decoder's picture of every patch, masked or not: (B, T, N, 3 P P), in the space of ``pixel_targets``."""
        batch, patches = len(visual.spatial_tokens), self.config.vision.patches
        all_ids = torch.arange(patches, device=visual.kept_ids.device).expand(batch, patches)
        return self._decode(visual, all_ids, None)

    def _decode(self, visual: VisualOutput, predict_ids: Tensor, visible_ids: Tensor | None) -> Tensor:
        batch, frames = visual.spatial_tokens.shape[:2]
        pixels = self.pixel_decoder(
            rearrange(visual.spatial_tokens[:, :, 1:], "b t k d -> (b t) k d"),
            rearrange(visual.kept_ids, "b t k -> (b t) k"),
            None if visible_ids is None else repeat(visible_ids, "b v -> (b t) v", t=frames),
            repeat(predict_ids, "b m -> (b t) m", t=frames),
        )
        return rearrange(pixels, "(b t) m p -> b t m p", b=batch)

    def patchify(self, frames: Tensor) -> Tensor:
        """``frames`` (B, T, 3, H, W) uint8 -> normalised pixels (B, T, N, 3 P P)."""
        return patchify(normalise_pixels(frames), self.config.vision.patch_size)

    def pixel_targets(self, frames: Tensor) -> Tensor:
        """What masked visual modelling predicts of ``frames`` (B, T, 3, H, W): (B, T, N, 3 P P)."""
        return pixel_targets(self.patchify(frames), self.config.decoder)

    def choose_frames(self, visual: VisualOutput, text: TextOutput, noise: Tensor | None = None) -> FrameChoice:
        """The ``frames_kept`` frames that the sentence is about. ``noise`` (B, T) uniform while training.

        Raises ValueError for a model that keeps all frames.
        """
        if self.config.frames == self.config.frames_kept:
            kept = self.config.frames_kept
            raise ValueError(f"model.frames and model.frames_kept are both {kept}: there is no frame to choose")
        return self._choose(visual.tokens, text.sentence, noise)

    def _choose(self, tokens: Tensor, sentence: Tensor, noise: Tensor | None) -> FrameChoice:
        return self.selector(tokens[:, :, 0], sentence, self.config.frames_kept, noise)

    def look_at(self, tokens: Tensor, sentence: Tensor, noise: Tensor | None = None) -> Tensor:
        """The visual tokens that a text gets to see: those of the chosen frames, where there is a choice.

        tokens: (B, T, K, D). sentence: (B, Dt) class token of the clean caption. Returns (B, k K, D).
        """
        if tokens.shape[1] > self.config.frames_kept:
            choice = self._choose(tokens, sentence, noise)
            rows = torch.arange(len(tokens), device=tokens.device)[:, None]
            weights = choice.weights.gather(1, choice.chosen).to(tokens.dtype)
            tokens = tokens[rows, choice.chosen] * weights[:, :, None, None]
        return rearrange(tokens, "b t k d -> b (t k) d")

    def choose_for_pairs(
        self, tokens: Tensor, clips: Tensor, sentence: Tensor, noise: Tensor | None
    ) -> FrameChoice | None:
        """The frames that P texts choose, each of its clip; None where the fusion sees all.

        tokens: (B, T, K, D). clips: (P,) rows of ``tokens``. sentence: (P, Dt). noise: (P, T) uniform while training.
        """
        if tokens.shape[1] <= self.config.frames_kept:
            return None
        return self.selector(tokens[:, :, 0].index_select(0, clips), sentence, self.config.frames_kept, noise)

    def look_at_pairs(self, tokens: Tensor, clips: Tensor, choice: FrameChoice | None) -> list[Tensor]:
        """Keys and values, a tensor for each layer of the fusion, of what P texts see, each of its clip.

        The same as projecting the ``look_at`` of every pair, but a frame is projected once for all texts.

        tokens: (B, T, K, D). clips: (P,) rows of ``tokens``. choice: of these pairs; None where all frames are seen.
        """
        frames = tokens.shape[1]
        if choice is None:
            rows, weights = clips[:, None] * frames + torch.arange(frames, device=clips.device), None
        else:
            rows, weights = clips[:, None] * frames + choice.chosen, choice.weights.gather(1, choice.chosen)
        return self.fusion.look(rearrange(tokens, "b t k d -> (b t) k d"), rows, weights)

    def fuse(
        self, states: Tensor, packing: Packing, visual: Tensor | Sequence[Tensor], rows: Tensor | None = None
    ) -> Tensor:
        """``states`` (S, D) of the text encoder -> (S, D), or only ``rows`` (R,) of it: (R, D), at less cost.

        visual: tokens (B, M, D), or the keys and values that ``look_at_pairs`` made of them.
        """
        seen = self.fusion.project(visual) if isinstance(visual, Tensor) else visual
        return self.fusion(states, packing, seen, rows)

    def match_logits(self, fused: Tensor, packing: Packing) -> Tensor:
        """``fused`` (S, D) -> (B, 2): not matched, matched."""
        return self.match_logits_of(packing.first(fused))

    def match_logits_of(self, first: Tensor) -> Tensor:
        """``first`` (B, D) fused class tokens -> (B, 2): not matched, matched."""
        return self.match_head(first).float()

    def match(self, visual: VisualOutput, text: TextOutput) -> Tensor:
        """How much better pair i fits than not: matched minus unmatched logit, (B,)."""
        seen = self.look_at(visual.tokens, text.sentence)
        logits = self.match_logits_of(self.fuse(text.states, text.packing, seen, text.packing.first_rows))
        return logits[:, 1] - logits[:, 0]

    def word_logits(self, states: Tensor) -> Tensor:
        """``states`` (R, D) of the hidden words only -> (R, vocabulary)."""
        return self.word_head(states, self.text.embedding.word.weight).float()

    def answer(self, answer_ids: Tensor, lengths: Sequence[int], questions: Tensor, packing: Packing) -> Tensor:
        """States (A, D) of answers, whose ``word_logits`` are the next words, given the fused states of questions.

        answer_ids: (A,) of B answers, one after the other, of ``lengths`` tokens. questions: (S, D) from ``fuse``, one
        for each answer, with their ``packing``. Raises ValueError for a model without an answer decoder.
        """
        if not self.config.answer_layers:
            raise ValueError("model.answer_layers is 0: the model has no answer decoder; fine-tune one for questions")
        own = Packing.of(lengths, answer_ids.device)
        return self.answers(self.text.embedding(answer_ids, own), own, questions, packing)
