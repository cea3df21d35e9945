"""Tokenizers: ids against the libraries they wrap, and what is said of wrong files."""

import io
import json
import math

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import SENTENCES, serialized, write_tokenizer

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


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("a", "b", True),
        ("a.", "(b", True),
        ("é", "b", True),
        ("", "b", False),
        ("a ", "b", False),  # runs of spaces have pieces of their own
        ("a▁", "b", False),  # the same to SentencePiece
        ("a", "", False),
        ("a", " b", False),
        ("a", "\u0308b", False),  # normalisation may join it with the space
        ("a", "é", False),
        ("a", "▁b", False),
    ],
)
def test_where_a_text_may_be_split(left, right, expected):
    assert can_split(left, right) is expected


def test_splitting_where_it_is_not_allowed_changes_ids(tmp_path):
    """Pieces for runs of spaces, and a normalisation that joins a space with what follows."""
    runs = trained(tmp_path, user_defined_symbols=["▁▁"], normalization_rule_name="identity")
    assert runs.splits_at_spaces and not can_split("a▁", "b")
    assert runs.encode(["a▁ b"])[0] != sum(runs.encode(["a▁", "b"]), [])
    rules = tmp_path / "rules.tsv"
    rules.write_text("20 308\tA8\n")  # a space and a diaeresis are one character
    joining = trained(tmp_path, normalization_rule_tsv=str(rules))
    assert joining.splits_at_spaces and not can_split("a", "\u0308b")
    assert joining.encode(["a \u0308b"])[0] != sum(joining.encode(["a", "\u0308b"]), [])


def trained(folder, **options):
    """A tokenizer of the tiny one's kind, but for `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path = folder / "trained.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


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


BOS_AND_EOS = [("<s>", 0), ("</s>", 1)]


def write_json_tokenizer(folder, template, settings=None, name="tokenizer_config.json"):
    """A byte-level BPE with <s> = 0 and </s> = 1, and a settings file beside it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the man and the woman"] * 50, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=BOS_AND_EOS
    )
    made.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / name).write_text(json.dumps(settings))
    return HFTokenizer(folder / "tokenizer.json")


NAMED, AS_OBJECT = {"bos_token": "<s>"}, {"bos_token": {"content": "<s>", "lstrip": False}}


@pytest.mark.parametrize(
    ("template", "settings", "bos", "adds"),
    [
        ("<s> $A", None, 0, True),
        ("<s> $A </s>", NAMED, 0, True),
        ("$A </s>", None, None, False),  # what stands behind a text is no BOS
        ("$A </s>", NAMED, 0, False),
        ("$A </s>", NAMED | {"add_bos_token": True}, 0, True),
        ("$A", AS_OBJECT, 0, False),
        ("$A", AS_OBJECT | {"add_bos_token": True}, 0, True),
        ("$A", {"add_bos_token": True}, None, False),
        ("$A", {"bos_token": "<nowhere>", "add_bos_token": True}, None, False),
        ("<s> $A", {"add_bos_token": False}, 0, False),
        ("<s> $A", NAMED | {"add_bos_token": False}, 0, False),
        ("<s> $A", NAMED | {"add_bos_token": None}, 0, True),
        ("</s> $A", NAMED, 1, True),  # as texts show
        ("</s> $A", NAMED | {"add_bos_token": True}, 0, True),  # as transformers rewrites it
        ("$A", {"bos_token": None}, None, False),
    ],
)
def test_bos_of_a_tokenizer_json(template, settings, bos, adds, tmp_path):
    tokenizer = write_json_tokenizer(tmp_path, template, settings)
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (bos, adds)


def test_bos_in_the_map_of_special_tokens(tmp_path):
    tokenizer = write_json_tokenizer(tmp_path, "$A", NAMED, "special_tokens_map.json")
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (0, False)


def test_added_tokens_count_for_both_kinds_of_tokenizer(tmp_path):
    decoder = {"added_tokens_decoder": {"340": {"content": "[PAD]"}}}
    assert write_json_tokenizer(tmp_path, "$A", decoder).size == 341
    assert SentencePieceTokenizer(write_tokenizer(tmp_path)).size == 341
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    assert SentencePieceTokenizer(write_tokenizer(tmp_path)).size == 320


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"[PAD]": "last"}, "the id of an added token is no number"),
        ("added_tokens.json", {"[PAD]": None}, "the id of an added token is no number"),
        ("added_tokens.json", {"[PAD]": math.inf}, "the id of an added token is no number"),
        ("added_tokens.json", ["[PAD]"], "not a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "the id of an added"),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}, "the id of an added"),
        ("tokenizer_config.json", {"add_bos_token": "false"}, "add_bos_token is 'false'"),
    ],
)
@pytest.mark.parametrize("kind", [write_tokenizer, lambda folder: tokenizer_file(folder)])
def test_broken_settings_are_named(kind, name, content, message, tmp_path):
    path = kind(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"{name}: {message}") as error:
        load_tokenizer(tmp_path, path)
    assert error.value.hint


def tokenizer_file(folder):
    return write_json_tokenizer(folder, "$A").path


@pytest.mark.parametrize("content", ["{", "[" * 100000])
def test_settings_that_are_no_json_are_named(content, tmp_path):
    path = write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer_config.json: not valid JSON"):
        load_tokenizer(tmp_path, path)


def test_tokenizer_model_goes_first_and_a_given_file_before_it(tokenizer_json, tmp_path):
    write_tokenizer(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(tmp_path, tokenizer_json), HFTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "elsewhere", tmp_path), SentencePieceTokenizer)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer.model, no tokenizer.json, and no"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="nowhere.model: No such file"):
        load_tokenizer(tmp_path, tmp_path / "nowhere.model")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match="not a SentencePiece model") as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in error.value.hint
    whole = write_tokenizer(tmp_path).read_bytes()
    for content in (b"", whole[:100], whole[:-3]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelError, match="tokenizer.model: not a SentencePiece model") as error:
            load_tokenizer(tmp_path)
        assert error.value.hint.startswith("Is the download complete?")
    with pytest.raises(ModelError, match="nowhere.json: No such file") as error:
        load_tokenizer(tmp_path, tmp_path / "nowhere.json")
    assert error.value.hint
    with pytest.raises(ModelError, match="File name too long"):
        load_tokenizer(tmp_path, tmp_path / ("t" * 300))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"
    for name in ("pointer.model", "pointer.json"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(ModelError, match=f"{name}: is a git-lfs pointer") as error:
            load_tokenizer(tmp_path, tmp_path / name)
        assert "git lfs pull" in error.value.hint
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ModelError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("rows", "way_out"),
    [(312, "[PAD]"), (319, "[PAD]"), (321, '{"<unused>": 320}'), (328, '{"<unused>": 327}')],
)
def test_a_vocabulary_of_another_size_is_refused(tokenizer, rows, way_out, tmp_path):
    check_vocabulary(tokenizer, 320, tmp_path)
    with pytest.raises(
        ModelError, match=f"has 320 tokens, but the embedding .* has {rows} rows"
    ) as error:
        check_vocabulary(tokenizer, rows, tmp_path)
    assert way_out in error.value.hint


def test_the_way_out_of_a_padded_embedding(tmp_path):
    path = write_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<unused>": 383}')
    check_vocabulary(SentencePieceTokenizer(path), 384, tmp_path)
