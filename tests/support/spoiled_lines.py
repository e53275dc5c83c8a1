"""`train` on a rank that can no longer read some lines: python -m tests.support.spoiled_lines RANK STRINGS RUN.yaml ...

Lines that contain one of the strings are garbage on that rank only, as from one node's bad cache; the file is sound.
"""

import sys

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.env import launcher
from megatron_v2pe.data import pack_reader


def spoil(strings: list[bytes]) -> None:
    """Wrap the reader of lines."""
    real = pack_reader.read_line

    def read_line(path, offset):
        line = real(path, offset)
        return b"\xff" * len(line) if any(string in line for string in strings) else line

    pack_reader.read_line = read_line


if __name__ == "__main__":
    where, what, *arguments = sys.argv[1:]
    if launcher().rank == int(where):
        spoil([string.encode() for string in what.split(",")])
    sys.exit(main(["train", *arguments]))
