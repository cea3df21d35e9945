"""Tokens to text while they come: what is printed against what the libraries make of all tokens."""

import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from awkward_texts import awkward_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import serialized, write_tokenizer
from tokenizers import decoders, models

from cupyllama.bpe import byte_of_character
from cupyllama.errors import ModelError, UsageError
from cupyllama.generation.text import StopTexts, TextStream, check_stop_texts
from cupyllama.tokenizer import load_tokenizer

OPT = Path(__file__).parent / "data" / "opt_bpe"
PAIR = ("vocab.json", "merges.txt", "tokenizer_config.json")
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
LLAMA_DECODER = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


class Case:
    """A tokenizer of ours, and what the library makes of tokens behind a token of text."""

    def __init__(self, folder, decode, anchor, size):
        self.tokenizer = load_tokenizer(folder)
        self.decode, self.anchor, self.size = decode, anchor, size

    def whole(self, ids):
        alone = self.decode([self.anchor])
        text = self.decode([self.anchor, *ids])
        assert alone and text.startswith(alone)
        return text[len(alone) :]


def sentencepiece_case(folder):
    write_tokenizer(folder)
    judge = sentencepiece.SentencePieceProcessor(model_proto=serialized())
    return Case(folder, judge.DecodeIds, judge.PieceToId("▁the"), judge.GetPieceSize())


def opt_case(folder):
    for name in PAIR:
        shutil.copyfile(OPT / name, folder / name)
    files = str(OPT / "vocab.json"), str(OPT / "merges.txt")
    judge = tokenizers.Tokenizer(models.BPE.from_file(*files))
    judge.decoder = decoders.ByteLevel()
    judge.add_special_tokens(["<pad>", "</s>"])
    return Case(folder, judge.decode, judge.token_to_id("the"), judge.get_vocab_size())


def json_case(folder, decoder=LLAMA_DECODER):
    """tokenizer.json in the manner of LLaMA's, with tokens added of both kinds."""
    words = ["▁the", "the", "▁", "▁▁", "é", "茶", "a▁b", ".", "<unk>"]
    vocabulary = BYTES | {word: 256 + place for place, word in enumerate(words)}
    judge = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    judge.decoder = decoder
    judge.add_special_tokens(["<s>", "</s>"])
    judge.add_tokens(["[▁X]"])
    judge.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Case(folder, judge.decode, vocabulary["the"], judge.get_vocab_size())


def metaspace_case(folder):
    return json_case(folder, decoders.Metaspace())


CASES = [sentencepiece_case, opt_case, json_case, metaspace_case]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def streamed(tokenizer, ids, stop_texts=()):
    """What is printed with each token, and at the end."""
    stream = TextStream(tokenizer, stop_texts)
    return [*(stream.put(token_id) for token_id in ids), stream.end()]


def bytes_of(case):
    """The tokens that are a byte each, by byte."""
    ids = {}
    for token_id in range(case.size):
        piece = case.tokenizer.piece(token_id)
        if isinstance(piece, bytes) and len(piece) == 1:
            ids.setdefault(piece[0], token_id)
    return ids


def test_random_tokens(case):
    draw = random.Random(5)
    lone = list(bytes_of(case).values())
    for _ in range(3000):
        ids = [draw.randrange(case.size) for _ in range(draw.randrange(1, 12))]
        if lone:
            ids = [draw.choice(lone) if draw.random() < 0.4 else token_id for token_id in ids]
        assert "".join(streamed(case.tokenizer, ids)) == case.whole(ids), ids


def test_bytes_that_are_nearly_characters(case):
    """Characters cut short, overlong, beyond the last one, and halves of surrogate pairs."""
    lone = bytes_of(case)
    if not lone:
        pytest.skip("no token is a byte")
    nearly = [
        b"\xf0\x9f\x98",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xe2\x82",
        b"\x80",
    ]
    whole = ["😀", "é", "\U0010ffff", "a"]
    draw = random.Random(6)
    for _ in range(3000):
        parts = [draw.choice([*nearly, *(text.encode() for text in whole)]) for _ in range(5)]
        ids = [lone[byte] for part in parts for byte in part]
        if draw.random() < 0.5:
            ids.insert(draw.randrange(len(ids)), draw.randrange(case.size))
        assert "".join(streamed(case.tokenizer, ids)) == case.whole(ids), ids


def test_awkward_texts(case):
    """What the tokenizer made of a text comes back, in characters that nothing changes later."""
    if case.tokenizer.path.name == "tokenizer.json":
        pytest.skip("a vocabulary of few words")
    for text in awkward_texts(400, seed=7):
        ids = case.tokenizer.encode([text])[0]
        parts = streamed(case.tokenizer, ids)
        printed = "".join(parts)
        assert printed == case.whole(ids), repr(text)
        for part in parts:
            part.encode()  # no half characters
        if case.tokenizer.invalid_bytes == "each":  # SentencePiece's: a space goes in front
            assert printed == (text and " " + text.replace("▁", " ")), repr(text)
        elif "</s>" not in text and "<pad>" not in text:  # else tokens that are no text
            assert printed == text


def test_an_emoji_over_several_tokens_comes_whole(case):
    lone = bytes_of(case)
    if not lone:
        pytest.skip("no token is a byte")
    ids = [lone[byte] for byte in "😀é".encode()]
    parts = streamed(case.tokenizer, ids)
    if case.tokenizer.invalid_bytes == "run":
        assert parts == [""] * 6 + ["😀é"]  # a bad byte behind it would still take it away
    else:
        assert parts == ["", "", "", "😀", "", "é", ""]


