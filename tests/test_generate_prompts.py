"""Prompts from files and from the command line: what is read, and what is said of wrong ones."""

import json

import pytest
from tiny_tokenizer import write_tokenizer

from cupyllama.errors import DataError
from cupyllama.generation.prompts import PromptText, check_text, read_prompts, tokenise
from cupyllama.tokenizer import load_tokenizer


def write(folder, content, name="prompts.txt"):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n two \r\n", ["one", " two "]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        ("é\u2028茶\x0c\u0085\n".encode(), ["é\u2028茶\x0c\u0085"]),  # ends of lines to Python
        (b'{"prompt": "one"}\n', ['{"prompt": "one"}']),  # the name does not say JSON
    ],
)
def test_lines(content, texts, tmp_path):
    prompts = read_prompts(write(tmp_path, content))
    assert [prompt.text for prompt in prompts] == texts
    places = [f"{tmp_path / 'prompts.txt'}, line {number}" for number in (1, 2)]
    assert [prompt.place for prompt in prompts] == places[: len(texts)]


def test_json_lines(tmp_path):
    records = [{"prompt": "one\ntwo", "id": 7}, {"prompt": " three"}]
    content = "\n".join(map(json.dumps, records)).encode()
    prompts = read_prompts(write(tmp_path, content, "prompts.jsonl"))
    assert [prompt.text for prompt in prompts] == ["one\ntwo", " three"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "p.txt", "p.txt: holds no prompts"),
        (b"", "p.jsonl", "p.jsonl: holds no prompts"),
        (b"one\n\nthree\n", "p.txt", "p.txt, line 2: the prompt is empty"),
        (b"one\n \t\n", "p.txt", "p.txt, line 2: the prompt is empty"),
        (b"one\n\n", "p.txt", "p.txt, line 2: the prompt is empty"),
        (b"one\ntw\xe9\n", "p.txt", "p.txt, line 2: not UTF-8 at byte 2"),
        ("one\n".encode("utf-16"), "p.txt", "p.txt, line 1: not UTF-8 at byte 0"),
        (b'{"prompt": "one"}\n{"prompt": ""}', "p.jsonl", "p.jsonl, line 2: the prompt is empty"),
        (b'{"prompt": "one"}\n\n', "p.jsonl", "p.jsonl, line 2: not JSON"),
        (b'{"prompt": "one"\n', "p.jsonl", "p.jsonl, line 1: not JSON"),
        (b'{"text": "one"}\n', "p.jsonl", "p.jsonl, line 1: has no prompt that is a text"),
        (b'{"prompt": 1}\n', "p.jsonl", "p.jsonl, line 1: has no prompt that is a text"),
        (b'"one"\n', "p.jsonl", "p.jsonl, line 1: has no prompt that is a text"),
        (b'{"prompt": "a\\ud83d"}\n', "p.jsonl", r"line 1: the prompt has '\\ud83d'"),
        (b"[" * 100000, "p.jsonl", "p.jsonl, line 1: not JSON"),
    ],
)
def test_wrong_lines_are_named(content, name, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        read_prompts(write(tmp_path, content, name))
    assert error.value.hint


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.txt: No such file") as error:
        read_prompts(tmp_path / "nowhere.txt")
    assert error.value.hint
    with pytest.raises(DataError, match="Is a directory"):
        read_prompts(tmp_path)


def test_bytes_of_an_argument_that_are_no_text():
    """As Python hands on what of an argument is not UTF-8."""
    with pytest.raises(DataError, match=r"--prompt: the prompt has '\\udce9'"):
        check_text(PromptText("caf\udce9", "--prompt"))


def test_ids_begin_with_bos_where_the_tokenizer_has_it(tmp_path):
    path = write_tokenizer(tmp_path)
    prompts = [PromptText("the man", "a"), PromptText("tea", "b")]
    tokenizer = load_tokenizer(tmp_path)
    bare = tokenizer.encode(["the man", "tea"])
    assert tokenise(prompts, tokenizer, 1, 99) == [[1, *ids] for ids in bare]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert tokenise(prompts, load_tokenizer(tmp_path, path), 1, 99) == bare


def test_a_prompt_must_leave_room(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    prompts = [PromptText("tea", "p.txt, line 1"), PromptText("the man on the roof", "line 2")]
    longest = 1 + len(tokenizer.encode(["the man on the roof"])[0])
    assert tokenise(prompts, tokenizer, 10, longest + 10)
    message = f"line 2: the prompt 'the man on the roof' has {longest} tokens, and with 10 new ones"
    with pytest.raises(DataError, match=f"{message} it would pass the model's {longest + 9}") as e:
        tokenise(prompts, tokenizer, 10, longest + 9)
    assert e.value.hint == "Give --max-new-tokens 9 or fewer."
    with pytest.raises(DataError, match="line 2: the prompt") as e:
        tokenise(prompts[1:], tokenizer, 10, longest)
    assert e.value.hint == "Shorten the prompt."


def test_a_session_may_have_less_room_than_the_model(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    line = [PromptText("the man on the roof", "this line")]
    length = 1 + len(tokenizer.encode(["the man on the roof"])[0])
    assert tokenise(line, tokenizer, 10, 131072, length + 10)
    with pytest.raises(DataError, match=f"would pass the {length + 9} that a session has") as e:
        tokenise(line, tokenizer, 10, 131072, length + 9)
    assert e.value.hint == "Shorten it, or give it with --prompt: the model sees 131,072 tokens."
    for room in (length + 9, length + 8):  # --prompt would be no remedy
        with pytest.raises(DataError, match=f"would pass the model's {length + 9}") as e:
            tokenise(line, tokenizer, 10, length + 9, room)
        assert e.value.hint == "Give --max-new-tokens 9 or fewer."
