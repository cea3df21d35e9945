"""Run the command line in one rank of several, and let a fault happen to one of them.

    mpirun -n 4 python faulty_rank.py RANK FAULT WHEN -- score …

RANK -1 means no fault. FAULT: kill, raise, interrupt, terminate, stuck, full-disk. WHEN: load, or
the number of the micro-batch that the rank is at.
"""

import hashlib
import os
import resource
import signal
import sys
import threading

from cupyllama import loading
from cupyllama.cli import cli
from cupyllama.ops import reference

faulty, fault, when, dashes, *arguments = sys.argv[1:]
assert dashes == "--"
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


def happen() -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise RuntimeError("a fault for the test")
    if fault == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if fault == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if fault == "stuck":  # in C, for minutes: Python's own handlers wait for its end
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 28)
    if fault == "full-disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


if rank == int(faulty):
    if when == "load":

        def check_names(*arguments) -> None:
            happen()

        loading.check_names = check_names
    else:
        uploads = iter(range(1 << 30))
        upload = reference.upload

        def counted(batch):
            if next(uploads) == int(when):
                happen()
            return upload(batch)

        reference.upload = counted

sys.argv[1:] = arguments
cli()
