"""Text: cleaning, WordPiece from a local file, batches without padding, masking for MLM.

Letters: B captions, S tokens of all captions together.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from torch import Tensor

_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_SPECIAL = {  # what BERT calls them, what RoBERTa and its kin do
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
_CONTINUES = "##"  # WordPiece's prefix of a piece that continues a word
IGNORED = -100  # label of a token that MLM does not predict, as torch's cross-entropy has it


class TextIds(NamedTuple):
    """Captions as token ids, packed: one caption after the other, without padding."""

    input_ids: Tensor  # (S,) int64
    lengths: list[int]  # tokens of each of the B captions


def clean(caption: str, max_words: int | None = None) -> str:
    """The caption as Singularity's ``pre_text`` leaves it: lower case, without ``,.'!?"()*#:;~``, with blanks for
    ``-`` and ``/``, ``person`` for ``<person>``, one blank between words, at most ``max_words`` words."""
    text = _DROPPED.sub("", caption.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:max_words])


class Tokenizer:
    """Token ids of captions from a local file: BERT's ``vocab.txt`` (WordPiece after uncased normalisation), a
    ``tokenizer.json`` of the ``tokenizers`` library, or a folder that holds one of them. Can be pickled.

    Raises ValueError where the file is missing, is neither, or lacks a special token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = tokenizer_file(path)
        self._backend = _from_json(self.path) if self.path.suffix == ".json" else _from_vocabulary(self.path)
        self._backend.no_padding()
        self._backend.no_truncation()
        self.vocab_size: int = self._backend.get_vocab_size()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = map(self._special_id, _SPECIAL)
        self.special_ids = frozenset((self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id))
        self.word_ids = torch.tensor([i for i in range(self.vocab_size) if i not in self.special_ids])

    def _special_id(self, role: str) -> int:
        for name in _SPECIAL[role]:
            if (token_id := self._backend.token_to_id(name)) is not None:
                return token_id
        raise ValueError(f"{self.path}: the vocabulary has no {' or '.join(_SPECIAL[role])}; data.tokenizer needs one")

    def encode(self, captions: Sequence[str], max_length: int) -> TextIds:
        """``[CLS] words [SEP]`` of each caption, cleaned first, cut to ``max_length`` tokens, special ones included.

        Returns the ids of all captions, one after the other, and each caption's number of them, at most ``max_length``.
        """
        # Cutting at max_length words bounds the work and loses nothing: a word is at least one token (but for words of
        # invisible characters only, which give none: a caption with many of those may come out shorter than it could).
        cleaned = [clean(caption, max_length) for caption in captions]
        encodings = self._backend.encode_batch(cleaned, add_special_tokens=False)
        rows = [[self.cls_id, *encoding.ids[: max_length - 2], self.sep_id] for encoding in encodings]
        return TextIds(torch.tensor([i for row in rows for i in row], dtype=torch.int64), [len(row) for row in rows])

    def decode(self, ids: Iterable[int]) -> str:
        """The words of token ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids if int(i) not in self.special_ids])


def mask_tokens(text: TextIds, noise: Tensor, probability: float, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Hide words for MLM as BERT does (arXiv 1810.04805, section 3.1): each word with ``probability``; of the hidden
    ones 80 % become ``[MASK]``, 10 % a random word, 10 % stay. A caption loses at least one word: the one of least
    noise. Special tokens are never hidden.

    Args:
        text: captions of S tokens in all.
        noise: (S, 3) uniform in [0, 1): whether a word is hidden, how, and which random word stands in.
        probability: share of the words to hide, 0 to 1.

    Returns:
        Masked ids (S,) and labels (S,): the hidden words' ids, ``IGNORED`` elsewhere.
    """
    input_ids = text.input_ids
    which, how, substitute = noise.unbind(-1)  # (S,) each
    is_word = ~torch.isin(input_ids, torch.tensor(sorted(tokenizer.special_ids)))
    rank = which.masked_fill(~is_word, torch.inf)
    is_least = torch.cat([torch.arange(len(own)) == own.argmin() for own in rank.split(text.lengths)])
    hidden = (rank < probability) | (is_least & is_word)
    words = tokenizer.word_ids
    random_words = words[(substitute * len(words)).long().clamp_(max=len(words) - 1)]
    masked_ids = torch.where(hidden & (how < 0.8), tokenizer.mask_id, input_ids)
    masked_ids = torch.where(hidden & (how >= 0.8) & (how < 0.9), random_words, masked_ids)
    return masked_ids, torch.where(hidden, input_ids, IGNORED)


def train_vocabulary(captions: Iterable[str], size: int, path: str | os.PathLike[str]) -> None:
    """Write a WordPiece ``vocab.txt`` of at most ``size`` entries: the special tokens, every character (at the start
    of a word and inside one, so that any word of the captions can be spelt), then the captions' most frequent words.

    The same captions give the same file, whatever their order; the library's own trainer breaks ties by a random hash.
    Raises ValueError where ``size`` does not hold the special tokens and characters.
    """
    backend = _wordpiece({})
    words: Counter[str] = Counter()
    for caption in captions:
        normal = backend.normalizer.normalize_str(clean(caption))
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    letters = sorted(set("".join(words)))
    base = [names[0] for names in _SPECIAL.values()] + letters + [_CONTINUES + letter for letter in letters]
    if size < len(base):
        raise ValueError(f"a vocabulary of {size} entries cannot hold the {len(base)} special tokens and characters")
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    aside = Path(f"{path}.{os.getpid()}.part")
    aside.write_text("".join(f"{token}\n" for token in (base + frequent)[:size]), encoding="utf-8")
    aside.replace(path)


def tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """The file that ``path``, which may be a folder, means. Raises ValueError where there is none, or none is named."""
    path = Path(path)
    wanted = "data.tokenizer must name a vocab.txt, a tokenizer.json or a folder that holds one"
    if path == Path():
        raise ValueError(f"no tokenizer is named: {wanted}, as in data.tokenizer=/data/bert-base-uncased/vocab.txt")
    candidates = [path / "tokenizer.json", path / "vocab.txt"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path}: no tokenizer there; {wanted}")


def _from_json(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from error


def _from_vocabulary(path: Path) -> Backend:
    try:
        tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a vocab.txt: {error}") from error
    vocabulary = {token.rstrip("\r"): i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{path}: {len(tokens)} tokens, {len(vocabulary)} of them different; each must stand once")
    return _wordpiece(vocabulary)


def _wordpiece(vocabulary: dict[str, int]) -> Backend:
    """BERT's uncased WordPiece. No special tokens are registered, so a caption cannot smuggle them in."""
    backend = Backend(WordPiece(vocabulary, unk_token=_SPECIAL["unk"][0], continuing_subword_prefix=_CONTINUES))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_CONTINUES)
    return backend
