"""Record what Hugging Face Transformers makes of the tiny models, as truth for the tests.

    python tools/record_transformers.py --output tests/data/transformers_loglikelihoods.json

Needs torch and transformers, which the package itself and its tests do not.  Every row is run by
itself, in float32 with eager attention on the CPU; its log-likelihood is the sum over the ending's
tokens of the log-softmax, taken in float64 from the float32 logits.

The tool refuses to record what would be no truth: a checkpoint that Transformers loads with
missing or unexpected keys, a rope that it reads otherwise than meant, or a greedy flag that
rounding might turn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
tiny_models = importlib.import_module("tiny_models")

# Below are unk, bos, eos, and OPT has a pad.
FIRST_ID = {"llama": 3, "mistral": 3, "opt": 4}
QUESTIONS = 6
LONGEST_CONTEXT = 60
LONGEST_ENDING = 20
# Two float32 implementations differ by some 1e-5 in a logit; a greedy flag must not hang on that.
GREEDY_MARGIN = 1e-3
# A config key that changes no number by more than this has not been understood.
VISIBLE = 1e-3

Question = dict[str, Any]


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The checkpoint in `directory` as Transformers loads it; fail unless every key matches."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: found for key, found in info.items() if found}
    if problems:
        raise SystemExit(f"{directory.name}: the checkpoint does not fit the model: {problems}")
    return model.eval()


def check_config(name: str, model: torch.nn.Module) -> None:
    """Fail unless Transformers understood the rope, the heads and the ties of `name`."""
    written = tiny_models.TINY_MODELS[name]
    if written["model_type"] == "opt":
        check_opt(name, model)
        return
    rope = written.get("rope_parameters") or written.get("rope_scaling") or {}
    expected = {
        **{key: value for key, value in rope.items() if key != "type"},
        "rope_theta": rope.get("rope_theta", written.get("rope_theta", 10000.0)),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    understood = dict(model.config.rope_parameters)
    understood.pop("type", None)  # Transformers keeps the old spelling beside the new
    if understood != expected:
        raise SystemExit(f"{name}: rope {understood} where {expected} was meant")
    heads = written["num_attention_heads"]
    for key, value in {
        "head_dim": written.get("head_dim") or written["hidden_size"] // heads,
        "num_key_value_heads": written.get("num_key_value_heads", heads),
        "rms_norm_eps": written["rms_norm_eps"],
        "tie_word_embeddings": written["tie_word_embeddings"],
    }.items():
        # Mistral's configuration leaves head_dim empty where config.json does.
        if getattr(model.config, key) != value and getattr(model.config, key) is not None:
            raise SystemExit(f"{name}: {key} {getattr(model.config, key)} where {value} was meant")


def check_opt(name: str, model: torch.nn.Module) -> None:
    """Fail unless Transformers understood where the norms, projections and ties of `name` are."""
    written, decoder = tiny_models.TINY_MODELS[name], model.model.decoder
    tied = model.lm_head.weight.data_ptr() == decoder.embed_tokens.weight.data_ptr()
    narrow = written["word_embed_proj_dim"] != written["hidden_size"]
    for what, found, meant in (
        ("norms", decoder.layers[0].do_layer_norm_before, written["do_layer_norm_before"]),
        ("last norm", decoder.final_layer_norm is not None, written["do_layer_norm_before"]),
        ("project_in", decoder.project_in is not None, narrow),
        ("project_out", decoder.project_out is not None, narrow),
        ("tie", tied, written.get("tie_word_embeddings", True)),
    ):
        if found != meant:
            raise SystemExit(f"{name}: {what} {found} where {meant} was meant")


@torch.no_grad()
def row_logits(model: torch.nn.Module, row: list[int]) -> torch.Tensor:
    """The logits after each token of `row`, as float64."""
    return model(torch.tensor([row]), use_cache=False).logits[0].double()


def greedy_ending(model: torch.nn.Module, context: list[int], length: int) -> list[int]:
    """What the model itself says next, up to `length` tokens, ending before any special token."""
    ending: list[int] = []
    special = range(FIRST_ID[model.config.model_type])
    while len(ending) < length:
        token = int(row_logits(model, context + ending)[-1].argmax())
        if token in special:
            break
        ending.append(token)
    return ending


def draw_questions(name: str, model: torch.nn.Module) -> list[Question]:
    """Questions for the model `name`: random, with the cases that an engine may trip over.

    The first context is BOS alone, the second as long as allowed.  Every second question has its
    model's own continuation among the endings, as random ones are never greedy.  The endings of
    the last question share prefixes; one contains another and one is there twice.
    """
    config = tiny_models.TINY_MODELS[name]
    first = FIRST_ID[config["model_type"]]
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"questions of {name}".encode())))

    def integer(low: int, high: int) -> int:
        return int(generator.integers(low, high, endpoint=True))

    def tokens(count: int) -> list[int]:
        return generator.integers(first, config["vocab_size"], count).tolist()

    row_length = config.get("sliding_window") or config["max_position_embeddings"]
    longest_context = min(LONGEST_CONTEXT, row_length - LONGEST_ENDING)
    questions = []
    for number in range(QUESTIONS):
        length = {0: 1, 1: longest_context}.get(number) or integer(2, longest_context)
        context = [config["bos_token_id"], *tokens(length - 1)]
        if number == QUESTIONS - 1:
            stem = tokens(3)
            longer = [*stem, *tokens(4)]
            endings = [stem, longer, [*stem[:2], *tokens(2)], list(stem), tokens(3)]
        else:
            endings = [tokens(integer(1, LONGEST_ENDING)) for _ in range(integer(2, 5))]
        if number % 2:
            chosen = integer(0, len(endings) - 1) if number < QUESTIONS - 1 else len(endings) - 1
            endings[chosen] = greedy_ending(model, context, integer(1, 6)) or endings[chosen]
        questions.append({"context": context, "endings": endings})
    return questions


def score(model: torch.nn.Module, question: Question) -> tuple[list[float], list[bool]]:
    """The log-likelihood of each ending after the context, and whether each token is the best."""
    context = question["context"]
    loglikelihoods, is_greedy = [], []
    for ending in question["endings"]:
        logits = row_logits(model, context + ending)[len(context) - 1 : -1]
        target = torch.tensor(ending)[:, None]
        loglikelihoods.append(float(logits.log_softmax(-1).gather(1, target).sum()))
        # How far the token lies above the best of the others: below 0 unless it is the best.
        own = logits.gather(1, target)[:, 0]
        lead = float((own - logits.scatter(1, target, -torch.inf).max(-1).values).min())
        if abs(lead) < GREEDY_MARGIN:
            raise SystemExit(f"a lead of {lead} is too small to call the ending greedy or not")
        is_greedy.append(lead > 0)
    return loglikelihoods, is_greedy


def farthest(model: torch.nn.Module, questions: list[Question]) -> float:
    """The largest distance of the `model`'s log-likelihoods from the recorded ones."""
    return max(
        float(np.abs(np.subtract(score(model, question)[0], question["loglikelihoods"])).max())
        for question in questions
    )


