"""docs/tutorial.md, block by block, in an empty folder, as a reader would type it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_every_block_runs_and_the_model_goes_home(tmp_path):
    page = (CLONE / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 7
    tools = {**os.environ, "CLONE": str(CLONE), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CLONE)}
    tools["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{tools['PATH']}"
    script = "set -eu\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=tools,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.rstrip().endswith("equal")  # `verify`, the last command
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert (tmp_path / "curves.png").is_file()
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert {name: each["questions"] for name, each in scores.items()} == {"1": 10, "4": 10}
    assert all(each["errors"] == 0 for each in scores.values())
