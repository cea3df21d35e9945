"""Reads files into shared memory, as `cupyllama.readers` asks.

A script for a process of its own. It imports little, to be there within milliseconds.

    python -I -S read_files.py MEMORY   (a descriptor, as the files are that it is asked for)
"""

import mmap
import os
import struct
import sys

ASKED = struct.Struct("<4q")  # file, offset, bytes, where in the memory
ANSWER = struct.Struct("<q")  # bytes read, fewer where the file ends, or what failed: -errno


def read(file: int, offset: int, into: memoryview) -> int:
    """The bytes read, or -errno."""
    done = 0
    try:
        while done < len(into):
            count = os.preadv(file, [into[done:]], offset + done)
            if not count:
                break
            done += count
    except OSError as error:
        return -error.errno
    return done


def main() -> None:
    memory = memoryview(mmap.mmap(int(sys.argv[1]), 0))
    while len(asked := os.read(0, ASKED.size)) == ASKED.size:
        file, offset, nbytes, place = ASKED.unpack(asked)
        os.write(1, ANSWER.pack(read(file, offset, memory[place : place + nbytes])))


if __name__ == "__main__":
    main()
