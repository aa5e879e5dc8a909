"""The benchmark of the memory manager runs, and tells the parts of a step apart."""

import json
from pathlib import Path

import pytest

from eval.memory_overhead import main, summarize


def test_a_step_is_the_sum_of_its_parts() -> None:
    misses = "misses (number)"
    rows = [
        {"a": 1e-6, "b": 2e-6, misses: 5},
        {"a": 3e-6, "b": 4e-6, misses: 6},
        {"a": 5e-6, "b": 9e-6, misses: 9},
    ]
    medians = {part: its["median"] for part, its in summarize(rows).items()}
    assert medians == {"a": 3, "b": 4, "all": 7, misses: 6}


@pytest.mark.parametrize("resident", ["100%", "50%"])
def test_a_small_model_is_measured(tmp_path: Path, resident: str) -> None:
    sizes = ["--layers=2", "--experts=16", "--top-k=2", "--requests=3", "--steps=3"]
    output = tmp_path / "figures.json"
    main([*sizes, f"--resident={resident}", f"--output={output}"])
    figures = json.loads(output.read_text())["microseconds_per_step"]
    assert figures["experts of the layers"]["median"] > 0


def test_steps_without_the_host_are_measured(tmp_path: Path) -> None:
    sizes = ["--layers=2", "--experts=16", "--top-k=2", "--requests=3", "--steps=3"]
    output = tmp_path / "figures.json"
    main([*sizes, "--resident=50%", "--skew=1", "--lent", f"--output={output}"])
    figures = json.loads(output.read_text())["microseconds_per_step"]
    assert figures["lending"]["median"] > 0
    assert figures["taking back"]["median"] > 0
    assert figures["misses (number)"]["median"] > 0
