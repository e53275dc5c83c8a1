"""config.validate: for each rule one configuration that is refused and one that passes."""

import dataclasses

import pytest

from megatron_v2pe.config.arch.architecture import ExpertsArchitecture, parse_architecture
from megatron_v2pe.config.schema import (
    CurriculumStage,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PositionConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.config.sections.moe import MoEConfig
from megatron_v2pe.config.validate import validate
from megatron_v2pe.core.errors import ConfigError

# 8 heads, 4 KV heads, 6 layers, 16 visual tokens per tile (8x8 patches, halved twice).
ARCH = parse_architecture(
    {
        "model_type": "internvl_chat",
        "force_image_size": 112,
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "patch_size": 14,
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "hidden_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "vocab_size": 128,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
    }
)
BASE = RunConfig(
    model=ModelConfig(checkpoint="ckpt"),
    data=DataConfig(meta="meta.json"),
    runtime=RuntimeConfig(run_dir="run"),
)


def run(world_size=1, **sections):
    validate(dataclasses.replace(BASE, **sections), ARCH, world_size)


def test_the_base_passes():
    assert ARCH.tokens_per_tile == 16
    run()


@pytest.mark.parametrize(
    ("section", "value", "name"),
    [
        ("model", ModelConfig(), "model.checkpoint"),
        ("data", DataConfig(), "data.meta"),
        ("runtime", RuntimeConfig(), "runtime.run_dir"),
    ],
)
def test_required_fields(section, value, name):
    with pytest.raises(ConfigError, match=f"{name} is empty, but every run needs it.*set {name}=PATH"):
        run(**{section: value})


def test_weights_come_from_one_place():
    run(model=ModelConfig(hf_path="InternVL2-2B"))
    with pytest.raises(
        ConfigError, match=r"model\.checkpoint is 'a' and model\.hf_path is 'b', but weights come from"
    ):
        ModelConfig(checkpoint="a", hf_path="b")


def test_warmup_leaves_a_step_for_the_decay():
    OptimConfig(steps=2, warmup_steps=1)
    with pytest.raises(
        ConfigError, match=r"optim\.warmup_steps is 2, but must be less than optim\.steps = 2"
    ):
        OptimConfig(steps=2, warmup_steps=2)


def test_kv_heads_by_tp():
    """More ranks than KV heads share them, if they are a multiple; their rows fit no adapter."""
    run(4, parallel=ParallelConfig(tp=4))
    run(8, parallel=ParallelConfig(tp=8))
    with pytest.raises(
        ConfigError, match=r"lora\.language_rank is 4 and parallel\.tp is 8, .* the 4 KV heads"
    ):
        run(8, parallel=ParallelConfig(tp=8), lora=LoRAConfig(language_rank=4))
    three = dataclasses.replace(
        ARCH, language=dataclasses.replace(ARCH.language, num_kv_heads=3, num_heads=12)
    )
    with pytest.raises(
        ConfigError, match=r"parallel.tp is 2, but must divide the 3 KV heads.*possible: 1, 3$"
    ):
        validate(dataclasses.replace(BASE, parallel=ParallelConfig(tp=2)), three, 2)


EXPERTS = ExpertsArchitecture(
    num_experts=6,
    top_k=2,
    ffn_size=32,
    is_sparse=(True,) * 6,
    normalizes_top_k=True,
    aux_loss_coefficient=0.001,
)


def run_experts(world_size=1, **sections):
    language = dataclasses.replace(ARCH.language, architecture="Qwen3MoeForCausalLM", experts=EXPERTS)
    validate(dataclasses.replace(BASE, **sections), dataclasses.replace(ARCH, language=language), world_size)


@pytest.mark.parametrize(
    ("world_size", "sections", "words"),
    [
        (
            4,
            {"parallel": ParallelConfig(ep=4)},
            r"parallel\.ep is 4, but must divide the 6 experts.*1, 2, 3, 6",
        ),
        (
            3,
            {"parallel": ParallelConfig(ep=2)},
            r"a pipeline stage has 3 ranks .* 2 x 1 = 2 must divide them",
        ),
        (
            2,
            {"parallel": ParallelConfig(tp=2)},
            r"with experts tensor parallel ranks must hold different tokens",
        ),
        (
            1,
            {"model": ModelConfig(checkpoint="c", recompute="full", mlp_chunks=2)},
            "mlp_chunks is 2, but the load",
        ),
    ],
)
def test_experts_by_layout(world_size, sections, words):
    with pytest.raises(ConfigError, match=words):
        run_experts(world_size, **sections)


def test_experts_that_fit():
    run_experts(
        4,
        parallel=ParallelConfig(tp=2, ep=2, etp=2, sequence_parallel=True),
        optim=OptimConfig(global_batch_size=2),
    )
    run_experts(2, parallel=ParallelConfig(cp=2, ep=2), moe=MoEConfig(z_loss=0.1))


def test_settings_of_experts_are_for_models_that_have_them():
    with pytest.raises(ConfigError, match=r"parallel\.ep is 2, but InternLM2ForCausalLM has no experts"):
        run(2, parallel=ParallelConfig(ep=2))
    with pytest.raises(ConfigError, match="section moe is set, but InternLM2ForCausalLM has no experts"):
        run(moe=MoEConfig(aux_loss=0.1))
    with pytest.raises(ConfigError, match=r"moe\.z_loss is -1, but must be >= 0"):
        MoEConfig(z_loss=-1)
    with pytest.raises(ConfigError, match=r"parallel\.etp is 2 with parallel\.ep 1 and parallel\.tp 1"):
        ParallelConfig(etp=2)


def test_heads_by_tp():
    with pytest.raises(ConfigError, match=r"parallel.tp is 3, but must divide the 8 attention heads"):
        run(3, parallel=ParallelConfig(tp=3))


def test_feed_forward_by_tp():
    arch = dataclasses.replace(ARCH, language=dataclasses.replace(ARCH.language, ffn_size=97))
    config = dataclasses.replace(BASE, parallel=ParallelConfig(tp=2))
    with pytest.raises(ConfigError, match=r"must divide the 97 feed-forward channels"):
        validate(config, arch, 2)
    validate(config, ARCH, 2)


@pytest.mark.parametrize(
    ("cp_comm_type", "backend", "reason"),
    [
        ("all_gather", "transformer_engine", "gathers keys of unpacked sequences only.*backend to native"),
        ("a2a+p2p", "transformer_engine", "refuses two levels for packed"),
        ("a2a+p2p", "native", "native attention has one level"),
        ("a2a+p2p", "auto", "one level of context parallelism"),
    ],
)
def test_comm_types_no_back_end_has(cp_comm_type, backend, reason):
    parallel = ParallelConfig(cp=2, cp_comm_type=cp_comm_type, attention_backend=backend)
    with pytest.raises(ConfigError, match=reason):
        run(2, parallel=parallel)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(cp_comm_type="a2a"), "cp_comm_type is 'a2a', in which all ranks exchange equal shards"),
        (dict(cp_comm_type="all_gather", attention_backend="native"), "is 'all_gather', in which"),
        (dict(attention_backend="transformer_engine"), "Transformer Engine's attention wants every document"),
    ],
)
@pytest.mark.parametrize("mode", ["by_document", "auto"])
def test_documents_on_ranks_need_native_attention_with_p2p(mode, changes, reason):
    with pytest.raises(ConfigError, match=f"parallel.cp_sharding is '{mode}'.*{reason}"):
        run(2, parallel=ParallelConfig(cp=2, cp_sharding=mode, **changes))
    run(2, parallel=ParallelConfig(cp=2, cp_sharding=mode))


