"""docs/performance.md shows the results that are committed."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def record():
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "speed" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(record):
    text = record.PAGE.read_text()
    assert record.page(text) == text, "run `python benchmarks/speed/record.py`"


def test_a_result_stands_on_the_page_with_its_bar_and_whether_it_was_missed(record, tmp_path):
    record.RESULTS = tmp_path
    for name, ratio in [("fast", 5.0), ("slow", 1.5)]:
        record.write(name, ratio=ratio, bar=2.0, against="torch", medians={"ours ms": 1.0, "torch ms": ratio}, setting={"rows": 10}, note="why")
    rows = [line for line in record.page(f"a\n{record.BEGIN}\nold\n{record.END}\nb\n").splitlines() if line.startswith("| `")]
    assert rows == [
        "| `fast` | torch | 5.00 | 2 | ours ms 1, torch ms 5 | why |",
        "| `slow` | torch | 1.50 | 2 (missed) | ours ms 1, torch ms 1.5 | why |",
    ]


def test_jobs_take_turns(record):
    turns = []
    medians = record.median_seconds({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=3, warm_ups=1)
    assert turns == ["a", "b"] * 4 and set(medians) == {"a", "b"}
