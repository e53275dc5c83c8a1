"""Everything that one rank could have been given differently changes its facts, and the message names it.

Strategy: one change at a time, of every field of the configuration, every field of the architecture, every file that is
read, versions and environment; compared with the unchanged rank in process. Two real ranks: tests/distributed.
"""

import dataclasses
import json
import shutil

import pytest

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.load import known_keys, load_run_config
from megatron_v2pe.parallel.agreement import RankFacts, describe_differences
from megatron_v2pe.train.guards import rank_facts as module
from megatron_v2pe.train.guards.rank_facts import rank_facts
from tests.support import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder of a run's inputs: hf/, data/, run.yaml."""
    root = tmp_path_factory.mktemp("facts")
    shutil.copytree(tiny.GOLDEN_HF, root / "hf")
    make_inputs(root)
    return root


def make_inputs(root):
    meta = tiny.make_data(root / "data")
    (root / "run.yaml").write_text(
        f"model: {{hf_path: {root / 'hf'}}}\ndata: {{meta: {meta}}}\nruntime: {{run_dir: {root / 'run'}}}\n"
    )


def facts_of(root, *, config=None):
    config = config or load_run_config(root / "run.yaml")
    return rank_facts(config, read_architecture(root / "hf"))


@pytest.fixture(scope="module")
def usual(root):
    return facts_of(root)


def message(usual, other):
    ranks = [
        RankFacts(rank=rank, host=f"node{rank}", facts=facts) for rank, facts in enumerate((usual, other))
    ]
    return describe_differences(ranks)


def another(value):
    """A different value of the same kind; rules of the schema do not matter here."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (*value, 7) if isinstance(value, tuple) else f"{value}x"


def changed(config, key):
    section, name = key.split(".")
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section))})
    own = getattr(config, section)
    object.__setattr__(own, name, another(getattr(own, name)))
    return config


def test_every_field_of_the_configuration_counts(root, usual):
    keys = known_keys()
    config = load_run_config(root / "run.yaml")
    assert len(keys) >= 80
    for key in keys:
        facts = {**usual, **module.config_facts(changed(config, key))}
        assert f"rank 1 on node1: {key} is " in message(usual, facts), key


def test_every_field_of_the_architecture_counts(root, usual):
    arch = read_architecture(root / "hf")
    plain = dict(module._flat("config.json", dataclasses.asdict(arch)))
    assert len(plain) >= 25
    assert plain.items() <= usual.items()


def file_paths(root):
    return sorted(path for folder in ("hf", "data") for path in (root / folder).rglob("*") if path.is_file())


def test_every_file_that_is_read_counts(root, usual):
    paths = [path for path in file_paths(root) if path.suffix != ".py"]
    assert len(paths) >= 12
    for path in paths:
        content = path.read_bytes()
        spoiled = bytearray(content)
        spoiled[len(content) // 2] ^= 1 if path.suffix not in (".json", ".jsonl") else 0
        # Of texts a blank at the end, which no reader minds.
        path.write_bytes(bytes(spoiled) if spoiled != content else content + b" ")
        try:
            named = message(usual, facts_of(root))
        finally:
            path.write_bytes(content)
        what = {"train.jsonl": "data set tiny annotation content", "meta.json": "data.meta content"}
        assert what.get(path.name, path.name) in named, path
    assert message(usual, facts_of(root)) == ""


def test_a_picture_that_only_some_ranks_see_is_named(root, usual):
    path = root / "data" / "1.png"
    hidden = path.rename(path.with_name("hidden"))
    try:
        assert f"file {path} (data.meta) is no such file (rank 0 on node0: " in message(usual, facts_of(root))
    finally:
        hidden.rename(path)


def test_other_sources_and_repeats_of_the_data_are_named(root, usual, tmp_path):
    values = json.loads((root / "data" / "meta.json").read_text())
    values["tiny"]["repeat_time"] = 2
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps(values))
    config = load_run_config(root / "run.yaml", [f"data.meta={meta}"])
    named = message(usual, facts_of(root, config=config))
    assert "data.meta is " in named
    assert "data set tiny repeat_time (data.meta) is 2.0" in named


@pytest.mark.parametrize(
    "name", ["CUBLAS_WORKSPACE_CONFIG", "NVTE_FLASH_ATTN", "NCCL_ALGO", "NVIDIA_TF32_OVERRIDE"]
)
def test_environment_that_changes_numbers_counts(root, usual, monkeypatch, name):
    monkeypatch.setenv(name, "7")
    assert f"environment {name} is 7 (rank 0 on node0: " in message(usual, facts_of(root))


@pytest.mark.parametrize("package", ["torch", "megatron-core", "pillow", "tokenizers"])
def test_versions_count(root, usual, monkeypatch, package):
    original = module.version
    monkeypatch.setattr(module, "version", lambda name: "9.9" if name == package else original(name))
    assert f"{package} version is 9.9 (rank 0" in message(usual, facts_of(root))


def test_the_source_of_this_package_counts(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    first = module._source_digest(tmp_path)
    (tmp_path / "a.py").write_text("a = 2\n")
    assert module._source_digest(tmp_path) != first


def test_a_large_file_counts_by_size_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE_BYTES", 1000)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3 * 2**20))
    first = module.folder_facts(tmp_path)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert module.folder_facts(tmp_path) != first
