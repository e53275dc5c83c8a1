"""config.load: what is accepted, what is refused, and in which words."""

import pytest

from megatron_v2pe.config.load import dump_run_config, known_keys, load_run_config
from megatron_v2pe.config.schema import CurriculumStage, RunConfig
from megatron_v2pe.core.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_an_empty_file_gives_the_defaults(write):
    assert load_run_config(write("")) == RunConfig()


def test_file_then_overrides_in_order(write):
    path = write("optim: {lr: 5e-6, steps: 10}\nparallel:\n  tp: 2\n")
    config = load_run_config(path, ["optim.steps=20", "optim.steps=30", "runtime.tensorboard=false"])
    assert (config.optim.lr, config.optim.steps, config.parallel.tp) == (5e-6, 30, 2)
    assert config.runtime.tensorboard is False


def test_numbers_with_an_exponent_are_numbers(write):
    config = load_run_config(write("optim:\n  lr: 1e-3\n"), ["optim.eps=1e-10"])
    assert (config.optim.lr, config.optim.eps) == (1e-3, 1e-10)


@pytest.mark.parametrize(("name", "ours"), [("v2pe_rnd", "v2pe_random"), ("v2pe_random", "v2pe_random")])
def test_the_release_names_of_modes(write, name, ours):
    assert load_run_config(write(f"position: {{mode: {name}}}")).position.mode == ours
    assert load_run_config(write(""), [f"position.mode={name}"]).position.mode == ours


def test_the_release_name_of_the_fixed_mode(write):
    config = load_run_config(write("position: {mode: v2pe_fix, stride: 64}"))
    assert (config.position.mode, config.position.stride) == ("v2pe_fixed", 64)


def test_curriculum_from_file_and_override(write):
    path = write("data:\n  curriculum:\n  - {from_step: 0, max_sample_tokens: 24}\n  - {from_step: 9}\n")
    stages = (CurriculumStage(from_step=0, max_sample_tokens=24), CurriculumStage(from_step=9))
    assert load_run_config(path).data.curriculum == stages
    config = load_run_config(path, ["data.curriculum=[{max_sample_tokens: 7}]"])
    assert config.data.curriculum == (CurriculumStage(max_sample_tokens=7),)


def test_paths_keep_spaces_and_equals_signs(write):
    config = load_run_config(write(""), ["data.meta=/a b/c=d.json"])
    assert config.data.meta == "/a b/c=d.json"


def test_interpolation_inside_the_file(write):
    config = load_run_config(
        write("data: {max_pack_tokens: 64, max_sample_tokens: '${data.max_pack_tokens}'}")
    )
    assert config.data.max_sample_tokens == 64


REFUSED = [
    (
        "data: {max_pack_token: 3}",
        r"run.yaml: unknown key data.max_pack_token; did you mean data.max_pack_tokens\?",
    ),
    ("dat: {max_pack_tokens: 3}", r"unknown key dat; did you mean data\?"),
    ("max_pack_tokens: 3", r"unknown key max_pack_tokens; did you mean data.max_pack_tokens\?"),
    ("model: {lr: 3}", r"unknown key model.lr; did you mean optim.lr\?"),
    ("zzzzzz: 3", r"unknown key zzzzzz; docs/configuration.md lists all keys"),
    ("parallel: {tp: two}", r"run.yaml: parallel.tp: Value 'two'"),
    ("parallel: {tp: 1.5}", r"parallel.tp: Value '1.5'"),
    ("parallel: {tp: null}", r"parallel.tp: Incompatible value 'None'"),
    ("parallel: {tp: {x: 1}}", r"parallel.tp: Value"),
    ("data: {shuffle: perhaps}", r"data.shuffle: Value 'perhaps' is not a valid bool"),
    ("data: {meta: [1]}", r"data.meta: Cannot convert"),
    ("position: {mode: bogus}", r"position.mode: Invalid value 'bogus', expected one of .*v2pe_fixed"),
    ("position: {mode: [a]}", r"position.mode: "),
    ("parallel: 3", r"parallel is a section and needs keys below it, such as parallel.tp"),
    ("position: 3", r"position is a section"),
    ("data:", r"data is a section"),
    ("- a\n- b", r"must hold sections"),
    ("a: 1\nb: 2: 3", r"run.yaml:2: not valid YAML"),
    ("data: {meta: a}\ndata: {meta: b}", r"run.yaml:2: not valid YAML \(found duplicate key"),
    ("data: {meta: '${nope.here}'}", r"data.meta: Interpolation key 'nope.here' not found"),
    ("data:\n  meta: ???", r"data.meta is '\?\?\?'; give a value"),
    ("data: {curriculum: 3}", r"data.curriculum is 3, but must be a list of stages"),
    ("data: {curriculum: [3]}", r"data.curriculum\[0\] is 3, but needs keys"),
    (
        "data: {curriculum: [{from_stp: 3}]}",
        r"unknown key data.curriculum\[0\].from_stp; did you mean .*from_step\?",
    ),
    ("data: {curriculum: [{from_step: x}]}", r"data.curriculum\[0\].from_step: Value 'x'"),
    ("data: {curriculum: [{from_step: 5}]}", r"data.curriculum is \[5\], but from_step must start at 0"),
    ("position: {mode: v2pe_fixed}", r"run.yaml: position.stride is 0, but v2pe_fixed needs a stride"),
    ("optim: {lr: -1}", r"optim.lr is -1.0, but must be positive"),
    ("optim: {lr: .inf}", r"optim.lr is inf, but must be finite"),
    ("runtime: {max_loss_ratio: .nan}", r"runtime.max_loss_ratio is nan, but must be"),
    ("data: {max_video_seconds: .inf}", r"data.max_video_seconds is inf, but must be finite"),
    ("optim: {batch_rampup: abc}", r"optim.batch_rampup is 'abc', but must be a list of whole numbers"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_refused_files(write, text, words):
    with pytest.raises(ConfigError, match=words):
        load_run_config(write(text))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tp", "'parallel.tp' is not an override; write section.key=value"),
        ("=3", "'=3' is not an override"),
        ("optim.lrr=3", r"command line: unknown key optim.lrr; did you mean optim.lr\?"),
        ("optim.steps=many", "command line: optim.steps: Value 'many'"),
        ("optim=3", "command line: optim is a section"),
        ("data.curriculum=[{", "command line: the value of .* is not valid YAML"),
        ("optim.lr=0", "run.yaml with overrides: optim.lr is 0.0, but must be positive"),
    ],
)
def test_refused_overrides(write, override, words):
    with pytest.raises(ConfigError, match=words):
        load_run_config(write(""), [override])


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read \(No such file"):
        load_run_config(tmp_path / "none.yaml")


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml.*not"):
        load_run_config(tmp_path / "run.yaml")


def test_known_keys_are_full_names():
    keys = known_keys()
    assert keys[0] == "model.checkpoint"
    assert len(keys) == len(set(keys)) > 40


def test_dump_is_yaml_of_everything(write):
    text = dump_run_config(RunConfig())
    assert all(f"  {key.partition('.')[2]}:" in text for key in known_keys())
