import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from leanrec.data.loader import Loader
from leanrec.data.schema import Field, Schema

SCHEMA = Schema(
    (
        Field("user", "categorical", vocabulary="user", num_embeddings=1000),
        Field("tags", "multivalued", vocabulary="tags", num_embeddings=9, max_length=4),
        Field("price", "numeric"),
        Field("item", "categorical", vocabulary="item", num_embeddings=50),
    )
)
NUM_ROWS = 1000


@pytest.fixture
def folder(tmp_path):
    """Two files of 600 and 400 rows in row groups of 100; row i has user i, i % 4 tags, price i / 2 (missing for i % 7 == 0), item i % 50."""
    rows = np.arange(NUM_ROWS)
    table = pa.table(
        {
            "user": rows.astype(np.int32),
            "tags": pa.array([[2 + tag for tag in range(row % 4)] for row in rows], pa.list_(pa.int32())),
            "price": np.where(rows % 7 == 0, np.nan, rows / 2).astype(np.float32),
            "item": (rows % 50).astype(np.int32),
            "label": (rows % 2).astype(np.int8),
        }
    )
    (tmp_path / "train").mkdir()
    pq.write_table(table.slice(0, 600), tmp_path / "train" / "part-00000.parquet", row_group_size=100)
    pq.write_table(table.slice(600), tmp_path / "train" / "part-00001.parquet", row_group_size=100)
    return tmp_path


def users(batches):
    return torch.cat([batch.features["user"] for batch in batches]).tolist()


def test_without_a_seed_rows_come_in_file_order_with_the_values_of_the_files(folder):
    batches = list(Loader(folder, "train", SCHEMA, batch_size=64).batches())
    assert users(batches) == list(range(NUM_ROWS))
    features, labels = batches[1]
    assert list(features) == ["user", "tags", "price", "item"]
    assert features["item"].dtype == torch.int64
    assert features["item"].tolist() == [row % 50 for row in range(64, 128)]
    assert features["tags"][:4].tolist() == [[0, 0, 0], [2, 0, 0], [2, 3, 0], [2, 3, 4]]
    assert features["price"][:8].isnan().tolist() == [row % 7 == 0 for row in range(64, 72)]
    assert features["price"][1] == 65 / 2
    assert labels.tolist() == [float(row % 2) for row in range(64, 128)]


@pytest.mark.parametrize("buffer_rows", [1, 250, 1 << 20])
def test_with_a_seed_every_row_comes_once_and_rows_keep_together(folder, buffer_rows):
    loader = Loader(folder, "train", SCHEMA, batch_size=64, seed=3, buffer_rows=buffer_rows)
    batches = list(loader.batches(epoch=1))
    assert sorted(users(batches)) == list(range(NUM_ROWS))
    assert users(batches) != list(range(NUM_ROWS))
    assert len(batches) == loader.num_batches(epoch=1)
    for features, labels in batches:
        assert torch.equal(features["item"], features["user"] % 50)
        assert torch.equal((features["tags"] > 0).sum(1), features["user"] % 4)
        assert torch.equal(labels, (features["user"] % 2).float())


def test_epochs_differ_and_seeds_repeat(folder):
    def order(seed, epoch):
        return users(Loader(folder, "train", SCHEMA, batch_size=64, seed=seed).batches(epoch=epoch))

    assert order(3, 0) == order(3, 0)
    assert order(3, 0) != order(3, 1)
    assert order(3, 0) != order(4, 0)


@pytest.mark.parametrize("buffer_rows", [150, 1 << 20])
def test_an_interrupted_epoch_goes_on_where_it_stopped(folder, buffer_rows):
    loader = Loader(folder, "train", SCHEMA, batch_size=64, seed=0, buffer_rows=buffer_rows)
    whole = [batch.features["user"].tolist() for batch in loader.batches(epoch=2)]
    for start in (0, 1, 5, len(whole) - 1, len(whole)):
        assert [batch.features["user"].tolist() for batch in loader.batches(epoch=2, start=start)] == whole[start:]


