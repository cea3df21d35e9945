"""Comparisons with other engines: requests, turns, arithmetic, and the scripts with stand-ins."""

import importlib.util
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
import sentencepiece
import tiny_tokenizer
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # in the engines' processes too

import compare_lm_eval  # noqa: E402
import compare_transformers_generate as compare_generate  # noqa: E402
import compare_vllm  # noqa: E402
import comparison  # noqa: E402
import hf_folder  # noqa: E402
from engines import Job, Turn, take_turns  # noqa: E402

from cupyllama.checkpoint.source import open_checkpoint  # noqa: E402
from cupyllama.config import load_config  # noqa: E402
from cupyllama.errors import DeviceError  # noqa: E402
from cupyllama.packing import TokenRow  # noqa: E402
from cupyllama.tasks.conventions import TokenRows  # noqa: E402
from cupyllama.tasks.files import demo_directory, load_task  # noqa: E402
from cupyllama.tasks.question import Question  # noqa: E402

DATA = Path(__file__).parent / "data"
STAND_INS = ("lm_eval", "vllm", "torch", "transformers")
DEMO = demo_directory()


@pytest.fixture
def job() -> Job:
    """Two questions, of two and of three choices; the rows begin with a token of context."""
    questions = [Question("a", ("bb", "cccc"), 0), Question("d", ("e", "ff", "g"), 2)]
    ids = [[1, 5, 6], [1, 5, 7, 8], [1, 9, 10], [1, 9, 11, 12], [1, 9, 13]]
    rows = TokenRows([TokenRow(row, 2, i) for i, row in enumerate(ids)], np.array([0, 2, 5]), 0)
    none = Path("none")
    return Job("tiny", none, none, none, questions, rows, True, "float32", "cpu")


# Requests


def test_requests_are_those_of_lm_evals_own_task():
    recorded = json.loads((DATA / "hellaswag_awkward_lm_eval.json").read_text())["documents"]
    questions = [Question(d["query"], tuple(d["choices"]), d["gold"]) for d in recorded]
    expected = [tuple(request) for document in recorded for request in document["requests"]]
    assert compare_lm_eval.requests(questions) == expected


def test_questions_are_spread_over_the_set():
    assert comparison.spread(range(10), 4) == [0, 2, 5, 7]
    assert comparison.spread(range(3), 1000) == [0, 1, 2]


# Turns


