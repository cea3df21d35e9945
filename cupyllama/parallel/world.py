"""The processes of one run: who is there, agreeing on errors, and ending together."""

import mmap
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cupyllama.errors import CupyllamaError, RankError, UsageError

# Set for each process by Open MPI, by PMI and PMIx launchers (MPICH, Slurm's srun), by Intel MPI.
_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MPI_LOCALRANKID")

# Between two looks at whether a message has come: MPI's own waiting keeps a core busy.
_SLEEP = 50e-6
_LONGEST_SLEEP = 2e-3

# What the process that speaks for a dead one needs at most to end the job.
_LEAVE_TO_OTHERS = 2.0

INTERRUPTED = 130

# Why a process is about to end: it says so itself or has nothing left to do; the launcher told it.
_LEFT, _TOLD = 1, 2
_STOP = 0  # through the pipe that signals go through too, which have numbers from 1 on


def open_world(remedy: str = "") -> "World":
    """The world that a launcher such as mpirun made, or this process alone.

    Importing MPI starts it, so it is imported under a launcher only.

    Args:
        remedy: what can be done after a process was killed.
    """
    if not launched():
        return World()
    from mpi4py import MPI

    if MPI.COMM_WORLD.size == 1:
        return World()
    return MPIWorld(MPI.COMM_WORLD, remedy)


def one_process(work: str) -> "World":
    """The world of a process that is to be alone; `work`: what it does, as an error begins.

    Raises:
        UsageError: a launcher started several.
    """
    world = open_world()
    with world.together():
        if world.size > 1:
            raise UsageError(
                f"{work}, and there are {world.size} ranks", "Start it without mpirun."
            )
    return world


def launched() -> bool:
    """Whether a launcher such as mpirun started this process."""
    return any(name in os.environ for name in _LAUNCHERS)


class World:
    """One process: rank 0 of 1."""

    rank = 0
    size = 1
    local_rank = 0  # among the processes of this host
    local_size = 1

    def allgather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all ranks do; an error of any of them becomes an error of all."""
        yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work during which others may wait for this rank: an error ends every rank at once."""
        yield

    def close(self) -> None:
        """Leave, once all are ready to."""


class MPIWorld(World):
    """Several processes, which end together whatever happens to one of them."""

    def __init__(self, comm: Any, remedy: str = ""):
        from mpi4py import MPI

        self.comm, self._remedy = comm, remedy
        self.rank, self.size = comm.rank, comm.size
        local = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.rank, local.size
        self._ending = threading.Lock()  # by whichever thread is the first to hear of it
        self._watch = _Watch(local, comm.rank, self._peer_died, self._terminated)
        # The watch hears of signals too: the handler waits until the main thread is back from a
        # kernel or a message, and Open MPI and MPICH kill 10 ms after they have told.
        signal.signal(signal.SIGTERM, self._terminated)
        signal.set_wakeup_fd(self._watch.waker)

    def allgather(self, value: Any) -> list[Any]:
        wait(self.comm.Ibarrier())  # asleep until all are there
        return self.comm.allgather(value)

    @contextmanager
    def together(self) -> Iterator[None]:
        error = None
        with self.alone():
            try:
                yield
            except CupyllamaError as found:
                error = found
            answers = self.allgather(None if error is None else (error, error.hint))
        failed = [rank for rank, answer in enumerate(answers) if answer is not None]
        if failed:
            first, hint = answers[failed[0]]
            who = "" if len(failed) == self.size else f"rank {failed[0]}: "
            if self.rank == 0:
                _say(f"{who}{first}", hint)
            self.close()
            sys.exit(first.exit_code)

    @contextmanager
    def alone(self) -> Iterator[None]:
        try:
            yield
        except CupyllamaError as error:
            self._end(str(error), error.hint, error.exit_code)
        except KeyboardInterrupt:
            self._end("interrupted", self._remedy, INTERRUPTED)
        except Exception as error:
            if os.environ.get("CUPYLLAMA_DEBUG", "0") not in ("", "0"):
                raise
            self._end(f"{type(error).__name__}: {error}", "", RankError.exit_code)

    def close(self) -> None:
        wait(self.comm.Ibarrier())
        self._watch.stop()

    def _end(self, message: str, hint: str, exit_code: int) -> None:
        self._watch.leave()
        _say(f"rank {self.rank}: {message}", hint)
        self.comm.Abort(exit_code)

    def _terminated(self, *_: Any) -> None:
        """The launcher ends the job: because it saw a rank die before we did?

        Else for a reason of its own, such as Ctrl-C or a limit of time.
        """
        if not self._ending.acquire(blocking=False):
            return
        watch = self._watch
        silent, dead = watch.anyone_left, [] if watch.left else watch.dead()
        watch.leave(_TOLD)
        if dead and watch.speaks(dead[0]):
            _say(f"rank {dead[0]}: was killed or crashed", self._remedy)
        elif self.rank == 0 and not dead and not silent:
            _say("ended by the launcher", self._remedy)
        os._exit(128 + signal.SIGTERM)

    def _peer_died(self, rank: int) -> None:
        if self._watch.left or not self._ending.acquire(blocking=False):
            return
        self._watch.leave()
        _say(f"rank {rank}: was killed or crashed", self._remedy)
        self.comm.Abort(RankError.exit_code)


