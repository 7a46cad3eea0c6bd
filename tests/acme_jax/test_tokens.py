"""Texts to ids. The vocabulary is the tiny BERT fixture's: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3."""

import builtins
import json
import shutil

import numpy as np
import pytest
from checkpoint_copies import CHECKPOINTS

from acme_jax import pretrained, tokens
from acme_jax.idx import DataError
from acme_jax.pretrained import PretrainedError

tokenizers = pytest.importorskip("tokenizers")

BERT = CHECKPOINTS / "bert"
VOCAB = {piece: i for i, piece in enumerate((BERT / "vocab.txt").read_text().split("\n")[:-1])}


def ids(*pieces, length=8):
    found = [VOCAB[piece] for piece in pieces]
    return found + [0] * (length - len(found))


def test_word_pieces_by_hand():
    made = tokens.load(BERT, max_tokens=8)
    assert (made.pad_id, made.vocab_size, made.max_tokens) == (0, len(VOCAB), 8)
    got = made(["The cat sat.", "", "Running cats ab CAB!", "the " * 20])
    assert got.dtype == np.int32
    np.testing.assert_array_equal(
        got,
        [
            ids("[CLS]", "the", "cat", "sat", ".", "[SEP]"),
            ids("[CLS]", "[SEP]"),
            # "running" and "cats" have no pieces; "ab" is a, ##b; "cab" is c, ##a, ##b.
            ids("[CLS]", "[UNK]", "[UNK]", "a", "##b", "c", "##a", "[SEP]"),
            ids("[CLS]", *["the"] * 6, "[SEP]"),
        ],
    )


def test_ids_fit_the_checkpoint():
    made = tokens.load(BERT, max_tokens=8)
    config, _ = pretrained.load_bert(BERT, max_tokens=8)
    assert (config.vocab_size, config.pad_id) == (made.vocab_size, made.pad_id)


def test_tokenizer_json_goes_before_the_vocabulary(tmp_path):
    made = tokens.load(BERT, max_tokens=8)
    made.engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("useless\n")
    # What the file says of truncation and padding does not count.
    again = tokens.load(tmp_path, max_tokens=5)
    np.testing.assert_array_equal(
        again(["the cat sat on"]), [ids("[CLS]", "the", "cat", "sat", "[SEP]", length=5)]
    )


def test_upper_case_is_kept_where_the_settings_say_so(tmp_path):
    shutil.copy(BERT / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    got = tokens.load(tmp_path, max_tokens=8)(["The cat"])
    np.testing.assert_array_equal(got, [ids("[CLS]", "[UNK]", "cat", "[SEP]")])


def test_many_texts_are_encoded_in_chunks(monkeypatch):
    texts = ["the cat", "a", "dog on mat", "b a", "run"]
    made = tokens.load(BERT, max_tokens=6)
    whole = made(texts)
    monkeypatch.setattr(tokens, "_CHUNK", 2)
    np.testing.assert_array_equal(made(texts), whole)
    assert made([]).shape == (0, 6)


# Bad input


def test_texts_that_are_none():
    made = tokens.load(BERT, max_tokens=6)
    with pytest.raises(DataError, match="text 1 is a float, expected a string"):
        made(["a", float("nan")])
    with pytest.raises(DataError, match="got one string"):
        made("the cat")


def test_too_few_tokens():
    with pytest.raises(PretrainedError, match="max_tokens is 2, expected at least 3"):
        tokens.load(BERT, max_tokens=2)


def test_nothing_to_read(tmp_path):
    with pytest.raises(PretrainedError, match=r"neither tokenizer\.json nor vocab\.txt"):
        tokens.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_damaged_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PretrainedError, match=r"tokenizer\.json is no tokeniser"):
        tokens.load(tmp_path)


def test_damaged_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    with pytest.raises(PretrainedError, match=r"no \[CLS\], \[SEP\]"):
        tokens.load(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PretrainedError, match="no UTF-8"):
        tokens.load(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "part"),
    [({"<pad>": 0, "a": 1}, r"no \[PAD\], \[CLS\], \[SEP\]"), (VOCAB, "does not put")],
)
def test_tokenisers_of_other_families(tmp_path, vocab, part):
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PretrainedError, match=part):
        tokens.load(tmp_path)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PretrainedError, match="pip install tokenizers"):
        tokens.load(BERT)
