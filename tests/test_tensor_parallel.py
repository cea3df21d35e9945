"""Matrices shared by ranks: the parts make the whole, in weights, in sums and in answers."""

import json
import threading
import time
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from checkpoint_makers import open_stage, write_meta_model, write_pytorch_model
from click.testing import CliRunner
from engine import score_rows
from test_evaluate import random_rows
from test_metaseq import metaseq
from test_ranks import mpirun, our_lines
from tiny_models import TINY_MODELS, tiny_tensors, write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.bench.pipeline import read_run
from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.checkpoint.shard import ShardOptions, shard
from cupyllama.checkpoint.slices import part_of_checkpoint
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.cli import cli
from cupyllama.config import Share, load_config
from cupyllama.errors import DataError, ModelError, UsageError
from cupyllama.families import family_of
from cupyllama.loading import load_stage
from cupyllama.ops import reference
from cupyllama.parallel.group import Group
from cupyllama.parallel.pipeline import Grid, make_grid
from cupyllama.quantized import Quantized
from cupyllama.tensor_parallel import check_tensor_parallel, span

# As awkward as can be shared: no size is a multiple of a vector's width.
MODELS = TINY_MODELS | {
    "odd3": TINY_MODELS["odd"] | {"intermediate_size": 141},
    "post_norm": TINY_MODELS["opt_350m"]
    | {"hidden_size": 136, "num_attention_heads": 4, "ffn_dim": 148},
}
ROWS = random_rows(np.random.default_rng(7), 12)


