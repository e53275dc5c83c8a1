"""`main` on ranks of which rank 1 was started differently: V2PE_TEST_OF_RANK_1, a json object or list, says how.

["optim.lr=2e-3"]                       arguments after the others
{"arguments": [...], "environment": {name: value}, "versions": {package: version}, "folder": another working folder}
"""

import json
import os
from collections.abc import Sequence

from megatron_v2pe.cli import main as cli


def main(arguments: Sequence[str]) -> int:
    given = json.loads(os.environ.get("V2PE_TEST_OF_RANK_1", "[]")) if os.environ.get("RANK") == "1" else []
    own = {"arguments": given} if isinstance(given, list) else given
    os.environ.update(own.get("environment", {}))
    if "folder" in own:
        os.chdir(own["folder"])
    if "versions" in own:
        _other_versions(own["versions"])
    return cli.main([*arguments, *own.get("arguments", [])])


def _other_versions(versions: dict[str, str]) -> None:
    from megatron_v2pe.train.guards import rank_facts

    original = rank_facts.version
    rank_facts.version = lambda package: versions.get(package) or original(package)
