"""`cupyllama bench generate`: what it counts, marks, prints and draws; no GPU is needed for it."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cupyllama.bench import generate, measure, shapes
from cupyllama.cli import cli
from cupyllama.errors import DeviceError
from cupyllama.ops import reference
from cupyllama.parallel.devices import Device

SIZES = {"tiny": (2, 96, 200, 4, 2, 331), "tiny-opt": (2, 96, 200, 4, 331)}
CPU = Device("cpu", "a CPU", reference, place="here/cpu")


@pytest.fixture
def pretended_gpu(monkeypatch):
    """`reference` in place of the device, and random arrays of NumPy."""

    def random_array(shape, dtype, seed, deviation):
        random = np.random.default_rng(abs(seed))
        return (deviation * random.standard_normal(shape, np.float32)).astype(dtype)

    monkeypatch.setitem(shapes.SHAPES, "tiny", SIZES["tiny"])
    monkeypatch.setitem(shapes.OPT_SHAPES, "tiny-opt", SIZES["tiny-opt"])
    monkeypatch.setattr(shapes, "random_array", random_array)
    monkeypatch.setattr(measure, "choose_device", lambda kind, *ranks: (CPU, ""))
    monkeypatch.setattr(generate, "host_copy_rate", lambda: 5e9)


def bench(*arguments):
    return CliRunner().invoke(cli, ["bench", "generate", *map(str, arguments)])


def measured_by(tmp_path, *arguments):
    result = bench(*arguments, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "out.json").read_text()), result


@pytest.mark.parametrize("shape", ["tiny", "tiny-opt"])
def test_a_sweep(pretended_gpu, shape, tmp_path):
    arguments = ["--shape", shape, "--batch-sizes", "1,3,20", "--prompt-len", 17]
    arguments += ["--new-tokens", 6, "--quantize", "none,int8", "--repeats", 3]
    measured, result = measured_by(tmp_path, *arguments, "--dtype", "float32")
    assert {"bench", "date", "gpu", "versions", "copy_bytes_per_second"} <= set(measured)
    assert (measured["prompt_len"], measured["new_tokens"]) == (17, 6)
    assert [setting["quantize"] for setting in measured["settings"]] == [None, "int8"]
    for setting in measured["settings"]:
        assert [run["batch_size"] for run in setting["runs"]] == [1, 3, 20]
        for run in setting["runs"]:
            median = np.median(run["seconds"])
            assert len(run["seconds"]) == 3 and not run["out_of_memory"]
            assert run["ms_per_token"] == pytest.approx(1e3 * median / 6)
            assert run["queries_per_second"] == pytest.approx(run["batch_size"] / median)
            assert run["tokens_per_second"] == pytest.approx(6 * run["batch_size"] / median)
            assert run["times_floor"] == pytest.approx(run["ms_per_token"] / run["floor_ms"])
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + 6 and "6 tokens after 17; copy 5 GB/s" in lines[0]
    assert [line.split()[:2] for line in lines[2:4]] == [["float32", "1"], ["float32", "3"]]


def test_every_query_is_generated_to_its_end(pretended_gpu, monkeypatch, tmp_path):
    """As many tokens as asked for, of prompts that have nothing in common, and all side by side."""
    seen, of = [], generate.Engine.generate

    def generated(self, prompts):
        events = list(of(self, prompts))
        seen.append((prompts, events, self._rows))
        return iter(events)

    monkeypatch.setattr(generate.Engine, "generate", generated)
    measured_by(tmp_path, "--shape", "tiny", "--batch-sizes", "5", "--new-tokens", 7)
    (_, warm, _), (prompts, events, rows) = seen
    assert len(warm) == 5 * generate.WARM_UP_TOKENS and len(events) == 5 * 7 and rows == 5
    assert len({tuple(prompt.token_ids) for prompt in prompts}) == 5
    assert {len(prompt.token_ids) for prompt in prompts} == {4}
    assert [event.number for event in events[:10]] == 2 * list(range(5))


def test_no_prompt_is_known_from_the_time_before(pretended_gpu, monkeypatch, tmp_path):
    """Blocks that a prompt left in the cache would spare the next time its prefill."""
    engines, made = [], generate.Engine
    monkeypatch.setattr(
        generate, "Engine", lambda *given: engines.append(made(*given)) or engines[-1]
    )
    arguments = ["--batch-sizes", "2", "--new-tokens", 3, "--prompt-len", 40, "--repeats", 2]
    measured_by(tmp_path, "--shape", "tiny", *arguments)
    assert [engine.prompt_tokens_computed for engine in engines] == 3 * [2 * 40]


@pytest.mark.parametrize("where", ["cache", "engine"])
def test_a_batch_without_memory_is_marked_and_the_sweep_goes_on(
    pretended_gpu, monkeypatch, where, tmp_path
):
    if where == "cache":
        make = generate.make_cache

        def make_cache(stage, device, blocks, dtype):
            if blocks > 16:  # as many as eight sequences of 4 + 20 tokens take
                raise MemoryError
            return make(stage, device, blocks, dtype)

        monkeypatch.setattr(generate, "make_cache", make_cache)
    else:
        of = generate.Engine.generate

        def generated(self, prompts):
            for number, event in enumerate(of(self, prompts)):
                if len(prompts) > 7 and number == 50:
                    raise DeviceError("out of memory while 8 sequences were generated")
                yield event

        monkeypatch.setattr(generate.Engine, "generate", generated)
    arguments = ["--shape", "tiny", "--batch-sizes", "2,8,3", "--new-tokens", 20]
    measured, result = measured_by(tmp_path, *arguments)
    (setting,) = measured["settings"]
    assert [run["out_of_memory"] for run in setting["runs"]] == [False, True, False]
    assert set(setting["runs"][1]) == {"batch_size", "out_of_memory", "floor_ms"}
    assert result.stdout.splitlines()[3].split()[:5] == ["float16", "8", "out", "of", "memory"]


def test_a_sweep_that_is_interrupted_leaves_its_points(pretended_gpu, monkeypatch, tmp_path):
    path, measure = tmp_path / "out.json", generate.Run.seconds
    partial = tmp_path / "out.json.partial"

    def seconds(run, *given):
        if run.batch_size == 3:
            assert json.loads(partial.read_text())["unfinished"] is True
            raise KeyboardInterrupt
        return measure(run, *given)

    arguments = ["--shape", "tiny", "--batch-sizes", "1,2,3", "--new-tokens", 3, "--json", path]
    whole = bench(*arguments[:3], "1,2", *arguments[4:])
    before = path.read_text()
    assert whole.exit_code == 0 and "unfinished" not in before and not partial.exists()
    monkeypatch.setattr(generate.Run, "seconds", seconds)
    assert bench(*arguments).exit_code == 130
    assert path.read_text() == before
    measured = json.loads(partial.read_text())
    assert measured["unfinished"] is True and measured["bench"] == "generate"
    (setting,) = measured["settings"]
    assert [run["batch_size"] for run in setting["runs"]] == [1, 2]
    assert setting["runs"][1]["tokens_per_second"] > 0


def test_json_to_a_pipe_is_written_once(pretended_gpu, tmp_path):
    path = tmp_path / "out.json"
    path.touch()
    number = os.open(path, os.O_WRONLY | os.O_APPEND)
    arguments = ["--batch-sizes", "1,2", "--new-tokens", 3, "--json", f"/dev/fd/{number}"]
    result = bench("--shape", "tiny", *arguments)
    os.close(number)
    assert result.exit_code == 0, result.output
    assert len(json.loads(path.read_text())["settings"][0]["runs"]) == 2


def test_a_query_may_have_one_new_token(pretended_gpu, tmp_path):
    measured, _ = measured_by(tmp_path, "--shape", "tiny", "--batch-sizes", 2, "--new-tokens", 1)
    assert not measured["settings"][0]["runs"][0]["out_of_memory"]


def test_the_floor_of_opt_30b_by_hand():
    config = shapes.model_config("opt-30b")
    hidden, ffn, layers, vocab = 7168, 28672, 48, 50272
    matrices = layers * (4 * hidden * hidden + 2 * hidden * ffn)
    # q, k, v, out, fc2 and two norms of two vectors each are hidden long, fc1's bias is ffn long
    vectors = layers * (5 * hidden + 4 * hidden + ffn) + 2 * hidden
    key = 2 * hidden * 2 * layers
    # 3 steps after 5 tokens find 5, 6 and 7 keys
    for kind, bytes_of in [
        (None, 2 * matrices),
        ("int8", matrices + 4 * layers * (5 * hidden + ffn)),
    ]:
        found = generate.floor_bytes(config, np.dtype(np.float16), kind, 2, 5, 3)
        assert found == bytes_of + 2 * (vectors + vocab * hidden) + 2 * 6 * key
    # 60 GB at 3 TB/s are 20 ms: a published system on two A100s takes 23
    assert (
        0.0195 < generate.floor_bytes(config, np.dtype(np.float16), None, 1, 4, 256) / 3e12 < 0.0205
    )


def test_the_floor_of_llama_leaves_out_the_embedding():
    config = shapes.model_config("llama-7b")
    found = generate.floor_bytes(config, np.dtype(np.float16), None, 1, 4, 1)
    weights = 6_738_415_616 - 32000 * 4096
    assert found == 2 * weights + 4 * 32 * 2 * 4096 * 2


def measured_sweep(kinds=(None, "int8"), held=512):
    """Figures as on a large GPU: latency grows with the cache, and memory ends."""
    settings = []
    for kind in kinds:
        weights, runs = (60e9 if kind is None else 30e9), []
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            floor = (weights + batch * 1.8e8) / 2.5e12
            seconds = None if batch > held else [256 * 1.1 * floor]
            runs.append(generate.figures(batch, 256, seconds, floor, 66_000_000_000))
        settings.append({"quantize": kind, "runs": runs})
    return {
        **{"shape": "opt-30b", "dtype": "float16", "gpu": "NVIDIA H100 80GB HBM3"},
        **{
            "prompt_len": 4,
            "tensor_parallel": 1,
            "new_tokens": 256,
            "copy_bytes_per_second": 2.5e12,
        },
        "settings": settings,
    }


def test_a_table():
    title, headers, *lines = generate.generate_table(measured_sweep()).splitlines()
    assert "opt-30b in float16 on NVIDIA H100 80GB HBM3: 256 tokens after 4" in title
    assert headers.split() == (
        "weights batch ms a token floor of the floor queries/s tokens/s peak GB".split()
    )
    # (60e9 + 1.8e8) / 2.5e12 = 24.07 ms, of which 1.1 times are 26.48; 256 of these are 6.779 s
    assert lines[0].split() == "float16 1 26.48 24.07 1.100 0.15 37.8 66.0".split()
    assert lines[10].split() == "float16 1,024 out of memory 97.73 - - - -".split()
    assert lines[11].split()[:2] == ["int8", "1"] and len(lines) == 22


@pytest.mark.parametrize("kinds", [(None,), (None, "int8"), (None, "int8", "fp8")])
@pytest.mark.parametrize("held", [0, 1, 128, 1024])
def test_a_plot(kinds, held, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from cupyllama.bench import plot

    path, figures, original = tmp_path / "plot.png", [], plot._save
    monkeypatch.setattr(plot, "_save", lambda f, to: (figures.append(f), original(f, to)))
    plot.plot_generate(measured_sweep(kinds, held), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency, ms a token", "queries a second")
    curves = {line.get_label(): line for line in axes.get_lines()}
    if held:
        assert len(curves) == 2 * len(kinds)
        x, y = curves["float16"].get_data()
        assert x[0] == pytest.approx(26.48, abs=0.01) and y[0] == pytest.approx(1 / 6.779, rel=1e-3)
        at, floor = curves["float16, if reading memory were all"].get_data()
        assert at[0] == pytest.approx(24.07, abs=0.01) and floor[0] == pytest.approx(1.1 * y[0])
    assert ("no memory for a batch of " in figures[0].get_supxlabel()) == (held < 1024)
    page, box = figures[0].bbox, figures[0]._supxlabel.get_window_extent()
    assert page.x0 <= box.x0 and box.x1 <= page.x1


def test_a_plot_from_the_command(pretended_gpu, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.svg"
    result = bench("--shape", "tiny", "--batch-sizes", "1,2", "--new-tokens", 3, "--plot", path)
    assert result.exit_code == 0 and path.read_text().count("ms a token") == 1


def test_what_is_wrong_is_said_before_anything_is_measured(pretended_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "random_stage", lambda *_, **__: pytest.fail("made"))

    def ends(exit_code, part, *arguments):
        result = bench("--shape", "tiny", *arguments)
        assert result.exit_code == exit_code and part in result.stderr, result.output

    ends(2, "pass", "--prompt-len", 2000, "--new-tokens", 100)
    for value in ("", "1,,2", "0", "-1", "many"):
        ends(2, "is no list of positive numbers", "--batch-sizes", value)
    for value in ("", "int4", "none,none", "int8,"):
        ends(2, "is no list of none, fp8, int8", "--quantize", value)
    ends(1, "cannot be written", "--json", tmp_path / "no" / "out.json")
    small = SimpleNamespace(**vars(CPU), free_bytes=lambda: 1000)
    small.supports = CPU.supports
    monkeypatch.setattr(measure, "choose_device", lambda kind, *ranks: (small, ""))
    ends(5, "needs 0.0 GB for its weights", "--new-tokens", 3)


def test_the_hosts_own_copy():
    assert 1e8 < generate.host_copy_rate() < 1e13
