"""InternVL2 with Variable Visual Position Encoding on megatron-core.

Importing the package imports neither torch nor megatron-core. It only registers the hook that lets
megatron-core run where there is no CUDA; the hook has to be in place before megatron-core is first imported.
"""

from __future__ import annotations

from megatron_v2pe.parallel.runtime.cpu_runtime import install

__version__ = "0.1.0"

install()