class Fake:
    """Notes in a file when it works; its first run is the warm-up."""

    name = "fake"

    def __init__(self, log: Path, label: str, fails: str = ""):
        self.log, self.label, self.fails, self.count = log, label, fails, 0
        self.dtype, self.info, self.versions = "float16", {"pid": os.getpid()}, {}
        self.note("load")
        if fails == "load":
            raise ValueError("no room\nfor this")

    def note(self, what: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{self.label} {what}\n")

    def run(self) -> Turn:
        print("engines may print")
        self.count += 1
        if self.fails == "run" and self.count == 2:
            raise ValueError("lost")
        if self.fails == "die" and self.count == 2:
            os._exit(7)
        self.note("begin")
        time.sleep(0.5 if self.label == "a" and self.count == 1 else 0.02)
        self.note("end")
        return Turn(float(self.count), 0.0, np.full(2, self.count))


def test_engines_load_one_after_the_other_and_take_turns(tmp_path, capfd):
    log = tmp_path / "log"
    children, turns = take_turns([(Fake, log, "a"), (Fake, log, "b")], 3)
    one_run = "{0} begin\n{0} end\n"
    a, b = one_run.format("a"), one_run.format("b")
    assert log.read_text() == f"a load\n{a}b load\n{b}" + 3 * (a + b)
    assert [[turn.seconds for turn in mine] for mine in turns] == 2 * [[2.0, 3.0, 4.0]]
    assert [child.process.exitcode for child in children] == [0, 0]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("engines may print") == 8
    assert len({child.info["pid"] for child in children} | {os.getpid()}) == 3


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("load", "fake: ValueError: no room"),
        ("run", "fake: ValueError: lost"),
        ("die", "fake ended with exit code 7"),
    ],
)
def test_an_engine_that_fails_ends_all(fails, message, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(click.ClickException) as caught:
        take_turns([(Fake, log, "a"), (Fake, log, "b", fails)], 3)
    assert caught.value.message == message
    assert not multiprocessing.active_children()


# Arithmetic


def test_agreement(job):
    ours = np.array([-1.0, -3.0, -4.0, -5.0, -6.0])
    # Question 0: the sum prefers choice 0 as ours does, and so does the mean over characters
    # (-2.9 / 2 and -6.1 / 4 against -1 / 2 and -3 / 4). Question 1: ours picks 0 by the sum and 1
    # by characters (-4, -2.5, -6), theirs 2 by both.
    theirs = np.array([-2.9, -6.1, -4.0, -5.0, -2.0])
    assert comparison.agreement(job, ours, theirs) == {
        "largest_difference": pytest.approx(4.0),
        "mean_difference": pytest.approx((1.9 + 3.1 + 0 + 0 + 4) / 5),
        "same_predictions": {"acc": 1, "acc_norm": 1},
    }


def test_rates_are_of_the_medians(job):
    children = [
        SimpleNamespace(name="cupyllama", dtype="float16", info={"gpu": "H100", "size": 8}),
        SimpleNamespace(name="other", dtype="fp8", info={"rows_tokenised_otherwise": 3}),
    ]
    sums = np.arange(5.0)
    turns = [[Turn(s, 0.5, sums) for s in seconds] for seconds in ([1, 9, 2], [8, 4, 5])]
    ours, other = runs = comparison.summary(job, children, turns)
    assert ours["questions_per_second"] == 1 and ours["times_ours"] == 1
    assert other["questions_per_second"] == 0.4 and other["times_ours"] == 0.4
    assert other["seconds"] == [8, 4, 5] and ours["tokenising_seconds"] == [0.5] * 3
    assert ours["size"] == 8 and "gpu" not in ours
    assert comparison.table(runs, 2) == [
        "engine       | dtype    | questions/s | × ours",
        "cupyllama    | float16  |         1.0 |  1.000",
        "other        | fp8      |         0.4 |  0.400",
        "other: log-likelihoods differ from ours by 0, at most 0; predictions are ours on 2 (acc) "
        "and 2 (acc_norm) of 2 questions",
        "other: tokenised 3 rows otherwise",
    ]


# The directory that other engines read


def test_a_folder_is_a_checkpoint_written_once(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    hf_folder.write_folder(folder, "tiny")
    checkpoint, config = open_checkpoint(folder), load_config(folder)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (2, 2, 32)
    assert len(checkpoint.tensors) == 2 * 9 + 3
    deviations = {}
    for name, stored in checkpoint.tensors.items():
        values = np.empty(stored.shape, np.float16)
        checkpoint.read_into(name, values)
        if "norm" in name:
            assert (values == 1).all()
        else:
            deviations[name] = values.astype(np.float64).std()
            assert abs(values.astype(np.float64).mean()) < 1e-3
    assert np.allclose(list(deviations.values()), 0.02, rtol=0.02)
    assert len(set(deviations.values())) == len(deviations)  # no two tensors alike

    monkeypatch.setattr(hf_folder, "random_tensor", lambda name, shape: pytest.fail(name))
    hf_folder.write_folder(folder, "tiny")
    with pytest.raises(click.ClickException, match="another model"):
        hf_folder.write_folder(folder, "llama-7b")


def test_a_folder_that_was_not_finished_is_written_again(tmp_path):
    hf_folder.write_folder(tmp_path, "tiny")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001.safetensors").write_bytes(b"cut short")
    hf_folder.write_folder(tmp_path, "tiny")
    assert len(open_checkpoint(tmp_path).tensors) == 21


TEXTS = [
    "She pours the tea into a cup.",
    "  two  spaces, and   three",
    "é, 茶 and 🫖 in bytes\n\tand a line",
    "▁",
    "Sumo: A youtube video shows two men in a room",
]


def check_tokenizer(folder: Path, model: Path, texts: list[str]) -> None:
    import tokenizers

    hf_folder.write_tokenizer(folder, model)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in texts:
        assert theirs.encode(text).ids == [pieces.bos_id(), *pieces.encode(text)], text
        assert theirs.encode(text, add_special_tokens=False).ids == pieces.encode(text)


def test_the_tokenizer_is_sentencepieces(tmp_path):
    check_tokenizer(tmp_path, tiny_tokenizer.write_tokenizer(tmp_path), TEXTS)


def test_the_real_tokenizer_is_sentencepieces(real_data, tmp_path):
    questions = load_task(real_data / "hellaswag_val_full.txt.bz2", "lm-eval").questions[::500]
    texts = [context + choice for context, choice in compare_lm_eval.requests(questions)]
    check_tokenizer(tmp_path, real_data / "llama_tokenizer.model", TEXTS + texts)


# The scripts, with stand-ins for the other engines

LM_EVAL = {
    "lm_eval/__init__.py": '__version__ = "0.0"',
    "lm_eval/api/__init__.py": "",
    "lm_eval/api/instance.py": """
class Instance:
    def __init__(self, request_type, doc, arguments, idx):
        assert request_type == "loglikelihood"
        self.args = arguments
""",
    "lm_eval/models/__init__.py": "",
    "lm_eval/models/huggingface.py": """
import tokenizers

class HFLM:
    max_length = 512

    def __init__(self, pretrained, tokenizer, add_bos_token, device, dtype, softmax_dtype,
                 batch_size):
        assert add_bos_token and (device, dtype, batch_size) == ("cpu", "float32", 4)
        self.tokenizer = tokenizers.Tokenizer.from_file(tokenizer + "/tokenizer.json")

    def _encode_pair(self, context, continuation):
        whole, alone = (
            self.tokenizer.encode(text).ids for text in (context + continuation, context)
        )
        return alone, whole[len(alone):]

    def loglikelihood(self, instances, disable_tqdm):
        return self._loglikelihood_tokens([self._encode_pair(*i.args) for i in instances])

    def _loglikelihood_tokens(self, pairs):
        return [(-float(len(own)), False) for _, own in pairs]
""",
}
VLLM = {
    "vllm/__init__.py": """
from types import SimpleNamespace

__version__ = "0.0"

def SamplingParams(**given):
    assert given == dict(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    return given

def TokensPrompt(prompt_token_ids):
    return {"prompt_token_ids": prompt_token_ids}

class LLM:
    def __init__(self, **given):
        self.given = given

    def generate(self, prompts, parameters, use_tqdm):
        return [SimpleNamespace(prompt_logprobs=self.tell(**prompt)) for prompt in prompts]

    def tell(self, prompt_token_ids):
        told = [None]  # nothing predicts the first token
        for place, token in list(enumerate(prompt_token_ids))[1:]:
            values = {token: -token - place / 100, token + 1: 0.0}
            told.append({t: SimpleNamespace(logprob=v) for t, v in values.items()})
        return told
""",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """What puts a module of the given files where processes find it before an installed one."""

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "modules" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "modules")

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in STAND_INS]:
        del sys.modules[name]


def run(script, *arguments: str, json_path: Path | None = None) -> dict | str:
    """Run a script on the demo; the JSON, or what it says where it fails."""
    given = ["--model", DEMO, "--data", DEMO / "questions.jsonl", "--questions", 3]
    given += ["--device", "cpu", "--dtype", "float32", "--repeats", 2, *arguments]
    given += ["--json", json_path] if json_path else []
    result = CliRunner().invoke(script.main, list(map(str, given)))
    if json_path is None or result.exit_code:
        assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
        return result.output
    assert result.output.startswith("engine ")
    return json.loads(json_path.read_text())


def check_result(result: dict, bench: str, engine: str) -> None:
    """What is the same in every comparison's JSON."""
    assert (result["bench"], result["shape"], result["questions"]) == (bench, "demo", 3)
    assert {"cupyllama", engine} < set(result["versions"]) and result["gpu"] and result["date"]
    ours, theirs = result["runs"]
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
    assert theirs["questions_per_second"] == pytest.approx(3 / np.median(theirs["seconds"]))
    ratio = np.median(ours["seconds"]) / np.median(theirs["seconds"])
    assert theirs["times_ours"] == pytest.approx(ratio)


def test_compare_lm_eval_with_a_stand_in(stand_in, tmp_path):
    stand_in(LM_EVAL)
    path = tmp_path / "out.json"
    result = run(compare_lm_eval, "--batch-size", "4", json_path=path)
    check_result(result, "compare_lm_eval", "lm_eval")
    ours, theirs = result["runs"]
    assert theirs["rows_tokenised_otherwise"] == 0 and theirs["batch_size"] == 4
    for run_ in result["runs"]:
        tokenising = np.array(run_["tokenising_seconds"])
        assert (0 < tokenising).all() and (tokenising < run_["seconds"]).all()
    assert 1 < theirs["mean_difference"] < theirs["largest_difference"]


def test_rows_tokenised_otherwise_are_counted(job):
    # The whole is the same in the second, but what is scored is not; the third is cut.
    pairs = [([1, 5], [6]), ([1, 5, 7], [8]), ([0, 0, 1, 9], [10]), ([1, 9], [11, 12]), ([2], [3])]
    lm = SimpleNamespace(max_length=2, _encode_pair=lambda context, own: (context, own))
    rows = [row.token_ids[-3:] for row in job.rows.rows]
    cut = SimpleNamespace(
        rows=[
            TokenRow(ids, len(ids) - len(row.token_ids) + 2, 0)
            for ids, row in zip(rows, job.rows.rows, strict=True)
        ]
    )
    count = compare_lm_eval.LmEval.count_other_rows
    assert count(SimpleNamespace(lm=lm), SimpleNamespace(rows=cut), pairs) == 2


def test_compare_vllm_with_a_stand_in(stand_in, tmp_path):
    stand_in(VLLM)
    result = run(compare_vllm, "--quantization", "fp8", json_path=tmp_path / "out.json")
    check_result(result, "compare_vllm", "vllm")
    ours, theirs = result["runs"]
    assert (ours["dtype"], theirs["dtype"]) == ("float32", "fp8")
    assert ours["tokenising_seconds"] == theirs["tokenising_seconds"] == [0, 0]


def test_vllm_is_read_as_lm_eval_reads_it(stand_in, job):
    stand_in(VLLM)
    engine = compare_vllm.Vllm(job, 0.5, None)
    assert engine.llm.given["gpu_memory_utilization"] == 0.5
    assert engine.llm.given["quantization"] is None and engine.dtype == "float32"
    # From place 2 on: the first two tokens are BOS and the context.
    expected = [-6.02, -7.02 - 8.03, -10.02, -11.02 - 12.03, -13.02]
    np.testing.assert_allclose(engine.run().loglikelihoods, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (compare_lm_eval, "lm_eval is not installed: pip install 'lm_eval[hf]==0.4.13'"),
        (compare_vllm, "vllm is not installed: pip install 'vllm'"),
    ],
)
def test_an_engine_that_is_not_installed(script, said, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(script) == f"Error: {said}\n"


def test_no_gpu(stand_in, monkeypatch, tmp_path):
    stand_in(VLLM)

    def none(kind: str) -> None:
        assert kind == "cuda"
        raise DeviceError("no usable GPU: CUDA sees no GPU", "Get one.")

    monkeypatch.setattr(comparison, "choose_device", none)
    folder = tmp_path / "model"
    arguments = ["--device", "cuda", "--folder", str(folder)]
    assert run(compare_vllm, *arguments) == "Error: no usable GPU: CUDA sees no GPU. Get one.\n"
    assert not folder.exists()


def test_a_shape_needs_a_folder(stand_in):
    stand_in(VLLM)
    arguments = ["--data", str(DEMO / "questions.jsonl"), "--device", "cpu"]
    result = CliRunner().invoke(compare_vllm.main, arguments)
    assert result.exit_code == 2 and "--shape needs --folder and --tokenizer" in result.output


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval and torch")
@pytest.mark.parametrize("shape", ["demo", "tiny"])
def test_lm_eval_itself_agrees(shape, real_data, tmp_path):
    arguments = ["--batch-size", "8"]
    if shape == "tiny":
        arguments = ["--shape", "tiny", "--folder", tmp_path / "model", "--questions", 8]
        arguments += ["--tokenizer", real_data / "llama_tokenizer.model", "--device", "cpu"]
        arguments += ["--data", real_data / "hellaswag_val_full.txt.bz2", "--dtype", "float32"]
        arguments += ["--json", tmp_path / "out.json"]
        result = CliRunner().invoke(compare_lm_eval.main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        result = json.loads((tmp_path / "out.json").read_text())
    else:
        result = run(compare_lm_eval, *arguments, json_path=tmp_path / "out.json")
    theirs = result["runs"][1]
    assert theirs["largest_difference"] < 1e-3 and theirs["rows_tokenised_otherwise"] == 0
    assert set(theirs["same_predictions"].values()) == {result["questions"]}


# Generation beside transformers

# What torch would compile, and what becomes of it, is in place of {compiled}.
TRANSFORMERS = {
    "torch/__init__.py": """
import contextlib
import numpy as np

__version__ = "0.0"
float32 = "float32"
inference_mode = contextlib.nullcontext
ones_like = np.ones_like

class Tensor(np.ndarray):
    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)

def tensor(values, device):
    assert device == "cpu"
    return np.asarray(values).view(Tensor)
""",
    "torch/_dynamo.py": """
from types import SimpleNamespace

config = SimpleNamespace(automatic_dynamic_shapes=True)
utils = SimpleNamespace(counters={"stats": {"unique_graphs": 0}})
utils.counters = type("Counters", (dict,), {"clear": lambda self: None})(utils.counters)
""",
    "transformers/__init__.py": """
from types import SimpleNamespace
import numpy as np
from torch import _dynamo

__version__ = "0.0"

class Model:
    generation_config = SimpleNamespace(eos_token_id=2)

    def to(self, device, dtype):
        assert (device, dtype) == ("cpu", "float32")
        return self

    def eval(self):
        pass

    def generate(self, ids, attention_mask, max_new_tokens, disable_compile, **given):
        assert given == dict(do_sample=False, cache_implementation="static", pad_token_id=0)
        assert self.generation_config.eos_token_id is None and (attention_mask == 1).all()
        if not disable_compile:
            assert not _dynamo.config.automatic_dynamic_shapes
            {compiled}
        new = np.full((len(ids), max_new_tokens), -7)
        return np.concatenate([ids, new], axis=1).view(type(ids))

class AutoModelForCausalLM:
    from_pretrained = lambda path: Model()
""",
}


def with_compiled(line: str) -> dict[str, str]:
    return {name: text.replace("{compiled}", line) for name, text in TRANSFORMERS.items()}


def compare_on_the_demo(path: Path) -> dict:
    given = ["--model", DEMO, "--device", "cpu", "--dtype", "float32", "--batch-sizes", "1,3"]
    given += ["--prompt-lens", "4,20", "--new-tokens", 5, "--repeats", 2, "--json", path]
    result = CliRunner().invoke(compare_generate.main, list(map(str, given)))
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()) | {"output": result.output}


def test_compare_generate_with_a_stand_in(stand_in, tmp_path):
    stand_in(with_compiled('_dynamo.utils.counters["stats"]["unique_graphs"] += 1'))
    result = compare_on_the_demo(tmp_path / "out.json")
    assert (result["bench"], result["shape"]) == ("compare_transformers_generate", "demo")
    assert {"cupyllama", "torch", "transformers"} < set(result["versions"]) and result["gpu"]
    assert [(case["batch_size"], case["prompt_len"]) for case in result["cases"]] == [
        *((1, 4), (1, 20), (3, 4), (3, 20))
    ]
    for case in result["cases"]:
        assert set(case["ways"]) == {"cupyllama", "eager", "compiled"}
        ours = case["ways"]["cupyllama"]
        for way in case["ways"].values():
            rate = 5 * case["batch_size"] / np.median(way["seconds"])
            assert len(way["seconds"]) == 2 and way["tokens_per_second"] == pytest.approx(rate)
        for name in ("eager", "compiled"):
            way = case["ways"][name]
            ratio = ours["tokens_per_second"] / way["tokens_per_second"]
            assert way["ours_times_this"] == pytest.approx(ratio) and way["same_tokens"] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise OSError('no C compiler\\nat all')", "OSError: no C compiler"),
        ("pass", "generate compiled nothing"),
    ],
)
def test_compiling_may_not_be_had(line, said, stand_in, tmp_path):
    stand_in(with_compiled(line))
    result = compare_on_the_demo(tmp_path / "out.json")
    for case in result["cases"]:
        assert case["ways"]["compiled"] == {"unavailable": said}
        assert case["ways"]["eager"]["tokens_per_second"] > 0
    assert result["output"].count(f"not to be had: {said}") == 4


