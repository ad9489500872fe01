"""Work done ahead in a thread of its own: reading and checking go on while what was read before is written."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
WAIT_SECONDS = 0.1


def ahead(items: Generator[T, None, None], *, depth: int = 2) -> Iterator[T]:
    """The same items in the same order, made up to `depth` ahead of their use. An error is raised where its item would have come."""
    queue: Queue[tuple[list[T], BaseException | None]] = Queue(depth)
    over = Event()

    def give(item: list[T], error: BaseException | None = None) -> None:
        while not over.is_set():
            try:
                return queue.put((item, error), timeout=WAIT_SECONDS)
            except Full:
                continue

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    give([item])
                    if over.is_set():
                        return
            give([])
        except BaseException as error:
            give([], error)

    thread = Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if error is not None:
                raise error
            if not item:
                return
            yield item[0]
    finally:
        over.set()
        thread.join()
