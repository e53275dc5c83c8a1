"""Rules between sections, against the checkpoint, and against the number of ranks.

They run on every rank before the first collective, so that a mistake is one message and not a hang. Rules
of a single section are in `schema.py`.
"""

from __future__ import annotations

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.batch_schedule import check_batches
from megatron_v2pe.config.fp8 import check_fp8
from megatron_v2pe.config.lora import check_lora, parts_trained_whole
from megatron_v2pe.config.overlap import check_overlap
from megatron_v2pe.config.pipeline import check_layout
from megatron_v2pe.config.schema import MOST_TILES, DataConfig, ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.config.sections.parts import PARTS
from megatron_v2pe.config.sections.rules import divisors
from megatron_v2pe.core.errors import ConfigError


def validate(config: RunConfig, arch: InternVLArchitecture, world_size: int) -> None:
    """Check a run's configuration as a whole.

    Args:
        config: the run.
        arch: architecture of `model.checkpoint` or `model.hf_path`.
        world_size: ranks of the run.

    Raises:
        ConfigError: names the field, its value, the rule with its factors, and a way out.
    """
    check_required(config)
    check_model_split(config.parallel, arch)
    check_comm_type(config.parallel.cp_comm_type, config.parallel.attention_backend)
    check_sharding(config.parallel, config.parallel.attention_backend)
    check_heads_by_cp(config.parallel, arch)
    check_vision_split(config.parallel, arch)
    check_tower(config, arch)
    check_pipeline(config.parallel, arch.language.num_layers)
    check_experts(config, arch)
    check_world(config, world_size)
    check_overlap(config, arch, world_size)
    check_fp8(config, arch)
    check_profiled_ranks(config.runtime, world_size)
    check_positions(config, arch.tokens_per_tile)
    check_lengths(config.data)
    check_validation(config)
    check_lora(config, arch)
    check_something_is_trained(config)
    check_part_rates(config)


def check_experts(config: RunConfig, arch: InternVLArchitecture) -> None:
    """Experts are spread evenly and split evenly; settings of experts are for models that have them."""
    parallel, experts = config.parallel, arch.language.experts
    if experts is None:
        for name, value in (("ep", parallel.ep), ("etp", parallel.etp)):
            if value > 1 and value != parallel.tp:
                raise ConfigError(
                    f"parallel.{name} is {value}, but {arch.language.architecture} has no experts; leave it out"
                )
        if not config.moe.is_default:
            raise ConfigError(
                f"section moe is set, but {arch.language.architecture} has no experts to balance; leave it out"
            )
        return
    if experts.num_experts % parallel.ep:
        raise ConfigError(
            f"parallel.ep is {parallel.ep}, but must divide the {experts.num_experts} experts of a layer; possible: "
            f"{divisors(experts.num_experts)}"
        )
    if experts.ffn_size % parallel.expert_tp:
        raise ConfigError(
            f"parallel.etp is {parallel.expert_tp}, but must divide the {experts.ffn_size} channels of an expert; "
            f"possible: {divisors(experts.ffn_size)}"
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"parallel.tp is {parallel.tp} and parallel.sequence_parallel is false, but with experts tensor parallel "
            "ranks must hold different tokens, or each expert would get every token several times; set "
            "parallel.sequence_parallel to true"
        )
    if config.moe.bias_rate and "language" not in parts_trained_whole(config):
        raise ConfigError(
            f"moe.bias_rate is {config.moe.bias_rate}, but the language model is not trained whole: its experts could "
            "not follow the tokens that the bias sends to them; set moe.bias_rate to 0, or train the language model"
        )
    if config.model.mlp_chunks > 1:
        raise ConfigError(
            f"model.mlp_chunks is {config.model.mlp_chunks}, but the load balancing loss needs all tokens of a pack at "
            "once; set model.mlp_chunks to 1"
        )