def test_figures_of_generation_by_hand():
    case = compare_generate.Case(2, 4, 3)

    def outcomes(seconds, tokens):
        return [{case: compare_generate.Outcome(s, np.array(tokens))} for s in seconds]

    own = [{"cupyllama": one} for one in outcomes([1, 2, 9], [[5, 6, 7], [8, 9, 9]])]
    # The first is the same for two tokens, the second for none: what follows does not count.
    eager, compiled = (outcomes(s, [[5, 6, 0], [0, 9, 9]]) for s in ([8, 7, 4], [3, 3, 3]))
    theirs = [{"eager": e, "compiled": c} for e, c in zip(eager, compiled, strict=True)]
    for same in (True, False):
        (record,) = compare_generate.summary([case], [own, theirs], same)
        assert record["ways"]["cupyllama"]["tokens_per_second"] == 3
        assert record["ways"]["eager"]["ours_times_this"] == pytest.approx(3.5)
        assert record["ways"]["compiled"]["ours_times_this"] == pytest.approx(1.5)
        assert record["ways"]["eager"].get("same_tokens") == (2 if same else None)
    _, first, second, third = compare_generate.table([record])
    assert first.split(" | ")[3:] == ["cupyllama ", "      3.0", "    666.67"]
    assert second.split(" | ")[4:] == ["      0.9", "   2333.33", "       3.50"]


def test_generation_needs_transformers_and_a_known_shape(stand_in, monkeypatch):
    stand_in(with_compiled("pass"))
    result = CliRunner().invoke(compare_generate.main, ["--device", "cpu", "--shape", "llama-8b"])
    assert result.exit_code == 1 and "shape 'llama-8b' is not known" in result.output
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(compare_generate.main, [])
    assert result.output == (
        "Error: transformers is not installed: pip install 'transformers torch accelerate'\n"
    )
