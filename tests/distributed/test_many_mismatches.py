"""More than 80 ways in which one of two real ranks was started differently, each refused by name before step 1.

Strategy: both ranks run in folders of their own, like nodes without a shared disk, with relative paths in their run
file; one field, file, version or environment variable differs at a time. One process at a time would take half an
hour, so the pairs of ranks are forked from a warm server.
"""

import json
import shutil

import pytest

from tests.support import tiny
from tests.support.warm import run_verb

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Every field that changes what a run computes or where its collectives are: an override that is valid by itself.
FIELDS = [
    "model.freeze_language=true",
    "model.freeze_projector=true",
    "model.recompute=full",
    "model.swiglu=plain",
    "model.loss_chunk_tokens=64",
    "vision.freeze=true",
    "vision.drop_path_rate=0.1",
    "vision.recompute=full",
    "vision.micro_batch_tiles=2",
    "vision.tile_multiple=2",
    "lora.language_rank=4",
    "lora.vision_rank=4",
    "lora.projector_rank=4",
    "parallel.attention_backend=native",
    "parallel.cp_comm_type=all_gather",
    "data.template=Hermes-2",
    "data.max_pack_tokens=700",
    "data.max_pack_tiles=64",
    "data.max_sample_tokens=500",
    "data.long_samples=split",
    "data.dynamic_image_size=false",
    "data.min_dynamic_patch=2",
    "data.max_dynamic_patch=3",
    "data.dynamic_max_patch=true",
    "data.use_thumbnail=false",
    "data.pad2square=true",
    "data.normalize_type=clip",
    "data.loss_reduction=token",
    "data.packing=release_greedy",
    "data.balance=false",
    "data.shuffle=false",
    "data.num_workers=1",
    "data.prefetch_mib=512",
    "data.max_bad_samples=0.5",
    "data.max_image_pixels=1000000",
    "data.exif=apply",
    "data.alpha=white",
    "data.control_tokens=refuse",
    "data.min_num_frame=2",
    "data.max_num_frame=8",
    "data.video_sampling=middle",
    "data.max_video_seconds=60",
    "position.mode=default",
    "optim.steps=6",
    "optim.global_batch_size=4",
    "optim.lr=2e-3",
    "optim.lr_vision=1e-4",
    "optim.lr_projector=1e-4",
    "optim.lr_language=1e-4",
    "optim.vision_layer_decay=0.9",
    "optim.min_lr=1e-5",
    "optim.warmup_steps=1",
    "optim.weight_decay=0",
    "optim.decay=release",
    "optim.beta1=0.8",
    "optim.beta2=0.99",
    "optim.eps=1e-6",
    "optim.clip_grad=0.5",
    "checkpoint.save_every=2",
    "checkpoint.keep=3",
    "checkpoint.async_save=false",
    "checkpoint.verify=full",
    "checkpoint.fallback=true",
    "checkpoint.allow_changed_data=true",
    "runtime.seed=4",
    "runtime.dtype=bfloat16",
    "runtime.log_every=2",
    "runtime.max_bad_steps=5",
    "runtime.max_loss_ratio=8",
    "runtime.loss_window=16",
    "runtime.tensorboard=true",
    "runtime.profile_steps=3",
    "runtime.elementwise=eager",
]
VERSIONS = (
    "torch",
    "megatron-core",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "megatron_v2pe",
)
ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVTE_FLASH_ATTN",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "MKL_CBWR",
)
# Files of a Hugging Face folder and of the data, of which rank 1 has another copy. Of a checkpoint every file has a
# hash, by which a rank refuses another one itself.
FILES = [
    "hf/config.json",
    "hf/model.safetensors",
    "hf/tokenizer.model",
    "hf/tokenizer_config.json",
    "hf/special_tokens_map.json",
    "hf/generation_config.json",
    "data/train.jsonl",
    "data/meta.json",
    "data/0.png",
    "data/5.png",
]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two equal folders with relative paths in their run files."""
    first = tmp_path_factory.mktemp("nodes") / "first"
    first.mkdir()
    config = tiny.prepared(first)
    config.write_text(config.read_text().replace(f"{first}/", ""))
    meta = first / "data" / "meta.json"
    entries = json.loads(meta.read_text())
    for entry in entries.values():
        entry.update(annotation="train.jsonl", root="data")
    meta.write_text(json.dumps(entries))
    shutil.copytree(tiny.GOLDEN_HF, first / "hf")
    second = first.with_name("second")
    shutil.copytree(first, second)
    return first, second


def refused(nodes, tmp_path, *overrides, **of_rank_1):
    """Both ranks start, rank 1 with differences; the message of the refusal."""
    own = {"folder": str(nodes[1]), **of_rank_1}
    done = run_verb(
        "train",
        "run.yaml",
        f"runtime.run_dir={tmp_path / 'run'}",
        "runtime.hang_timeout_s=200",
        *overrides,
        ranks=2,
        entry="tests.support.unequal:main",
        variables={"V2PE_TEST_OF_RANK_1": json.dumps(own)},
        timeout=260,
        folder=nodes[0],
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "ranks were not started alike: rank 1 on " in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    return done.stderr


@pytest.mark.parametrize("override", FIELDS)
def test_another_field(nodes, tmp_path, override):
    assert f"{override.partition('=')[0]} is " in refused(nodes, tmp_path, arguments=[override])


@pytest.mark.parametrize("package", VERSIONS)
def test_another_version(nodes, tmp_path, package):
    assert f"{package} version is 9.9.9 (rank 0" in refused(nodes, tmp_path, versions={package: "9.9.9"})


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_another_environment(nodes, tmp_path, name):
    assert f"environment {name} is 0 (rank 0" in refused(nodes, tmp_path, environment={name: "0"})


@pytest.mark.parametrize("name", FILES)
def test_another_copy_of_a_file(nodes, tmp_path, name):
    path = nodes[1] / name
    content = path.read_bytes()
    path.write_bytes(
        content + b" " if path.suffix in (".json", ".jsonl") else content[:-1] + bytes([content[-1] ^ 1])
    )
    try:
        message = refused(nodes, tmp_path, "model.checkpoint=''", "model.hf_path=hf")
    finally:
        path.write_bytes(content)
    named = {"train.jsonl": "data set tiny annotation content", "meta.json": "data.meta content"}
    assert named.get(path.name, path.name) in message


def test_there_are_at_least_eighty():
    assert len({*FIELDS, *VERSIONS, *ENVIRONMENT, *FILES}) >= 80
