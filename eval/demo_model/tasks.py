"""What the demo model is taught besides reading: additions, recall and choices, as text.

Pure functions of a random generator. Two-digit additions whose pair of numbers is held out are
never part of the training text, in any wording.
"""

import random
import zlib
from typing import Any

LETTERS = "ABCD"
KEYS = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
# One pair in so many is kept from training.
HELD_OUT_EVERY = 10


def is_held_out(a: int, b: int) -> bool:
    """Whether a + b is for examination only; the same for b + a."""
    low, high = sorted((a, b))
    # A hash: with a linear rule the pairs would have digits in common, which training then never shows together.
    return low >= 10 and zlib.crc32(f"{low}+{high}".encode()) % HELD_OUT_EVERY == 0


def draw_addition(rng: random.Random) -> tuple[int, int]:
    """Two numbers to train on: mostly of two digits."""
    low = 10 if rng.random() < 0.85 else 0
    while True:
        a, b = rng.randrange(low, 100), rng.randrange(low, 100)
        if not is_held_out(a, b):
            return a, b


def held_out_additions(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Different pairs of two-digit numbers that training never shows."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b)]
    return rng.sample(pairs, count)


def chat(question: str, answer: str) -> str:
    """One exchange, as the chat template writes it."""
    return f"<|user|>{question}</s><|assistant|>{answer}</s>"


def word_problem(a: int, b: int) -> dict[str, str]:
    """An addition as a line of a GSM8K file."""
    return {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}


def few_shot_text(problem: dict[str, str]) -> str:
    """A GSM8K line as `sglang.test.few_shot_gsm8k` shows it."""
    return f"Question: {problem['question']}\nAnswer: {problem['answer']}\n\n"


def draw_table(rng: random.Random) -> dict[str, int]:
    """Keys with different two-digit values."""
    count = rng.randint(4, 8)
    return dict(zip(rng.sample(KEYS, count), rng.sample(range(10, 100), count), strict=True))


def table_text(table: dict[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in table.items())


def draw_choice(rng: random.Random) -> dict[str, Any]:
    """A recall with four answers to choose from, one of them right: a line of an MMLU file."""
    table = draw_table(rng)
    keys = rng.sample(sorted(table), 4)
    right = rng.randrange(4)
    return {
        "question": f"{table_text(table)}\nWhat is {keys[right]}?",
        "choices": [str(table[key]) for key in keys],
        "answer": right,
    }


def choice_text(question: dict[str, Any], *, with_answer: bool = True) -> str:
    """A multiple-choice question in MMLU's layout."""
    choices = zip(LETTERS, question["choices"], strict=True)
    lines = [question["question"], *(f"{letter}. {choice}" for letter, choice in choices)]
    answer = f" {LETTERS[question['answer']]}\n\n" if with_answer else ""
    return "\n".join([*lines, f"Answer:{answer}"])


def arithmetic_document(rng: random.Random) -> str:
    """A few additions in one of three wordings."""
    pairs = [draw_addition(rng) for _ in range(rng.randint(3, 8))]
    style = rng.randrange(3)
    if style == 0:
        return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs) + "</s>"
    if style == 1:
        return "".join(few_shot_text(word_problem(a, b)) for a, b in pairs) + "</s>"
    return "".join(chat(f"What is {a} + {b}?", str(a + b)) for a, b in pairs)


def recall_document(rng: random.Random) -> str:
    """A table of keys and values, and questions about it."""
    style = rng.randrange(3)
    if style == 0:
        return "".join(choice_text(draw_choice(rng)) for _ in range(3)) + "</s>"
    table = draw_table(rng)
    asked = [rng.choice(sorted(table)) for _ in range(rng.randint(2, 5))]
    if style == 1:
        lines = "".join(f"{key}={table[key]}\n" for key in asked)
        return f"{table_text(table)}\n{lines}</s>"
    first, *others = asked
    text = chat(f"{table_text(table)}\nWhat is {first}?", str(table[first]))
    return text + "".join(chat(f"What is {key}?", str(table[key])) for key in others)