def check_required(config: RunConfig) -> None:
    """Fields without a usable default."""
    source = config.model.checkpoint or config.model.hf_path
    hints = {
        "model.checkpoint": (source, "the folder that `megatron-v2pe import-hf` wrote, or model.hf_path"),
        "data.meta": (config.data.meta, "a json file that names the data sets"),
        "runtime.run_dir": (config.runtime.run_dir, "the folder this run writes to"),
    }
    for name, (value, meaning) in hints.items():
        if not value:
            raise ConfigError(f"{name} is empty, but every run needs it: {meaning}; set {name}=PATH")


def check_model_split(parallel: ParallelConfig, arch: InternVLArchitecture) -> None:
    """Tensor parallelism cuts heads, KV heads and feed-forward rows of the language model evenly.

    More ranks than KV heads are fine where they are a multiple: each KV head is then used by several ranks.
    """
    language = arch.language
    sizes = {
        "attention heads": language.num_heads,
        "KV heads": language.num_kv_heads,
        "feed-forward channels": language.ffn_size,
    }
    for what, size in sizes.items():
        is_shared = what == "KV heads" and parallel.tp % size == 0
        if size % parallel.tp and not is_shared:
            raise ConfigError(
                f"parallel.tp is {parallel.tp}, but must divide the {size} {what} of the language model; "
                f"possible: {divisors(size)}"
            )


COMM_TYPES = {  # packed sequences, which every batch is
    "native": ("p2p", "all_gather", "a2a"),
    "transformer_engine": ("p2p", "a2a"),
}


def check_comm_type(cp_comm_type: str, backend: str) -> None:
    """The attention back end can share packed sequences in the way asked for.

    Args:
        cp_comm_type: `parallel.cp_comm_type`.
        backend: `native`, `transformer_engine`, or `auto` when that is not known yet.
    """
    known = [name for name in COMM_TYPES if backend in (name, "auto")]
    if any(cp_comm_type in COMM_TYPES[name] for name in known):
        return
    where = f"parallel.cp_comm_type is {cp_comm_type!r}, but"
    if cp_comm_type == "all_gather":
        raise ConfigError(
            f"{where} Transformer Engine before 2.20 gathers keys of unpacked sequences only, and every batch here is "
            "packed (thd); use p2p or a2a, or set parallel.attention_backend to native"
        )
    raise ConfigError(
        f"{where} native attention has one level of context parallelism, and Transformer Engine before 2.20 refuses "
        "two levels for packed sequences (thd), which every batch here is; use p2p or a2a"
    )


def check_sharding(parallel: ParallelConfig, backend: str) -> None:
    """Documents that lie on some of the ranks need a back end that knows which.

    Args:
        parallel: names the sharding, and how ranks share a sequence.
        backend: `native`, `transformer_engine`, or `auto` when that is not known yet.
    """
    if parallel.cp_sharding == "zigzag":
        return
    where = f"parallel.cp_sharding is {parallel.cp_sharding!r}, but"
    if backend == "transformer_engine":
        raise ConfigError(
            f"{where} Transformer Engine's attention wants every document cut over all ranks, in equal shards; set "
            "parallel.attention_backend to native, or cp_sharding to zigzag"
        )
    if parallel.cp_comm_type != "p2p":
        raise ConfigError(
            f"{where} parallel.cp_comm_type is {parallel.cp_comm_type!r}, in which all ranks exchange equal shards; "
            "set cp_comm_type to p2p, or cp_sharding to zigzag"
        )


def check_heads_by_cp(parallel: ParallelConfig, arch: InternVLArchitecture) -> None:
    """Exchanging tokens for heads gives every rank whole heads."""
    if parallel.cp_comm_type != "a2a":
        return
    language = arch.language
    for what, size in (("attention heads", language.num_heads), ("KV heads", language.num_kv_heads)):
        if size % (parallel.tp * parallel.cp):
            raise ConfigError(
                f"parallel.cp_comm_type is 'a2a' with parallel.tp x parallel.cp = {parallel.tp} x {parallel.cp}, which "
                f"must divide the {size} {what} of the language model; make tp or cp smaller, or use p2p"
            )


