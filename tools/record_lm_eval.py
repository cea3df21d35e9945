"""Record what EleutherAI's lm-evaluation-harness makes of HellaSwag, as truth for the tests.

Over the six-line text form of HellaSwag (``label: context``, the index of the right ending, four
endings; plain, .gz or .bz2), every 50th question, with the tiny random model that has LLaMA's
vocabulary:

    python tools/record_lm_eval.py --data hellaswag.txt.bz2 --tokenizer tokenizer.model \\
        --output tests/data/lm_eval_hellaswag.json

Over HellaSwag's own JSON lines, with lm-eval's own task (its process_docs included) and any
Hugging Face model:

    python tools/record_lm_eval.py --data hellaswag_val.jsonl --model DIR --output FILE

And only what lm-eval's process_docs makes of the documents, without any model:

    python tools/record_lm_eval.py --data tests/data/hellaswag_awkward.jsonl --docs-only \\
        --output tests/data/hellaswag_awkward_lm_eval.json

Needs lm_eval, torch, transformers, datasets and sentencepiece; works offline.  Scores are those of
lm-eval's `hf` backend in float32 on the CPU, through simple_evaluate.  Except with --docs-only
(meant for documents of this project), the recording holds numbers and no text of the questions.

A tokenizer that comes as a SentencePiece model is held against the sentencepiece library on every
text that is scored; on any difference nothing is recorded.
"""

from __future__ import annotations

import os

# Before datasets and transformers are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import bz2
import gzip
import hashlib
import importlib
import importlib.metadata
import json
import logging
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
tiny_models = importlib.import_module("tiny_models")

LIBRARIES = ("lm_eval", "transformers", "torch", "tokenizers", "sentencepiece", "datasets", "numpy")
METRICS = ("acc", "acc_norm", "acc_bytes")
TINY_MODEL = "llama_tokenizer"
# float32 sums of a row in another batch differ by rounding only.
SAME = 1e-3

Document = dict[str, Any]


def open_text(path: Path) -> str:
    """The text of `path`, decompressed as its name says, with its line ends untouched."""
    opener = {".bz2": bz2.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rb") as file:
        return file.read().decode("utf-8")


def six_line_questions(text: str) -> list[Document]:
    """The questions of the six-line form: query, gold and choices, exactly as they stand."""
    # Not splitlines(), which would also split at Unicode's line separators inside a text.
    lines = text.removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise SystemExit(f"{len(lines)} lines are no whole number of six-line questions")
    questions = []
    for start in range(0, len(lines), 6):
        query, gold, *choices = lines[start : start + 6]
        if gold not in {"0", "1", "2", "3"}:
            raise SystemExit(f"line {start + 2}: {gold!r} is no index of an ending")
        questions.append({"query": query, "gold": int(gold), "choices": choices})
    return questions


def json_lines(text: str) -> list[Document]:
    """The documents of a JSON-lines text."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def local_dataset(documents: list[Document], scratch: Path) -> dict[str, Any]:
    """The part of a task's configuration that makes it read `documents`, and them alone."""
    path = scratch / "documents.json"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(path)},
            "cache_dir": str(scratch / "datasets"),
        },
        "training_split": None,
        "validation_split": "validation",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in METRICS
        ],
    }


def six_line_task(questions: list[Document], scratch: Path) -> ConfigurableTask:
    """lm-eval's multiple-choice task over questions that need no more processing."""
    return ConfigurableTask(
        config={
            "task": "hellaswag_text",
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "choices",
            "num_fewshot": 0,
            **local_dataset(questions, scratch),
        }
    )


def hellaswag_task(documents: list[Document], scratch: Path) -> ConfigurableTask:
    """lm-eval's own HellaSwag task, as it is configured there, over local `documents`."""
    own = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    config = {
        "include": str(own),
        "task": "hellaswag_local",
        "num_fewshot": 0,
        **local_dataset(documents, scratch),
    }
    path = scratch / "hellaswag_local.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    (task,) = TaskManager(include_defaults=False).load(str(path))["tasks"].values()
    return task


