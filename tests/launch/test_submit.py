"""Batch scripts of every recipe, letter by letter; mistakes in cluster files; what is asked before a job is submitted.

The expected scripts lie in golden/; after a wanted change write them anew: python -m tests.launch.test_submit
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch import submit
from launch.cluster import LaunchError, limit_seconds, read_cluster

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
H100, A100, CPU = (f"launch/clusters/{name}.yaml" for name in ("h100_pyxis", "a100_apptainer", "cpu_venv"))
RECIPES = {
    "internvl2_2b_32k": (H100, 4),
    "internvl2_2b_256k": (H100, 4),
    "internvl2_8b_256k": (H100, 4),
    "internvl2_26b_256k": (H100, 8),
    "internvl2_76b_256k": (H100, 32),
    "internvl3_2b_32k": (H100, 1),
    "internvl3_2b_256k": (H100, 1),
    "internvl3_5_8b_32k": (H100, 1),
    "internvl3_5_8b_256k": (H100, 4),
    "internvl3_5_20b_a4b_32k": (H100, 2),
    "internvl3_5_20b_a4b_256k": (H100, 4),
    "internvl3_5_30b_a3b_32k": (H100, 4),
    "internvl3_5_30b_a3b_256k": (H100, 8),
}
# Published sizes by the names of their recipes.
SIZES = {
    "internvl3_2b": "3-2B",
    "internvl3_5_8b": "3.5-8B",
    "internvl3_5_20b_a4b": "3.5-20B-A4B",
    "internvl3_5_30b_a3b": "3.5-30B-A3B",
}
# Without SLURM, on GPUs of one machine: recipe -> GPUs, GB of one.
LOCAL_RECIPES = {
    "internvl2_2b_lora_24gb": (1, 24),
    "internvl2_2b_frozen_tower_80gb": (1, 80),
    "internvl2_8b_full_8x80gb": (8, 80),
}
RUN_32K = ["train", "launch/recipes/internvl2_2b_32k.yaml"]
CASES = {
    **{
        name: [cluster, "--nodes", str(nodes), "train", f"launch/recipes/{name}.yaml"]
        for name, (cluster, nodes) in RECIPES.items()
    },
    "evaluate_2b_1m": [H100, "@launch/recipes/evaluate_2b_1m.args"],
    "apptainer": [
        A100,
        "--nodes",
        "8",
        "--time",
        "01:00:00",
        "train",
        "launch/recipes/internvl2_2b_32k.yaml",
    ],
    "array": [
        H100,
        "--nodes",
        "4",
        "--array",
        "1-5%1",
        "--name",
        "long run",
        "train",
        "launch/recipes/internvl2_2b_256k.yaml",
        "runtime.run_dir=/runs/two words",
    ],
    "venv": [CPU, "--nodes", "2", "train", "launch/recipes/internvl2_2b_32k.yaml", "optim.steps=3"],
}


def size_of(recipe):
    return SIZES.get(recipe.rpartition("_")[0], recipe.split("_")[1].upper())


def rendered(arguments):
    """The script as --dry-run prints it, without this clone's place."""
    done = subprocess.run(
        [sys.executable, "launch/submit.py", arguments[0], "--dry-run", "--force", *arguments[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.replace(str(ROOT), "PROJECT")


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_the_recorded_script(name):
    assert rendered(CASES[name]) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("path", sorted([*GOLDEN.glob("*.sbatch"), ROOT / "launch" / "node_entry.sh"]))
def test_scripts_are_valid_shell(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool, "shellcheck is in the extra dev: bash tests/run.sh installs it"
    subprocess.run([tool, "--shell=bash", str(path)], check=True)


def test_every_recipe_is_tested():
    found = {path.stem for path in (ROOT / "launch" / "recipes").iterdir()}
    assert found == set(RECIPES) | set(LOCAL_RECIPES) | {"evaluate_2b_1m"}


@pytest.mark.parametrize("name", LOCAL_RECIPES)
def test_recipes_for_one_machine_fit_their_gpus(name):
    gpus, memory = LOCAL_RECIPES[name]
    command = [
        sys.executable,
        "-m",
        "megatron_v2pe",
        "plan",
        f"launch/recipes/{name}.yaml",
        "--gpus",
        str(gpus),
    ]
    command += ["--gpu-memory", str(memory), "--arch", name.split("_")[1].upper()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_in_a_recipe_is_the_tested_one(name):
    text = (ROOT / "launch" / "recipes" / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^#   python launch/submit\.py (.*)$", text, flags=re.MULTILINE)
    given, tested = submit.parse(command.split()), submit.parse(CASES[name])
    for field in ("cluster", "nodes", "verb", "arguments"):
        assert getattr(given, field) == getattr(tested, field)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_for_their_models(name):
    from megatron_v2pe.config.arch.architecture import parse_architecture
    from megatron_v2pe.config.arch.published import PUBLISHED
    from megatron_v2pe.config.load import load_run_config
    from megatron_v2pe.config.validate import validate

    config = load_run_config(str(ROOT / "launch" / "recipes" / f"{name}.yaml"), [])
    cluster, nodes = RECIPES[name]
    world_size = nodes * read_cluster(ROOT / cluster).ranks_per_node
    validate(config, parse_architecture(PUBLISHED[size_of(name)]), world_size)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_their_gpus(name):
    nodes = RECIPES[name][1]
    command = [sys.executable, "-m", "megatron_v2pe", "plan", f"launch/recipes/{name}.yaml"]
    command += ["--gpus", str(8 * nodes), "--gpu-memory", "80", "--arch", size_of(name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: a\n", "unknown key 'partitoin'; did you mean 'partition'?"),
        ("ranks_per_node: 8\n", "key 'partition' is missing"),
        ("partition: a\nranks_per_node: x\n", "ranks_per_node is 'x', but must be int"),
        ("partition: a\ntime: 24:00:00\n", "time is 86400, but must be str; quote it"),
        ("partition: a\ncontainer: {runtime: docker}\n", "container.runtime is 'docker'"),
        ("partition: a\ncontainer: {runtime: pyxis}\n", "container.image is empty"),
        ("partition: a\nranks_per_node: 0\n", "must be at least 1"),
        ("partition: a\nenv: {A-B: c}\n", "env.A-B: not a name"),
        ("partition: a\ntime: 1h\n", "time is '1h', but must be a time limit such as 24:00:00"),
        ("- a\n", "must hold keys and values"),
        ("a: [\n", "not YAML"),
        ("[" * 5000, "not YAML (nested too deep)"),
        ("partition: a\nx: 2024-99-99\n", "not YAML (month must be"),
        ("partition: !!python/object/apply:os.system [echo]\n", "not YAML"),
        ("partition: a\ngpus_per_node: -1\n", "gpus_per_node is -1, but must be at least 0"),
        ("partition: a\nenv: {A: }\n", "env.A is None, but must be a text or a number; quote it"),
        ("partition: a\nenv: {A: yes}\n", "env.A is True, but must be a text or a number; quote it"),
    ],
)
def test_mistakes_in_a_cluster_file(tmp_path, text, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(LaunchError, match=re.escape(message)) as error:
        read_cluster(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"partition: caf\xe9\n")
    with pytest.raises(LaunchError, match=r"a\.yaml: not UTF-8 text .* at byte 14"):
        read_cluster(path)
    with pytest.raises(LaunchError, match=r"a\.yaml: not UTF-8 text"):
        submit.run_folder("train", [str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml", "train", "a.yaml"], "none.yaml: No such file"),
        ([CPU, "train", "none.yaml"], "none.yaml: No such file"),
        ([CPU, "train"], "give the run's YAML file"),
        ([CPU, "evaluate", "ckpt"], "give --out"),
        ([CPU, "--nodes", "0", "train", "a.yaml"], "--nodes is 0"),
        ([CPU, "--max-restarts", "-1", "train", "a.yaml"], "--max-restarts is -1"),
        ([CPU, "--time", "soon", *RUN_32K], "--time is 'soon', but must be a time limit"),
        (
            [CPU, "--time", "5", *RUN_32K],
            "--warn-seconds is 300, but the time limit is 5: the job would be asked to",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert submit.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("01:00:05", 3605),
        ("2-0", 172800),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert limit_seconds(text, where="--time") == seconds


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for sbatch that records what it was given."""
    tool = tmp_path / "bin" / "sbatch"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "Submitted batch job 7: $1"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return tmp_path / "run"


def big_run(folder):
    """A run that fits no GPU: 76B on one node."""
    path = folder.parent / "run.yaml"
    text = (ROOT / "launch" / "recipes" / "internvl2_76b_256k.yaml").read_text()
    path.write_text(text.replace("pp: 4, vpp: 2, cp: 8", "pp: 1, vpp: 1, cp: 1"))
    return [str(path), f"runtime.run_dir={folder}"]


def test_submitting_keeps_the_script_in_the_run_folder(sbatch, capsys):
    run = ["launch/recipes/internvl2_2b_32k.yaml", f"runtime.run_dir={sbatch}"]
    assert submit.main([CPU, "train", *run]) == 0
    assert capsys.readouterr().out == f"Submitted batch job 7: {sbatch}/job.sbatch\n"
    assert f"run_dir={sbatch}" in (sbatch / "job.sbatch").read_text()


def test_a_run_folder_that_is_in_use_is_reported_at_once(sbatch, capsys):
    run = [*RUN_32K, f"runtime.run_dir={sbatch}"]
    assert submit.main([CPU, *run]) == 0
    assert capsys.readouterr().err == ""
    (sbatch / "job.lock").write_text("6 node7 2026-01-01T00:00:00\n")
    assert submit.main([CPU, *run]) == 0
    assert "is in use: 6 node7 2026-01-01T00:00:00; the new job is refused if" in capsys.readouterr().err


def test_a_run_that_cannot_be_planned_is_refused_without_force(sbatch, capsys):
    run = big_run(sbatch)
    assert submit.main([H100, "train", *run]) == 2
    assert "plan refuses the run on 8 GPUs" in capsys.readouterr().err
    assert not sbatch.exists()
    assert submit.main([H100, "--force", "train", *run]) == 0
    assert "submitting although plan says" in capsys.readouterr().err


def test_a_dry_run_refuses_what_submitting_refuses(sbatch, capsys):
    assert submit.main([H100, "--dry-run", "train", *big_run(sbatch)]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("#!/usr/bin/env bash")
    assert "plan refuses the run on 8 GPUs" in shown.err


def test_a_run_file_of_the_callers_folder_is_planned(sbatch, tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "launch" / "recipes" / "internvl2_2b_32k.yaml", tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert submit.main([str(ROOT / H100), "--force", "train", "mine.yaml", f"runtime.run_dir={sbatch}"]) == 0
    assert (
        "/InternVL2-2B/hf/config.json does not exist (yet)" in capsys.readouterr().err
    )  # not: no such run file


def test_a_run_folder_that_cannot_be_written(sbatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert submit.main([CPU, "--dry-run", *RUN_32K, f"runtime.run_dir={tmp_path}/file/run"]) == 2
    assert "/file/run: cannot be written (Not a directory)" in capsys.readouterr().err
    assert submit.main([CPU, "--dry-run", *RUN_32K, f"runtime.run_dir={tmp_path}/new/run"]) == 0
    assert not (tmp_path / "new").exists()
    assert submit.main([CPU, *RUN_32K, f"runtime.run_dir={tmp_path}/file/run"]) == 2
    assert (
        "/file/run: cannot be written (Not a directory); choose another run folder" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "mount",
    ["$(touch pwned)", "`touch pwned`", 'a"; touch pwned; "', "a,b", "a\nb", "a\\b", "${x:-$(id)}", "$"],
)
def test_a_mount_that_a_shell_would_run_is_refused(tmp_path, mount):
    container = {"runtime": "pyxis", "image": "i.sqsh", "mounts": [mount]}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"partition": "p", "container": container}))
    with pytest.raises(LaunchError, match=r"container\.mounts"):
        read_cluster(path)


def test_mounts_may_name_variables_and_two_places(tmp_path):
    mounts = ["/data", "/scratch/$USER:/scratch", "${HOME}/models:/models", "/a b"]
    path = tmp_path / "c.yaml"
    path.write_text(
        json.dumps({"partition": "p", "container": {"runtime": "pyxis", "image": "i", "mounts": mounts}})
    )
    assert read_cluster(path).container.mounts == tuple(mounts)


LEAVES_ITS_LINE = "a\ntouch pwned\n#"


@pytest.mark.parametrize("key", ["partition", "account", "qos"])
def test_a_cluster_file_cannot_add_lines_to_the_script(tmp_path, key):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"partition": "p", key: LEAVES_ITS_LINE}))
    with pytest.raises(LaunchError, match=f"{key} is .* one line"):
        read_cluster(path)
    path.write_text(json.dumps({"partition": "p", "sbatch": [LEAVES_ITS_LINE]}))
    with pytest.raises(LaunchError, match=r"sbatch is .* one line"):
        read_cluster(path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--name", LEAVES_ITS_LINE, *RUN_32K], "job's name"),
        (["--array", LEAVES_ITS_LINE, *RUN_32K], "--array"),
        ([*RUN_32K, f"runtime.run_dir={LEAVES_ITS_LINE}"], "job's name|run folder"),
        (["--name", "n", *RUN_32K, f"runtime.run_dir={LEAVES_ITS_LINE}"], "the run folder"),
        (["evaluate", "ckpt", "--out", LEAVES_ITS_LINE], "job's name|run folder"),
    ],
)
def test_a_command_line_cannot_add_lines_to_the_script(arguments, named, capsys):
    assert submit.main([CPU, "--dry-run", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(named, shown.err)


@pytest.mark.parametrize(
    "folder",
    ["", "'a b'", '"a"', "runs/${oc.env:USER}", "a\\b", "-a", " a", "a #b", "null", "[a]", "{a: b}", "yes"],
)
def test_a_run_folder_that_train_or_sbatch_would_read_otherwise_is_refused(folder, capsys):
    """OmegaConf fills ${...} in, YAML drops quotes and comments; the script would lock another folder than train's."""
    assert submit.main([CPU, "--dry-run", *RUN_32K, f"runtime.run_dir={folder}"]) == 2
    assert (
        f"runtime.run_dir is {folder!r}, but the run folder must be a path as it is"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runtime: {run_dir: }", "runtime.run_dir is not given"),
        ("runtime: 5", "runtime.run_dir is not given"),
        ("- runtime", "runtime.run_dir is not given"),
        ("runtime: {run_dir: [a]}", "runtime.run_dir is ['a'], but the run folder must be"),
        ("runtime: {run_dir: 'a/${x}'}", "without ${; give runtime.run_dir=..."),
        ("[" * 5000, "nested too deep"),
    ],
)
def test_a_run_file_without_a_plain_run_folder_is_refused(text, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert submit.main([CPU, "--dry-run", "train", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_home_and_numbers_are_folders_as_train_reads_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert submit.run_folder("train", ["a.yaml", "runtime.run_dir=~/runs/a"]) == "/home/me/runs/a"
    assert submit.run_folder("train", ["a.yaml", "runtime.run_dir=5"]) == "5"
    assert submit.run_folder("train", ["a.yaml", "runtime.run_dir=2024-01-01"]) == "2024-01-01"


def test_a_percent_sign_of_the_run_folder_is_none_of_sbatchs_patterns(tmp_path, capsys):
    assert submit.main([CPU, "--dry-run", *RUN_32K, f"runtime.run_dir={tmp_path}/50%j"]) == 0
    assert f"#SBATCH --output={tmp_path}/50%%j/slurm-%j.log" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["a,/etc:/etc", "b:/x"])
def test_a_run_folder_that_a_list_of_mounts_would_split_is_refused(folder, tmp_path, capsys):
    assert submit.main([H100, "--dry-run", "--force", *RUN_32K, f"runtime.run_dir={tmp_path}/{folder}"]) == 2
    assert "is mounted into the container" in capsys.readouterr().err
    assert submit.main([CPU, "--dry-run", *RUN_32K, f"runtime.run_dir={tmp_path}/{folder}"]) == 0


def test_the_script_is_submitted_by_its_whole_path(tmp_path, sbatch, monkeypatch):
    """A relative one may look like an option of sbatch's."""
    monkeypatch.chdir(tmp_path)
    assert submit.submit("#!/bin/sh\n", "run") == f"Submitted batch job 7: {tmp_path}/run/job.sbatch"


def test_the_script_in_the_run_folder_is_for_its_owner_only(tmp_path, sbatch):
    submit.submit("#!/bin/sh\n", str(tmp_path / "run"))
    assert stat.S_IMODE((tmp_path / "run" / "job.sbatch").stat().st_mode) == 0o600


if __name__ == "__main__":
    for case, given in CASES.items():
        (GOLDEN / f"{case}.sbatch").write_text(rendered(given))
