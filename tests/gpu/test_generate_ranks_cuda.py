"""Several ranks generate on the GPUs that there are what Transformers does, on one of them too."""

import json

import pytest
from test_generate_ranks import NAMES, RECORDED, generating
from test_generate_ranks import models as models
from test_ranks import MPIRUN

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")]

WORLDS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)]


@pytest.mark.parametrize(("ranks", "tensor_parallel"), WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_worlds_generate_what_transformers_does(name, ranks, tensor_parallel, models):
    result = generating(ranks, models, name, tensor_parallel, on=("cuda", "float32"))
    assert result.returncode == 0, result.stderr
    everyone = json.loads(result.stdout)
    recorded = RECORDED["models"][name]
    beams = [one["tokens"] for one in recorded["beams"][0]["hypotheses"]]
    for found in everyone:
        assert found["greedy"] == recorded["greedy"]
        assert found["beams"] == beams
        assert found["drawn"] == everyone[0]["drawn"]


@pytest.mark.parametrize("name", NAMES)
def test_stages_give_the_tokens_of_one_process_in_half_precision(name, models):
    found = []
    for ranks in (1, 2):
        result = generating(ranks, models, name, 1, on=("cuda", "float16"))
        assert result.returncode == 0, result.stderr
        everyone = json.loads(result.stdout)
        found += [{key: rank[key] for key in ("greedy", "drawn", "beams")} for rank in everyone]
    assert found[1:] == found[:1] * 2