def test_nothing_is_sharded_on_one_rank():
    with pytest.raises(ConfigError, match=r"parallel.cp_sharding is 'auto', but parallel.cp is 1"):
        ParallelConfig(cp_sharding="auto")


@pytest.mark.parametrize(
    ("cp_comm_type", "backend"),
    [
        *((name, "native") for name in ("p2p", "all_gather", "a2a")),
        *((name, "transformer_engine") for name in ("p2p", "a2a")),
        *((name, "auto") for name in ("p2p", "all_gather", "a2a")),
    ],
)
def test_comm_types_by_back_end(cp_comm_type, backend):
    run(2, parallel=ParallelConfig(cp=2, cp_comm_type=cp_comm_type, attention_backend=backend))


def test_heads_traded_for_tokens():
    with pytest.raises(ConfigError, match=r"'a2a' with .* 2 x 4, which must divide the 4 KV heads.*use p2p"):
        run(8, parallel=ParallelConfig(tp=2, cp=4, cp_comm_type="a2a"))
    run(4, parallel=ParallelConfig(tp=2, cp=2, cp_comm_type="a2a"))
    arch = dataclasses.replace(ARCH, language=dataclasses.replace(ARCH.language, num_heads=6, num_kv_heads=4))
    with pytest.raises(ConfigError, match=r"1 x 4, which must divide the 6 attention heads"):
        validate(dataclasses.replace(BASE, parallel=ParallelConfig(cp=4, cp_comm_type="a2a")), arch, 4)


