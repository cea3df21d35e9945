"""`cupyllama generate` as a user meets it: prompts in, text out, and what ends a run."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from engine import build_stage, score_rows
from generate_command import (
    DEMO,
    PROMPTS,
    SLOW,
    fails,
    generate,
    is_usage,
    records_of,
    text_of,
    text_of_file,
    text_of_stdin,
)
from generate_command import prompts_file as prompts_file
from tiny_generation import write_overflowing_model
from tiny_models import write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.cli import cli
from cupyllama.generation.answers import Pace, end_token_ids
from cupyllama.packing import TokenRow
from cupyllama.tokenizer import load_tokenizer


def test_the_likeliest_text_is_what_scoring_calls_greedy():
    stage, tokenizer = build_stage(DEMO), load_tokenizer(DEMO)
    for prompt in PROMPTS:
        text = text_of("--prompt", prompt, "--max-new-tokens", 20)
        begin, whole = ([1, *ids] for ids in tokenizer.encode([prompt, prompt + text]))
        assert whole[: len(begin)] == begin and len(whole) > len(begin) + 3
        scores = score_rows(stage, [TokenRow(whole, len(begin), 0)])
        assert scores.is_greedy[0], text
        worse = [*whole[:-1], whole[-1] + 1]
        assert not score_rows(stage, [TokenRow(worse, len(begin), 0)]).is_greedy[0]


def test_several_prompts_are_answered_as_each_alone(prompts_file, tmp_path):
    more, path = ["--max-new-tokens", 24], tmp_path / "out.jsonl"
    alone = [text_of("--prompt", prompt, *more) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    for size in (1, 3, 32):
        result = generate("--prompts", prompts_file, "--batch-size", size, *more)
        assert result.exit_code == 0, result.output
        blocks = [p + text + "\n\n" for p, text in zip(PROMPTS, alone, strict=True)]
        assert result.stdout == "".join(blocks)
        assert re.search(r"4 prompts: \d+ tokens in [\d.]+ s: ", result.stderr)
        silent = text_of_file("--prompts", prompts_file, "--batch-size", size, *more, path=path)
        assert [record["text"] for record in silent] == alone
    assert text_of_stdin(prompts_file, *more) == "".join(blocks)


def test_records(prompts_file, tmp_path):
    tokenizer = load_tokenizer(DEMO)
    arguments = ["--prompts", prompts_file, "--max-new-tokens", 150, "--stop", " small"]
    records = text_of_file(*arguments, path=tmp_path / "out.jsonl")
    assert list(records[0]) == ["prompt", "text", "prompt_tokens", "tokens", "finish_reason"]
    assert [record["prompt"] for record in records] == PROMPTS
    for record in records:
        (ids,) = tokenizer.encode([record["prompt"]])
        assert record["prompt_tokens"] == 1 + len(ids)
    stopped, *others = records
    assert stopped["finish_reason"] == "stop" and stopped["text"].endswith("doors of the")
    assert {record["finish_reason"] for record in others} == {"eos"}
    for record in others:  # of the tokens, the last one is EOS
        assert record["tokens"] == len(tokenizer.encode([record["text"].strip()])[0]) + 1
    limited = ["--prompt", "She pours", "--max-new-tokens", 5, "--output", tmp_path / "out.jsonl"]
    text = text_of(*limited)  # one prompt is printed, too
    (record,) = records_of(tmp_path / "out.jsonl")
    assert (record["text"], record["tokens"], record["finish_reason"]) == (text, 5, "length")


def test_json_lines_as_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    records = text_of_file("--prompts", path, "--max-new-tokens", 9, path=tmp_path / "out.jsonl")
    expected = [text_of("--prompt", p, "--max-new-tokens", 9) for p in PROMPTS]
    assert [record["text"] for record in records] == expected


def test_stop_texts():
    whole = text_of("--prompt", PROMPTS[0], "--max-new-tokens", 20)
    assert " of the small truck." in whole
    for stops in (["mall tr"], ["xyz", "mall tr"], ["mall truck. He", "mall tr"]):
        given = [argument for stop in stops for argument in ("--stop", stop)]
        cut = text_of("--prompt", PROMPTS[0], "--max-new-tokens", 20, *given)
        assert cut == whole[: whole.index("mall tr")]
    unseen = ["--stop", whole[-4:] + "more"]  # what was held back is printed at the end
    assert text_of("--prompt", PROMPTS[0], "--max-new-tokens", 20, *unseen) == whole


def test_a_seed_gives_the_same_text_again(prompts_file, tmp_path):
    settings = ["--temperature", 1, "--top-k", 40, "--top-p", 0.95, "--max-new-tokens", 16]

    def drawn(*arguments):
        return text_of_file(
            "--prompts", prompts_file, *settings, *arguments, path=tmp_path / "out.jsonl"
        )

    first = drawn("--seed", 7)
    assert drawn("--seed", 7, "--batch-size", 1) == first
    assert drawn("--seed", 8) != first
    assert drawn() == drawn("--seed", 0) != first
    alone = text_of("--prompt", PROMPTS[0], *settings, "--seed", 7)
    assert alone == first[0]["text"]
    prompts_file.write_text("She pours\n" * 4)
    assert len({record["text"] for record in drawn("--seed", 7)}) > 1  # not one draw four times


def test_top_k_and_top_p_draw_without_a_temperature():
    greedy = text_of("--prompt", PROMPTS[0])
    drawn = {text_of("--prompt", PROMPTS[0], "--top-p", 0.99, "--seed", s) for s in range(3)}
    assert len(drawn) == 3 and greedy not in drawn
    assert text_of("--prompt", PROMPTS[0], "--top-k", 1) == greedy
    assert text_of("--prompt", PROMPTS[0], "--temperature", 0) == greedy


def test_a_repetition_penalty_changes_what_comes():
    plain = text_of("--prompt", PROMPTS[0], "--max-new-tokens", 40)
    assert text_of("--prompt", PROMPTS[0], "--max-new-tokens", 40, "--repetition-penalty", 9) != (
        plain
    )


def test_beams_find_a_likelier_text(prompts_file, tmp_path):
    stage, tokenizer = build_stage(DEMO), load_tokenizer(DEMO)
    more = ["--prompts", prompts_file, "--max-new-tokens", 12]
    texts = {}
    for width in (1, 6):
        records = text_of_file(*more, "--beam-width", width, path=tmp_path / "out.jsonl")
        texts[width] = [record["text"] for record in records]
    assert texts[1] == [
        record["text"] for record in text_of_file(*more, path=tmp_path / "out.jsonl")
    ]
    differing = 0
    for prompt, greedy, found in zip(PROMPTS, texts[1], texts[6], strict=True):
        begin, *whole = (
            [1, *ids] for ids in tokenizer.encode([prompt, prompt + greedy, prompt + found])
        )
        rows = [TokenRow(ids, len(begin), place) for place, ids in enumerate(whole)]
        sums = score_rows(stage, rows).loglikelihoods
        means = [total / (len(ids) - len(begin)) for total, ids in zip(sums, whole, strict=True)]
        differing += greedy != found
        assert means[1] >= means[0] - 1e-4, (greedy, found)
    assert differing


def test_text_comes_token_by_token():
    command = [sys.executable, "-c", SLOW, "generate", "--demo", "--device", "cpu", "--prompt"]
    command += [PROMPTS[0], "--max-new-tokens", "12"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        came, text = [], b""
        while part := os.read(process.stdout.fileno(), 1000):
            came.append(time.monotonic())
            text += part
    assert process.returncode == 0
    assert text.decode() == text_of("--prompt", PROMPTS[0], "--max-new-tokens", 12) + "\n"
    assert len(came) > 8 and came[-1] - came[0] > 0.7


# What ends a run


def test_usage(tmp_path, prompts_file):
    is_usage(CliRunner().invoke(cli, ["generate"]), "Give one of --model DIR and --demo")
    is_usage(generate("--prompt", "a", "--prompts", prompts_file), "Give one of --prompt TEXT and")
    is_usage(generate("--prompts", prompts_file, "--output", prompts_file), "are the same file")
    for flag in ("temperature", "top-k", "top-p", "repetition-penalty", "seed"):
        for value in ("1", "0") if flag in ("temperature", "seed") else ("1",):
            result = generate("--prompt", "a", "--beam-width", 2, f"--{flag}", value)
            is_usage(result, f"--beam-width searches for the likeliest text, and --{flag} is")
    for flag in ("top-k", "top-p", "seed"):
        result = generate("--prompt", "a", "--temperature", 0, f"--{flag}", 1)
        is_usage(result, f"--temperature 0 takes the most likely token, and --{flag} is for draws")
    for more in ([], ["--repetition-penalty", 2]):
        result = generate("--prompt", "a", "--seed", 0, *more)
        is_usage(result, "--seed is for draws, and without --temperature, --top-k or --top-p the")
    for size in (1, 32):
        result = generate("--prompt", "a", "--beam-width", 2, "--batch-size", size)
        is_usage(result, "--beam-width answers one prompt after the other, and --batch-size is for")
    for option in (
        *(["--temperature", "-1"], ["--temperature", "hot"], ["--top-k", "0"], ["--top-p", "0"]),
        *(["--top-p", "1.1"], ["--repetition-penalty", "0"], ["--seed", "-1"]),
        *(
            ["--beam-width", "0"],
            ["--beam-width", "257"],
            ["--max-new-tokens", "0"],
            ["--batch-size", "0"],
            ["--stop"],
        ),
    ):
        assert generate("--prompt", "a", *option).exit_code == 2, option
    fails(generate("--prompt", "a", "--stop", ""), 2, "--stop '' is empty")
    fails(generate("--prompt", "a", "--temperature", "1e-40"), 2, "temperature 1e-40 is not")


def test_wrong_prompts(tmp_path, prompts_file):
    fails(generate("--prompt", ""), 4, "--prompt: the prompt is empty")
    fails(generate("--prompt", " \n"), 4, "--prompt: the prompt is empty")
    fails(generate(stdin=""), 4, "stdin: holds no prompts")
    fails(generate(stdin=b"a\n\xff\n"), 4, "stdin, line 2: not UTF-8 at byte 0")
    fails(generate("--prompts", tmp_path / "no.txt"), 4, "no.txt: No such file")
    prompts_file.write_bytes(b"a\nb\nc\xe9\n")
    fails(generate("--prompts", prompts_file), 4, "prompts.txt, line 3: not UTF-8 at byte 1")
    prompts_file.write_text("a\n\n")
    fails(generate("--prompts", prompts_file), 4, "prompts.txt, line 2: the prompt is empty")
    prompts_file.write_text("a\n" + "the man " * 300)
    output = ["--output", tmp_path / "out.jsonl"]
    long = generate("--prompts", prompts_file, "--max-new-tokens", 10, *output)
    fails(long, 4, "prompts.txt, line 2: the prompt 'the man the man", "tokens, and with 10 new")
    assert "would pass the model's 512" in long.stderr and "Shorten the prompt." in long.stderr
    assert not (tmp_path / "out.jsonl").exists()
    fails(generate("--prompt", "a", "--max-new-tokens", 600), 4, "--max-new-tokens 510 or fewer")


@pytest.mark.parametrize(
    "more", [[], ["--top-p", 0.9], ["--beam-width", 2], ["--repetition-penalty", 1.2]]
)
def test_float16_that_overflows(more, prompts_file, tmp_path):
    """Another dtype is the remedy, as the hint says."""
    model = write_overflowing_model(tmp_path / "model")
    write_tokenizer(model, json.loads((model / "config.json").read_text())["vocab_size"])
    for given, name in ((["--prompt", "the man"], "--prompt"), (["--prompts", prompts_file], "1")):
        arguments = [*given, *more, "--max-new-tokens", 5]
        result = generate(*arguments, "--dtype", "float16", model=f"--model={model}")
        fails(result, 3, f"{name}: the logits of new token 1 are NaN or infinite")
        assert result.stderr.endswith(
            "  float16 may overflow: try --dtype bfloat16 or float32. If that does not help, the "
            "weights are broken.\n"
        )
        for dtype in ("bfloat16", "float32"):
            result = generate(*arguments, "--dtype", dtype, model=f"--model={model}")
            assert result.exit_code == 0, result.output


def test_a_model_of_another_vocabulary(tmp_path):
    model = write_tiny_model("gqa", tmp_path / "model")
    fails(generate("--prompt", "a", model=f"--model={model}"), 3, "has no tokenizer.model")
    write_tokenizer(model, 321)
    fails(generate("--prompt", "a", model=f"--model={model}"), 3, "has 321 tokens, but the")


@pytest.mark.parametrize("name", ["opt", "opt_350m", "gqa", "tied", "odd"])
def test_random_models(name, tmp_path):
    """Their text is of any bytes; tokens are drawn from all of the vocabulary."""
    model = write_tiny_model(name, tmp_path / "model")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    write_tokenizer(model, size)
    for quantize in ("none", "int8"):
        arguments = ["--prompt", "the man", "--top-p", 1, "--quantize", quantize]
        result = generate("--quiet", *arguments, model=f"--model={model}")
        assert result.exit_code == 0, result.output
        assert len(result.stdout) > 20


def test_ends_of_an_answer(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert end_token_ids(tmp_path, tokenizer) == {2}
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_token_ids(tmp_path, tokenizer) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_token_ids(tmp_path, tokenizer) == {7, 9}
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_token_ids(tmp_path / "reshard-*.pt", tokenizer) == {7}
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    fails(generate("--prompt", "a", model=f"--model={tmp_path}"), 3, "config.json")


def test_the_line_that_closes_an_answer():
    pace = Pace()
    assert str(pace).startswith("0 tokens in 0.00 s: 0.0 tokens/s")
    pace.began -= 2.0
    pace.count()
    pace.began -= 8.0
    pace.count(9)
    assert pace.first == pytest.approx(2, abs=0.1) and pace.last == pytest.approx(10, abs=0.1)
    assert str(pace) == "10 tokens in 10.00 s: 1.0 tokens/s, the first after 2.000 s"


def test_importing_is_free():
    code = "import cupyllama.cli_generate, sys\nprint('numpy' in sys.modules)\n"
    code += "import cupyllama.generate\n"
    code += "print(*({'cupy', 'mpi4py', 'datasets', 'tqdm', 'readline'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "False\n\n", answer.stderr