def tokenizer_from_sentencepiece(spm: Path, directory: Path) -> Path:
    """Write the tokenizer.json of the SentencePiece BPE model `spm`, as Transformers 4 made it.

    Transformers 5 does not tokenize as sentencepiece does when it is left to read `spm` itself.  It
    ranks merges by id where sentencepiece goes by score (so LLaMA's "▁▁" wins over the word after
    it), puts no space before a text that begins with one and, unless a tokenizer_config.json names
    the class, none before any text.  Whether this conversion is right for `spm`, `check_tokenizer`
    decides.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    ids = range(pieces.get_piece_size())
    vocabulary = {pieces.id_to_piece(index): index for index in ids}
    special = (pieces.is_control, pieces.is_unknown, pieces.is_byte, pieces.is_unused)
    normal = [index for index in ids if not any(test(index) for test in special)]
    merges = []
    for index in sorted(normal, key=lambda index: -pieces.get_score(index)):
        piece = pieces.id_to_piece(index)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]

    unk, bos, eos = (
        pieces.id_to_piece(index) for index in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    )
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, pieces.bos_id())]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos
    ).save_pretrained(directory)
    return directory


def check_tokenizer(lm: HFLM, spm: Path, texts: set[str]) -> None:
    """Fail unless `lm` tokenizes every one of `texts` as the sentencepiece library does."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    start = [pieces.bos_id()] if lm.add_bos_token else []
    for text in texts:
        if lm.tok_encode(text) != start + pieces.encode(text):
            raise SystemExit(f"tokenized otherwise than by sentencepiece: {text!r}")


