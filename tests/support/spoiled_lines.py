"""`train` on a rank that cannot read some lines any more: python -m tests.support.spoiled_lines RANK WORDS RUN.yaml ...

Lines that hold one of the words come as garbage on that rank alone, as from one node's bad cache; the file is sound.
"""

import sys

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.env import launcher
from megatron_v2pe.data import pack_reader


def spoil(words: list[bytes]) -> None:
    """Wrap the reader of lines."""
    real = pack_reader.read_line

    def read_line(path, offset):
        line = real(path, offset)
        return b"\xff" * len(line) if any(word in line for word in words) else line

    pack_reader.read_line = read_line


if __name__ == "__main__":
    where, what, *arguments = sys.argv[1:]
    if launcher().rank == int(where):
        spoil([word.encode() for word in what.split(",")])
    sys.exit(main(["train", *arguments]))
