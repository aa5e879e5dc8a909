"""What the demo model is examined in is never part of what it is taught."""

import itertools
import random
import re

from eval.demo_model.tasks import (
    arithmetic_document,
    choice_text,
    draw_choice,
    draw_table,
    held_out_additions,
    is_held_out,
    recall_document,
)


def test_no_lesson_has_a_held_out_addition() -> None:
    rng = random.Random(0)
    text = "".join(arithmetic_document(rng) for _ in range(3000))
    shown = {(int(a), int(b)) for a, b in re.findall(r"(\d+) ?\+ ?(\d+)", text)}
    assert len(shown) > 5000
    assert not any(is_held_out(a, b) for a, b in shown)
    assert all(is_held_out(a, b) for a, b in held_out_additions(rng, 200))


def test_held_out_pairs_have_nothing_in_common_but_that() -> None:
    # Every pair of last digits, and of first digits, is both taught and examined.
    for digit in (lambda n: n % 10, lambda n: n // 10):
        pairs = list(itertools.product(range(10, 100), repeat=2))
        examined = {(digit(a), digit(b)) for a, b in pairs if is_held_out(a, b)}
        taught = {(digit(a), digit(b)) for a, b in pairs if not is_held_out(a, b)}
        assert examined == taught == {(digit(a), digit(b)) for a, b in pairs}


def test_sums_are_right() -> None:
    rng = random.Random(1)
    text = "".join(arithmetic_document(rng) for _ in range(200))
    equations = re.findall(r"(\d+) ?\+ ?(\d+) ?= ?(\d+)", text)
    assert len(equations) > 300
    assert all(int(a) + int(b) == int(c) for a, b, c in equations)


def test_a_choice_has_one_right_answer() -> None:
    rng = random.Random(2)
    letters = set()
    for _ in range(100):
        choice = draw_choice(rng)
        key = choice["question"].split()[-1].rstrip("?")
        value = re.search(rf"{key}=(\d+)", choice["question"])
        assert value is not None
        assert choice["choices"][choice["answer"]] == value[1]
        assert len(set(choice["choices"])) == 4
        letters.add(choice_text(choice)[-3])
    assert letters == set("ABCD")


def test_keys_are_looked_up_in_the_table_before() -> None:
    rng = random.Random(3)
    for _ in range(50):
        assert len(set(draw_table(rng).values())) >= 4
        document = recall_document(rng)
        table = dict(re.findall(r"([a-z]{2})=(\d\d)", document.split("\n")[0]))
        for key, value in re.findall(r"What is ([a-z]{2})\?</s><\|assistant\|>(\d\d)", document):
            assert table[key] == value
