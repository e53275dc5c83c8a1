"""torchrun for a terminal: on Ctrl-C the ranks say what happens next, and no traceback of the launcher follows.

    python tools/torchrun.py --standalone --nproc-per-node 2 -m megatron_v2pe train run.yaml

Arguments, environment and exit codes are those of `torch.distributed.run`; a signal ends with 128 + its number.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))
