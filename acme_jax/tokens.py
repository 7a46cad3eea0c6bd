"""Texts to token ids, with the tokeniser that a checkpoint brings along.

Needs the package `tokenizers`. A tokeniser is read from tokenizer.json, or, where a checkpoint
only has vocab.txt, made as BERT's WordPiece.

Shape letters: N samples, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acme_jax.checkpoint_tensors import PretrainedError, read_json
from acme_jax.hub import find_directory
from acme_jax.idx import DataError

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHUNK = 4096  # texts encoded at a time; an encoding takes far more memory than its ids


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts to token ids of one length; see `load`."""

    engine: Any
    """A `tokenizers.Tokenizer` that truncates and pads."""
    vocab_size: int
    max_tokens: int
    """T: ids of a text, [CLS] first, [SEP] after its last word, then padding."""
    pad_id: int

    def to_json(self) -> bytes:
        """The content of a tokenizer.json that cuts and pads as this one does."""
        return bytes(self.engine.to_str(), "utf-8")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [N, T]; longer texts are truncated, their [SEP] stays.

        Args:
          texts: N strings.

        Raises:
          DataError: something among them is no string.
        """
        if isinstance(texts, str):
            raise DataError("expected a sequence of texts, got one string; put it into a list")
        ids = np.empty((len(texts), self.max_tokens), np.int32)
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            for index, text in enumerate(chunk):
                if not isinstance(text, str):
                    raise DataError(
                        f"text {start + index} is a {type(text).__name__}, expected a string; "
                        "drop the sample or replace it by ''"
                    )
            encoded = self.engine.encode_batch(chunk)
            ids[start : start + len(chunk)] = [encoding.ids for encoding in encoded]
        return ids


def load(path_or_hub_id: str | Path, *, max_tokens: int = 128) -> Tokenizer:
    """The tokeniser of a checkpoint.

    Args:
      path_or_hub_id: as in `acme_jax.pretrained.load_bert`.
      max_tokens: T, at least 3: [CLS], one word piece and [SEP].

    Raises:
      PretrainedError: `tokenizers` is not installed; the directory has neither tokenizer.json nor
        vocab.txt, or a damaged one; or the tokeniser does not enclose texts in [CLS] and [SEP].
    """
    if max_tokens < 3:
        raise PretrainedError(f"max_tokens is {max_tokens}, expected at least 3")
    try:
        import tokenizers
    except ImportError:
        raise PretrainedError(
            "texts need the package tokenizers: `pip install tokenizers`"
        ) from None
    directory = find_directory(path_or_hub_id)
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            engine = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The package raises plain Exception.
            raise PretrainedError(f"{path} is no tokeniser ({error}); get it again") from None
    else:
        engine = _word_piece(directory)
    pad_id = _check(engine, directory)
    engine.enable_truncation(max_tokens)
    engine.enable_padding(pad_id=pad_id, pad_token="[PAD]", length=max_tokens)
    return Tokenizer(engine, engine.get_vocab_size(), max_tokens, pad_id)


def _check(engine: Any, directory: Path) -> int:
    """Id of the padding, of a tokeniser that encloses texts as BERT expects."""
    special = {name: engine.token_to_id(name) for name in ("[PAD]", "[CLS]", "[SEP]")}
    lacking = [name for name, index in special.items() if index is None]
    if lacking:
        raise PretrainedError(
            f"the tokeniser of {directory} has no {', '.join(lacking)}; supported are those of the "
            "BERT family"
        )
    engine.no_padding()
    engine.no_truncation()
    ids = engine.encode("a").ids
    if len(ids) < 3 or ids[0] != special["[CLS]"] or ids[-1] != special["[SEP]"]:
        raise PretrainedError(
            f"the tokeniser of {directory} does not put [CLS] before and [SEP] after a text; "
            "supported are those of the BERT family"
        )
    return special["[PAD]"]


def _word_piece(directory: Path) -> Any:
    """BERT's tokeniser around vocab.txt, one piece a line (Devlin et al., 2019)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    path = directory / "vocab.txt"
    if not path.is_file():
        raise PretrainedError(
            f"{directory} has neither tokenizer.json nor vocab.txt; copy the tokeniser of the "
            "model it was trained from, or save it with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(dir)`"
        )
    try:
        pieces = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise PretrainedError(f"{path} is no UTF-8 text ({error.reason}); get it again") from None
    pieces = pieces[:-1] if pieces[-1] == "" else pieces
    vocab = {piece.rstrip("\r"): index for index, piece in enumerate(pieces)}
    lacking = [name for name in _SPECIAL[:4] if name not in vocab]
    if lacking:
        raise PretrainedError(
            f"{path} has no {', '.join(lacking)}, expected BERT's vocabulary with one piece a line"
        )
    settings = directory / "tokenizer_config.json"
    lowercase = read_json(settings).get("do_lower_case", True) if settings.is_file() else True
    engine = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    engine.add_special_tokens([name for name in _SPECIAL if name in vocab])
    engine.normalizer = normalizers.BertNormalizer(lowercase=bool(lowercase))
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocab[name]) for name in ("[SEP]", "[CLS]")]
    engine.post_processor = processors.BertProcessing(*ends)
    return engine
