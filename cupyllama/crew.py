"""Threads that do jobs, and one that hands them out."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

Job = TypeVar("Job")
Worker = Callable[[], AbstractContextManager[Callable[[Job], Iterable[Any]]]]


# Python lets a thread that computes go on for 5 ms before another may; here threads want it for
# microseconds, many times, and tokenising is beside them.
_TURN_SECONDS = 2e-4


@contextmanager
def _short_turns() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@_short_turns()
def for_each(
    jobs: Iterable[Job],
    worker: Worker[Job],
    threads: int,
    on_done: Callable[[Job], None] = lambda job: None,
) -> None:
    """Have every job done in one of up to `threads` threads.

    `jobs` is iterated over, and on_done called, in the thread that calls. Whatever is raised
    anywhere ends all threads, each after the step it is at, before it is raised here.

    Args:
        worker: entered in every thread; gives what does a job, in as many steps as it yields.
    """
    todo: SimpleQueue[Job | None] = SimpleQueue()
    done: SimpleQueue[Job | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            with worker() as do:
                while (job := todo.get()) is not None and not stop.is_set():
                    for _ in do(job):
                        if stop.is_set():
                            break
                    else:
                        done.put(job)
        except BaseException as error:
            stop.set()
            done.put(error)
        else:
            done.put(None)

    crew: list[threading.Thread] = []
    try:
        for job in jobs:
            if stop.is_set():
                break
            todo.put(job)
            if len(crew) < threads:
                # A daemon: a read that hangs must not keep alive a process that was told to end.
                crew.append(threading.Thread(target=work, name="read", daemon=True))
                crew[-1].start()
        _send_home(todo, crew)
        working = len(crew)
        while working:
            answer = done.get()
            if answer is None:
                working -= 1
            elif isinstance(answer, BaseException):
                try:
                    raise answer
                finally:
                    del answer  # else it and this frame, with every array, keep each other alive
            else:
                on_done(answer)
    finally:
        stop.set()
        _send_home(todo, crew)
        for thread in crew:
            if thread.is_alive():  # not so if the interrupt came before it was started
                thread.join()


def _send_home(todo: SimpleQueue, crew: list[threading.Thread]) -> None:
    for _ in crew:
        todo.put(None)
