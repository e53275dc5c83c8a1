"""A tiny training set and run configuration over the golden checkpoint, for end-to-end tests."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from tests.support.warm import run_verb

GOLDEN_HF = Path(__file__).parent.parent / "golden" / "ckpt" / "a_internlm2_vit300m"
TEXTS = ("a small red square", "two lines of text about nothing", "green", "the page has a number on it")


def make_data(folder: Path, *, num_samples: int = 24, seed: int = 0, num_sets: int = 1) -> Path:
    """Write images, annotations of text, single- and multi-image samples in equal data sets, and the meta json."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(6):
        size = (112 * int(generator.integers(1, 4)), 112 * int(generator.integers(1, 3)), 3)
        pixels = generator.integers(0, 256, size=size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    records = [_record(index, generator) for index in range(num_samples)]
    entries = {}
    for number in range(num_sets):
        share = records[number::num_sets]
        path = folder / ("train.jsonl" if number == 0 else f"train_{number}.jsonl")
        path.write_text("".join(json.dumps(record) + "\n" for record in share), encoding="utf-8")
        entry = {"annotation": str(path), "root": str(folder), "data_augment": False}
        name = "tiny" if number == 0 else f"tiny/{number}"
        entries[name] = {**entry, "repeat_time": 1, "length": len(share)}
    meta = folder / "meta.json"
    meta.write_text(json.dumps(entries))
    return meta


def _record(index: int, generator: np.random.Generator) -> dict:
    num_images = index % 4  # 0 is text only
    images = [f"{int(generator.integers(0, 6))}.png" for _ in range(num_images)]
    question = "".join("<image>\n" for _ in images) + "What is on the page?"
    answer = " ".join(TEXTS[int(i)] for i in generator.integers(0, len(TEXTS), size=1 + index % 3))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    image = {} if not images else {"image": images[0] if num_images == 1 else images}
    return {"id": f"s{index}", **image, "conversations": turns}


def import_golden(folder: Path, *, hf_folder: Path = GOLDEN_HF) -> Path:
    """A golden checkpoint, imported."""
    import_hf(hf_folder, folder)
    return folder


def run_yaml(path: Path, *, checkpoint: Path, meta: Path, run_dir: Path) -> Path:
    """A five-step float32 run; small enough for seconds on one core."""
    path.write_text(
        f"""
model: {{checkpoint: {checkpoint}}}
data:
  meta: {meta}
  max_pack_tokens: 640
  max_sample_tokens: 600
  max_dynamic_patch: 2
  loss_reduction: square
position: {{mode: v2pe_random}}
optim: {{steps: 5, global_batch_size: 2, lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.05}}
runtime: {{run_dir: {run_dir}, dtype: float32, tensorboard: false, seed: 3}}
"""
    )
    return path


def prepared(root: Path, *, run: str = "run", num_sets: int = 1, hf_folder: Path = GOLDEN_HF) -> Path:
    """A golden checkpoint, data, and the YAML file of a run in `root / run`, which is returned."""
    checkpoint = import_golden(root / "checkpoint", hf_folder=hf_folder)
    meta = make_data(root / "data", num_sets=num_sets)
    return run_yaml(root / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=root / run)


def train_command(config: Path, overrides: list[str], *, ranks: int) -> list[str]:
    """Command line of a run on `ranks` processes."""
    module = ["-m", "megatron_v2pe", "train", str(config), *overrides]
    if ranks == 1:
        return [sys.executable, *module]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, *module]


def train(config: Path, overrides: list[str], *, ranks: int = 1, timeout: float = 240) -> str:
    """Run to the end; returns stderr, raises with it when the run fails."""
    done = run_verb("train", config, *overrides, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def curve(run_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of metrics.jsonl."""
    return [(line["loss"], line["grad_norm"]) for line in metrics(run_dir)]


def metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl, of which none may be missing or double."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def back_to(run_dir: Path, name: str) -> None:
    """Make the step folder `name` the newest one of a run that has ended; steps after it are trained again."""
    checkpoints = run_dir / "checkpoints"
    latest = checkpoints / "latest"
    newest = latest.read_text().strip()
    assert newest != name, newest
    shutil.rmtree(checkpoints / newest)
    latest.write_text(name + "\n")
