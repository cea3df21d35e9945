"""What `cupyllama bench` counts, generates, checks, prints and draws; no GPU is needed for it."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cupyllama.bench import (
    cases,
    cases_llama,
    cases_opt,
    gemm,
    kernels,
    load,
    measure,
    rows,
    score,
    shapes,
)
from cupyllama.bench.measure import Ceilings
from cupyllama.bench.table import as_table
from cupyllama.checkpoint.fields import stage_fields
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.cli import cli
from cupyllama.errors import CupyllamaError, DataError, ModelError, OutputError, UsageError
from cupyllama.evaluate import plan
from cupyllama.ops import reference
from cupyllama.packing import TokenRow, pack
from cupyllama.parallel.devices import Device
from cupyllama.quantized import Quantized

TINY = (2, 96, 200, 4, 2, 331)  # heads of 24, two for each key-value head
TINY_OPT = (2, 96, 200, 4, 331)
CPU = Device("cpu", "a CPU", reference, place="here/cpu")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.OPT_SHAPES, "tiny-opt", TINY_OPT)


@pytest.fixture
def on_the_host(monkeypatch):
    """Random arrays of NumPy, so that `reference` can stand for a device."""

    def random_array(shape, dtype, seed, deviation):
        random = np.random.default_rng(abs(seed))
        return (deviation * random.standard_normal(shape, np.float32)).astype(dtype)

    for module in (shapes, cases, gemm):
        monkeypatch.setattr(module, "random_array", random_array)


def case_name(each):
    return each.__name__ if hasattr(each, "__name__") else f"{each.func.__name__}, fp8"


def lengths(generated):
    contexts = np.array([row.first_target - 1 for row in generated.rows]).reshape(-1, 4)
    assert (contexts == contexts[:, :1]).all()
    return contexts[:, 0], generated.num_tokens.reshape(-1, 4)


@pytest.mark.parametrize("questions", [50, 1000])
def test_generated_rows_have_the_lengths_of_hellaswag(questions):
    generated = rows.hellaswag_like_rows(questions, 32000)
    contexts, endings = lengths(generated)
    assert len(generated.rows) == 4 * questions and generated.choice_start[-1] == 4 * questions
    assert [row.choice for row in generated.rows] == list(range(4 * questions))
    assert contexts.mean() == pytest.approx(56, abs=0.6) and contexts.max() == 118
    assert endings.mean() == pytest.approx(33, abs=0.4) and endings.max() == 98
    assert contexts.min() == 12 and endings.min() == 2


def test_long_endings_follow_long_contexts():
    contexts, endings = lengths(rows.hellaswag_like_rows(1000, 32000))
    assert np.corrcoef(contexts, endings[:, 0])[0, 1] == pytest.approx(0.63, abs=0.05)
    assert np.corrcoef(endings[:, 1], endings[:, 3])[0, 1] == pytest.approx(0.66, abs=0.05)


def test_the_lengths_are_those_of_the_real_text(real_data):
    files = real_data / "hellaswag_val_full.txt.bz2", real_data / "llama_tokenizer.model"
    real = rows.read_rows(shapes.model_config("llama-7b"), 2000, *files)
    generated = rows.hellaswag_like_rows(2000, 32000)
    for ours, theirs in zip(lengths(generated), lengths(real), strict=True):
        percent = np.arange(5, 100, 5)
        difference = np.percentile(ours, percent) - np.percentile(theirs, percent)
        assert abs(difference).max() <= 2.5


def test_generated_rows_share_their_contexts_and_nothing_else():
    generated = rows.hellaswag_like_rows(20, 331)
    for number, first in enumerate(generated.rows[::4]):
        question = generated.rows[4 * number : 4 * number + 4]
        for row in question:
            assert row.token_ids[: row.first_target] == first.token_ids[: first.first_target]
            assert max(row.token_ids) < 331 and min(row.token_ids[1:]) >= 3
    assert {row.token_ids[0] for row in generated.rows} == {1}
    contexts, endings = lengths(generated)
    alone = int(endings.sum() + contexts.sum()) + 1 - len(generated.rows)  # and BOS once
    (batch,) = pack(generated.rows, 8192)
    # chance makes a first token or two coincide
    assert alone - 12 <= len(batch.token_ids) <= alone


def test_generated_rows_are_the_same_every_time():
    assert rows.hellaswag_like_rows(9, 331).digest() == rows.hellaswag_like_rows(9, 331).digest()
    other = rows.hellaswag_like_rows(9, 331, seed=1)
    assert other.digest() != rows.hellaswag_like_rows(9, 331).digest()


def test_few_shot_rows():
    generated = rows.few_shot_rows(5, 32000)
    assert {len(row.token_ids) for row in generated.rows} == {1530}
    assert {row.first_target for row in generated.rows} == {1500}
    begins = {tuple(row.token_ids[:1500]) for row in generated.rows}
    assert len(begins) == 1 and len({tuple(row.token_ids) for row in generated.rows}) == 20
    (batch,) = pack(generated.rows, 8192)
    assert len(batch.token_ids) == 1500 + 20 * 29  # the last token is not fed
    own = rows.few_shot_rows(5, 32000, own=True)
    assert {len(row.token_ids) for row in own.rows} == {1530}
    assert len({tuple(row.token_ids[:1500]) for row in own.rows}) == 5
    (batch,) = pack(own.rows, 8192)
    assert len(batch.token_ids) == 1 + 5 * (1499 + 4 * 29)  # BOS is everyone's


def test_text_and_tokenizer_come_together(tmp_path, real_data):
    config, tokenizer = shapes.model_config("tiny"), real_data / "llama_tokenizer.model"
    for wrong in ((tmp_path, None), (None, tokenizer)):
        with pytest.raises(UsageError, match="beside it"):
            rows.read_rows(config, 10, *wrong)
    with pytest.raises(ModelError, match="32,000 tokens, and the shape 331"):
        rows.read_rows(config, 10, tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(DataError, match="No such file"):
        rows.read_rows(shapes.model_config("llama-7b"), 10, tmp_path / "none.jsonl", tokenizer)


def test_published_shapes():
    seventy = shapes.model_config("llama-2-70b")
    assert (seventy.num_hidden_layers, seventy.head_dim, seventy.kv_size) == (80, 128, 1024)
    biggest = shapes.model_config("llama-65b")
    fields = stage_fields(biggest, range(80))
    parameters = sum(math.prod(field.shape) for _, field in fields)
    assert parameters == 65_285_660_672  # of huggyllama/llama-65b
    thirty = shapes.model_config("opt-30b")
    assert (thirty.head_dim, thirty.layer_parameters, thirty.bos_token_id) == (128, 616562688, 2)
    fields = stage_fields(thirty, range(48))
    parameters = sum(math.prod(field.shape) for _, field in fields)
    assert parameters == 29_974_540_288  # of facebook/opt-30b
    with pytest.raises(UsageError, match="'llama-8b' is not known"):
        shapes.model_config("llama-8b")


def test_bytes_and_flops_by_hand():
    # 10 rows of 8 numbers of 2 bytes, read and written
    assert cases.gather_work(10, 8, 2) == (10 * 4 + 10 * 16 + 10 * 16, 0)
    assert cases_llama.rmsnorm_work(10, 8, 2) == (160 + 160 + 16, 10 * 8 * 4)
    # 6 pairs a row: 4 products and 2 sums each
    assert cases_llama.rope_work(10, 12, 2) == (10 * 4 + 240 + 240, 10 * 6 * 6)
    # 16 numbers in and 8 out
    assert cases.linear_work(10, 16, 4, 8, 2) == (2 * (40 + 64 + 80), 2 * 640)
    assert cases_llama.swiglu_work(10, 8, 2) == (320 + 160, 10 * 8 * 4)
    assert cases_opt.add_work(10, 8, 4) == (320 + 320 + 320, 80)
    assert cases_opt.layernorm_work(10, 8, 2) == (160 + 160 + 16 + 16, 10 * 8 * 7)
    # a byte an element and 4 a row out, a comparison and a product more
    assert cases.quantize_work(10, 8, 2) == (160 + 80 + 40, 160)
    assert cases_llama.rmsnorm_work(10, 8, 2, True) == (160 + 16 + 80 + 40, 10 * 8 * 6)
    assert cases_llama.swiglu_work(10, 8, 2, True) == (320 + 80 + 40, 10 * 8 * 6)
    assert cases_opt.layernorm_work(10, 8, 2, True) == (160 + 32 + 80 + 40, 10 * 8 * 9)
    # 3 rows of 100 logits and 4 starts in, 5 targets in, 10 numbers out, 4 bytes each
    assert cases.log_probs_work(3, 100, 5) == (1200 + 16 + 20 + 40, 1200)


def test_work_of_attention_by_hand():
    config = dataclasses.replace(shapes.model_config("tiny"), head_dim=10)
    # [1 5 6 7] then [1 5 8 9 4], of which 2 tokens are shared and the last ones never fed
    shared = [TokenRow([1, 5, 6, 7], 2, 0), TokenRow([1, 5, 8, 9, 4], 2, 1)]
    (batch,) = pack(shared, 100)
    assert np.diff(batch.segment_start).tolist() == [3, 2]
    seen = (1 + 2 + 3) + (3 + 4)
    work = cases.attention_work(batch, config, 2)
    assert work.flops == seen * 4 * 10 * (2 + 2)  # heads, their size, two products and two sums
    assert work.nbytes == 5 * (40 + 20 + 20 + 40) * 2 + (3 + 4) * 4


def test_products_of_llama_7b():
    config = shapes.model_config("llama-7b")
    assert gemm.all_products(config) == {
        "qkv_proj": (12288, 4096),
        "o_proj": (4096, 4096),
        "gate_up_proj": (22016, 4096),
        "down_proj": (4096, 11008),
        "lm_head": (32000, 4096),
    }
    assert gemm.layer_flops(config, 1) == 2 * 202_375_168
    assert gemm.product_flops(3, 5, 7) == 210
    tiny = shapes.model_config("tiny")
    batches = plan(rows.hellaswag_like_rows(3, 331).rows, 400, reference)
    fed = sum(len(batch.token_ids) for batch in batches)
    wanted = sum(len(batch.logit_rows) for batch in batches)
    after = 2 * 96 * (96 + 400 + 200)  # attention, in a layer
    expected = fed * 2 * (2 * 96 * 192) + (fed + wanted) * after + wanted * 2 * 96 * 331
    assert score.evaluation_flops(tiny, batches) == expected
    other = 2 * 96 * (96 + 200 + 200)
    expected = fed * 2 * (2 * 96 * 288) + (fed + wanted) * other + wanted * 2 * 96 * 331
    assert score.evaluation_flops(shapes.model_config("tiny-opt"), batches) == expected


def test_products_of_opt():
    config = shapes.model_config("opt-30b")
    assert gemm.all_products(config) == {
        "qkv_proj": (21504, 7168),
        "out_proj": (7168, 7168),
        "fc1": (28672, 7168),
        "fc2": (7168, 28672),
        "lm_head": (50272, 7168),
    }
    for layers in (1, 3):  # of which the last may be the first
        small = dataclasses.replace(config, num_hidden_layers=layers, word_embed_proj_dim=512)
        for tied in (True, False):
            found = gemm.head_products(dataclasses.replace(small, tie_word_embeddings=tied))
            assert found == {"project_out": (512, 7168), "lm_head": (50272, 512)}


def test_the_ceiling_is_the_nearer_one():
    ceilings = Ceilings(copy_bytes_per_second=100.0, gemm_flops_per_second=1000.0)
    assert ceilings.seconds(50, 10) == 0.5
    assert ceilings.seconds(50, 2000) == 2.0
    case = cases.Case("x", None, None, cases.Work(50, 2000), True)
    found = kernels.figures(case, 4.0, ceilings)
    assert (found["of_ceiling"], found["bytes_per_second"], found["tflops"]) == (0.5, 12.5, 5e-10)


def case_of(shape, each):
    return pytest.param(shape, each, id=f"{shape} {case_name(each)}")


ALL = [
    case_of(shape, each)
    for shape, family in (("tiny", "llama"), ("tiny-opt", "opt"))
    for each in (*kernels.EACH[family], *kernels.EIGHT_BIT[family])
]


def setting(ops, shape, dtype="float16", tokens=300):
    batch = plan(rows.hellaswag_like_rows(9, 331).rows, tokens, reference)[0]
    return cases.Setting(shapes.model_config(shape), np.dtype(dtype), ops, batch)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape, each", ALL)
def test_right_kernels_pass(on_the_host, shape, each, dtype):
    case = each(setting(reference, shape, dtype))
    case.check()
    assert case.work.nbytes > 0
    assert each(setting(reference, shape, dtype)).launch() is not None


def wrong_gather(ids, table):
    return reference.gather(np.roll(ids, 1), table)


def wrong_rmsnorm(x, weight, eps, quantized=False):
    return reference.rmsnorm(x * x.dtype.type(1.01), weight, eps + 0.05, quantized)


def wrong_quantize(x):
    return Quantized(reference.quantize(x).values, np.ones(len(x), np.float32))


def wrong_rope(qkv, positions, *rest):
    return reference.rope(qkv, positions // 2, *rest)


def wrong_attention(qkv, batch, *rest):
    """The last of all segments does not see the first key of its row."""
    out = reference.attention(qkv, batch, *rest)
    start = batch.key_start.copy()
    start[-2] += 1
    index = batch.key_index[np.arange(len(batch.key_index)) != start[-2] - 1]
    start[-2:] -= 1
    one_less = dataclasses.replace(batch, key_start=start, key_index=index)
    first = batch.segment_start[-2]
    out[first:] = reference.attention(qkv, one_less, *rest)[first:]
    return out


def wrong_swiglu(gate_up, quantized=False):
    return reference.swiglu(np.roll(gate_up, gate_up.shape[1] // 2, axis=1), quantized)


def wrong_linear_swiglu(x, weight):
    return reference.linear_swiglu(x, np.roll(weight, len(weight) // 2, axis=0))


def wrong_linear_rope(x, weight, bias, positions, *rest):
    return reference.linear_rope(x, weight, bias, positions // 2, *rest)


def wrong_layernorm(x, weight, bias, eps, quantized=False):
    return reference.layernorm(x, weight, bias * x.dtype.type(0.98), eps, quantized)


def wrong_add(x, y):
    return reference.add(x, np.roll(y, 1, axis=0))


def wrong_linear(x, weight, bias, residual):
    return reference.linear(x, weight, None, residual)


def wrong_linear_relu(x, weight, bias):
    return reference.linear(x, weight, bias)


def wrong_log_probs(logits, start, token, out):
    reference.log_probs(logits, start, token, out)
    out[1, 0] = 1 - out[1, 0]


def wrong_dequantize(matrix, dtype):
    return reference.dequantize(Quantized(matrix.values, 1.01 * matrix.scale), dtype)


def nan_swiglu(gate_up, quantized=False):
    out = reference.swiglu(gate_up)
    out[0, 0] = np.nan
    return out


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("gather", wrong_gather),
        ("rmsnorm", wrong_rmsnorm),
        ("rope", wrong_rope),
        ("attention", wrong_attention),
        ("swiglu", wrong_swiglu),
        ("swiglu", nan_swiglu),
        ("linear_swiglu", wrong_linear_swiglu),
        ("linear_rope", wrong_linear_rope),
        ("log_probs", wrong_log_probs),
        ("quantize", wrong_quantize),
        ("dequantize", wrong_dequantize),
        ("rmsnorm, fp8", wrong_rmsnorm),
        ("swiglu, fp8", wrong_swiglu),
        ("layernorm", wrong_layernorm),
        ("layernorm, fp8", wrong_layernorm),
        ("add", wrong_add),
        ("linear", wrong_linear),
        ("linear_relu", wrong_linear_relu),
    ],
)
def test_wrong_kernels_are_named(on_the_host, name, wrong):
    shape, each = next(param.values for param in ALL if case_name(param.values[1]) == name)
    operation = name.removesuffix(", fp8")
    case = each(setting(SimpleNamespace(**vars(reference) | {operation: wrong}), shape))
    with pytest.raises(CupyllamaError, match=f"^{name}.* is wrong"):
        case.check()


def test_products_are_checked(on_the_host):
    y, x, weight = gemm.operands(65, 70, 33, "float16")
    y[...] = x.astype(np.float32) @ weight.T.astype(np.float32)
    gemm.check_rows("gemm", y, x, weight)
    with pytest.raises(CupyllamaError, match="^gemm is wrong"):
        gemm.check_rows("gemm", np.roll(y, 1, axis=0), x, weight)
    eight_bit = reference.quantize(x), reference.quantize(weight)
    y[...] = reference.linear(*eight_bit, out_dtype=np.float16)
    gemm.check_rows("gemm", y, *eight_bit)
    with pytest.raises(CupyllamaError, match="^gemm is wrong"):
        gemm.check_rows("gemm", y * np.float16(1.01), *eight_bit)


def test_chosen_algorithms_are_recorded(monkeypatch):
    """One for each product, whatever the numbers of rows that it is asked for."""
    cublaslt = pytest.importorskip("cupyllama.ops.cublaslt")

    class Plan:
        def __init__(self, product, device):
            if product.m != product.chosen_for:
                cublaslt.plan(product._replace(m=product.chosen_for), device)

        def configuration(self):
            return {"id": 66, "split_k": 1}

    monkeypatch.setattr(cublaslt, "Plan", Plan)
    monkeypatch.setattr(cublaslt, "_chosen", [])
    cublaslt.plan.cache_clear()
    product = cublaslt.Product(128, 64, 32, "float16", "float32")
    few = product._replace(m=16, n=48, chosen_for=16)
    for asked in (product, product._replace(m=384), few):
        cublaslt.plan(asked, 0)
    cublaslt.plan.cache_clear()
    found = cublaslt.algorithms()
    assert [(one["m"], one["n"], one["k"]) for one in found] == [(8192, 64, 32), (16, 48, 32)]
    assert all((one["id"], one["split_k"]) == (66, 1) for one in found)
    assert json.loads(json.dumps(found)) == found


def test_the_breakdown_tells_operations_apart(on_the_host, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(score, "mark", lambda: next(ticks))
    monkeypatch.setattr(score, "seconds_between", lambda begin, end: float(end - begin))
    monkeypatch.setattr(reference, "LOGIT_CHUNK", 100)
    config = shapes.model_config("tiny")
    batch = plan(rows.hellaswag_like_rows(2, 331).rows, 300, reference)[0]
    stage = shapes.random_stage(config, np.dtype(np.float32), reference, 300)
    spent = score.breakdown(stage, batch)
    inside = ["rmsnorm input_layernorm", "linear_rope qkv_proj", "attention"]
    after = ["linear o_proj", "rmsnorm post_attention_layernorm", "linear_swiglu gate_up_proj"]
    after += ["linear down_proj"]
    assert spent["layer"] == dict.fromkeys([*inside, *after], 1.0)  # of one, and of the last:
    ends = dict.fromkeys(["gather embed_tokens", *inside], 1.0)
    chunks = -(-len(batch.logit_rows) // reference.LOGIT_CHUNK)
    head = ["rmsnorm norm", "linear lm_head", "log_probs"]
    ends |= dict.fromkeys([*after, *head], chunks) | {"gather": 2 * chunks}
    assert chunks == 2 and spent["rest"] == ends
    assert spent["seconds"] == 2 * (7 + 4 + (4 + 2 + 3) * chunks) + 1


def test_the_breakdown_of_opt(on_the_host, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(score, "mark", lambda: next(ticks))
    monkeypatch.setattr(score, "seconds_between", lambda begin, end: float(end - begin))
    config = shapes.model_config("tiny-opt")
    batch = plan(rows.hellaswag_like_rows(1, 331).rows, 300, reference)[0]
    stage = shapes.random_stage(config, np.dtype(np.float32), reference, 300)
    spent = score.breakdown(stage, batch)
    inside = ["layernorm self_attn_layer_norm", "linear qkv_proj", "attention"]
    after = ["linear out_proj", "layernorm final_layer_norm", "linear_relu fc1", "linear fc2"]
    assert spent["layer"] == dict.fromkeys([*inside, *after], 1.0)
    ends = ["gather embed_tokens", "add", "linear lm_head", "log_probs"]
    expected = dict.fromkeys([*inside, *after, *ends], 1.0)
    expected |= {"layernorm final_layer_norm": 2, "gather": 3}  # positions, and rows wanted
    assert spent["rest"] == expected
    assert stage.ops is reference and "mix" not in vars(stage)


@pytest.mark.parametrize("shape", ["tiny", "tiny-opt"])
def test_random_layers_are_the_same_in_every_stage(on_the_host, shape):
    config = shapes.model_config(shape)

    def stage(layers=None, quantize=None):
        arguments = (config, np.dtype(np.float32), reference, 300, layers, quantize)
        return shapes.random_stage(*arguments).weights

    everything, last = stage(), stage(range(1, 2))
    assert last.embed_tokens is None
    np.testing.assert_array_equal(last.lm_head, everything.lm_head)
    seen = []
    for name, array in vars(last.layers[0]).items():
        if array is None:
            continue
        np.testing.assert_array_equal(array, getattr(everything.layers[1], name))
        if name.endswith(("norm", "layernorm")):
            assert (array == 1).all()
        else:
            assert array.std() == pytest.approx(0.02, rel=0.2)
            others = (array, getattr(everything.layers[0], name), everything.embed_tokens)
            seen += [other.ravel()[:8].tobytes() for other in others[: 2 if seen else 3]]
    assert len(set(seen)) == len(seen)  # every array has numbers of its own
    tied = config.tie_word_embeddings
    assert np.array_equal(everything.lm_head, everything.embed_tokens) == tied
    for name, array in vars(stage(quantize="fp8").layers[0]).items():
        assert isinstance(array, Quantized) == (name in gemm.layer_products(config)), name


def test_tables_are_aligned():
    text = as_table(["name", "us"], [["a", "1,000.0"], ["longer", "2"]])
    assert text.splitlines() == ["name         us", "a       1,000.0", "longer        2"]


def kernel_run(name, shape, nbytes, flops, of_ceiling):
    ceilings = Ceilings(3e12, 700e12)
    case = cases.Case(name, None, None, cases.Work(nbytes, flops), name.startswith("attention"))
    seconds = ceilings.seconds(nbytes, flops) / of_ceiling
    return {"kernel": name, "shape": shape, **kernels.figures(case, seconds, ceilings)}


def measured_kernels(many=("llama-7b", "llama-30b")):
    """Close to one another on purpose."""
    made = [
        *(("embedding", 134_000_000, 0, 0.9), ("rmsnorm", 134_000_000, 134_000_000, 0.92)),
        *(("log_probs", 131_000_000, 131_000_000, 0.92), ("swiglu", 540_000_000, 360_000_000, 0.9)),
        *(("rope", 270_000_000, 200_000_000, 0.85), ("bias", 400_000_000, 100_000_000, 0.9)),
        *(("attention", 270_000_000, 9_500_000_000, 0.6),),
        *(("attention, few-shot", 272_000_000, 200_000_000_000, 0.5),),
    ]
    return {
        "bench": "kernels",
        "gpu": "NVIDIA H100 80GB HBM3",
        "dtype": "float16",
        "micro_batch_tokens": 8192,
        "copy_bytes_per_second": 3e12,
        "gemm_tflops": 700.0,
        "runs": [kernel_run(name, shape, *work) for shape in many for name, *work in made],
    }


def test_a_table_of_kernels():
    title, headers, *lines = kernels.kernels_table(measured_kernels()).splitlines()
    assert "copy 3,000 GB/s, matrix products 700 TFLOP/s" in title
    assert headers.split() == "kernel shape us GB/s TFLOP/s of the ceiling".split()
    assert len(lines) == 16
    # 134 MB at 3 TB/s are 44.67 us, at 0.92 of it 48.6
    assert lines[1].split() == ["rmsnorm", "llama-7b", "48.6", "2,760", "-", "0.92"]
    few = "attention, few-shot llama-7b 571.4 476 350.0 0.50"  # 2e11 FLOP at 350 TFLOP/s
    assert " ".join(lines[7].split()) == few
    assert len({len(line) for line in lines}) == 1


def breakdown_run(tokens=8192):
    names = ["rmsnorm a", "linear qkv_proj", "rope", "attention", "linear o_proj", "rmsnorm b"]
    names += ["linear gate_up_proj", "swiglu", "linear down_proj"]
    shares = [50, 1180, 95, 150, 400, 50, 2150, 190, 1080]
    layer = {n: 1e-6 * us * tokens / 8192 for n, us in zip(names, shares, strict=True)}
    return {
        "micro_batch_tokens": tokens,
        "micro_batches": 22,
        "tokens_asked": 355960,
        "tokens_computed": 180224,
        "seconds": [3.9, 4.0, 4.1],
        "questions_per_second": 250.0,
        "gemm_tflops": 700.0,
        "run_tflops": 595.0,
        "efficiency": 0.85,
        "peak_memory_bytes": 15_750_000_000,
        "breakdown": {"layer": layer, "rest": {"linear lm_head": 3e-4}, "seconds": 0.18},
    }


def measured_score(*sizes):
    return {
        "gpu": "NVIDIA H100 80GB HBM3",
        "shape": "llama-7b",
        "dtype": "float16",
        "quantize": None,
        "questions": 1000,
        "data": "generated",
        "runs": [breakdown_run(size) for size in sizes],
    }


def test_a_table_of_scores():
    text = score.score_table(measured_score(8192, 2048))
    lines = [line.split() for line in text.splitlines()]
    assert lines[2] == ["8,192", "250.0", "595", "700", "0.850", "49.4", "%", "15.8"]
    assert ["a", "layer", "5,345", "100.0", "%"] in lines
    assert ["linear", "gate_up_proj", "2,150", "40.2", "%"] in lines
    assert "1,000 questions (generated), 355,960 tokens" in text


def test_a_table_of_products():
    runs = [
        {
            **{"shape": "llama-7b", "product": "o_proj", "m": 2048, "n": 4096, "k": 4096},
            "seconds": {"gemm": 1e-4, "gemmEx": 1.25e-4},
            "tflops": {"gemm": 687.2, "gemmEx": 549.8},
        }
    ]
    headers, line = gemm.gemm_table({"runs": runs}).splitlines()
    assert headers.endswith("gemm us  TFLOP/s  gemmEx us  TFLOP/s  gemm / gemmEx")
    expected = "llama-7b o_proj 2,048 4,096 4,096 100.0 687.2 125.0 549.8 1.250"
    assert " ".join(line.split()) == expected


@pytest.mark.parametrize(
    "draw, measured",
    [
        ("plot_kernels", measured_kernels()),
        ("plot_kernels", measured_kernels(["llama-7b"])),
        ("plot_score", measured_score(8192)),
        ("plot_score", measured_score(8192, 4096, 2048)),
    ],
)
def test_labels_do_not_overlap(tmp_path, monkeypatch, draw, measured):
    Text = pytest.importorskip("matplotlib.text").Text
    from cupyllama.bench import plot

    path, figures, original = tmp_path / "plot.png", [], plot._save
    monkeypatch.setattr(plot, "_save", lambda f, to: (figures.append(f), original(f, to)))
    getattr(plot, draw)(measured, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    (axes,) = figure.axes
    texts = [*axes.texts, *figure.texts, axes.xaxis.label, axes.yaxis.label]
    (x0, x1), (y0, y1) = axes.get_xlim(), sorted(axes.get_ylim())
    # matplotlib keeps some that lie outside and are not drawn
    texts += [text for text in axes.get_xticklabels() if x0 <= text.get_position()[0] <= x1]
    texts += [text for text in axes.get_yticklabels() if y0 <= text.get_position()[1] <= y1]
    for legend in (axes.get_legend(), *figure.legends):
        texts += legend.get_texts() if legend else []
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    # of the words alone: an annotation's own extent has its line in it
    boxes = [Text.get_window_extent(text).expanded(0.98, 0.9) for text in texts]
    for (a, first), (b, second) in itertools.combinations(zip(boxes, texts, strict=True), 2):
        assert not a.overlaps(b), f"{first.get_text()!r} lies on {second.get_text()!r}"
    page = figure.bbox
    for box, text in zip(boxes, texts, strict=True):
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 <= page.y1
        assert inside, f"{text.get_text()!r} leaves the page"
    if draw == "plot_kernels":
        named = {run["kernel"] for run in measured["runs"] if run["flops"]}
        assert named <= {text.get_text().split(":")[0] for text in axes.texts}


@pytest.fixture
def pretended_gpu(monkeypatch, on_the_host):
    """`reference` in place of the device, and a watch that says a millisecond."""
    monkeypatch.setattr(measure, "choose_device", lambda kind, *ranks: (CPU, ""))
    monkeypatch.setattr(kernels, "layer_rate", lambda config, dtype, tokens: 7e14)
    monkeypatch.setattr(kernels, "copy_rate", lambda: 3e12)
    watch = SimpleNamespace(seconds=lambda launch: 1e-3 if launch() is not None else 1e-3)
    monkeypatch.setattr(kernels, "Stopwatch", lambda repeats: watch)
    monkeypatch.setattr(gemm, "stream_seconds", lambda launches, times: 1e-3)

    def product(y, x, weight):
        y[...] = reference.linear(x, weight, out_dtype=y.dtype)

    monkeypatch.setattr(gemm, "ways", lambda dtype: {"gemm": product, "gemmEx": product})


@pytest.mark.parametrize(
    "shape, names",
    [
        (
            "tiny",
            ["gather", "rmsnorm", "linear_rope", "attention", "linear_swiglu", "log_probs"]
            + ["rope", "swiglu", "dequantize"],
        ),
        (
            "tiny-opt",
            ["gather", "add", "layernorm", "attention", "linear_relu", "linear", "log_probs"]
            + ["dequantize"],
        ),
    ],
)
def test_kernels_from_end_to_end(pretended_gpu, tmp_path, shape, names):
    arguments = ["--shape", shape, "--micro-batch-tokens", 2048, "--json", tmp_path / "out.json"]
    result = CliRunner().invoke(cli, ["bench", "kernels", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"bench", "date", "gpu", "versions", "dtype", "runs"} <= set(found)
    names = [*names, "attention, few-shot", "attention, own prompts"]
    assert [run["kernel"] for run in found["runs"]] == names
    short, *long = (found["runs"][i] for i in (3, -2, -1))
    assert all(run["flops"] > 5 * short["flops"] > 0 for run in long)
    assert all(run["seconds"] == 1e-3 and run["of_ceiling"] > 0 for run in found["runs"])
    assert len(result.stdout.splitlines()) == 2 + len(found["runs"])


def test_a_wrong_kernel_ends_the_command(pretended_gpu, monkeypatch):
    monkeypatch.setattr(reference, "rmsnorm", wrong_rmsnorm_of(reference.rmsnorm))
    arguments = ["--shape", "tiny", "--micro-batch-tokens", "2048"]
    result = CliRunner().invoke(cli, ["bench", "kernels", *arguments])
    assert result.exit_code == 1 and result.stderr.startswith("cupyllama: rmsnorm is wrong")


def wrong_rmsnorm_of(right):
    """Wrong for the device's dtype alone: the reference itself computes in float32."""

    def wrong(x, weight, eps, quantized=False):
        return right(x, weight, eps) * x.dtype.type(1 if x.dtype == np.float32 else 1.01)

    return wrong


