import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from leanrec.data import vocabulary
from leanrec.data.prepare import prepare
from leanrec.data.vocabulary import Vocabulary, count_piece, merge_counts, read_counts, vocabulary_nbytes, vocabulary_of, vocabulary_path


def pieces_of(values, sizes):
    ends = np.cumsum(sizes)
    return [pa.array(values[end - size : end]).dictionary_encode() for size, end in zip(sizes, ends, strict=True)]


def drawn(num_values, num_rows, text=lambda number: f"value {number}"):
    return [text(number) for number in np.random.default_rng(0).zipf(1.3, num_rows) % num_values]


@pytest.mark.parametrize("merged_values", [1, 50, 1 << 20])
def test_counts_of_pieces_and_of_shards_are_those_of_the_whole(monkeypatch, merged_values):
    monkeypatch.setattr(vocabulary, "MERGED_VALUES", merged_values)
    values = drawn(300, 5000)
    expected = pl.DataFrame({"value": values}).group_by("value").agg(pl.len().cast(pl.Int64).alias("count")).sort("value")
    pieces = pieces_of(values, [1000, 1, 2999, 1000])
    assert merge_counts(map(count_piece, pieces)).sort("value").equals(expected)
    shards = [merge_counts(map(count_piece, pieces[:2])), merge_counts(map(count_piece, pieces[2:]))]
    assert merge_counts(shards).sort("value").equals(expected)


@pytest.mark.parametrize(
    "text",
    [str, lambda number: f"{number:x}", lambda number: f"a long beginning of all {number}", lambda number: "\u00e9" * (number % 5) + str(number)],
)
def test_ids_go_by_falling_count_and_then_by_text(text):
    values = drawn(300, 5000, text)
    table = vocabulary_of(merge_counts(map(count_piece, pieces_of(values, [5000]))), min_count=2)
    counts = {value: values.count(value) for value in set(values)}
    expected = sorted((value for value in counts if counts[value] >= 2), key=lambda value: (-counts[value], value.encode()))
    assert table["value"].to_list() == [None, None, *expected]
    assert table["id"].to_list() == list(range(len(expected) + 2))
    assert table["count"].to_list() == [0, sum(count for count in counts.values() if count < 2), *(counts[value] for value in expected)]


def test_a_column_without_values_has_a_vocabulary_of_padding_and_unknown():
    table = vocabulary_of(merge_counts([]), min_count=1)
    assert table["id"].to_list() == [0, 1]
    assert Vocabulary(table).ids(pa.array(["a"]).dictionary_encode()).tolist() == [1]


def test_values_are_found_and_others_are_unknown():
    values = drawn(3000, 20_000)
    found = Vocabulary(vocabulary_of(merge_counts(map(count_piece, pieces_of(values, [20_000]))), min_count=3))
    table = vocabulary_of(merge_counts(map(count_piece, pieces_of(values, [20_000]))), min_count=3)
    ids = dict(zip(table["value"].to_list(), table["id"].to_list(), strict=True))
    asked = [*values, "", "value", "value -1", "valu\u00e9"]
    assert found.ids(pa.array(asked).dictionary_encode()).tolist() == [ids.get(value, 1) for value in asked]


def test_a_text_with_the_hash_of_another_is_not_taken_for_it(monkeypatch):
    """Hashes of one value each do not collide in practice; here the unknown ones are made to."""
    table = vocabulary_of(merge_counts(map(count_piece, pieces_of(["a", "b", "b"], [3]))), min_count=1)
    found = Vocabulary(table)
    hashes = found._hashes.copy()
    monkeypatch.setattr(pl.Series, "hash", lambda series, *seeds: pl.Series([hashes[0]] * len(series), dtype=pl.UInt64))
    ids = found.ids(pa.array(["x", "y"]).dictionary_encode())
    assert ids.tolist() == [1, 1]


def test_a_seed_under_which_two_values_collide_is_not_used(monkeypatch):
    honest = pl.Series.hash
    monkeypatch.setattr(pl.Series, "hash", lambda series, seed: honest(series, seed) if seed else pl.Series([7] * len(series), dtype=pl.UInt64))
    table = vocabulary_of(merge_counts(map(count_piece, pieces_of(["a", "b", "b"], [3]))), min_count=1)
    assert Vocabulary(table).ids(pa.array(["a", "b", "c"]).dictionary_encode()).tolist() == [3, 2, 1]


def test_a_vocabulary_with_a_value_twice_is_an_error():
    table = pl.DataFrame({"value": [None, None, "a", "a"], "id": [0, 1, 2, 3], "count": [0, 0, 2, 1]})
    with pytest.raises(ValueError, match="holds a value twice"):
        Vocabulary(table)


def test_only_a_name_that_is_too_long_for_a_file_is_shortened(tmp_path):
    paths = {vocabulary_path(tmp_path, "x" * 300 + end).name for end in "ab"}
    assert len(paths) == 2
    assert {len(path) <= 255 and path.startswith("x" * 200) for path in paths} == {True}
    assert vocabulary_path(tmp_path, "x" * 247).name == "x" * 247 + ".parquet"
    assert vocabulary_path(tmp_path, "é a/b").name == "%C3%A9 a%2Fb.parquet"


def test_a_column_of_a_very_long_name_is_prepared(tmp_path):
    name = "é" * 150
    (tmp_path / "log.csv").write_text(f"label,{name}\n" + "1,a\n0,b\n" * 20)
    prepared = prepare(tmp_path / "log.csv", tmp_path / "out")
    assert read_counts(prepared.folder, prepared.schema)[name].sum() == prepared.rows["train"]
    assert prepared.vocabulary_nbytes > 0


def test_bytes_of_a_log_that_is_not_there_or_not_whole_are_an_error(tmp_path):
    (tmp_path / "log.csv").write_text("label,x\n" + "1,a\n0,b\n" * 20)
    prepared = prepare(tmp_path / "log.csv", tmp_path / "out")
    assert vocabulary_nbytes(tmp_path / "out") == prepared.vocabulary_nbytes > 0
    with pytest.raises(ValueError, match=r"moved.schema\.json: not found"):
        vocabulary_nbytes(tmp_path / "moved")
    vocabulary_path(tmp_path / "out", "x").unlink()
    with pytest.raises(ValueError, match=r"x\.parquet: not found"):
        vocabulary_nbytes(tmp_path / "out")
    vocabulary_path(tmp_path / "out", "x").write_text("no Parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: damaged"):
        vocabulary_nbytes(tmp_path / "out")


def test_a_log_of_numbers_has_no_bytes_of_vocabularies(tmp_path):
    (tmp_path / "log.csv").write_text("label,x\n" + "1,0.5\n0,1.5\n" * 20)
    assert prepare(tmp_path / "log.csv", tmp_path / "out", kinds={"x": "numeric"}).vocabulary_nbytes == 0