def scored_row(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
    """The tokens of the context and of the continuation as lm-eval scores them.

    lm-eval takes the context's tokens from the context alone and the continuation's from what is
    left of the whole; the third value says whether the two make up the whole's tokens.
    """
    context_ids, continuation_ids = lm._encode_pair(context, continuation)
    whole = lm.tok_encode(context + continuation)
    return context_ids, continuation_ids, context_ids + continuation_ids == whole


def check_instances(lm: HFLM, samples: list[dict[str, Any]]) -> None:
    """Fail unless HFLM.loglikelihood, called by hand, gives what the evaluation recorded."""
    for sample in samples:
        instances = [
            Instance("loglikelihood", sample["doc"], (str(context), str(continuation)), index)
            for index, (context, continuation) in enumerate(sample["arguments"])
        ]
        by_hand = lm.loglikelihood(instances, disable_tqdm=True)
        recorded = sample["filtered_resps"]
        for (value, greedy), (other, other_greedy) in zip(by_hand, recorded, strict=True):
            if abs(value - other) > SAME or greedy != other_greedy:
                raise SystemExit(f"document {sample['doc_id']}: {value} where {other} is recorded")


def evaluate(
    task: ConfigurableTask,
    indexes: list[int],
    model: Path,
    tokenizer: Path,
    spm: Path | None,
    *,
    batch_size: int,
    add_bos_token: bool,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Score `task` with lm-eval; the settings, the results and the numbers of each question."""
    lm = HFLM(
        pretrained=str(model),
        tokenizer=str(tokenizer),
        device="cpu",
        dtype="float32",
        batch_size=batch_size,
        add_bos_token=add_bos_token,
        max_length=max_length,
    )
    output = lm_eval.simple_evaluate(
        lm,
        tasks=[task],
        num_fewshot=0,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),
    )
    samples = sorted(output["samples"][task.config.task], key=lambda sample: sample["doc_id"])
    if [sample["doc_id"] for sample in samples] != list(range(len(indexes))):
        raise SystemExit("lm-eval did not score every question")
    check_instances(lm, samples[:: max(1, len(samples) // 10)])

    questions, texts = [], set()
    truncated = unstable = 0
    for index, sample in zip(indexes, samples, strict=True):
        question: dict[str, Any] = {"index": index, "gold": int(sample["target"])}
        context_lengths, lengths, crcs = set(), [], []
        for context, continuation in sample["arguments"]:
            texts |= {context + continuation, context.rstrip()}
            context_ids, ids, whole = scored_row(lm, context, continuation)
            truncated += len(context_ids) + len(ids) > lm.max_length + 1
            unstable += not whole
            context_lengths.add(len(context_ids))
            lengths.append(len(ids))
            crcs.append(zlib.crc32(np.array(context_ids + ids, "<i4").tobytes()))
        question["loglikelihoods"] = [value for value, _ in sample["filtered_resps"]]
        question["is_greedy"] = [greedy for _, greedy in sample["filtered_resps"]]
        question.update({metric: int(sample[metric]) for metric in METRICS})
        (question["context_tokens"],) = context_lengths  # one context, so one length
        question["ending_tokens"] = lengths
        question["row_crc32"] = crcs
        questions.append(question)
    if spm is not None:
        check_tokenizer(lm, spm, texts)

    results = {}
    for metric in METRICS:
        results[metric] = output["results"][task.config.task][f"{metric},none"]
        results[f"{metric}_stderr"] = output["results"][task.config.task][f"{metric}_stderr,none"]
    return {
        "settings": {
            "dtype": "float32",
            "batch_size": batch_size,
            "add_bos_token": add_bos_token,
            "max_length": lm.max_length,
            "truncated_rows": truncated,
            "rows_tokenized_otherwise_as_a_whole": unstable,
        },
        "results": results,
        "questions": questions,
    }


def dumps(value: Any) -> str:
    """`value` as JSON on one line, text as it is."""
    return json.dumps(value, ensure_ascii=False)


def evaluation_json(evaluation: dict[str, Any]) -> str:
    """The members of an evaluation as JSON, without the braces, one question a line."""
    lines = ",\n".join(json.dumps(q, separators=(",", ":")) for q in evaluation["questions"])
    head = ",\n".join(f'"{key}": {dumps(evaluation[key])}' for key in ("settings", "results"))
    return f'{head},\n"questions": [\n{lines}\n]'


def sha256(data: bytes) -> str:
    """The SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def record_documents(text: str, scratch: Path) -> str:
    """What lm-eval makes of each HellaSwag document before it is scored, as JSON.

    Also the pairs of context and continuation that its task asks a model for.
    """
    task = hellaswag_task(json_lines(text), scratch)
    lines = []
    for document in task.validation_docs():
        context = task.fewshot_context(document, num_fewshot=0)
        instances = task.construct_requests(document, context, metadata=("hellaswag", 0, 1))
        made = {
            "query": document["query"],
            "choices": document["choices"],
            "gold": task.doc_to_target(document),
            "requests": [list(instance.args) for instance in instances],
        }
        lines.append(dumps(made))
    version = importlib.metadata.version("lm_eval")
    return f'{{"lm_eval": {dumps(version)},\n"documents": [\n' + ",\n".join(lines) + "\n]}\n"


def record_scores(text: str, arguments: argparse.Namespace, scratch: Path) -> str:
    """The evaluations that the command line asks for, as JSON."""
    if arguments.model is None and arguments.tokenizer is None:
        raise SystemExit("the tiny model has no tokenizer: give --tokenizer, or --model")
    if arguments.tokenizer and not arguments.tokenizer.exists():
        raise SystemExit(f"{arguments.tokenizer} does not exist")
    model = arguments.model or tiny_models.write_tiny_model(TINY_MODEL, scratch / "model")

    spm = arguments.tokenizer or model / "tokenizer.model"
    if not spm.exists():
        spm, tokenizer = None, model
    elif arguments.tokenizer or not (model / "tokenizer.json").exists():
        tokenizer = tokenizer_from_sentencepiece(spm, scratch / "tokenizer")
    else:
        tokenizer = model

    is_json = ".jsonl" in arguments.data.suffixes
    documents = json_lines(text) if is_json else six_line_questions(text)
    indexes = list(range(0, len(documents), arguments.every))[: arguments.limit]
    chosen = [documents[index] for index in indexes]
    task = (hellaswag_task if is_json else six_line_task)(chosen, scratch)

    def run(**settings: Any) -> dict[str, Any]:
        evaluation = evaluate(
            task, indexes, model, tokenizer, spm, batch_size=arguments.batch_size, **settings
        )
        print(evaluation["settings"], evaluation["results"])
        return evaluation

    provenance: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "data_sha256": sha256(text.encode()),
        "tokenizer_sha256": sha256(spm.read_bytes()) if spm else None,
    }
    if arguments.model is None:
        provenance["model"] = TINY_MODEL
        provenance["weights_crc32"] = tiny_models.weights_crc32(TINY_MODEL)
    else:
        provenance["model"] = {
            file.name: sha256(file.read_bytes()) for file in sorted(model.glob("*.safetensors"))
        }
    provenance["indexes"] = indexes
    parts = [f'"{key}": {dumps(value)}' for key, value in provenance.items()]
    parts.append(evaluation_json(run(add_bos_token=True)))
    parts.append('"without_bos": {\n' + evaluation_json(run(add_bos_token=False)) + "\n}")
    if arguments.short:
        short = run(add_bos_token=True, max_length=arguments.short)
        parts.append('"truncated": {\n' + evaluation_json(short) + "\n}")
    return "{" + ",\n".join(parts) + "}\n"


def main() -> None:
    """Record what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="six-line text or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--model", type=Path, help=f"Hugging Face model directory (default: tiny {TINY_MODEL})"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model (default: the tokenizer of --model)"
    )
    parser.add_argument(
        "--docs-only", action="store_true", help="record what process_docs makes of a .jsonl"
    )
    parser.add_argument("--every", type=int, default=50, help="take every n-th question")
    parser.add_argument("--limit", type=int, default=200, help="at most so many questions")
    parser.add_argument(
        "--short", type=int, metavar="TOKENS", help="record again with this small max_length"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads for torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # A warning for each truncated row; the recording counts them.
    logging.getLogger("lm_eval.models.huggingface").addFilter(
        lambda entry: not entry.getMessage().startswith("Combined length")
    )
    text = open_text(arguments.data)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.docs_only:
            recording = record_documents(text, Path(scratch))
        else:
            recording = record_scores(text, arguments, Path(scratch))
    json.loads(recording)  # what does not read back is not to be kept
    arguments.output.write_text(recording, encoding="utf-8")
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
