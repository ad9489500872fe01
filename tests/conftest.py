import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from leanrec.data.schema import Field, Schema

torch.set_num_threads(1)  # two test processes share two cores; more threads only wait for each other


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real logs; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("LEANREC_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real logs not found at {folder}; set LEANREC_DATA to the folder that holds frappe/, kdd12/, ...")
    return folder


@pytest.fixture(scope="session")
def small_log(tmp_path_factory) -> Path:
    """A prepared log of 6,000 / 2,000 / 2,000 rows: users, items, tags and a price; clicks follow planted user x item and tag effects.

    Users and items stand in falling popularity, but for chance."""
    folder = tmp_path_factory.mktemp("log") / "small"
    schema = Schema(
        (
            Field("user", "categorical", vocabulary="user", num_embeddings=202),
            Field("item", "categorical", vocabulary="item", num_embeddings=102),
            Field("tags", "multivalued", vocabulary="tags", num_embeddings=12, max_length=3),
            Field("price", "numeric"),
        )
    )
    draw = np.random.default_rng(0)
    user_vectors, item_vectors, tag_effects = draw.normal(size=(202, 3)), draw.normal(size=(102, 3)), draw.normal(size=12)
    counts = {"user": np.zeros(202, np.int64), "item": np.zeros(102, np.int64), "tags": np.zeros(12, np.int64)}
    for split, num_rows in (("train", 6000), ("valid", 2000), ("test", 2000)):
        users = 2 + (draw.zipf(1.3, num_rows) - 1) % 200
        items = 2 + (100 * draw.random(num_rows) ** 1.2).astype(np.int64)
        tags = [2 + draw.integers(0, 10, size) for size in draw.integers(0, 4, num_rows)]
        price = np.where(draw.random(num_rows) < 0.1, np.nan, draw.normal(size=num_rows)).astype(np.float32)
        score = (user_vectors[users] * item_vectors[items]).sum(1) + [tag_effects[row].sum() for row in tags] + np.nan_to_num(price)
        clicks = draw.random(num_rows) < 1 / (1 + np.exp(-score))
        columns = {
            "user": users.astype(np.int32),
            "item": items.astype(np.int32),
            "tags": pa.array(tags, pa.list_(pa.int32())),
            "price": price,
            "label": clicks.astype(np.int8),
        }
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / split / "part-00000.parquet", row_group_size=1000)
        if split == "train":
            for name, ids in (("user", users), ("item", items), ("tags", np.concatenate(tags))):
                counts[name] = np.bincount(ids, minlength=len(counts[name]))
    (folder / "vocabulary").mkdir()
    for name, count in counts.items():
        values = [None, None] + [f"{name}-{row}" for row in range(2, len(count))]
        vocabulary = pa.table({"value": values, "id": np.arange(len(count)), "count": count.astype(np.int64)})
        pq.write_table(vocabulary, folder / "vocabulary" / f"{name}.parquet")
    schema.save(folder / "schema.json")
    (folder / "run.json").write_text(json.dumps({"command": "prepare", "settings": {}, "fingerprint": "small"}))
    return folder
