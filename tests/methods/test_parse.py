import pytest

from leanrec.methods import METHODS, PQ, Scalar, parse


@pytest.mark.parametrize("text", ["PQ", "PQ()", " PQ( ) ", "PQ(num_subspaces=4)", "PQ(num_subspaces=4, num_centroids=256)"])
def test_left_out_arguments_take_their_defaults(text):
    assert parse(text) == PQ()


def test_arguments_are_read_in_any_order():
    assert parse("PQ(num_centroids=16, num_subspaces=2)") == PQ(num_subspaces=2, num_centroids=16)
    assert parse("Scalar(num_bits=4)") == Scalar(num_bits=4)


def test_a_whole_number_may_stand_for_a_float():
    assert repr(parse("PQ(weight_power=1)")) == "PQ(num_subspaces=4, num_centroids=256, weight_power=1.0)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PQX", f"unknown method 'PQX'. Choose one of {list(METHODS)}."),
        ("pq", f"unknown method 'pq'. Choose one of {list(METHODS)}."),
        ("PQ(4)", "cannot read 'PQ(4)' as a method. Write a name, with named arguments if any: PQ or PQ(num_subspaces=4, num_centroids=256)."),
        (
            "PQ(subspaces=4)",
            "'PQ(subspaces=4)' has an unknown argument 'subspaces'. "
            "PQ takes each of ['num_subspaces', 'num_centroids', 'weight_power'] at most once.",
        ),
        ("PQ(num_subspaces=four)", "num_subspaces=four is not a literal. Write a plain int, such as 4."),
        ("PQ(num_subspaces=True)", "num_subspaces=True is not of the right type. Write a plain int, such as 4."),
        ("PQ(num_subspaces=2.0)", "num_subspaces=2.0 is not of the right type. Write a plain int, such as 4."),
    ],
)
def test_a_mistake_is_answered_with_what_there_is(text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text", ["", "(", "PQ(", "PQ; Full", "a.PQ()", "PQ()()", "PQ(num_subspaces=1)(2)", "PQ(**{})", "PQ(num_subspaces=1, num_subspaces=2)"]
)
def test_what_is_no_call_of_a_name_is_refused(text):
    with pytest.raises(ValueError, match="PQ"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "PQ(weight_power=1" + "0" * 400 + ")",
        "PQ(weight_power=1" + "0" * 5000 + ")",
        "PQ(weight_power=1e999)",
        "PQ(weight_power=-1e999)",
        "PQ(num_subspaces=" + "-" * 900 + "4)",
        "-" * 100_000 + "4",
        "PQ" + "()" * 490,
        "PQ" + "()" * 10_000,
        "PQ(num_subspaces=" + "1+" * 450 + "1)",
        "+".join("1" * 100_000),
        "PQ(num_subspaces=" + "[" * 150 + "]" * 150 + ")",
        "PQ(num_subspaces=" + "(" * 900,
        "PQ(num_subspaces={[]: 1})",
        "PQ(num_subspaces='\0')",
        "PQ\0",
        "PQ\ud800",
    ],
    ids=lambda text: f"{text[:24]!a}... of {len(text)}",
)
def test_text_that_is_too_much_for_python_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"PQ|weight_power|num_subspaces") as error:
        parse(text)
    assert type(error.value) is ValueError and "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "touched"
    with pytest.raises(ValueError, match="not a literal"):
        parse(f"PQ(num_subspaces=open({str(target)!r}, 'w').write('x'))")
    with pytest.raises(ValueError, match="cannot read"):
        parse(f"open({str(target)!r}, 'w')")
    assert not target.exists()