def test_layers_by_stages():
    with pytest.raises(
        ConfigError, match=r"4 x 1 = 4, but must divide the 6 decoder layers; possible: 1, 2, 3, 6"
    ):
        run(4, parallel=ParallelConfig(pp=4))
    with pytest.raises(ConfigError, match=r"2 x 2 = 4, but must divide the 6"):
        run(2, parallel=ParallelConfig(pp=2, vpp=2))
    run(3, parallel=ParallelConfig(pp=3))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("Et*6|L|", "has 3 stages, but parallel.pp x parallel.vpp = 2"),
        ("Et*2|t*3L", "has 5 decoder layers, but the model has 6"),
        ("t*3|Et*3L", "must have E once, first"),
        ("Et*3L|t*3", "L once, last"),
        ("Et*3|x*3L", "'x.3L' is not understood"),
    ],
)
def test_pipeline_layout_refused(layout, words):
    with pytest.raises(ConfigError, match=words):
        run(2, parallel=ParallelConfig(pp=2, pipeline_layout=layout))


@pytest.mark.parametrize(("vpp", "layout"), [(1, "Et|t*5L"), (1, "E|t*6L"), (2, "E|t*3|t*2|tL")])
def test_pipeline_layout_accepted(vpp, layout):
    parallel = ParallelConfig(pp=2, vpp=vpp, pipeline_layout=layout)
    run(2, parallel=parallel, optim=OptimConfig(global_batch_size=2))


def test_micro_batches_of_the_interleaved_schedule():
    parallel = ParallelConfig(pp=3, vpp=2)
    with pytest.raises(ConfigError, match=r"4 micro batches.*needs a multiple of parallel.pp = 3"):
        run(3, parallel=parallel, optim=OptimConfig(global_batch_size=4))
    run(3, parallel=parallel, optim=OptimConfig(global_batch_size=6))


def test_a_pipeline_is_needed():
    for fields in ({"vpp": 2}, {"pipeline_layout": "Et*6L"}):
        with pytest.raises(ConfigError, match=r"parallel.pp is 1"):
            ParallelConfig(**fields)


def test_world_by_replica():
    axes = ParallelConfig(tp=2, cp=2)
    with pytest.raises(ConfigError, match=r"2 \* 1 \* 2 = 4 must divide the world size 6"):
        run(6, parallel=axes)
    run(8, parallel=axes, optim=OptimConfig(global_batch_size=2))


def test_global_batch_by_dp():
    with pytest.raises(
        ConfigError, match=r"optim.global_batch_size is 6, but the 4 data parallel.*nearest: 4 or 8"
    ):
        run(4, optim=OptimConfig(global_batch_size=6))
    with pytest.raises(ConfigError, match=r"global_batch_size is 1, .*nearest: 4$"):
        run(4, optim=OptimConfig(global_batch_size=1))
    run(4, optim=OptimConfig(global_batch_size=8))


def test_stride_by_tokens_per_tile():
    with pytest.raises(ConfigError, match=r"position.stride is 17, but must lie in 1..16"):
        run(position=PositionConfig(mode="v2pe_fixed", stride=17))
    run(position=PositionConfig(mode="v2pe_fixed", stride=16))


def test_v2pe_on_a_dynamic_ntk_checkpoint_is_allowed():
    # The release switches the checkpoint's scaling off when V2PE is on, and so does training here.
    assert ARCH.language.rope_scaling.kind == "dynamic"
    run(position=PositionConfig(mode="v2pe_random"))


