import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two test processes share two cores; more threads only wait for each other


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real logs; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("LEANREC_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real logs not found at {folder}; set LEANREC_DATA to the folder that holds frappe/, kdd12/, ...")
    return folder
