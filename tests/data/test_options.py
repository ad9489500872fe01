"""What is said of options that are of the wrong type."""

import pytest

from leanrec.data.options import resolve_settings
from leanrec.data.prepare import prepare

NOTHING = {"kinds": None, "min_count": None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('fields = "x"', r"prepare\.toml: fields='x': a table \[fields\] of COLUMN = 'KIND' is needed"),
        ("[fields]\nuser = {kind = 5}", "kind of 'user'=5: text such as 'categorical' is needed"),
        ("[fields]\nuser = {min_count = true}", "min_count of 'user'=True: a whole number from 1 is needed"),
        ("[fields]\nuser = {max_length = 1.0}", "max_length of 'user'=1.0: a whole number from 1 is needed"),
        ("split = 0.5", "split=0.5: a list is needed, or its values with commas between them"),
        ("split = {train = 0.5}", "split={'train': 0.5}: a list is needed"),
        ("split = [true]", "split='True': a number is needed"),
        ("columns = 5", "columns=5: a list is needed"),
        ("delimiter = 5", "delimiter=5: text is needed"),
        ('delimiter = "\\r"', r"delimiter='\\r': one ASCII character is needed"),
        ("seed = 1.5", "seed=1.5: a whole number from 0 is needed"),
        ("seed = -1", "seed=-1: a whole number from 0 is needed"),
        ('seed = "a"', "seed='a': a whole number from 0 is needed"),
        ("seed = true", "seed=True: a whole number from 0 is needed"),
        ("split_by = 5", "split_by=5: the name of a column is needed"),
        ('format = ["csv"]', r"format=\['csv'\] is unknown. Choose one of"),
        ('on_bad_row = ["skip"]', r"on_bad_row=\['skip'\] is unknown. Choose one of"),
        ("numeric = 5", "numeric=5 is unknown. Choose one of"),
        ('header = "no"', "header='no': true or false is needed"),
        ("header = 1", "header=1: true or false is needed"),
        ("min_count = true", "min_count=True: a whole number from 1 is needed"),
        ('min_count = ["item=2"]', r"min_count=\['item=2'\]: a whole number from 1 is needed"),
        ("max_length = true", "max_length=True: a whole number from 1 is needed"),
        ('test = "test.csv"', r"prepare\.toml: option 'test' does not exist"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_in_one_line(tmp_path, text, words):
    log, config = tmp_path / "log.csv", tmp_path / "prepare.toml"
    log.write_text("label,user\n1,a\n0,b\n")
    config.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        prepare(log, tmp_path / "out", config=config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"min_count": 1.5}, "min_count='1.5': a whole number is needed"),
        ({"min_count": True}, "min_count='True': a whole number is needed"),
        ({"split": 0.5}, "split=0.5: a list is needed"),
        ({"kinds": {"user": 5}}, "kind of 'user'=5: text"),
    ],
)
def test_so_is_an_argument(argument, words):
    with pytest.raises(ValueError, match=words):
        resolve_settings(None, **{**NOTHING, **argument})


def test_options_of_a_file_are_read(tmp_path):
    config = tmp_path / "prepare.toml"
    options = ["header = false", 'columns = ["a", "b"]', "split = [0.5, 0.5]", "seed = 0", r'delimiter = "\\t"', 'split_by = "a"']
    config.write_text("\n".join([*options, "[fields]", 'a = "label"']))
    settings = resolve_settings(config, **NOTHING)
    assert (settings.header, settings.columns, settings.split) == (False, ("a", "b"), (0.5, 0.5))
    assert (settings.seed, settings.delimiter, settings.split_by, settings.of("a").kind) == (0, "\t", "a", "label")