def write_model(name: str, directory: Path, **options) -> Path:
    with mock.patch.dict(TINY_MODELS, MODELS):
        return write_tiny_model(name, directory, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a name to its directory, written once."""
    folder = tmp_path_factory.mktemp("models")

    def model(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_model(name, path)

    return model


class Meeting:
    """Threads in the place of ranks: what one sends, the others copy."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.sent = [[] for _ in range(size)]

    def exchange(self, rank: int):
        def exchange(outgoing, incoming):
            self.sent[rank] = outgoing
            self.barrier.wait(20)
            for peer in range(self.size):
                if peer != rank:
                    incoming[peer][...] = self.sent[peer][rank]
            self.barrier.wait(20)

        return exchange

    def each(self, work) -> list:
        """What `work(rank)` gives in all threads."""
        found, errors = [None] * self.size, []

        def run(rank):
            try:
                found[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found


def load_part(directory, share, dtype=np.float32, layers=None, quantize=None, **options):
    """A rank's weights, its config, and its checkpoint."""
    config = load_config(directory)
    checkpoint = part_of_checkpoint(open_checkpoint(directory), config, share)
    own, layers = config.part(share), layers or range(config.num_hidden_layers)
    weights = load_stage(
        checkpoint, own, layers, np.dtype(dtype), reference, quantize=quantize, **options
    )
    return weights, own, checkpoint


def scores_of_group(directory, size, rows=ROWS, **options) -> list:
    """What each rank of a group finds."""
    meeting = Meeting(size)

    def work(rank):
        weights, config, _ = load_part(directory, Share(rank, size), **options)
        group = Group(reference, config, meeting.exchange(rank))
        longest = max(len(row.token_ids) for row in rows)
        stage = family_of(config).model.Stage(config, weights, reference, longest, group)
        return score_rows(stage, rows, 100)

    return meeting.each(work)


# --- the parts -----------------------------------------------------------------------------------


def test_what_each_rank_has(models):
    config = load_config(models("gqa"))  # 8 heads of 64, 2 key-value heads, 256, 320 tokens
    two = [config.part(Share(rank, 2)) for rank in range(2)]
    assert [(c.num_attention_heads, c.num_key_value_heads) for c in two] == [(4, 1)] * 2
    assert [(c.q_size, c.kv_size, c.intermediate_size) for c in two] == [(256, 64, 128)] * 2
    assert [c.head_rows for c in two] == [160, 160]
    spans = [
        [span(config, "kv_size", Share(rank, size)) for rank in range(size)] for size in (2, 4)
    ]
    assert spans == [[range(64), range(64, 128)], 2 * [range(64)] + 2 * [range(64, 128)]]
    odd = load_config(models("odd3"))
    found = [span(odd, "head_rows", Share(rank, 3)) for rank in range(3)]
    assert found == [range(104), range(104, 216), range(216, 331)]
    assert [span(odd, "kv_size", Share(rank, 3)) for rank in range(3)] == [range(32)] * 3
    opt = load_config(models("post_norm")).part(Share(3, 4))
    assert (opt.num_attention_heads, opt.num_key_value_heads, opt.head_dim) == (1, 1, 34)
    assert (opt.q_size, opt.ffn_dim, opt.hidden_size, opt.vocab_size) == (34, 37, 136, 331)


@pytest.mark.parametrize(
    ("name", "size", "message", "possible"),
    [
        ("odd3", 2, "2 ranks cannot share 3 attention heads evenly", "1, 3"),
        ("odd", 3, "3 ranks cannot share the 137 columns of the MLP evenly", "1"),
        ("gqa", 16, "16 ranks cannot share 8 attention heads", "1, 2, 4, 8"),
        ("opt_350m", 3, "3 ranks cannot share the 149 columns", "1"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_can(name, size, message, possible, models):
    with pytest.raises(UsageError, match=f"--tensor-parallel {size}: {message}") as error:
        check_tensor_parallel(load_config(models(name)), size)
    assert error.value.hint == f"This model allows {possible}."


def test_key_value_heads_that_neither_divide_nor_are_divided(tmp_path):
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 32}
    with mock.patch.dict(MODELS, {"six": TINY_MODELS["gqa"] | heads}):
        directory = write_model("six", tmp_path)
    with pytest.raises(UsageError, match="share 6 key-value heads nor have one each") as error:
        check_tensor_parallel(load_config(directory), 4)
    assert error.value.hint == "This model allows 1, 2."


def parts_of(tensors, name, size, rank, config):
    """What a rank is to have of a stored tensor, cut by hand; and the axis, None for all of it."""
    kind = name.split(".")[-2]
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    array, kv_heads = tensors[name], kv_heads or heads
    if kind in ("k_proj", "v_proj") and size > kv_heads:
        return np.array_split(array, kv_heads)[rank * kv_heads // size]
    if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"):
        return np.array_split(array, size)[rank]
    if kind in ("o_proj", "out_proj", "down_proj", "fc2") and array.ndim == 2:
        return np.array_split(array, size, axis=1)[rank]
    return array


def forms(name, folder):
    """The model in every form that is read."""
    yield write_model(name, folder / "safetensors", shards=3)
    with mock.patch.dict(TINY_MODELS, MODELS):
        yield write_pytorch_model(name, folder / "pytorch")
    if name == "llama1":
        config = {"num_key_value_heads": 4} | TINY_MODELS[name]
        meta = folder / "meta"
        yield write_meta_model(config, tiny_tensors(name), meta, 2, ffn_dim_multiplier=0.75)
    if name == "opt":
        for parts in (1, 2, 4):
            yield metaseq(name, folder / f"metaseq-{parts}", parts)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("opt", 2),
        ("opt", 4),
        ("llama1", 2),
        ("llama1", 4),
        ("gqa", 4),
        ("attention_bias", 2),
        ("odd3", 3),
        ("post_norm", 4),
    ],
)
def test_every_tensor_is_the_part_that_it_should_be(name, size, tmp_path):
    with mock.patch.dict(TINY_MODELS, MODELS):
        tensors, config = tiny_tensors(name), MODELS[name]
    for directory in forms(name, tmp_path):
        heads = []
        for rank in range(size):
            checkpoint = part_of_checkpoint(
                open_checkpoint(directory), load_config(directory), Share(rank, size)
            )
            for stored in checkpoint.tensors:
                out = np.empty(checkpoint.tensors[stored].shape, np.float32)
                checkpoint.read_into(stored, out)
                if stored == "lm_head.weight":
                    heads.append(out)
                    continue
                expected = parts_of(tensors, stored, size, rank, config)
                np.testing.assert_array_equal(out, expected, f"{directory.name} {stored}")
        tied = config.get("tie_word_embeddings", config["model_type"] == "opt")
        head = "model.decoder.embed_tokens.weight" if tied else "lm_head.weight"
        np.testing.assert_array_equal(np.concatenate(heads), tensors[head])


@pytest.mark.parametrize("piece_bytes", [1, 1002, 4099, 1 << 22])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_reads_the_parts_and_no_more(stored, piece_bytes, tmp_path):
    """Columns cut into pieces at any place; a rank's bytes are those of its arrays."""
    name, size = ("odd3", 3) if piece_bytes > 1 else ("tied", 2)
    directory = write_model(name, tmp_path / "m", dtype=stored)
    itemsize = 4 if stored == "float32" else 2
    with mock.patch.dict(TINY_MODELS, MODELS):
        tensors = tiny_tensors(name)
    for rank in range(size):
        share, layers = Share(rank, size), range(1, 2)
        options = {"piece_bytes": piece_bytes, "layers": layers}
        weights, config, checkpoint = load_part(directory, share, **options)
        whole = stage_bytes(load_config(directory), layers, np.float32)
        assert checkpoint.bytes_read == stage_bytes(config, layers, np.float32) // 4 * itemsize
        assert checkpoint.bytes_read < 0.8 * whole * itemsize // 4
        for field, kind in (("o_proj", "self_attn.o_proj"), ("down_proj", "mlp.down_proj")):
            array = tensors[f"model.layers.1.{kind}.weight"]
            expected = np.array_split(array, size, axis=1)[rank]
            if stored == "bfloat16":
                expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(getattr(weights.layers[0], field), expected)


# --- the sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("size", "shape"), [(2, (5, 16)), (3, (7, 11)), (4, (1, 5)), (5, (3, 8))])
def test_sums_are_in_the_order_of_ranks_and_rounded_once(size, shape, dtype):
    parts = np.random.default_rng(size).standard_normal((size, *shape)).astype(dtype)
    expected = np.zeros(shape, np.float32)
    for part in parts:
        expected += part.astype(np.float32)
    meeting = Meeting(size)

    def work(rank):
        config = mock.Mock(vocab_size=1000, share=Share(rank, size))
        return Group(reference, config, meeting.exchange(rank)).sum(parts[rank].copy())

    for found in meeting.each(work):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected.astype(dtype))


@pytest.mark.parametrize(("vocab", "size"), [(331, 3), (40, 4), (1000, 2)])
def test_log_probs_of_parts_are_those_of_the_whole(vocab, size):
    rng = np.random.default_rng(vocab)
    rows = 70
    logits = (5 * rng.standard_normal((rows, vocab))).astype(np.float32)
    logits[0] += 1e4  # whose exponential is infinite
    logits[1, [3, vocab // 2, vocab - 1]] = 50  # a tie, in different parts
    logits[2], logits[2, vocab - 1] = -np.inf, 1  # but for one, nothing
    logits[3, vocab // 2] = np.nan
    counts = rng.integers(0, 4, rows)
    counts[:4] = 3
    start = np.concatenate([[2], 2 + np.cumsum(counts)]).astype(np.int32)  # others come before
    token = rng.integers(0, vocab, start[-1] + 1).astype(np.int32)
    for row in (0, 1, 2):
        token[start[row]] = logits[row].argmax()
    token[start[1] + 1] = vocab - 1  # as likely as another, but not the first
    expected = np.full((2, len(token)), 7, np.float32)
    reference.log_probs(logits, start, token, expected)
    meeting = Meeting(size)

    def work(rank):
        share, out = Share(rank, size), np.full((2, len(token)), 7, np.float32)
        own = share.vocabulary(vocab)
        config = mock.Mock(vocab_size=vocab, share=share)
        group = Group(reference, config, meeting.exchange(rank))
        group.log_probs(logits[:, own.start : own.stop].copy(), start, token, out)
        return out

    found = meeting.each(work)
    for out in found:
        assert out.tobytes() == found[0].tobytes()
    np.testing.assert_array_equal(found[0][1], expected[1])
    assert expected[1, start[1]] == 1 and expected[1, start[1] + 1] == 0
    np.testing.assert_allclose(found[0][0], expected[0], rtol=1e-6, atol=2e-6)
    assert np.isnan(found[0][0, start[3] : start[4]]).all()


# --- the answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama1", 2),
        ("gqa", 4),
        ("gqa", 8),
        ("tied", 2),
        ("attention_bias", 2),
        ("attention_bias", 4),
        ("odd3", 3),
        ("opt", 4),
        ("opt_untied", 2),
        ("post_norm", 2),
        ("post_norm", 4),
    ],
)
def test_a_group_finds_what_one_rank_finds(name, size, models):
    directory = models(name)
    expected = score_rows(open_stage(directory), ROWS, 100)
    found = scores_of_group(directory, size)
    for scores in found:
        assert scores.loglikelihoods.tobytes() == found[0].loglikelihoods.tobytes()
        np.testing.assert_allclose(
            scores.loglikelihoods, expected.loglikelihoods, rtol=1e-6, atol=1e-5
        )
        np.testing.assert_array_equal(scores.is_greedy, expected.is_greedy)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantized_parts(kind, models):
    """Each rank's columns have scales of their own: nearly the answers of one rank."""
    directory = models("gqa")
    config = load_config(directory)
    layers = range(config.num_hidden_layers)
    checkpoint = open_checkpoint(directory)
    weights = load_stage(checkpoint, config, layers, np.dtype(np.float32), reference, quantize=kind)
    whole = family_of(config).model.Stage(config, weights, reference, 512)
    expected = score_rows(whole, ROWS, 100).loglikelihoods
    found = [scores.loglikelihoods for scores in scores_of_group(directory, 2, quantize=kind)]
    exact = score_rows(open_stage(directory), ROWS, 100).loglikelihoods
    assert found[0].tobytes() == found[1].tobytes()
    assert 1e-4 < np.abs(found[0] - exact).mean() < 1.5 * np.abs(expected - exact).mean()
    row, _, _ = load_part(directory, Share(1, 2), quantize=kind)
    whole_row = weights.layers[0].down_proj
    largest = 127 if kind == "int8" else 448
    columns = tiny_tensors("gqa")["model.layers.0.mlp.down_proj.weight"][:, 128:]
    np.testing.assert_allclose(
        row.layers[0].down_proj.scale, np.abs(columns).max(axis=1) / largest, rtol=1e-6
    )
    assert (row.layers[0].down_proj.scale <= whole_row.scale).all()
    np.testing.assert_array_equal(
        row.layers[0].gate_up_proj.values,
        np.concatenate([weights.layers[0].gate_up_proj.values[i : i + 128] for i in (128, 384)]),
    )


# --- sharded -------------------------------------------------------------------------------------


def every_array(weights) -> dict[str, np.ndarray]:
    """All that a stage has, by name."""
    holders = [("", weights), *((f"{i}.", layer) for i, layer in enumerate(weights.layers))]
    arrays = {}
    for prefix, holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, Quantized):
                arrays |= {f"{prefix}{name}": value.values, f"{prefix}{name}.scale": value.scale}
            elif isinstance(value, np.ndarray):
                arrays[prefix + name] = value
    return arrays


def assert_same_arrays(found, expected):
    found, expected = every_array(found), every_array(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, name)


def sharded(model, output, ranks, stages=2, **options) -> Path:
    options = {"tensor_parallel": ranks, "quiet": True, "chunk_bytes": 3000} | options
    assert shard(ShardOptions(model, output, stages, **options)).files == stages * ranks
    return output


@pytest.mark.parametrize(
    ("name", "made_for"),
    [("gqa", 2), ("gqa", 8), ("tied", 2), ("attention_bias", 4), ("post_norm", 4), ("odd3", 3)],
)
def test_parts_in_files_make_parts_for_any_number_of_ranks(name, made_for, models, tmp_path):
    original, config = models(name), load_config(models(name))
    output = sharded(original, tmp_path / "out", made_for)
    names = sorted(path.name for path in output.glob("stage-*"))
    assert names == [
        f"stage-0{stage}-of-02.tp-{rank}-of-{made_for}.safetensors"
        for stage in range(2)
        for rank in range(made_for)
    ]
    assert json.loads((output / "manifest.json").read_text())["tensor_parallel"] == made_for
    assert open_checkpoint(output).digest() == open_checkpoint(original).digest()
    np.testing.assert_array_equal(
        score_rows(open_stage(output), ROWS).loglikelihoods,
        score_rows(open_stage(original), ROWS).loglikelihoods,
    )
    for size in (2, 3, 4, 8):
        try:
            check_tensor_parallel(config, size)
        except UsageError:
            continue
        for rank in range(size):
            found, own, checkpoint = load_part(output, Share(rank, size), piece_bytes=999)
            expected, _, _ = load_part(original, Share(rank, size))
            assert_same_arrays(found, expected)
            if size == made_for:
                layers = range(config.num_hidden_layers)
                assert checkpoint.bytes_read == stage_bytes(own, layers, np.float32)
    again = sharded(output, tmp_path / "again", 1, 1)
    for name in open_checkpoint(original).tensors:
        first, second = open_checkpoint(original), open_checkpoint(again)
        out = [np.empty(first.tensors[name].shape, np.float32) for _ in range(2)]
        first.read_into(name, out[0])
        second.read_into(name, out[1])
        np.testing.assert_array_equal(out[1], out[0], name)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_parts_are_converted_as_by_loading(stored, tmp_path):
    original = write_model("gqa", tmp_path / "m", dtype=stored)
    output = sharded(original, tmp_path / "out", 2, dtype="float16")
    for rank in range(2):
        found, expected = (
            load_part(directory, Share(rank, 2), np.float16)[0] for directory in (output, original)
        )
        assert_same_arrays(found, expected)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("name", "made_for"), [("gqa", 2), ("opt", 4), ("llama1", 1)])
def test_quantized_parts_in_files(kind, name, made_for, models, tmp_path):
    original = models(name)
    output = sharded(original, tmp_path / "out", made_for, quantize=kind)
    for rank in range(made_for if made_for > 1 else 0):
        found, _, checkpoint = load_part(output, Share(rank, made_for), quantize=kind)
        expected, _, _ = load_part(original, Share(rank, made_for), quantize=kind)
        assert_same_arrays(found, expected)
    for rank in range(4):
        # Narrower columns keep the scales of what they are cut from.
        found, _, _ = load_part(output, Share(rank, 4), quantize=kind)
        whole, _, _ = load_part(original, Share(rank * made_for // 4, made_for), quantize=kind)
        matrices = family_of(load_config(original)).names.matrices
        wide, narrow = (
            getattr(whole.layers[1], matrices[-1]),
            getattr(found.layers[1], matrices[-1]),
        )
        columns = np.array_split(wide.values, 4 // made_for, axis=1)[rank % (4 // made_for)]
        np.testing.assert_array_equal(narrow.values, columns)
        np.testing.assert_array_equal(narrow.scale, wide.scale)
    again = sharded(output, tmp_path / "again", 4, 1)
    for rank in range(4):
        first, second = (load_part(d, Share(rank, 4), quantize=kind)[0] for d in (output, again))
        assert_same_arrays(second, first)
    if made_for > 1:
        with pytest.raises(ModelError, match=f"was made {kind} for --tensor-parallel {made_for}"):
            part_of_checkpoint(open_checkpoint(output), load_config(output), None)
        with pytest.raises(ModelError, match="with scales that do not go with 1"):
            sharded(output, tmp_path / "no", 1)


def test_manifests_of_other_numbers_of_ranks_are_refused(models, tmp_path):
    output = sharded(models("gqa"), tmp_path / "out", 2)
    manifest = json.loads((output / "manifest.json").read_text())
    for ranks in (1, 3, 4, 0, "2"):
        changed = manifest | {"tensor_parallel": ranks}
        (output / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match="manifest.json: not a manifest"):
            open_checkpoint(output)
    swapped = manifest | {"stages": [manifest["stages"][i] for i in (1, 0, 2, 3)]}
    (output / "manifest.json").write_text(json.dumps(swapped))
    with pytest.raises(ModelError, match="belongs to another model than manifest.json"):
        open_checkpoint(output)


# --- under mpirun --------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_neighbours_share_matrices(replicas, stages, size):
    grids = [Grid(replicas, stages, rank, size) for rank in range(replicas * stages * size)]
    places = [(grid.replica, grid.stage, grid.tensor_rank) for grid in grids]
    assert places == [
        (replica, stage, part)
        for replica in range(replicas)
        for stage in range(stages)
        for part in range(size)
    ]
    for grid in grids:
        together = [rank for rank, place in enumerate(places) if place[:2] == places[grid.rank][:2]]
        assert list(grid.group) == together


@pytest.fixture(scope="module")
def scored(models, tmp_path_factory):
    """A function that scores a model on some ranks: its answers and its results file."""
    folder = tmp_path_factory.mktemp("scored")
    questions = [
        {"query": f"the man {i}", "choices": ["roof", "the tea", "a dog in"], "gold": 0}
        for i in range(30)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))

    def arguments(name, *options):
        model = models(name)
        if not (model / "tokenizer.model").exists():
            write_tokenizer(model, MODELS[name]["vocab_size"])
        fixed = ["score", "--model", model, "--data", folder / "q.jsonl", "--device", "cpu"]
        return [*fixed, "--micro-batch-tokens", 64, "--quiet", *options]

    def score(name, ranks, *options):
        samples, output = folder / "samples.jsonl", folder / "results.json"
        options = [*arguments(name, *options), "--samples", samples, "--output", output]
        if ranks == 1:
            result = CliRunner().invoke(cli, list(map(str, options)))
            assert result.exit_code == 0, result.output
        else:
            result = mpirun(ranks, *options)
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("acc_norm") == 1  # one rank prints
        return answers(samples), json.loads(output.read_text())

    score.arguments = arguments
    return score


def answers(samples: Path) -> np.ndarray:
    lines = samples.read_text().splitlines()
    return np.array([value for line in lines for value in json.loads(line)["loglikelihoods"]])


@pytest.mark.parametrize(
    ("name", "size", "stages", "replicas"),
    [("gqa", 2, 1, 1), ("gqa", 4, 1, 1), ("post_norm", 2, 2, 1), ("attention_bias", 2, 2, 2)],
)
def test_worlds_agree(name, size, stages, replicas, scored):
    expected, _ = scored(name, 1)
    ranks = size * stages * replicas
    options = ("--tensor-parallel", size, "--replicas", replicas)
    found, results = scored(name, ranks, *options)
    assert len(found) == 90
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    settings = results["config"]
    assert settings["tensor_parallel"] == size
    assert (settings["stages"], settings["replicas"]) == (stages, replicas)
    reports = results["cupyllama"]["ranks"]
    assert [rank["tensor_rank"] for rank in reports] == list(range(size)) * stages * replicas
    assert [rank["replica"] for rank in reports] == sorted(list(range(replicas)) * stages * size)
    for first in range(0, ranks, size):
        assert len({tuple(rank["layers"]) for rank in reports[first : first + size]}) == 1
    assert sum(rank["micro_batches"] for rank in reports) % (size * stages) == 0
    assert all(0 < rank["busy"] <= 1 for rank in reports)


def test_a_sharded_model_gives_the_same_bits(models, scored, tmp_path):
    """Made for one stage of four ranks, scored on two stages of two."""
    expected, _ = scored("attention_bias", 4, "--tensor-parallel", 2)
    output = sharded(models("attention_bias"), tmp_path / "out", 4, 1)
    found, results = scored("attention_bias", 4, "--tensor-parallel", 2, "--model", output)
    assert results["config"]["model"] == str(output)
    np.testing.assert_array_equal(found, expected)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(DataError, match="is of stages of 2 ranks"):
        read_run(tmp_path / "results.json")


@pytest.mark.parametrize(("fault", "exit_code"), [("kill", 6), ("raise", 6)])
def test_a_fault_ends_all_and_resuming_needs_the_same_group(fault, exit_code, scored, tmp_path):
    samples = tmp_path / "s.jsonl"
    command = scored.arguments("post_norm", "--samples", samples)
    begin = time.monotonic()
    result = mpirun(2, *command, "--tensor-parallel", 2, fault=("1", fault, "4"))
    assert time.monotonic() - begin < 15  # start and loading included
    said = our_lines(result)
    assert len(said) == 1 and "rank 1: " in said[0], result.stderr
    assert result.returncode in ((exit_code, 137) if fault == "kill" else (exit_code,))
    assert not samples.exists()
    alone = CliRunner().invoke(cli, list(map(str, [*command, "--resume"])))
    assert alone.exit_code == 2 and "tensor_parallel was 2 and is 1" in alone.stderr
    if fault == "raise":
        again = mpirun(2, *command, "--tensor-parallel", 2, "--resume")
        assert again.returncode == 0, again.stderr
        assert len(answers(samples)) == 90


@pytest.mark.parametrize(
    ("ranks", "replicas", "size", "hint"), [(3, 1, 2, "-n 2"), (2, 2, 2, "-n 4"), (1, 1, 4, "-n 4")]
)
def test_worlds_that_cannot_be(ranks, replicas, size, hint):
    message = f"{ranks} ranks cannot be {replicas} replicas of stages of {size}"
    with pytest.raises(UsageError, match=message) as error:
        make_grid(mock.Mock(size=ranks, rank=0), replicas, size)
    assert f"mpirun {hint} cupyllama" in error.value.hint


def test_wrong_numbers_are_said_once(scored):
    result = mpirun(3, *scored.arguments("gqa", "--tensor-parallel", 3))
    said = our_lines(result)
    assert result.returncode == 2 and len(said) == 1, result.stderr
    assert "--tensor-parallel 3: 3 ranks cannot share 8 attention heads evenly" in said[0]


def test_a_dry_run_says_what_each_rank_would_have(scored):
    command = scored.arguments("gqa", "--tensor-parallel", 2, "--dry-run")
    result = mpirun(4, *command)
    assert result.returncode == 0, result.stderr
    for part in ("rank 0: layers 0 to 0, part 1/2", "rank 3: layers 1 to 1, part 2/2"):
        assert result.stdout.count(part) == 1
