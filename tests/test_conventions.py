"""Token rows of the three conventions, over a tokenizer whose ids can be read."""

from pathlib import Path

import pytest

from cupyllama.errors import DataError, ModelError
from cupyllama.tasks.conventions import CONVENTIONS, token_rows
from cupyllama.tasks.question import Question

BOS = 1


class Characters:
    """One id a character, but "c" and a space behind it are one id: a merge over the border."""

    path = Path("characters")
    size = 200
    bos_token_id: int | None = BOS
    adds_bos = True
    splits_at_spaces = False

    def encode(self, texts):
        return [[ord(c) for c in text.replace("c ", "\x05")] for text in texts]


def ids(text):
    return Characters().encode([text])[0]


def rows(question, convention="lm-eval", bos=True, max_length=100, tokenizer=None):
    tokenizer = tokenizer or Characters()
    return token_rows([question], tokenizer, CONVENTIONS[convention], bos, max_length)


def test_lm_eval_scores_what_comes_after_the_contexts_own_tokens():
    made = rows(Question("ab", ("x", "yz"), 0))
    assert [row.token_ids for row in made.rows] == [[BOS, *ids("ab x")], [BOS, *ids("ab yz")]]
    assert [row.first_target for row in made.rows] == [3, 3]
    assert made.num_tokens.tolist() == [2, 3]
    assert made.tokens_asked == 4 + 5


def test_lm_eval_on_a_merge_over_the_border():
    # "abc" is three ids, "abc x" is [a, b, "c ", x]: what comes after three is "x" alone
    made = rows(Question("abc", ("x",), 0))
    assert made.rows[0].token_ids == [BOS, *ids("abc"), ord("x")]
    assert made.rows[0].first_target == 4


def test_lm_eval_moves_trailing_spaces_to_the_continuation():
    made = rows(Question("ab  ", ("x",), 0))
    assert made.rows[0].token_ids == [BOS, *ids("ab   x")]
    assert made.rows[0].first_target == 3


def test_an_empty_context_is_bos_even_where_bos_is_off():
    for bos in (True, False):
        made = rows(Question("", ("x",), 0), bos=bos)
        assert made.rows[0].token_ids == [BOS, *ids(" x")]
        assert made.rows[0].first_target == 1
    for convention in CONVENTIONS:  # and never twice
        (row,) = rows(Question("", ("x",), 0), convention, bos=True).rows
        assert row.token_ids.count(BOS) == 1


def test_what_each_convention_reports():
    assert {name: (c.name, c.bos, c.headline) for name, c in CONVENTIONS.items()} == {
        "lm-eval": ("lm-eval", None, "acc_norm"),
        "fastertransformer": ("fastertransformer", False, "acc_tokens"),
        "llamacpp": ("llamacpp", True, "acc_tokens"),
    }


def test_fastertransformer_tokenises_choices_apart():
    made = rows(Question("abc", ("x",), 0), "fastertransformer", bos=False)
    assert made.rows[0].token_ids == ids("abc") + ids("x")
    assert made.rows[0].first_target == 3


def test_llamacpp_scores_from_where_the_choices_differ():
    made = rows(Question("ab", ("xy", "xz"), 0), "llamacpp")
    assert [row.first_target for row in made.rows] == [5, 5]
    assert made.num_tokens.tolist() == [1, 1]
    equal = rows(Question("ab", ("x", "xz"), 0), "llamacpp")
    assert equal.num_tokens.tolist() == [1, 2]  # one token is left to the shorter


def test_a_long_row_keeps_its_last_tokens():
    question = Question("abdefg", ("x",), 0)
    whole = [BOS, *ids("abdefg x")]
    assert rows(question, max_length=8).truncated == 0  # 8 are fed, the 9th is only predicted
    made = rows(question, max_length=4)
    assert made.truncated == 1
    assert made.rows[0].token_ids == whole[-5:]
    assert made.rows[0].first_target == 3


def test_a_choice_longer_than_the_model_allows_is_named():
    with pytest.raises(
        DataError, match="question 0, choice 1: has 5 tokens of its own, and 1 to 4"
    ):
        rows(Question("ab", ("x", "wxyz"), 0), max_length=4)
    with pytest.raises(DataError, match=r"question 0 \(q.jsonl, line 7\), choice 0: ") as error:
        rows(Question("ab", ("x" * 9000,), 0, place="q.jsonl, line 7"))
    assert len(str(error.value)) < 200 and "9001 tokens" in str(error.value) and error.value.hint


def test_a_choice_without_tokens_is_named():
    with pytest.raises(DataError, match="question 0, choice 0: has 0 tokens"):
        rows(Question("abcabc", ("",), 0), "fastertransformer", bos=False)


def test_bos_that_the_tokenizer_lacks():
    tokenizer = Characters()
    tokenizer.bos_token_id = None
    with pytest.raises(ModelError, match="has no BOS token"):
        rows(Question("ab", ("x",), 0), tokenizer=tokenizer)
    with pytest.raises(DataError, match="question 0: an empty context needs a BOS token") as error:
        rows(Question("", ("x",), 0), bos=False, tokenizer=tokenizer)
    assert error.value.hint


def test_choices_are_numbered_over_all_questions():
    questions = [Question("a", ("x", "y"), 0), Question("b", ("x", "y", "z"), 1)]
    made = token_rows(questions, Characters(), CONVENTIONS["lm-eval"], True, 100)
    assert made.choice_start.tolist() == [0, 2, 5]
    assert [row.choice for row in made.rows] == [0, 1, 2, 3, 4]
