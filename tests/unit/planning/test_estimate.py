"""Plans of published sizes against figures worked out independently, and how plans answer to settings."""

from dataclasses import replace

import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import (
    DataConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.planning.changes import advise, changed, relax
from megatron_v2pe.planning.command import evaluate
from megatron_v2pe.planning.estimate import estimate
from megatron_v2pe.planning.report import heading_lines
from megatron_v2pe.planning.request.hardware import A100, GIB, H100, group_gb_s, hop_gb_s, with_rates
from megatron_v2pe.planning.request.workload import Assumptions, Pack, assumed_pack, fullest_pack, mean_pack
from megatron_v2pe.planning.search import search

ARCH = {size: parse_architecture(PUBLISHED[size]) for size in ("2B", "26B")}
FULL = {
    "model": ModelConfig(recompute="full"),
    "vision": VisionConfig(recompute="full", micro_batch_tiles=16),
}


def run(tokens, *, batch=8, **sections):
    return RunConfig(
        data=DataConfig(max_pack_tokens=tokens, max_sample_tokens=tokens),
        optim=OptimConfig(global_batch_size=batch),
        **sections,
    )


def plan(config, *, gpus, size="2B", hardware=H100, assumptions=None):
    pack = assumed_pack(config, ARCH[size], assumptions or Assumptions())
    return estimate(config, ARCH[size], pack, gpus=gpus, hardware=hardware)


def asking(config, *, gpus, size="2B"):
    pack = assumed_pack(config, ARCH[size], Assumptions())

    def ask(other):
        return evaluate(other, arch=ARCH[size], packs=(pack, pack), gpus=gpus, hardware=H100)

    return ask


# PFLOP of one pack, from the formulas for InternLM2-1.8B and InternViT-300M at 95 % visual tokens, 5 % supervised:
# decoder linears, attention, head, vision.
@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (32_768, (0.297, 0.317, 0.002, 0.267)),
        (262_144, (2.375, 20.27, 0.015, 2.13)),
    ],
)
def test_model_flops_agree_with_the_formulas(tokens, parts):
    found = plan(run(tokens, batch=1, **FULL), gpus=1)
    assert found.model_flops == pytest.approx(sum(parts) * 1e15, rel=0.004)
    assert found.full_flops - found.model_flops == pytest.approx(parts[1] * 1e15, rel=0.002)


def test_ring_traffic_agrees_with_the_formula():
    # 24 layers, own keys and values 2 * 32768 * 1024 * 2 bytes, 7 hops, 4 passes (forward twice, keys and gradients).
    found = plan(run(262_144, batch=1, parallel=ParallelConfig(cp=8), **FULL), gpus=8)
    assert found.traffic["context parallel"] == 24 * 4 * 7 * 2 * 32_768 * 1024 * 2  # 84 GiB


def by_document(lengths, mode="by_document", **changes):
    parallel = ParallelConfig(cp=8, cp_sharding=mode, attention_backend="native", **changes)
    pack = Pack(document_lengths=lengths, num_tiles=100, supervised_tokens=1000, source="test")
    config = run(sum(lengths), batch=1, parallel=parallel, **FULL)
    return estimate(config, ARCH["2B"], pack, gpus=8, hardware=H100)


def test_documents_on_ranks_send_less_and_fill_the_fullest_rank():
    lengths = (65_536, *(16_384,) * 12, 8_192)
    zigzag, found = by_document(lengths, "zigzag"), by_document(lengths)
    setting = found.setting
    assert found.traffic["context parallel"] < 0.5 * zigzag.traffic["context parallel"]
    assert setting.tokens == max(setting.shards.tokens(rank) for rank in range(8)) > zigzag.setting.tokens
    assert found.fullest.total_bytes > zigzag.fullest.total_bytes
    # Balanced by operations: where attention runs at a lower rate than linears, ranks with long documents are slower.
    assert found.time.seconds < 1.2 * zigzag.time.seconds
    assert "by_document: " in "\n".join(heading_lines(found, "run"))


