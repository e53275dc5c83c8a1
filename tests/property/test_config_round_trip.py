"""Any valid configuration survives dump and load."""

import dataclasses
import typing

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_v2pe.config.load import dump_run_config, load_run_config
from megatron_v2pe.config.schema import (
    CurriculumStage,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PositionConfig,
    RunConfig,
    RuntimeConfig,
)

# Strings that YAML could mistake for something else.
TRICKY = [
    "",
    "null",
    "yes",
    "1",
    "1e-3",
    "~",
    "a: b",
    "#x",
    " lead",
    "- x",
    "[1]",
    "'q'",
    "caf\u00e9",
    "a\nb",
    "0x1F",
]
# Not drawn: what is refused (a null character), and paths that loading makes absolute (`~/`, `.`).
anything = st.text(st.characters(exclude_characters="$?\0", codec="utf-8"), max_size=8)
text = st.one_of(st.sampled_from(TRICKY), anything.filter(lambda drawn: not drawn.startswith(("~/", "."))))
positive = st.floats(1e-12, 1e3, allow_nan=False)


@st.composite
def configs(draw):
    starts = sorted(draw(st.sets(st.integers(1, 50), max_size=3)))
    stages = [CurriculumStage(from_step=at, max_sample_tokens=draw(st.integers(0, 9))) for at in [0, *starts]]
    mode = draw(st.sampled_from(typing.get_args(typing.get_type_hints(PositionConfig)["mode"])))
    tp = draw(st.integers(1, 8))
    return RunConfig(
        model=ModelConfig(checkpoint=draw(text), freeze_language=draw(st.booleans())),
        parallel=ParallelConfig(
            tp=tp, cp=draw(st.integers(1, 8)), sequence_parallel=tp > 1 and draw(st.booleans())
        ),
        data=DataConfig(meta=draw(text), curriculum=tuple(stages) if draw(st.booleans()) else ()),
        position=PositionConfig(mode=mode, stride=draw(st.integers(1, 256)) if mode == "v2pe_fixed" else 0),
        optim=OptimConfig(lr=draw(positive), eps=draw(positive), beta2=draw(st.floats(0, 0.999999))),
        runtime=RuntimeConfig(run_dir=draw(text), seed=draw(st.integers(0, 2**63))),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs())
def test_dump_then_load_is_identity(tmp_path, config):
    path = tmp_path / "run.yaml"
    path.write_bytes(dump_run_config(config).encode())
    assert load_run_config(path) == config
    assert dataclasses.asdict(load_run_config(path)) == dataclasses.asdict(config)
