"""An estimate as text for people: memory, FLOPs, traffic, time, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.config.batch_schedule import batch_schedule
from megatron_v2pe.config.lora import parts_trained_whole
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.planning.changes import Variant, changed, override_text
from megatron_v2pe.planning.estimate import Estimate, RankMemory
from megatron_v2pe.planning.memory.inference import InferenceMemory
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.hardware import GIB, Hardware
from megatron_v2pe.planning.search import shown_overrides

MEANING = {
    "attention": "grows with the square of the documents; more GPUs, shorter documents or less recompute help",
    "decoder linears": "grows with tokens; tp, cp and dp all share it",
    "vision tower": "grows with tiles; freeze it, or let more ranks share the tiles (cp, or tp with sequence_parallel)",
    "element-wise": "bound by memory bandwidth; tp with sequence_parallel shares it",
    "head and loss": "grows with supervised tokens",
    "tensor parallel traffic": "waits for NVLink in every layer; less tp and more cp sends less",
    "context parallel traffic": "keys arrive later than they are used; fewer cp ranks, or cp inside a node",
    "feature router": "features travel once; cp inside a node",
    "pipeline traffic": "hidden states between stages",
    "pipeline bubble": "stages wait to be filled; more packs in optim.global_batch_size, vpp, or less pp",
    "gradients and weights over dp, cp": "once a step; more packs in a step spread it",
    "optimizer": "once a step",
    "gradient accumulation": "once a pack and weight",
    "offload": "layer inputs to host memory and back, not hidden",
}
MAX_STAGES = 4


def gib(number: float) -> str:
    """Bytes as GiB."""
    return f"{number / GIB:,.1f}"


def heading_lines(estimate: Estimate, name: str) -> list[str]:
    """Model, GPUs, layout, pack."""
    plan, pack, config = estimate.plan, estimate.setting.pack, estimate.setting.config
    saving = f"recompute {config.model.recompute}"
    saving += f", MLP in {config.model.mlp_chunks} chunks" if config.model.mlp_chunks > 1 else ""
    saving += ", layer inputs in host memory" if config.model.offload_activations else ""
    tower = f"tower {plan.vision}, recompute {config.vision.recompute}"
    if config.vision.micro_batch_tiles:
        tower += f", slices of {config.vision.micro_batch_tiles} tiles"
    documents = len(pack.document_lengths)
    batches = batch_schedule(config)
    rampup = f"; at first {batches.text}" if len(batches.levels) > 1 else ""
    return [
        f"{name} on {plan.world_size} x {estimate.hardware.name}, {config.runtime.dtype}, {estimate.setting.backend}"
        + (f", linears in FP8 ({config.model.fp8})" if config.model.fp8 != "none" else ""),
        f"  layout   tp {plan.tp}{' with sequence parallelism' if plan.sequence_parallel else ''}, pp {plan.pp}, "
        f"vpp {plan.vpp}, cp {plan.cp} ({_sharing(estimate)}), dp {plan.dp}",
        f"  memory   {saving}; {tower}",
        f"  pack     {pack.num_tokens:,} tokens in {documents} document{'s' if documents > 1 else ''}, "
        f"{pack.num_tiles:,} tiles, {pack.supervised_tokens:,} supervised ({pack.source})",
        f"  step     {batches.full_size} packs, {estimate.micro_batches} for each data parallel rank{rampup}",
        f"  rank     {estimate.setting.tokens:,} tokens, {estimate.setting.tiles:,} tiles",
    ]


def _sharing(estimate: Estimate) -> str:
    """How context parallel ranks share a pack, and what by_document sends and weighs beside zigzag."""
    parallel, setting = estimate.setting.config.parallel, estimate.setting
    if parallel.cp_sharding == "zigzag":
        return parallel.cp_comm_type
    if setting.shards.holders is None:
        return f"{parallel.cp_comm_type}, {parallel.cp_sharding}: zigzag for this pack"
    mean = setting.pack.num_tokens / setting.plan.cp
    share = setting.received_rows / ((setting.plan.cp - 1) * mean)
    return (
        f"{parallel.cp_comm_type}, {parallel.cp_sharding}: {share:.0%} of zigzag's keys, fullest rank "
        f"{setting.tokens / mean:.2f} of the mean in tokens, slowest {setting.slowest_rank[1]:.2f} in attention"
    )


def shown_stages(estimate: Estimate) -> list[RankMemory]:
    """All pipeline ranks, or first, fullest and last."""
    ranks = list(estimate.ranks)
    if len(ranks) <= MAX_STAGES:
        return ranks
    chosen = {0, estimate.fullest.pp_rank, len(ranks) - 1}
    return [ranks[index] for index in sorted(chosen)]


def memory_lines(estimate: Estimate) -> list[str]:
    """Memory of each pipeline rank at its peak."""
    ranks, plan = shown_stages(estimate), estimate.plan
    limit = estimate.hardware.memory_gib * GIB
    parts = list(dict.fromkeys(name for rank in ranks for name in rank.peak.parts))
    peak = ["activations at their peak", *(f"in {rank.peak.name}" for rank in ranks)]
    rows = [
        ["memory of a GPU, GiB", *(f"stage {rank.pp_rank}" for rank in ranks)],
        ["weights", *(gib(rank.state.weights_bytes) for rank in ranks)],
        *(
            [["weights in FP8, by rows and columns", *(gib(rank.state.fp8_bytes) for rank in ranks)]]
            if any(rank.state.fp8_bytes for rank in ranks)
            else []
        ),
        ["gradients, float32", *(gib(rank.state.gradients_bytes) for rank in ranks)],
        [
            f"optimizer, shared by {plan.dp * plan.cp} ranks",
            *(gib(rank.state.optimizer_bytes) for rank in ranks),
        ],
        peak,
        *([f"  {name}", *(gib(rank.peak.parts.get(name, 0.0)) for rank in ranks)] for name in parts),
        ["lost between blocks", *(gib(rank.lost_bytes) for rank in ranks)],
        ["reserved: context, NCCL, workspaces", *(gib(rank.reserved_bytes) for rank in ranks)],
        ["total", *(gib(rank.total_bytes) for rank in ranks)],
        ["to spare", *(gib(limit - rank.total_bytes) for rank in ranks)],
    ]
    if plan.pp > 1:
        rows.insert(rows.index(peak) + 1, ["  micro batches held", *(str(rank.in_flight) for rank in ranks)])
    if any(rank.host_bytes for rank in ranks):
        rows.append(["host memory for layer inputs", *(gib(rank.host_bytes) for rank in ranks)])
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    room = abs(estimate.room_bytes) / GIB
    lines = text_table(None, rows)
    lines.append(
        f"{verdict}: {gib(estimate.fullest.total_bytes)} of {estimate.hardware.memory_gib:.1f} GiB on stage "
        f"{estimate.fullest.pp_rank}, {room:.1f} {'to spare' if estimate.fits else 'too much'}"
    )
    return lines


def phase_lines(estimate: Estimate) -> list[str]:
    """Activations of every phase on the fullest stage, and what a layer keeps."""
    rank = estimate.fullest
    phases = ", ".join(f"{phase.name} {gib(phase.total_bytes)}" for phase in rank.phases)
    return [f"phases of stage {rank.pp_rank}, GiB (a prime marks backward): {phases}"]


def compute_lines(estimate: Estimate) -> list[str]:
    """FLOPs by both conventions, and executed."""
    step = estimate.time.seconds
    rows = [["FLOPs of a step", "PFLOP", "TFLOP/s per GPU", "of peak"]]
    for name, flops in (
        ("model, causal attention", estimate.model_flops),
        ("model, whole attention square", estimate.full_flops),
        ("executed, with recomputation", estimate.executed_flops),
    ):
        rate = flops / step / estimate.plan.world_size / 1e12
        rows.append([name, f"{flops / 1e15:,.2f}", f"{rate:,.0f}", f"{estimate.utilisation(flops):.1%}"])
    return text_table(None, rows)


def traffic_lines(estimate: Estimate) -> list[str]:
    """Bytes sent by a rank."""
    rows = [["sent by a GPU in a step, GiB", ""]]
    rows += [[name, gib(sent)] for name, sent in estimate.traffic.items() if sent]
    return text_table(None, rows) if len(rows) > 1 else ["sent by a GPU in a step: nothing"]


def time_lines(estimate: Estimate) -> list[str]:
    """Predicted time by term."""
    time = estimate.time
    rows = [["predicted time of a step", "s", "share"]]
    for name, seconds in sorted(time.terms.items(), key=lambda term: -term[1]):
        if seconds > 0.0005 * time.seconds:
            rows.append([name, f"{seconds:,.2f}", f"{seconds / time.seconds:.0%}"])
    rows.append(["total", f"{time.seconds:,.2f}", f"{estimate.tokens_per_s:,.0f} tokens/s per GPU"])
    lines = text_table(None, rows)
    lines.append(f"binds: {time.binding}: {MEANING.get(time.binding, '')}")
    return lines


def inference_lines(setting: Setting, memories: Sequence[InferenceMemory], hardware: Hardware) -> list[str]:
    """Memory of generation."""
    tokens = setting.pack.num_tokens
    rows = [
        [f"answering a prompt of {tokens:,} tokens, GiB", *(f"stage {i}" for i in range(len(memories)))],
        ["weights", *(gib(memory.weights_bytes) for memory in memories)],
        ["cache of keys and values", *(gib(memory.kv_cache_bytes) for memory in memories)],
        ["prefill", *(gib(memory.prefill_bytes) for memory in memories)],
        ["  most of it in", *(memory.prefill_part for memory in memories)],
        ["reserved", *(gib(memory.reserved_bytes) for memory in memories)],
        ["total", *(gib(memory.total_bytes) for memory in memories)],
    ]
    limit = hardware.memory_gib * GIB
    fullest = max(memory.total_bytes for memory in memories)
    verdict = "fits" if fullest <= limit else "DOES NOT FIT"
    return [
        *text_table(None, rows),
        f"{verdict}: {gib(fullest)} of {hardware.memory_gib:.1f} GiB",
    ]


def advice_lines(estimate: Estimate, variant: Variant | None) -> list[str]:
    """What to change."""
    if variant is None and estimate.fits:
        return ["advice: nothing; --search compares other layouts"]
    if variant is None:
        return ["advice: no small change makes it fit; try --search, more GPUs, or shorter packs"]
    after = variant.estimate
    what = "to make it fit" if not estimate.fits else "to be faster with the memory to spare"
    return [
        f"advice, {what}: {variant.text}",
        f"  then {gib(after.fullest.total_bytes)} GiB and {after.time.seconds:,.2f} s a step "
        f"({after.time.seconds / estimate.time.seconds:.2f}x)",
    ]


def less_lines(found: Sequence[Variant], config: RunConfig) -> list[str]:
    """Runs that train less of the model and fit."""
    rows = []
    for variant in found:
        after, own = variant.estimate, changed(config, variant.overrides)
        trained = ", ".join([*parts_trained_whole(own), *(["adapters"] if own.lora.is_on else [])])
        memory = f"{gib(after.fullest.total_bytes)} GiB, {after.time.seconds:,.2f} s"
        rows.append([trained, memory, variant.text])
    if not rows:
        return []
    heading = "training less of the model would fit (what is trained, memory and time of a step, overrides):"
    notes = ["  IMPORTED: the folder as `import-hf` stores it"] if "IMPORTED" in str(rows) else []
    return [heading, *text_table(None, rows, align="<", indent="  "), *notes]


def search_lines(found: Sequence[Variant], config: RunConfig, *, count: int) -> list[str]:
    """The best layouts."""
    best = [variant for variant in found if variant.estimate.fits][:count]
    if not best:
        lines = ["no layout fits; those that come nearest:"]
        best = list(found[:count])
    else:
        fitting = sum(variant.estimate.fits for variant in found)
        lines = [f"{fitting} splits fit; the fastest {len(best)} by predicted time:"]
    header = ["step s", "tokens/s/GPU", "MFU", "GiB", "binds", "overrides"]
    rows = []
    for variant in best:
        estimate = variant.estimate
        rows.append(
            [
                f"{estimate.time.seconds:,.2f}",
                f"{estimate.tokens_per_s:,.0f}",
                f"{estimate.utilisation(estimate.model_flops):.1%}",
                gib(estimate.fullest.total_bytes),
                estimate.time.binding,
                " ".join(map(override_text, shown_overrides(variant, config))) or "(as it is)",
            ]
        )
    lines += text_table(header, rows, align=">>>>><", indent="  ")
    return lines


def fp8_lines(variant: Variant | None, best: Variant) -> list[str]:
    """What FP8 linears would bring to the best layout."""
    if variant is None:
        return []
    after = variant.estimate
    return [
        f"with model.fp8=current the first of them takes {after.time.seconds:,.2f} s a step "
        f"({after.time.seconds / best.estimate.time.seconds:.2f}x) and {gib(after.fullest.total_bytes)} GiB; "
        "it rounds the decoder's products to 8 bits"
    ]


def estimate_text(estimate: Estimate, name: str, variant: Variant | None) -> str:
    """The whole report."""
    blocks = [
        heading_lines(estimate, name),
        memory_lines(estimate),
        phase_lines(estimate),
        compute_lines(estimate),
        traffic_lines(estimate),
        time_lines(estimate),
        advice_lines(estimate, variant),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"