def without_key(directory: Path, key: str) -> torch.nn.Module:
    """The model in `directory`, loaded as though its config.json had no `key`."""
    path = directory / "config.json"
    text = path.read_text()
    config = json.loads(text)
    del config[key]
    path.write_text(json.dumps(config))
    try:
        return load_model(directory)
    finally:
        path.write_text(text)


def check_key_matters(
    name: str, directory: Path, questions: list[Question], key: str, *, expected: bool
) -> None:
    """Fail unless dropping `key` from the config visibly changes the numbers, or does not."""
    distance = farthest(without_key(directory, key), questions)
    print(f"{name}: without {key} the numbers move by up to {distance:.3g}")
    if (distance > VISIBLE) != expected:
        raise SystemExit(f"{name}: {key} {'has no' if expected else 'has an'} effect")


def record(name: str, scratch: Path) -> list[Question]:
    """The questions for the tiny model `name`, with the numbers of Transformers."""
    directory = tiny_models.write_tiny_model(name, scratch / name)
    model = load_model(directory)
    check_config(name, model)
    questions = draw_questions(name, model)
    for question in questions:
        question["loglikelihoods"], question["is_greedy"] = score(model, question)

    config = tiny_models.TINY_MODELS[name]
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key):
            check_key_matters(name, directory, questions, key, expected=True)
    if config.get("sliding_window"):
        check_key_matters(name, directory, questions, "sliding_window", expected=False)
    # How far float32 is from the truth: what a test's tolerance has to allow at least.
    rounding = farthest(load_model(directory, torch.float64), questions)
    values = [value for question in questions for value in question["loglikelihoods"]]
    greedy = sum(flag for question in questions for flag in question["is_greedy"])
    print(
        f"{name}: {len(values)} rows, {min(values):.2f} to {max(values):.2f}, {greedy} greedy; "
        f"float64 differs by up to {rounding:.2g}"
    )
    return questions


def to_json(recorded: dict[str, list[Question]]) -> str:
    """The whole recording as JSON, one question a line, so that a diff can be read."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    models = []
    for name, questions in recorded.items():
        lines = ",\n".join(compact(question) for question in questions)
        models.append(f"{compact(name)}: [\n{lines}\n]")
    crc32 = {name: tiny_models.weights_crc32(name) for name in recorded}
    return (
        "{"
        f'"transformers": {compact(transformers.__version__)},\n'
        f'"torch": {compact(torch.__version__)},\n'
        f'"numpy": {compact(np.__version__)},\n'
        f'"weights_crc32": {json.dumps(crc32)},\n'
        '"models": {\n' + ",\n".join(models) + "\n}}\n"
    )


def main() -> None:
    """Run every tiny model and write the recording."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        recorded = {name: record(name, Path(scratch)) for name in tiny_models.TINY_MODELS}
    text = to_json(recorded)
    if list(json.loads(text)["models"]) != list(tiny_models.TINY_MODELS):
        raise SystemExit("the recording does not read back")
    arguments.output.write_text(text)
    print(f"{arguments.output}: {len(text)} bytes")


if __name__ == "__main__":
    main()