def test_auto_plans_zigzag_where_little_is_saved():
    lengths = (262_144,)
    zigzag, found = by_document(lengths, "zigzag"), by_document(lengths, "auto")
    assert found.traffic == zigzag.traffic
    assert "auto: zigzag for this pack" in "\n".join(heading_lines(found, "run"))


def test_documents_on_ranks_are_not_planned_for_transformer_engine():
    parallel = ParallelConfig(cp=8, cp_sharding="auto")
    with pytest.raises(ConfigError, match=r"set parallel.attention_backend to native"):
        plan(run(262_144, batch=1, parallel=parallel, **FULL), gpus=8)


def test_layer_inputs_are_what_full_recompute_keeps():
    found = plan(run(262_144, parallel=ParallelConfig(cp=8), **FULL), gpus=8)
    loss = next(phase for phase in found.ranks[0].phases if phase.name == "loss")
    assert loss.parts["decoder layers"] == 24 * 32_768 * 2048 * 2  # 3 GiB


def test_a_longer_pack_needs_more_memory_and_time():
    short, long = (plan(run(tokens, **FULL), gpus=8) for tokens in (32_768, 65_536))
    assert long.fullest.total_bytes > short.fullest.total_bytes
    assert long.time.seconds > 2 * short.time.seconds


SAVINGS = {
    "recompute selective": {"model": ModelConfig(recompute="selective")},
    "recompute full": {"model": ModelConfig(recompute="full")},
    "recompute full, MLP chunks": {"model": ModelConfig(recompute="full", mlp_chunks=4)},
    "offload": {"model": ModelConfig(recompute="full", mlp_chunks=4, offload_activations=True)},
    "tower recomputed": {"vision": VisionConfig(recompute="full")},
    "tower in slices": {"vision": VisionConfig(micro_batch_tiles=8)},
    "tower frozen": {"vision": VisionConfig(freeze=True)},
    "cp": {"parallel": ParallelConfig(cp=2)},
    "tp": {"parallel": ParallelConfig(tp=2, sequence_parallel=True)},
}


@pytest.mark.parametrize("name", SAVINGS)
def test_each_saving_saves(name):
    whole, saving = (plan(run(65_536, **sections), gpus=8) for sections in ({}, SAVINGS[name]))
    assert saving.fullest.peak.total_bytes < whole.fullest.peak.total_bytes
    if "model" in SAVINGS[name]:
        assert saving.time.seconds > whole.time.seconds


def test_offloaded_inputs_are_counted_on_the_host():
    config = run(65_536, model=ModelConfig(recompute="full", offload_activations=True))
    found = plan(config, gpus=1)
    assert found.ranks[0].host_bytes == 24 * 65_536 * 2048 * 2
    assert found.time.terms["offload"] > 0


def test_stages_hold_fewer_micro_batches_towards_the_end():
    found = plan(run(32_768, parallel=ParallelConfig(pp=4), **FULL), gpus=4)
    assert [rank.in_flight for rank in found.ranks] == [4, 3, 2, 1]
    held = [rank.peak.parts["other micro batches in flight"] for rank in found.ranks]
    assert held == sorted(held, reverse=True)
    assert held[3] == 0
    assert found.time.terms["pipeline bubble"] > 0


def test_a_replicated_tower_with_sequence_parallelism_copies_its_gradients():
    parallel = ParallelConfig(tp=8, cp=8, sequence_parallel=True)
    found = plan(run(262_144, parallel=parallel, **FULL), gpus=64, size="26B")
    reduce = next(phase for phase in found.ranks[0].phases if phase.name == "reduce")
    assert reduce.total_bytes > 5.5e9 * 4  # the tower's 5.5 G numbers in float32
    split = plan(run(262_144, parallel=replace(parallel, vision="tensor"), **FULL), gpus=64, size="26B")
    assert all(phase.total_bytes < 1e9 for phase in split.ranks[0].phases if phase.name == "reduce")