def check_vision_split(parallel: ParallelConfig, arch: InternVLArchitecture) -> None:
    """A split tower cuts its feed-forward channels and the projector's; its heads are padded."""
    if parallel.vision != "tensor":
        return
    sizes = {"vision feed-forward": arch.vision.ffn_size}
    if not arch.reads_all_branches:
        sizes["projector"] = arch.language.hidden_size
    for index, branch in enumerate(arch.pyramid.branches if arch.pyramid else ()):
        sizes[f"pyramid branch {index} feed-forward"] = branch.ffn_size
    for what, size in sizes.items():
        if size % parallel.tp:
            raise ConfigError(
                f"parallel.tp is {parallel.tp} with parallel.vision 'tensor', but must divide the {size} {what} "
                f"channels; possible: {divisors(size)}, or set parallel.vision to replicated"
            )
    if arch.vision.qk_normalization and arch.vision.norm_type != "rms_norm":
        raise ConfigError(
            "parallel.vision is 'tensor', but this tower normalises queries and keys by LayerNorm, whose mean over all "
            "heads is not implemented across ranks; set parallel.vision to replicated"
        )


def check_tower(config: RunConfig, arch: InternVLArchitecture) -> None:
    """The checkpoint's tower is the one that the run names; a pyramid is trained in ways that are implemented."""
    tower, pyramid = config.vision.tower, arch.pyramid
    if tower == "piip" and pyramid is None:
        raise ConfigError(
            "vision.tower is 'piip', but the checkpoint's config.json has no piip_config; add a pyramid to its Hugging "
            "Face folder (megatron-v2pe add-piip), import that, or set vision.tower to auto"
        )
    if pyramid is None:
        return
    if tower == "internvit":
        raise ConfigError(
            "vision.tower is 'internvit', but the checkpoint's config.json has a piip_config; set vision.tower to "
            "piip, or give a checkpoint without a pyramid"
        )
    if config.lora.vision_rank and (tower != "piip" or config.vision.freeze):
        raise ConfigError(
            f"lora.vision_rank is {config.lora.vision_rank}, vision.tower is {tower!r} and vision.freeze is "
            f"{str(config.vision.freeze).lower()}, but adapters are for the large branch, and the pyramid around it is "
            "trained whole; set vision.tower to piip and vision.freeze to false, or lora.vision_rank to 0"
        )
    if config.lora.projector_rank and pyramid.reads_all:
        raise ConfigError(
            f"lora.projector_rank is {config.lora.projector_rank}, but this checkpoint's readout (llava) is a "
            "projector that starts at random and has no adapters; set lora.projector_rank to 0: it is then trained"
        )
    if config.optim.vision_layer_decay != 1.0:
        raise ConfigError(
            f"optim.vision_layer_decay is {config.optim.vision_layer_decay}, which is not defined for the layers of a "
            "pyramid here; set it to 1"
        )


def check_pipeline(parallel: ParallelConfig, num_layers: int) -> None:
    """Pipeline stages hold whole decoder layers: equally many, or as the layout says."""
    num_stages = parallel.pp * parallel.vpp
    if parallel.pipeline_layout:
        check_layout(parallel.pipeline_layout, num_stages=num_stages, num_layers=num_layers)
    elif num_layers % num_stages:
        raise ConfigError(
            f"parallel.pp x parallel.vpp is {parallel.pp} x {parallel.vpp} = {num_stages}, but must divide the "
            f"{num_layers} decoder layers; possible: {divisors(num_layers)}, or set parallel.pipeline_layout"
        )


def check_world(config: RunConfig, world_size: int) -> None:
    """Ranks fill whole model replicas, and the packs of every step fill whole rounds over the replicas."""
    check_batches(config, dp=config.parallel.dp(world_size))


