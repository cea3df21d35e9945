"""Tokenizers: ids against the libraries they wrap, and what is said of wrong files."""

import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import serialized, write_tokenizer

from cupyllama.errors import ModelError
from cupyllama.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    can_split,
    check_vocabulary,
    load_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return SentencePieceTokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_ids_are_sentencepieces_own(tokenizer):
    judge = sentencepiece.SentencePieceProcessor(model_proto=serialized())
    texts = ["She pours", " two  spaces ", "", "naïve 茶 \n☕", "<s>"]
    assert tokenizer.encode(texts) == [judge.encode(text) for text in texts]
    assert tokenizer.encode([]) == []
    assert (tokenizer.size, tokenizer.bos_token_id, tokenizer.adds_bos) == (320, 1, True)


text = st.text(st.sampled_from("the man.,  ▁\u0308\u00e9茶\u2028\n"), max_size=12)


@given(text, text)
@settings(max_examples=400, deadline=None)
def test_splitting_at_a_space_changes_no_id(tokenizer, left, right):
    assert tokenizer.splits_at_spaces
    if can_split(left, right):
        together, apart = tokenizer.encode([f"{left} {right}"])[0], tokenizer.encode([left, right])
        assert together == apart[0] + apart[1]


def test_a_piece_over_a_space_forbids_splitting(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(serialized(split_by_whitespace=False))
    assert not SentencePieceTokenizer(path).splits_at_spaces


def test_settings_beside_the_model(tmp_path):
    path = write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 320}')
    tokenizer = SentencePieceTokenizer(path)
    assert not tokenizer.adds_bos and tokenizer.size == 321


@pytest.fixture
def tokenizer_json(tmp_path):
    """A byte-level BPE that puts <s> before a text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the man and the woman"] * 50, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_tokenizer_json(tokenizer_json, tmp_path):
    judge = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HFTokenizer)
    texts = ["the man", " and é", ""]
    assert [[0, *ids] for ids in tokenizer.encode(texts)] == [judge.encode(t).ids for t in texts]
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (0, True)
    assert tokenizer.size == judge.get_vocab_size()


def test_tokenizer_model_goes_first_and_a_given_file_before_it(tokenizer_json, tmp_path):
    write_tokenizer(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(tmp_path, tokenizer_json), HFTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "elsewhere", tmp_path), SentencePieceTokenizer)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer.model and no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="nowhere.model: No such file"):
        load_tokenizer(tmp_path, tmp_path / "nowhere.model")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match="not a SentencePiece model") as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in error.value.hint
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ModelError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("rows", [319, 321])
def test_a_vocabulary_of_another_size_is_refused(tokenizer, rows, tmp_path):
    check_vocabulary(tokenizer, 320, tmp_path)
    with pytest.raises(ModelError, match=f"has 320 tokens, but the embedding .* has {rows} rows"):
        check_vocabulary(tokenizer, rows, tmp_path)