def test_sample_by_pack():
    with pytest.raises(ConfigError, match=r"data.max_sample_tokens is 65, .*data.max_pack_tokens = 64"):
        run(data=DataConfig(meta="m", max_pack_tokens=64, max_sample_tokens=65))
    run(data=DataConfig(meta="m", max_pack_tokens=64, max_sample_tokens=64))


def test_tile_limits():
    with pytest.raises(ConfigError, match=r"data.min_dynamic_patch is 3, but must not exceed"):
        run(data=DataConfig(meta="m", min_dynamic_patch=3, max_dynamic_patch=2))
    with pytest.raises(ConfigError, match="max_dynamic_patch is 1000000, but must not exceed 1024"):
        run(data=DataConfig(meta="m", max_dynamic_patch=10**6))
    run(data=DataConfig(meta="m", min_dynamic_patch=2, max_dynamic_patch=2))


def test_curriculum_within_the_longest_sample():
    def data(longest):
        return DataConfig(
            meta="m", max_sample_tokens=64, curriculum=(CurriculumStage(max_sample_tokens=longest),)
        )

    with pytest.raises(ConfigError, match=r"data.curriculum\[0\].max_sample_tokens is 65"):
        run(data=data(65))
    run(data=data(64))
    run(data=data(0))


def test_a_rate_of_its_own_is_for_a_part_that_learns():
    frozen = VisionConfig(freeze=True)
    for optim in (OptimConfig(lr_vision=1e-3), OptimConfig(vision_layer_decay=0.9)):
        run(optim=optim)
        with pytest.raises(
            ConfigError, match=r"optim\.(lr_vision|vision_layer_decay) is .*vision.* is frozen"
        ):
            run(optim=optim, vision=frozen)
        run(optim=optim, vision=frozen, lora=LoRAConfig(vision_rank=2))
    with pytest.raises(ConfigError, match=r"optim.lr_projector is 0.001, but the projector part is frozen"):
        run(optim=OptimConfig(lr_projector=1e-3), model=ModelConfig(checkpoint="c", freeze_projector=True))


def test_rates_are_positive():
    with pytest.raises(ConfigError, match=r"lr_language is 0.0.*model.freeze_language=true keeps the part"):
        OptimConfig(lr_language=0.0)
    for decay in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"optim.vision_layer_decay is .*must lie in \(0, 1\]"):
            OptimConfig(vision_layer_decay=decay)


def test_something_is_trained():
    frozen = ModelConfig(checkpoint="c", freeze_language=True, freeze_projector=True)
    with pytest.raises(ConfigError, match="nothing is trained"):
        run(model=frozen, vision=VisionConfig(freeze=True))
    run(model=frozen, vision=VisionConfig(freeze=False))


def test_profiled_ranks_exist():
    with pytest.raises(
        ConfigError, match=r"runtime.profile_ranks is '0,2', but this run has the ranks 0 to 1"
    ):
        run(
            2, runtime=RuntimeConfig(run_dir="r", profile_ranks="0,2"), optim=OptimConfig(global_batch_size=2)
        )
    for ranks in ("0,1", "all"):
        run(
            2, runtime=RuntimeConfig(run_dir="r", profile_ranks=ranks), optim=OptimConfig(global_batch_size=2)
        )


@pytest.mark.parametrize("ranks", ["", "0,", "every", "-1", "0 1"])
def test_profiled_ranks_are_numbers_or_all(ranks):
    with pytest.raises(ConfigError, match=r"runtime.profile_ranks is .*must be all, or numbers of ranks"):
        RuntimeConfig(profile_ranks=ranks)


@pytest.mark.parametrize("ratio", [-1.0, 0.5, 1.0, float("inf"), float("nan")])
def test_loss_ratio(ratio):
    with pytest.raises(ConfigError, match=r"runtime.max_loss_ratio is .*must be above 1 and finite, or 0"):
        RuntimeConfig(max_loss_ratio=ratio)
    RuntimeConfig(max_loss_ratio=1.5)


@pytest.mark.parametrize("fields", [{"loss_window": 0}, {"profile_steps": 0}, {"profile_from_step": -1}])
def test_counts_of_runtime(fields):
    with pytest.raises(ConfigError, match=rf"runtime.{next(iter(fields))} is "):
        RuntimeConfig(**fields)