class _Watch:
    """Notices at once when a process of this host is gone that did not say it was leaving.

    MPI's launcher notices too, but tells neither in our words nor with our exit code.
    """

    def __init__(self, local: Any, rank: int, on_death: Any, on_sigterm: Any):
        self.me = local.rank
        self._on_death, self._on_sigterm = on_death, on_sigterm
        self._leaving = self._shared_flags(local)
        self._wake, self.waker = os.pipe()
        os.set_blocking(self.waker, False)
        self._ranks: dict[int, tuple[int, int]] = {}  # pidfd -> local rank, rank
        peers = local.allgather((os.getpid(), rank))
        if hasattr(os, "pidfd_open"):
            for number, (pid, peer) in enumerate(peers):
                if number != self.me:
                    self._ranks[os.pidfd_open(pid)] = (number, peer)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        wait(local.Ibarrier())  # nobody goes on unwatched

    @staticmethod
    def _shared_flags(local: Any) -> mmap.mmap:
        """A byte for each process of this host, set when it is about to end: _LEFT or _TOLD."""
        path = None
        if local.rank == 0:
            file, path = tempfile.mkstemp(prefix="cupyllama-")
            os.write(file, bytes(local.size))
            os.close(file)
        path = local.bcast(path)
        with open(path, "r+b") as file:
            flags = mmap.mmap(file.fileno(), local.size)
        local.Barrier()
        if local.rank == 0:
            os.unlink(path)
        return flags

    def _run(self) -> None:
        poll = select.poll()
        for fd in [self._wake, *self._ranks]:
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    heard = os.read(fd, 100)
                    if signal.SIGTERM in heard:
                        self._on_sigterm()
                    if _STOP in heard:
                        return
                    continue
                number, rank = self._ranks[fd]
                poll.unregister(fd)
                if self._leaving[number] or self._leaving[self.me]:
                    continue
                if not self.speaks(rank):  # the others would only if that one cannot
                    time.sleep(_LEAVE_TO_OTHERS)
                self._on_death(rank)
                return

    def dead(self) -> list[int]:
        """Ranks that are gone without having said so."""
        poll = select.poll()
        for fd in self._ranks:
            poll.register(fd, select.POLLIN)
        gone = [self._ranks[fd] for fd, _ in poll.poll(0)]
        return [rank for number, rank in gone if not self._leaving[number]]

    def speaks(self, dead: int) -> bool:
        """Whether it falls to this process to tell of another's end."""
        numbers = {rank: number for number, rank in self._ranks.values()}
        return self.me == min({self.me, *numbers.values()} - {numbers[dead]})

    def leave(self, why: int = _LEFT) -> None:
        """Tell the others that this process is about to end."""
        self._leaving[self.me] = why

    @property
    def left(self) -> bool:
        """Whether this process has said that it leaves."""
        return bool(self._leaving[self.me])

    @property
    def anyone_left(self) -> bool:
        """Whether a process of this host ends of its own accord, and says why if need be."""
        return _LEFT in self._leaving[:]

    def stop(self) -> None:
        """Tell the others, and stop watching them."""
        self.leave()
        os.write(self.waker, bytes([_STOP]))


def wait(request: Any, longest_sleep: float = _LONGEST_SLEEP) -> None:
    """Wait for an MPI request, asleep most of the time."""
    sleep = _SLEEP
    while not request.Test():
        time.sleep(sleep)
        sleep = min(2 * sleep, longest_sleep)


def _say(message: str, hint: str) -> None:
    """One write, so that lines of several ranks do not mix."""
    lines = f"cupyllama: {message}\n" + (f"  {hint}\n" if hint else "")
    os.write(sys.stderr.fileno(), lines.encode())