def test_faster_links_and_kernels_shorten_the_step():
    config = run(262_144, parallel=ParallelConfig(tp=8, sequence_parallel=True), **FULL)
    slow = plan(config, gpus=8, hardware=with_rates(H100, ["nvlink_gb_s=45"]))
    fast = plan(config, gpus=8)
    faster = plan(config, gpus=8, hardware=with_rates(H100, ["gemm_share=0.9"]))
    assert slow.time.terms["tensor parallel traffic"] > 9 * fast.time.terms["tensor parallel traffic"]
    assert faster.time.terms["decoder linears"] < fast.time.terms["decoder linears"]


def test_a_ring_that_leaves_the_node_has_one_port_and_a_collective_all_of_them():
    assert hop_gb_s(H100, size=8, stride=1) == group_gb_s(H100, size=8, stride=1) == 450 * 0.8
    assert hop_gb_s(H100, size=16, stride=1) == 50 * 0.8
    assert group_gb_s(H100, size=16, stride=1) == 400 * 0.8
    assert group_gb_s(H100, size=4, stride=8) == 50 * 0.8


@pytest.mark.parametrize("rate", ["gemm=1", "gemm_share", "gemm_share=zero", "gemm_share=-1", "name=x"])
def test_unknown_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="--rate"):
        with_rates(H100, [rate])


def test_adapters_need_little_state_and_save_the_optimizer():
    whole = plan(run(32_768, **FULL), gpus=1)
    lora = LoRAConfig(language_rank=16, vision_rank=16, projector_rank=16)
    adapted = plan(run(32_768, lora=lora, **FULL), gpus=1)
    assert adapted.ranks[0].state.weights_bytes < 1.05 * whole.ranks[0].state.weights_bytes
    assert adapted.ranks[0].state.optimizer_bytes < 0.05 * whole.ranks[0].state.optimizer_bytes
    assert adapted.executed_flops < whole.executed_flops


def test_advice_fits_and_its_overrides_lead_to_what_it_says():
    config = run(262_144, parallel=ParallelConfig(cp=4))
    ask = asking(config, gpus=32)
    assert not ask(config).fits
    advice = advise(config, ask)
    assert advice.estimate.fits
    again = ask(changed(config, advice.overrides))
    assert again.fullest.total_bytes == advice.estimate.fullest.total_bytes


def test_no_advice_where_nothing_helps():
    config = run(4_194_304, batch=1)
    assert advise(config, asking(config, gpus=1)) is None


def test_room_is_used():
    config = run(32_768, parallel=ParallelConfig(cp=8), **FULL)
    ask = asking(config, gpus=8)
    change = relax(config, ask)
    assert change.estimate.fits
    assert change.estimate.time.seconds < ask(config).time.seconds


def test_search_lists_layouts_that_fit_the_fastest_first():
    config = run(131_072)
    found = search(config, ARCH["2B"], asking(config, gpus=8), gpus=8, hardware=H100)
    assert all(advice.estimate.fits for advice in found)
    seconds = [advice.estimate.time.seconds for advice in found]
    assert seconds == sorted(seconds)
    assert all(advice.estimate.plan.world_size == 8 for advice in found)


def test_search_without_a_valid_split_says_why():
    config = run(131_072, batch=4)
    with pytest.raises(ConfigError, match="no split of 7 GPUs"):
        search(config, ARCH["2B"], asking(config, gpus=7), gpus=7, hardware=H100)


def test_search_where_nothing_fits_gives_the_nearest():
    config = run(1_048_576, batch=1)
    found = search(config, ARCH["26B"], asking(config, gpus=1, size="26B"), gpus=1, hardware=H100)
    assert not any(advice.estimate.fits for advice in found)
    rooms = [advice.estimate.room_bytes for advice in found]
    assert rooms == sorted(rooms, reverse=True)