def check_profiled_ranks(runtime: RuntimeConfig, world_size: int) -> None:
    """Ranks that are to write traces exist."""
    ranks = runtime.profile_ranks
    if ranks != "all" and max(map(int, ranks.split(","))) >= world_size:
        raise ConfigError(
            f"runtime.profile_ranks is {ranks!r}, but this run has the ranks 0 to {world_size - 1}; name some of "
            "these, or all"
        )


def check_positions(config: RunConfig, tokens_per_tile: int) -> None:
    """A stride is a whole number of 1/tokens_per_tile and never more than a text token's step."""
    if config.position.stride > tokens_per_tile:
        raise ConfigError(
            f"position.stride is {config.position.stride}, but must lie in 1..{tokens_per_tile}: this "
            f"checkpoint has {tokens_per_tile} visual tokens per tile, and that many is the default step"
        )


def check_lengths(data: DataConfig) -> None:
    """The longest sample fits into a pack; tile limits and curriculum stages are within their bounds."""
    if data.max_sample_tokens > data.max_pack_tokens:
        raise ConfigError(
            f"data.max_sample_tokens is {data.max_sample_tokens}, but a pack holds data.max_pack_tokens = "
            f"{data.max_pack_tokens}; lower the first or raise the second"
        )
    if data.max_dynamic_patch > MOST_TILES:
        raise ConfigError(
            f"data.max_dynamic_patch is {data.max_dynamic_patch}, but must not exceed {MOST_TILES}"
        )
    if data.min_dynamic_patch > data.max_dynamic_patch:
        raise ConfigError(
            f"data.min_dynamic_patch is {data.min_dynamic_patch}, but must not exceed "
            f"data.max_dynamic_patch = {data.max_dynamic_patch}"
        )
    for index, stage in enumerate(data.curriculum):
        if stage.max_sample_tokens > data.max_sample_tokens:
            raise ConfigError(
                f"data.curriculum[{index}].max_sample_tokens is {stage.max_sample_tokens}, but samples are "
                f"cut at data.max_sample_tokens = {data.max_sample_tokens}; raise that or lower the stage "
                "(0 means no limit)"
            )


def check_validation(config: RunConfig) -> None:
    """Held-out data and how often it is used come together."""
    data, runtime = config.data, config.runtime
    for name, meta, field, every in (
        ("validation", data.validation, "validate_every", runtime.validate_every),
        ("retrieval", data.retrieval, "evaluate_every", runtime.evaluate_every),
    ):
        if bool(meta) != bool(every):
            raise ConfigError(
                f"data.{name} is {meta!r} and runtime.{field} is {every}; give both, or neither"
            )


def check_part_rates(config: RunConfig) -> None:
    """A learning rate of its own is for a part that learns."""
    optim = config.optim
    for part in PARTS:
        has_pyramid = part == "vision" and config.vision.freeze_large_branch
        if not config.is_frozen(part) or config.lora.rank_of(part) or has_pyramid:
            continue
        rate = getattr(optim, f"lr_{part}")
        if rate is not None:
            raise ConfigError(
                f"optim.lr_{part} is {rate}, but the {part} part is frozen and has no adapters; omit it or "
                "train the part"
            )
        if part == "vision" and optim.vision_layer_decay != 1:
            raise ConfigError(
                f"optim.vision_layer_decay is {optim.vision_layer_decay}, but the vision tower is frozen and has no "
                "adapters; omit it, or set vision.freeze to false"
            )


def check_something_is_trained(config: RunConfig) -> None:
    """At least one part of the model is not frozen, or has adapters."""
    if not parts_trained_whole(config) and not config.lora.is_on:
        raise ConfigError(
            "model.freeze_language, model.freeze_projector and vision.freeze are all true, but then "
            "nothing is trained; set one of them to false, or train adapters (lora.language_rank)"
        )
