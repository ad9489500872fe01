import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def test_the_readme_has_python():
    assert BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_python_block_of_the_readme_runs(number, tmp_path):
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    run = subprocess.run([sys.executable, "-c", BLOCKS[number]], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_every_file_the_readme_points_to_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (REPOSITORY / "README.md").read_text())
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_measured_row_of_the_readme_stands_in_the_generated_results():
    rows = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("| `")]
    generated = (REPOSITORY / "benchmarks" / "README.md").read_text().splitlines()
    assert rows
    assert [row for row in rows if row not in generated] == []