def test_text_does_not_wait_for_more_than_it_must(tmp_path):
    tokenizer = sentencepiece_case(tmp_path).tokenizer
    ids = tokenizer.encode(["the man"])[0]
    parts = streamed(tokenizer, ids)
    assert parts[-1] == "" and all(parts[:-1]) and "".join(parts) == " the man"


def test_tokens_beyond_the_tokenizer_are_no_text(case):
    assert streamed(case.tokenizer, [case.size + 3]) == ["", ""]


def test_ends_of_text(tmp_path):
    for name, expected in [("sp", 2), ("opt", 2), ("json", 266)]:
        folder = tmp_path / name
        folder.mkdir()
        case = {"sp": sentencepiece_case, "opt": opt_case, "json": json_case}[name](folder)
        assert case.tokenizer.eos_token_id == expected
    (tmp_path / "json" / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "json").eos_token_id is None
    (tmp_path / "opt" / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "opt").eos_token_id == 2  # as Metaseq's own release


def test_characters_of_bytes():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    found = byte_of_character()
    assert set(found) == set(alphabet) and sorted(found.values()) == list(range(256))
    judge = decoders.ByteLevel()
    for character, byte in found.items():
        if byte < 128:
            assert judge.decode([character]) == chr(byte)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.ByteFallback(), decoders.CTC()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("a+"), "b")]),
    ],
)
def test_other_decoders_are_refused_by_generation_alone(decoder, tmp_path):
    tokenizer = json_case(tmp_path, decoder).tokenizer
    assert tokenizer.encode(["the"])
    with pytest.raises(ModelError, match="tokenizer.json: its decoder is .* is not known") as error:
        TextStream(tokenizer)
    assert error.value.hint


# Stop texts


def first_stop(text, stop_texts):
    """Character by character: where the first stop text is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stop_texts if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


letters = st.text("ab\n", max_size=4)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3))
@settings(max_examples=1000, deadline=None)
def test_stop_texts_in_any_pieces(parts, stop_texts):
    stops, printed = StopTexts(stop_texts), ""
    expected, found = first_stop("".join(parts), stop_texts)
    for part in parts:
        printed += stops.put(part)
        assert expected.startswith(printed)
    assert stops.found == found
    assert printed + stops.end() == expected
    # What was held back might have become a stop text: no more is kept than that.
    if not found:
        held = len(expected) - len(printed)
        assert held == max(
            (n for s in stop_texts for n in range(len(s)) if expected.endswith(s[:n])), default=0
        )


def test_a_stop_text_over_several_tokens(tmp_path):
    tokenizer = sentencepiece_case(tmp_path).tokenizer
    ids = tokenizer.encode(["the man 😀 and the tea"])[0]
    stream = TextStream(tokenizer, ["😀 an", "tea"])
    parts = []
    for token_id in ids:
        parts.append(stream.put(token_id))
        if stream.stopped:
            break
    assert "".join(parts) == " the man " and stream.stopped
    assert stream.put(ids[0]) == "" and stream.end() == ""


def test_what_is_held_back_comes_at_the_end(tmp_path):
    tokenizer = sentencepiece_case(tmp_path).tokenizer
    ids = tokenizer.encode(["the tea"])[0]
    parts = streamed(tokenizer, ids, ["tea party"])
    assert "".join(parts) == " the tea" and parts[-1].endswith("tea")


def test_bytes_at_the_end_may_still_stop(tmp_path):
    case = sentencepiece_case(tmp_path)
    stream = TextStream(case.tokenizer, ["\ufffd"])
    assert stream.put(bytes_of(case)[0xF0]) == "" and stream.end() == "" and stream.stopped


def test_an_empty_stop_text():
    check_stop_texts(["a", " "])
    with pytest.raises(UsageError, match="--stop '' is empty"):
        check_stop_texts(["a", ""])


@pytest.mark.parametrize("name", ["llama_tokenizer.model", "opt"])
def test_the_real_tokenizers(name, real_data, tmp_path):
    if name == "opt":
        for part in ("vocab.json", "merges.txt"):
            shutil.copyfile(real_data / f"opt_gpt2-{part}", tmp_path / f"gpt2-{part}")
        tokenizer = load_tokenizer(tmp_path)
        files = [str(tmp_path / f"gpt2-{part}") for part in ("vocab.json", "merges.txt")]
        judge = tokenizers.Tokenizer(models.BPE.from_file(*files))
        judge.decoder = decoders.ByteLevel()
        judge.add_special_tokens(["<pad>", "</s>"])
        case = SimpleCase(tokenizer, judge.decode, judge.token_to_id("the"))
    else:
        tokenizer = load_tokenizer(tmp_path, real_data / name)
        judge = sentencepiece.SentencePieceProcessor(model_file=str(real_data / name))
        case = SimpleCase(tokenizer, judge.DecodeIds, judge.PieceToId("▁the"))
    draw = random.Random(8)
    for text in awkward_texts(1000, seed=9):
        ids = tokenizer.encode([text])[0]
        ids += [draw.randrange(tokenizer.size) for _ in range(draw.randrange(4))]
        draw.shuffle(ids)
        assert "".join(streamed(tokenizer, ids)) == case.whole(ids), ids


class SimpleCase(Case):
    def __init__(self, tokenizer, decode, anchor):
        self.tokenizer, self.decode, self.anchor = tokenizer, decode, anchor


def test_scoring_needs_no_decoder(tmp_path):
    case = json_case(tmp_path)
    assert case.tokenizer.encode(["the"]) and "_decoding" not in vars(case.tokenizer)
