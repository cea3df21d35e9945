"""Record what Hugging Face Transformers generates with tiny models, as truth for the tests.

    python tools/record_transformers_generate.py --output tests/data/transformers_generate.json

Needs torch and transformers, which the package itself and its tests do not.  Everything is in
float32 with eager attention on the CPU: greedy text of a ragged batch, padded on the left, and the
hypotheses of beam search.

The tool refuses to record what would be no truth: text that hangs on rounding, a batch that
answers otherwise than its prompts do alone, text so poor in tokens that it would show nothing.
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
tiny_generation = importlib.import_module("tiny_generation")
record_transformers = importlib.import_module("record_transformers")

LENGTHS = (7, 1, 23, 12, 40)
NEW_TOKENS = 64
FEWEST_TOKENS = 15  # different ones in a text
ATTEMPTS = 20
BEAMS = 4
BEAM_TOKENS = 24
BEAM_PROMPTS = (0, 2)

Recorded = dict[str, Any]


def draw_prompts(name: str, attempt: int) -> list[list[int]]:
    """Prompts of LENGTHS tokens; the last begins like the third."""
    config = tiny_generation.generating_config(name)
    first = record_transformers.FIRST_ID[config["model_type"]]
    generator = np.random.Generator(
        np.random.PCG64(zlib.crc32(f"prompts {attempt} of {name}".encode()))
    )
    prompts = [
        [config["bos_token_id"], *generator.integers(first, config["vocab_size"], n - 1).tolist()]
        for n in LENGTHS
    ]
    prompts[4][:20] = prompts[2][:20]
    return prompts


@torch.no_grad()
def generate(
    model: torch.nn.Module, prompts: list[list[int]], eos: list[int] | None, **options: Any
) -> Any:
    """What transformers generates for a batch; the new tokens begin after the longest prompt."""
    model.generation_config.eos_token_id = eos
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )


def greedy(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """The new tokens of each prompt, and by how much the best was ahead of the second at least."""
    found = generate(model, prompts, None, max_new_tokens=NEW_TOKENS, output_logits=True)
    best = torch.stack(found.logits).topk(2).values
    return found.sequences[:, -NEW_TOKENS:].tolist(), float((best[..., 0] - best[..., 1]).min())


def greedy_texts(name: str, model: torch.nn.Module) -> tuple[list[list[int]], list[list[int]]]:
    """The first prompts drawn whose texts vary and do not hang on rounding, and these texts."""
    for attempt in range(ATTEMPTS):
        prompts = draw_prompts(name, attempt)
        texts, lead = greedy(model, prompts)
        different = min(len(set(text)) for text in texts)
        if lead > record_transformers.GREEDY_MARGIN and different >= FEWEST_TOKENS:
            return prompts, texts
    raise SystemExit(f"{name}: at last a lead of {lead}, and only {different} different tokens")


def beam_search(model: torch.nn.Module, prompt: list[int], eos: list[int] | None) -> list[Recorded]:
    """All hypotheses, the best first: new tokens up to an EOS, and scores."""
    found = generate(
        model,
        [prompt],
        eos,
        max_new_tokens=BEAM_TOKENS,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        length_penalty=1.0,
        early_stopping=False,
        output_scores=True,
    )
    hypotheses = []
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        tokens = sequence[len(prompt) :].tolist()
        ends = [place for place, token in enumerate(tokens) if token in (eos or [])]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        hypotheses.append({"tokens": tokens, "score": round(float(score), 6)})
    return hypotheses


def record(name: str, scratch: Path) -> Recorded:
    """Prompts for a model, and what Transformers makes of them."""
    directory = tiny_generation.write_generating_model(name, scratch / name)
    model = record_transformers.load_model(directory)
    exact = record_transformers.load_model(directory, torch.float64)
    prompts, texts = greedy_texts(name, model)
    for alone in (model, exact):  # of a padded batch in float64 transformers makes nonsense
        if texts != [greedy(alone, [prompt])[0][0] for prompt in prompts]:
            raise SystemExit(f"{name}: the texts are others alone, or in float64")
    beams = []
    for number in BEAM_PROMPTS:
        best = beam_search(model, prompts[number], None)[0]["tokens"]
        few = [], [best[4]], [best[9], texts[number][3]]
        for eos in (*few, list(range(4, 68)), list(range(4, 164))):
            found = beam_search(model, prompts[number], eos or None)
            rounded = [one["tokens"] for one in beam_search(exact, prompts[number], eos or None)]
            if rounded != [one["tokens"] for one in found]:
                raise SystemExit(f"{name}: beam search hangs on rounding")
            beams.append({"prompt": number, "eos": eos, "hypotheses": found})
    lengths = [[len(one["tokens"]) for one in entry["hypotheses"]] for entry in beams]
    different = [len(set(text)) for text in texts]
    print(f"{name}: {different} different tokens; hypotheses of {lengths} tokens")
    return {"prompts": prompts, "greedy": texts, "beams": beams}


def to_json(recorded: dict[str, Recorded]) -> str:
    """The whole recording as JSON, a prompt or a search a line, so that a diff can be read."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    models = []
    for name, found in recorded.items():
        parts = [
            f"{compact(key)}: [\n" + ",\n".join(map(compact, value)) + "\n]"
            for key, value in found.items()
        ]
        models.append(f"{compact(name)}: {{\n" + ",\n".join(parts) + "\n}")
    crc32 = {name: tiny_generation.generating_crc32(name) for name in recorded}
    return (
        "{"
        f'"transformers": {compact(transformers.__version__)},\n'
        f'"torch": {compact(torch.__version__)},\n'
        f'"numpy": {compact(np.__version__)},\n'
        f'"weights_crc32": {json.dumps(crc32)},\n'
        '"models": {\n' + ",\n".join(models) + "\n}}\n"
    )


def main() -> None:
    """Run every model and write the recording."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        names = tiny_generation.GENERATING
        recorded = {name: record(name, Path(scratch)) for name in names}
    text = to_json(recorded)
    if json.loads(text)["models"] != recorded:
        raise SystemExit("the recording does not read back")
    arguments.output.write_text(text)
    print(f"{arguments.output}: {len(text)} bytes")


if __name__ == "__main__":
    main()
