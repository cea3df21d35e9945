"""A session from options to an engine: the cache that memory allows, and what is refused."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from test_generate_engine import texts
from tiny_generation import generating_config, write_generating_model
from tiny_tokenizer import write_tokenizer

from cupyllama.errors import DeviceError, ModelError
from cupyllama.generation.blocks import BLOCK_TOKENS, blocks_for
from cupyllama.generation.engine import PREFILL_TOKENS, Prompt
from cupyllama.generation.session import SessionOptions, open_session
from cupyllama.ops import decode_reference
from cupyllama.parallel import devices
from cupyllama.sizing import activation_bytes

PATH = Path(__file__).parent / "data" / "transformers_generate.json"
RECORDED = json.loads(PATH.read_text())["models"]["gqa"]
LONGEST = 40 + 63
# Of a block in float32: keys and values of 2 heads of 64 elements, in 4 layers.
BLOCK_BYTES = BLOCK_TOKENS * 4 * 2 * 2 * 64 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_generating_model("gqa", tmp_path_factory.mktemp("model"))
    write_tokenizer(directory, generating_config("gqa")["vocab_size"])
    return directory


def options(model, **others) -> SessionOptions:
    return SessionOptions(model, device="cpu", quiet=True, **others)


def let_blocks_fit(monkeypatch, session, rows: int, blocks: int) -> None:
    """As though memory were free for so many blocks, and no more."""
    tokens = PREFILL_TOKENS + LONGEST
    used = activation_bytes(session.config, tokens, "float32", 0, fused=False)
    used += 4 * 4 * rows * session.config.vocab_size
    free = used + int(BLOCK_BYTES * (blocks + 0.5) / 0.9)
    monkeypatch.setattr(devices, "_available_host_bytes", lambda: free)


def test_the_cache_has_room_for_all_rows(model):
    with open_session(options(model)) as session:
        engine = session.engine(5, LONGEST)
        assert engine.pool.capacity == 5 * blocks_for(LONGEST)
        prompts = [Prompt(ids, 64) for ids in RECORDED["prompts"]]
        assert texts(engine, prompts) == RECORDED["greedy"]
        cache = engine.decoder.cache
        assert sum(layer.nbytes for layer in cache) == BLOCK_BYTES * (engine.pool.capacity + 1)


@pytest.mark.parametrize("blocks", [8, 12, 36])
def test_where_memory_is_short_prompts_wait(blocks, model, monkeypatch):
    with open_session(options(model)) as session:
        let_blocks_fit(monkeypatch, session, 5, blocks)
        engine = session.engine(5, LONGEST)
        assert engine.pool.capacity == min(blocks - 1, 35)  # block 0 is nobody's
        prompts = [Prompt(ids, 64) for ids in RECORDED["prompts"]]
        assert texts(engine, prompts) == RECORDED["greedy"]


def test_no_memory_for_one_sequence(model, monkeypatch):
    with open_session(options(model)) as session:
        let_blocks_fit(monkeypatch, session, 2, 7)
        with pytest.raises(DeviceError, match="no memory for the keys and values of 103 tokens"):
            session.engine(2, LONGEST)


def test_half_precision_and_int8(model):
    for others in ({"dtype": "float16"}, {"quantize": "int8"}):
        with open_session(options(model, **others)) as session:
            engine = session.engine(2, 60)
            found = texts(engine, [Prompt(ids, 20) for ids in RECORDED["prompts"]])
            assert engine.decoder.cache[0].dtype == others.get("dtype", "float32")
            # The first tokens at least are further apart than what rounding moves.
            same = [
                text[:3] == other[:3] for text, other in zip(found, RECORDED["greedy"], strict=True)
            ]
            assert sum(same) >= 3


def test_wrong_files_are_found_before_prompts_are_read(model, tmp_path):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    write_tokenizer(tmp_path, generating_config("gqa")["vocab_size"])
    with pytest.raises(ModelError, match="no .*weights|has no"), open_session(options(tmp_path)):
        raise AssertionError
    write_tokenizer(tmp_path, 400)
    with pytest.raises(ModelError, match="has 400 tokens"), open_session(options(tmp_path)):
        raise AssertionError


@pytest.mark.parametrize("error", [None, DeviceError("no more")])
def test_a_session_that_ends_closes_what_generates(error, model, monkeypatch):
    closed = []
    monkeypatch.setattr(decode_reference.Decoder, "close", lambda self: closed.append(self))
    made = []
    with suppress(DeviceError), open_session(options(model)) as session:
        made += [session.engine(2, 40).decoder for _ in range(2)]
        assert not closed
        if error:
            raise error
    assert closed == made