def test_products_from_end_to_end(pretended_gpu, tmp_path):
    arguments = ["--shape", "tiny", "--tokens", 64, "--tokens", 33, "--json", tmp_path / "out.json"]
    result = CliRunner().invoke(cli, ["bench", "gemm", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [(run["product"], run["m"]) for run in runs[-4:]] == [
        *(("down_proj", 64), ("down_proj", 33), ("lm_head", 64), ("lm_head", 33))
    ]
    assert runs[-1]["tflops"]["gemmEx"] == pytest.approx(2 * 33 * 331 * 96 / 1e-3 / 1e12)


def test_what_would_end_in_an_error_is_seen_first(pretended_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "measure_kernels", lambda *_: pytest.fail("measured"))

    def ends(exit_code, part, *arguments):
        result = CliRunner().invoke(cli, ["bench", "kernels", *map(str, arguments)])
        assert result.exit_code == exit_code and part in result.stderr, result.output

    ends(1, "cannot be written", "--json", tmp_path / "none" / "out.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    ends(2, "pip install 'cupyllama[plot]'", "--plot", tmp_path / "plot.png")


def test_plots_are_named_for_what_they_are(pretended_gpu, tmp_path):
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(cli, ["bench", "kernels", "--plot", str(tmp_path / "plot.txt")])
    assert result.exit_code == 2 and ".png" in result.stderr


@pytest.mark.parametrize("shape", ["tiny", "tiny-opt"])
def test_written_checkpoints_are_read(tmp_path, shape):
    config = shapes.model_config(shape)
    load.write_checkpoint(tmp_path, config, np.dtype(np.float16))
    checkpoint = open_checkpoint(tmp_path)
    weights = load.load_stage(checkpoint, config, range(2), np.dtype(np.float16), reference)
    for name in gemm.layer_products(config):
        matrix = getattr(weights.layers[1], name)
        assert np.isfinite(matrix).all() and matrix.std() > 0
    with pytest.raises(OutputError, match="cannot be written"):
        load.write_checkpoint(tmp_path / "none", config, np.dtype(np.float16))


def test_the_line_of_a_load():
    measured = {
        **{"shape": "llama-7b", "dtype": "float16", "bytes": 13_500_000_000},
        "pinned_copy_bytes_per_second": [54e9, 55e9, 56e9],
        "runs": [{"bytes_per_second": [44e9, 45e9, 40e9], "of_pinned_copy": 0.8}],
    }
    line = load.load_table(measured).splitlines()[1].split()
    assert line == ["llama-7b", "float16", "13.50", "0.307", "44.0", "55.0", "0.80"]


def test_importing_is_free():
    code = "import sys, cupyllama.cli_bench; print('numpy' in sys.modules)"
    code += "\nimport cupyllama.bench.score, cupyllama.bench.kernels, cupyllama.bench.load"
    code += "\nimport cupyllama.bench.plot"
    code += "\nprint(*({'cupy', 'mpi4py', 'matplotlib', 'datasets'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "False\n\n", answer.stderr
