"""`python -m megatron_v2pe VERB ...`, also under torchrun."""

import sys

from megatron_v2pe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
