import threading

import pytest

from leanrec.data.ahead import ahead


def test_items_come_in_order_and_no_thread_is_left():
    before = threading.active_count()
    assert list(ahead(number for number in range(100))) == list(range(100))
    assert list(ahead(None for _ in range(3))) == [None] * 3
    assert threading.active_count() == before


def test_an_error_is_raised_where_its_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    seen = []
    with pytest.raises(ValueError, match="third"):
        seen.extend(iter(ahead(items())))
    taken = ahead(items())
    assert [next(taken), next(taken)] == [1, 2]


def test_leaving_early_ends_the_work_and_closes_its_source():
    closed = threading.Event()

    def items():
        try:
            yield from range(10**9)
        finally:
            closed.set()

    for item in ahead(items()):
        if item == 3:
            break
    else:
        pytest.fail("the items never end")
    assert closed.wait(5)