@pytest.mark.parametrize(
    ("batch_size", "buffer_rows", "sizes"),
    [
        (333, 1 << 20, [333, 333, 334]),  # 1000 = 3 * 333 + 1
        (999, 1 << 20, [1000]),
        (33, 100, ([33, 33, 34] * 10)),  # in each buffer
        (332, 1 << 20, [332, 332, 332, 4]),
        (1, 1 << 20, [1] * 1000),
    ],
)
def test_no_shuffled_batch_but_those_of_size_one_has_a_single_row(folder, batch_size, buffer_rows, sizes):
    loader = Loader(folder, "train", SCHEMA, batch_size=batch_size, seed=0, buffer_rows=buffer_rows)
    whole = [batch.features["user"].tolist() for batch in loader.batches(epoch=1)]
    assert [len(batch) for batch in whole] == sizes
    assert loader.num_batches(epoch=1) == len(sizes)
    assert sorted(user for batch in whole for user in batch) == list(range(NUM_ROWS))
    for start in (1, len(sizes) - 1, len(sizes)):
        assert [batch.features["user"].tolist() for batch in loader.batches(epoch=1, start=start)] == whole[start:]
    in_order = Loader(folder, "train", SCHEMA, batch_size=batch_size, buffer_rows=buffer_rows)
    assert max(len(batch.labels) for batch in in_order.batches()) == batch_size, "batches in order stay as they are"


def test_a_row_group_of_one_row_is_no_buffer_of_its_own(folder):
    (folder / "valid").mkdir()
    pq.write_table(pq.read_table(folder / "train" / "part-00001.parquet").slice(0, 201), folder / "valid" / "part-00000.parquet", row_group_size=100)
    for epoch in range(6):
        loader = Loader(folder, "valid", SCHEMA, batch_size=50, seed=0, buffer_rows=100)
        sizes = [len(batch.labels) for batch in loader.batches(epoch=epoch)]
        assert len(sizes) == loader.num_batches(epoch=epoch)
        assert sum(sizes) == 201
        assert min(sizes) > 1


def test_a_small_buffer_reads_no_more_than_it_holds(folder, monkeypatch):
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, index, columns: read.append(index) or original(self, index, columns=columns))
    batches = Loader(folder, "train", SCHEMA, batch_size=64, seed=0, buffer_rows=200).batches()
    next(batches)
    assert len(read) == 2


def test_the_usual_buffer_is_of_bytes_and_shuffles_a_log_that_fits_as_a_whole(folder, monkeypatch):
    loader = Loader(folder, "train", SCHEMA, batch_size=64, seed=0)
    assert [len(buffer) for buffer in loader._buffers(0)] == [10]
    first = next(loader.batches()).features["user"]
    assert len((first // 100).unique()) > 5, "rows of many row groups come together"
    values = 4 + max(SCHEMA.fields[1].max_length, 1)  # user, price, item and label beside the tags
    monkeypatch.setattr("leanrec.data.loader.BUFFER_NBYTES", 4 * values * 250)
    assert Loader(folder, "train", SCHEMA, batch_size=64, seed=0).buffer_rows == 1 << 20, "at least a million"
    monkeypatch.setattr("leanrec.data.loader.BUFFER_ROWS", 100)
    loader = Loader(folder, "train", SCHEMA, batch_size=64, seed=0)
    assert loader.buffer_rows == 250
    assert [len(buffer) for buffer in loader._buffers(0)] == [3, 2, 3, 2]


def test_missing_split_truncated_file_and_missing_column_are_one_line_errors(folder):
    with pytest.raises(ValueError, match=r"valid: no Parquet files here"):
        Loader(folder, "valid", SCHEMA, batch_size=64)
    with pytest.raises(ValueError, match=r"columns \['price'\] of the schema are missing"):
        (folder / "test").mkdir()
        pq.write_table(pq.read_table(folder / "train" / "part-00000.parquet").drop_columns(["price"]), folder / "test" / "part-00000.parquet")
        Loader(folder, "test", SCHEMA, batch_size=64)
    path = folder / "train" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-00001\.parquet: not a whole Parquet file"):
        Loader(folder, "train", SCHEMA, batch_size=64)