def test_assumed_packs():
    config = run(4096)
    pack = assumed_pack(config, ARCH["2B"], Assumptions())
    assert (pack.document_lengths, pack.num_tiles, pack.supervised_tokens) == ((4096,), 15, 205)
    short = replace(config, data=replace(config.data, max_sample_tokens=1000))
    assert assumed_pack(short, ARCH["2B"], Assumptions()).document_lengths == (1024,) * 4
    with pytest.raises(ConfigError, match="--tiles"):
        assumed_pack(config, ARCH["2B"], Assumptions(tiles=17))
    with pytest.raises(ConfigError, match="--visual-share"):
        Assumptions(visual_share=1.5)


def test_mean_and_fullest_of_measured_packs():
    packs = [
        Pack(document_lengths=(600, 400), num_tiles=2, supervised_tokens=50, source=""),
        Pack(document_lengths=(500, 500), num_tiles=4, supervised_tokens=10, source=""),
    ]
    mean, fullest = mean_pack(packs), fullest_pack(packs)
    assert (mean.document_lengths, mean.num_tiles, mean.supervised_tokens) == ((500, 500), 3, 30)
    assert (fullest.num_tokens, fullest.num_tiles, fullest.supervised_tokens) == (1000, 4, 50)


def test_memory_is_that_of_a_vendor_gigabyte():
    assert H100.memory_gib * GIB == pytest.approx(81_559 * 2**20, rel=0.001)  # what nvidia-smi shows


def fp8_run(fp8, **model):
    return run(32768, model=ModelConfig(fp8=fp8, **model))


def test_fp8_is_faster_and_its_copies_of_weights_are_counted():
    without, found = (plan(fp8_run(fp8), gpus=8) for fp8 in ("none", "current"))
    numbers = 24 * 62_914_560  # the linears of a decoder layer, te_gpu's table
    assert found.fullest.state.fp8_bytes == 2 * numbers
    assert without.fullest.state.fp8_bytes == 0
    linears = [each.time.terms["decoder linears"] for each in (without, found)]
    assert linears[0] == pytest.approx(1.5 * linears[1])
    assert found.time.seconds < without.time.seconds
    assert found.executed_flops == without.executed_flops
    # A byte in place of two for the inputs of qkv, fc1 and fc2; attention's own output stays.
    saved = 24 * 32768 * (2048 + 2048 + 8192)
    kept = [each.fullest.peak.parts["decoder layers"] for each in (without, found)]
    assert kept[0] - kept[1] == pytest.approx(saved, rel=0.1)


def test_layers_in_bfloat16_are_counted_as_such():
    none, some, all_layers = (
        plan(fp8_run(fp8, fp8_skip_layers=skip), gpus=8)
        for fp8, skip in (("none", 0), ("current", 6), ("current", 0))
    )
    assert some.fullest.state.fp8_bytes == all_layers.fullest.state.fp8_bytes / 2
    times = [each.time.terms["decoder linears"] for each in (none, some, all_layers)]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)
    kept = [each.fullest.peak.parts["decoder layers"] for each in (none, some, all_layers)]
    assert kept[2] < kept[1] < kept[0]


def test_packs_are_counted_with_the_rows_that_fp8_adds():
    config = replace(fp8_run("blockwise"), parallel=ParallelConfig(cp=8))
    pack = Pack(document_lengths=(1000, 30000), num_tiles=100, supervised_tokens=500, source="test")
    found = estimate(config, ARCH["2B"], pack, gpus=8, hardware=H100)
    assert found.setting.pack.document_lengths == (1008, 31744 - 1008)


def test_a_gpu_without_fp8_is_refused():
    with pytest.raises(ConfigError, match=r"model\.fp8 is 'current', but A100 SXM 80 GB has no FP8 products"):
        plan(fp8_run("current"), gpus=8, hardware=A100)
    plan(fp8_run("none"), gpus=8, hardware=A100)
