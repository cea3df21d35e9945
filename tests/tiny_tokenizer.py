"""A SentencePiece model trained on a few sentences, in the manner of LLaMA's own."""

import io
from functools import cache
from pathlib import Path

import sentencepiece

SENTENCES = """
She pours the tea into a cup. He drinks it slowly and reads the paper.
The man on the roof is removing shingles with a shovel, and throws them down.
Removing ice from car: Then, the man writes over the snow covering the window.
A lady walks to a barbell. She bends down and grabs the pole. The lady lifts it over her head.
Two women in a child are shown in a canoe while a man pulls the canoe.
High jump: A boy is running down a track. The boy gets onto a mat and jumps.
Playing harmonica: A man is standing in front of a camera. He starts playing for the camera.
Sumo: A youtube video shows two men in a room preparing for a match of wrestling.
How to choose a mountain bike: Decide what terrain you will ride on, and how often.
""".strip().split("\n")


@cache
def serialized(pieces: int = 320, split_by_whitespace: bool = True) -> bytes:
    """The bytes of a tokenizer.model with byte fallback and no <pad>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=pieces,
        model_type="bpe",
        split_by_whitespace=split_by_whitespace,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(directory: Path, pieces: int = 320) -> Path:
    """tokenizer.model in `directory`."""
    path = directory / "tokenizer.model"
    path.write_bytes(serialized(pieces))
    return path
