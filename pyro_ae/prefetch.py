"""Work that is done ahead of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ahead(make: Callable[[A], B], items: Iterable[A], depth: int = 2) -> Iterator[B]:
    """What a function makes of each item, in their order, made by a thread while those before are in use.

    Arguments:
        make: a function that spends its time outside Python, such as reading a file.
        items: its arguments.
        depth: results that wait at most.

    Example:
        >>> list(ahead(abs, [-3, -2, -1]))
        [3, 2, 1]
    """
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(1) as thread:
        try:
            for item in items:
                waiting.append(thread.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # where the one who uses them stops early
                future.cancel()
