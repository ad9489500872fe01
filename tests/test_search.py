import pytest

from leanrec import search
from leanrec.data.loader import Loader
from leanrec.ops.metrics import auc
from leanrec.recommender import PREDICT_BATCH, compress_tables, open_run, predict
from leanrec.report import report
from leanrec.search import smallest_ratio
from leanrec.train import TrainSettings, train_run
from leanrec.tune import compress_run


@pytest.fixture(scope="module")
def base(small_log, tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "base"
    settings = {"embedding_dim": 16, "hidden_units": [8]}
    train_run(small_log, out, model="deepfm", model_settings=settings, settings=TrainSettings(epochs=3, batch_size=250, table_learning_rate=0.02))
    return out


def valid_auc(recommender):
    return auc(*predict(recommender.model, Loader(recommender.data, "valid", recommender.schema, batch_size=PREDICT_BATCH)))


@pytest.mark.parametrize("method", ["PQ()", "VRQ()"])
def test_the_largest_ratio_tried_that_keeps_the_promise_is_taken_and_the_next_one_does_not_keep_it(base, tmp_path, method):
    full, promise, seen = valid_auc(open_run(base)), 0.004, []
    record = compress_run(base, tmp_path / "small", method=method, max_auc_drop=promise, tuning=None, on_trial=seen.append)
    ratios = [trial["ratio"] for trial in record["trials"]]
    assert ratios == sorted(ratios) and len(ratios) == len(seen)
    kept = max((trial for trial in record["trials"] if trial["auc_drop"] <= promise), key=lambda trial: trial["ratio"])
    recommender = open_run(tmp_path / "small")
    assert full - valid_auc(recommender) == pytest.approx(kept["auc_drop"], abs=1e-9)
    assert report(recommender.model).ratio >= kept["ratio"]
    beyond = [trial for trial in record["trials"] if trial["ratio"] > kept["ratio"]]
    assert all(trial["auc_drop"] > promise for trial in beyond)
    assert not beyond or beyond[0]["ratio"] < 1.1 * kept["ratio"]
    assert (record["kept"], record["beyond"]) == (kept, beyond[0] if beyond else None)


def test_a_trial_is_what_compress_gives_at_that_ratio(base, tmp_path):
    trials = []
    smallest_ratio(base, "VRQ()", max_auc_drop=0.004, seed=3, found=tmp_path / "trials.json", on_trial=trials.append)
    recommender = open_run(base)
    compress_tables(recommender, "VRQ()", ratio=trials[-1].ratio, seed=3)
    assert valid_auc(recommender) == trials[-1].auc


def test_a_killed_search_goes_on_where_it_was(base, tmp_path):
    class Killed(Exception):
        pass

    def kill(trial):
        if len(seen) == 2:
            raise Killed
        seen.append(trial.ratio)

    seen, later = [], []
    arguments = {"method": "VRQ()", "max_auc_drop": 0.004, "tuning": None}
    with pytest.raises(Killed):
        compress_run(base, tmp_path / "small", **arguments, on_trial=kill)
    record = compress_run(base, tmp_path / "small", **arguments, on_trial=lambda trial: later.append(trial.ratio))
    assert not set(seen) & set(later)
    assert record["trials"] == compress_run(base, tmp_path / "undisturbed", **arguments)["trials"]


def test_all_that_a_search_does_between_its_trials_is_told(base, tmp_path):
    told = []
    smallest_ratio(
        base,
        "VRQ()",
        max_auc_drop=0.49,
        seed=0,
        found=tmp_path / "trials.json",
        on_trial=lambda trial: told.append("trial"),
        on_work=lambda what, done, total: told.append(what.split(" ")[0]),
    )
    assert list(dict.fromkeys(told)) == ["sensitivity", "sizes", "table", "trial"]
    assert told.count("table") == 3 * told.count("trial")


def test_the_smallest_tables_are_taken_where_all_keep_the_promise(base, tmp_path):
    record = compress_run(base, tmp_path / "small", method="LowRank()", max_auc_drop=0.49, tuning=None)
    smallest = record["trials"][-1]
    assert all(trial["auc_drop"] <= 0.49 for trial in record["trials"])
    assert report(open_run(tmp_path / "small").model).ratio == pytest.approx(smallest["ratio"])
    assert (record["kept"], record["beyond"]) == (smallest, None)


def test_a_promise_that_no_size_keeps_is_an_error_of_one_line(base, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "LEAST_RATIO", 8.0)
    with pytest.raises(ValueError, match=r"No size of Hash keeps the validation AUC within 0.0: at ratio 10 it drops by") as error:
        compress_run(base, tmp_path / "small", method="Hash()", max_auc_drop=0.0, tuning=None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 5}, "neither ratio nor nbytes"),
        ({"nbytes": 5}, "neither ratio nor nbytes"),
        ({"method": {"*": "PQ()"}}, "one method"),
        ({"max_auc_drop": -0.1}, "max_auc_drop=-0.1"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_written(base, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        compress_run(base, tmp_path / "small", **{"max_auc_drop": 0.01, **wrong})
    assert not list(tmp_path.iterdir())
