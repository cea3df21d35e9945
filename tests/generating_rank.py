"""Generate in one rank of several, or alone; rank 0 prints what came of it as JSON.

    mpirun -n 4 python generating_rank.py MODEL NAME DEVICE DTYPE TENSOR_PARALLEL [RANK FAULT STEP]

NAME says whose recorded prompts are taken. FAULT, of one rank at a step on a CPU: kill, raise.
"""

import json
import os
import signal
import sys
from pathlib import Path

from cupyllama.generation.beam import beam_search
from cupyllama.generation.engine import Prompt
from cupyllama.generation.session import SessionOptions, open_session
from cupyllama.generation.settings import SamplingSettings
from cupyllama.ops import decode_reference

directory, name, device, dtype, tensor_parallel, *fault = sys.argv[1:]
recorded = json.loads((Path(__file__).parent / "data" / "transformers_generate.json").read_text())
prompts = recorded["models"][name]["prompts"]


def let_happen(rank: int, faulty: str, kind: str, when: str) -> None:
    """A fault at a step of one of the ranks."""
    steps = iter(range(1 << 30))
    step = decode_reference.Decoder.step

    def counted(decoder, positions):
        if rank == int(faulty) and next(steps) == int(when):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a fault for the test")
        return step(decoder, positions)

    decode_reference.Decoder.step = counted


def texts(engine, count: int, settings: list[SamplingSettings]) -> list[list[int]]:
    found = [[] for _ in prompts]
    asked = [Prompt(ids, count, one) for ids, one in zip(prompts, settings, strict=True)]
    for number, token, _ in engine.generate(asked):
        found[number].append(token)
        if number == 1 and len(found[1]) == 9 and settings[1].temperature:
            engine.cancel(1)
    return found


options = SessionOptions(
    Path(directory),
    device=device,
    dtype=dtype,
    tensor_parallel=int(tensor_parallel),
    quiet=True,
)
with open_session(options) as session:
    if fault:
        let_happen(session.world.rank, *fault)
    engine = session.engine(3, 40 + 63)
    with session.world.alone():
        drawn = [SamplingSettings(0.8, 40, 0.9, 1.1, seed) for seed in range(5)]
        found = {
            "greedy": texts(engine, 64, [SamplingSettings()] * 5),
            "drawn": texts(engine, 30, drawn),
            "beams": [
                one.token_ids for one in beam_search(engine.decoder, engine.pool, prompts[0], 4, 24)
            ],
            "layers": [session.layers.start, session.layers.stop],
        }
    everyone = session.world.allgather(found)
    if session.world.rank == 0:
        print(json.dumps(everyone))
