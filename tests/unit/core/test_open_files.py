"""Too few open files are refused by name; a low soft limit is raised. In processes of their own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.open_files import require_open_files
try:
    require_open_files()
except ConfigError as error:
    print(error)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "printed"),
    [(64, 64, "may open 64 files (ulimit -n), but a run needs at least 256"), (64, 1024, "1024\n")],
)
def test_the_limit_is_raised_or_refused(soft, hard, printed):
    program = PROGRAM.format(soft=soft, hard=hard)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed in done.stdout
    assert ("ulimit" in done.stdout) == (hard < 256)
