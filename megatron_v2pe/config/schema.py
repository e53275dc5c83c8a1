"""The whole run configuration on one screen; each field is documented under its name.

Local rules are checked in `__post_init__`, rules across sections and against the checkpoint in
`validate.py`. Objects never change after loading; derived values live elsewhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

from megatron_v2pe.config.sections.lora import LoRAConfig
from megatron_v2pe.config.sections.moe import MoEConfig
from megatron_v2pe.config.sections.optim import OptimConfig
from megatron_v2pe.config.sections.parts import FREEZE_FIELDS, Part
from megatron_v2pe.config.sections.rules import require, require_local
from megatron_v2pe.core.errors import ConfigError

MOST_TILES = 1024
"""Of one image; all grids of up to so many tiles are compared."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint is trained, and which parts of it."""

    checkpoint: str = ""
    """Folder written by `import-hf`, a step folder of an earlier run, or its run folder, which means its newest
    checkpoint; only its weights are used."""
    hf_path: str = ""
    """Hugging Face folder to train from without importing it first, instead of model.checkpoint; each rank reads
    its slices of the safetensors."""
    freeze_language: bool = False
    """Keep the language model's weights as they are."""
    freeze_projector: bool = False
    """Keep the projector's weights as they are."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing, each layer's MLP, or whole decoder layers."""
    mlp_chunks: int = 1
    """MLP chunks: parts of the tokens that a recomputed MLP runs in turn; inner activations exist of one at a time."""
    swiglu: Literal["auto", "fused", "plain"] = "auto"
    """What an MLP keeps for backward. fused: its first linear's output and the product, 3 inner activations, from which
    backward computes the gate again, at no time on a GPU; plain: 4, experts 5. They round in another order, in backward
    only. auto: fused on a GPU, plain on a CPU, where it is faster."""
    offload_activations: bool = False
    """Keep the layer inputs of `recompute: full` in host memory until backward; needs a GPU."""
    loss_chunk_tokens: int = 4096
    """Supervised tokens whose logits exist at a time."""
    fp8: Literal["none", "current", "blockwise"] = "none"
    """Products of the decoder's linears in 8-bit floats; needs Transformer Engine on a GPU that has them. current:
    one scale for each tensor; blockwise: one for 128 x 128 weights and for 128 entries of a row. Attention, norms,
    head, embedding, tower, projector and generation stay in bfloat16. Packs are padded at their end to 16 (blockwise:
    128) rows of each rank; each weight of a linear needs two bytes more."""
    fp8_skip_layers: int = 0
    """Decoder layers at each end whose linears stay in bfloat16 with model.fp8; they lose most by it."""

    def __post_init__(self) -> None:
        require(
            self.loss_chunk_tokens > 0, "model.loss_chunk_tokens", self.loss_chunk_tokens, "must be positive"
        )
        if self.checkpoint and self.hf_path:
            raise ConfigError(
                f"model.checkpoint is {self.checkpoint!r} and model.hf_path is {self.hf_path!r}, but weights come from "
                "one place; set one of the two to ''"
            )
        require(self.fp8_skip_layers >= 0, "model.fp8_skip_layers", self.fp8_skip_layers, "must be >= 0")
        if self.fp8_skip_layers and self.fp8 == "none":
            raise ConfigError(
                f"model.fp8_skip_layers is {self.fp8_skip_layers}, but model.fp8 is 'none' and all layers are in "
                "bfloat16; set model.fp8 to current or blockwise, or fp8_skip_layers to 0"
            )
        require(self.mlp_chunks >= 1, "model.mlp_chunks", self.mlp_chunks, "must be at least 1")
        if self.mlp_chunks > 1 and self.recompute == "none":
            raise ConfigError(
                f"model.mlp_chunks is {self.mlp_chunks}, but model.recompute is 'none' and all chunks would be kept; "
                "set model.recompute to selective or full, or mlp_chunks to 1"
            )
        if self.offload_activations and self.recompute != "full":
            raise ConfigError(
                f"model.offload_activations is true, but model.recompute is {self.recompute!r} and only layer inputs "
                "are moved; set model.recompute to full, or offload_activations to false"
            )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """How the vision tower is trained."""

    tower: Literal["auto", "internvit", "piip"] = "auto"
    """What the checkpoint's vision tower must be: InternVL's alone, or with a pyramid around it, which `add-piip` adds
    to a checkpoint; auto accepts either."""
    freeze: bool = False
    """Keep the vision tower's weights as they are (drop path stays active, as in the release)."""
    freeze_large_branch: bool = False
    """Keep the weights of the checkpoint's own tower as they are and train the pyramid around it (`tower: piip`)."""
    drop_path_rate: float = 0.0
    """Largest stochastic depth rate; rises linearly from 0 over the layers. The release trains with 0.1."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing, each layer's MLP, or whole vision layers."""
    micro_batch_tiles: int = 0
    """Tiles that a rank encodes at a time; each slice is recomputed as a whole in backward. 0 takes all at once."""
    tile_multiple: int = 1
    """Round the tiles that are encoded at a time up to a multiple of this with blank ones. A GPU chooses and builds its
    kernels anew for every number of tiles, a second each time; blank tiles cost as much as others, and no gradient."""

    def __post_init__(self) -> None:
        require(
            0 <= self.drop_path_rate < 1, "vision.drop_path_rate", self.drop_path_rate, "must lie in [0, 1)"
        )
        require(
            self.micro_batch_tiles >= 0, "vision.micro_batch_tiles", self.micro_batch_tiles, "must be >= 0"
        )
        if self.freeze_large_branch and (self.freeze or self.tower != "piip"):
            raise ConfigError(
                f"vision.freeze_large_branch is true with vision.freeze {str(self.freeze).lower()} and vision.tower "
                f"{self.tower!r}, but it freezes the tower that a trained pyramid is around; set vision.tower to piip "
                "and vision.freeze to false, or omit it"
            )
        require(self.tile_multiple >= 1, "vision.tile_multiple", self.tile_multiple, "must be at least 1")
        if self.micro_batch_tiles % self.tile_multiple:
            raise ConfigError(
                f"vision.tile_multiple is {self.tile_multiple}, but must divide vision.micro_batch_tiles = "
                f"{self.micro_batch_tiles}, or full slices would grow; change one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes; the data-parallel size is what remains of the world."""

    tp: int = 1
    """Tensor parallel size; must divide attention heads and KV heads."""
    pp: int = 1
    """Pipeline parallel size."""
    cp: int = 1
    """Context parallel size: ranks that share one sequence."""
    sequence_parallel: bool = False
    """Split activations between layers over the tensor parallel ranks."""
    vision: Literal["replicated", "tensor"] = "replicated"
    """The vision tower on tensor parallel ranks. replicated: whole on each, tiles shared between them where
    sequence_parallel is on; tensor: split like the decoder, heads padded to a multiple of tp."""
    ep: int = 1
    """Expert parallel size: ranks of a pipeline stage (tp x cp x dp) over which the experts of a layer are spread."""
    etp: int = 0
    """Ranks that split each expert; 0 is tp where ep is 1, else 1."""
    vpp: int = 1
    """Virtual stages of each pipeline rank (interleaved schedule); shortens the pipeline's bubble."""
    pipeline_layout: str = ""
    """Decoder layers of each stage in Megatron's notation, such as Et*3|t*5|t*5|t*3L; empty splits evenly."""
    attention_backend: Literal["auto", "native", "transformer_engine"] = "auto"
    """`auto` uses Transformer Engine in bfloat16 where it is installed and a GPU is present, else `native`."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    """How context parallel ranks share a sequence. p2p: keys travel in a ring, overlapped with compute; all_gather
    (native only): all keys at once; a2a: tokens are exchanged for heads, of which every tensor parallel rank needs a
    multiple of cp. No back end has a2a+p2p for packed sequences yet."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data and context parallel ranks in buckets of 40 million while backward continues, instead
    of all after it. Saves up to that reduction's time; NCCL shares the GPU's processors with backward meanwhile."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket while the next forward pass has begun; needs overlap_grad_reduce."""
    cp_sharding: Literal["zigzag", "by_document", "auto"] = "zigzag"
    """Which context parallel rank holds which tokens. zigzag: every document is cut over all ranks; by_document (native
    attention with p2p): short documents lie whole on one rank, long ones are cut over as many as balance needs, only
    their keys travel, and shards differ by some 5 % in tokens; auto: by_document for packs where the busiest rank then
    receives at most 3/4 of zigzag's keys."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "vpp", "ep"):
            require(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), "must be at least 1")
        if self.vision == "tensor" and self.tp == 1:
            raise ConfigError(
                "parallel.vision is 'tensor', but parallel.tp is 1 and there is nothing to split over; set parallel.tp "
                "to 2 or more, or vision to replicated"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                f"parallel.vpp is {self.vpp}, but parallel.pp is 1 and there is no pipeline to interleave; set "
                "parallel.pp to 2 or more, or vpp to 1"
            )
        if self.pipeline_layout and self.pp == 1:
            raise ConfigError(
                f"parallel.pipeline_layout is {self.pipeline_layout!r}, but parallel.pp is 1 and there is only one "
                "stage; leave it empty"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_parallel is true, but parallel.tp is 1 and there is nothing to split over; "
                "set parallel.tp to 2 or more, or sequence_parallel to false"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError(
                "parallel.overlap_param_gather is true, but parallel.overlap_grad_reduce is false, and both use the "
                "same buckets; set overlap_grad_reduce to true as well, or overlap_param_gather to false"
            )
        if self.cp_sharding != "zigzag" and self.cp == 1:
            raise ConfigError(
                f"parallel.cp_sharding is {self.cp_sharding!r}, but parallel.cp is 1 and nothing is cut; set "
                "parallel.cp to 2 or more, or cp_sharding to zigzag"
            )
        require(self.etp >= 0, "parallel.etp", self.etp, "must be >= 0")
        if self.ep == 1 and self.etp not in (0, self.tp):
            raise ConfigError(
                f"parallel.etp is {self.etp} with parallel.ep 1 and parallel.tp {self.tp}, but experts that are not "
                "spread are split like the rest of the model; set parallel.etp to 0, or parallel.ep to 2 or more"
            )

    @property
    def expert_tp(self) -> int:
        """Ranks that split each expert."""
        return self.etp or (self.tp if self.ep == 1 else 1)

    @property
    def replica_size(self) -> int:
        """Ranks of one model replica."""
        return self.tp * self.pp * self.cp

    def dp(self, world_size: int) -> int:
        """Data parallel size: model replicas in a world of so many ranks.

        Raises:
            ConfigError: the world is not a whole number of them, or experts do not spread over its stages.
        """
        if world_size % self.replica_size:
            raise ConfigError(
                f"parallel.tp * parallel.pp * parallel.cp = {self.tp} * {self.pp} * {self.cp} = {self.replica_size} "
                f"must divide the world size {world_size}; start a multiple of {self.replica_size} ranks, or make one "
                "of the three smaller"
            )
        stage, spread = world_size // self.pp, self.ep * self.expert_tp
        if stage % spread:
            raise ConfigError(
                f"a pipeline stage has {stage} ranks (tp x cp x dp), but parallel.ep x parallel.etp = {self.ep} x "
                f"{self.expert_tp} = {spread} must divide them; make ep smaller or start more ranks"
            )
        return world_size // self.replica_size


@dataclass(frozen=True, kw_only=True)
class CurriculumStage:
    """From a step on, only samples up to a length are drawn."""

    from_step: int = 0
    """First step (0-based) of this stage."""
    max_sample_tokens: int = 0
    """Longest sample that this stage draws; 0 means data.max_sample_tokens."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how images are tiled, how samples are packed."""

    meta: str = ""
    """The release's meta json: data set name -> annotation, root, repeat_time, ..."""
    validation: str = ""
    """Meta json of held-out data sets, whose loss is measured every runtime.validate_every steps; empty: none."""
    retrieval: str = ""
    """Meta json of questions with short answers, asked every runtime.evaluate_every steps; empty: none."""
    template: str = ""
    """Chat template; empty uses the checkpoint's own (`template` of its config.json)."""
    max_pack_tokens: int = 4096
    """Token budget of a pack, padding of documents excluded."""
    max_pack_tiles: int = 1024
    """Tile budget of a pack."""
    max_sample_tokens: int = 4096
    """Longest sample; what happens to longer ones is data.long_samples."""
    long_samples: Literal["cut", "split", "bad", "refuse"] = "cut"
    """Samples longer than max_sample_tokens. cut: text is cut on the right, as in the release, and a cut through an
    image makes the sample bad; split: parts are made between rounds and before images; bad: skipped, counted, named;
    refuse: the run stops with their list."""
    dynamic_image_size: bool = True
    """Cut images into a grid of tiles; false resizes each image to one tile."""
    min_dynamic_patch: int = 1
    """Fewest tiles of an image, thumbnail excluded."""
    max_dynamic_patch: int = 12
    """Most tiles of an image, thumbnail excluded, up to 1024; a data set may override it."""
    dynamic_max_patch: bool = False
    """Divide max_dynamic_patch by the number of images of a sample."""
    use_thumbnail: bool = True
    """Append the whole image as a last tile when it was cut into several."""
    pad2square: bool = False
    """Pad an image to a square with the mean color before resizing (only when it is not augmented)."""
    normalize_type: Literal["imagenet", "clip", "siglip"] = "imagenet"
    """Mean and standard deviation of the pixel normalisation."""
    loss_reduction: Literal["token", "sample", "square"] = "square"
    """Weight of a supervised token of a sample with x of them: 1, 1/x, or 1/sqrt(x)."""
    packing: Literal["best_fit", "release_greedy"] = "best_fit"
    """best_fit: packs as full and as alike as possible; release_greedy: the release's packer with its buffer of 20."""
    balance: bool = True
    """Steps of packs that cost about the same, assigned so that data parallel ranks end together; false is random."""
    shuffle: bool = True
    """Shuffle samples before packing, anew each epoch."""
    num_workers: int = 0
    """Loader processes per rank."""
    prefetch_mib: int = 2048
    """Memory of a rank for packs that are made but not yet used, in MiB; at least one pack is always under way."""
    max_bad_samples: float = 0.001
    """Share of samples that may be skipped as bad before the run stops, found while measuring or while training."""
    max_image_pixels: int = 89_478_485
    """Largest width x height that is decoded, of images and of frames; decoding needs up to 12 bytes for each pixel.
    WebP needs 16 and JPEG 2000 up to 27, so their limits are three quarters and two fifths of it."""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation of pictures, which phones store instead of turning pixels. ignore: as in the release."""
    alpha: Literal["black", "white"] = "black"
    """Transparent pixels. black: the transparency is dropped, as in the release, and the colors stored below it are
    shown, mostly black; white: the picture is laid on white."""
    control_tokens: Literal["text", "refuse"] = "text"
    """Control tokens that a record's text spells (`<|im_end|>`, `</s>`, `<img>`). text: they are text like any other,
    and end or forge nothing; refuse: the record is bad."""
    min_num_frame: int = 4
    """Fewest frames of a video; fewer only where it has fewer."""
    max_num_frame: int = 20
    """Most frames of a video; how many a sample shows is drawn once, from its identity."""
    video_sampling: Literal["rand", "middle"] = "rand"
    """One frame of each equal interval: `rand` anew in every epoch, `middle` the same always."""
    max_video_seconds: float = 7200.0
    """Longest video, or clip of one, that is read."""
    cache_dir: str = ""
    """Where measured lengths are kept; empty means `<runtime.run_dir>/data_cache`."""
    curriculum: tuple[CurriculumStage, ...] = ()
    """Stages by sample length; empty draws from all samples at every step."""

    def __post_init__(self) -> None:
        for name in ("max_pack_tokens", "max_pack_tiles", "max_sample_tokens", "max_image_pixels"):
            require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "must be positive")
        require(
            self.min_dynamic_patch >= 1,
            "data.min_dynamic_patch",
            self.min_dynamic_patch,
            "must be at least 1",
        )
        require(
            0 <= self.max_bad_samples <= 1, "data.max_bad_samples", self.max_bad_samples, "must lie in [0, 1]"
        )
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "must be >= 0")
        require(self.prefetch_mib >= 1, "data.prefetch_mib", self.prefetch_mib, "must be at least 1")
        require(
            1 <= self.min_num_frame <= self.max_num_frame,
            "data.min_num_frame",
            self.min_num_frame,
            f"must lie in 1..data.max_num_frame = {self.max_num_frame}",
        )
        require(
            self.max_video_seconds > 0, "data.max_video_seconds", self.max_video_seconds, "must be positive"
        )
        steps = [stage.from_step for stage in self.curriculum]
        require(
            steps == sorted(set(steps)) and (not steps or steps[0] == 0),
            "data.curriculum",
            steps,
            "from_step must start at 0 and rise",
        )


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """Variable Visual Position Encoding."""

    mode: Literal["default", "v2pe_fixed", "v2pe_random"] = "default"
    """`default`: a visual token counts as a text token. The release's `v2pe_fix`, `v2pe_rnd` are accepted."""
    stride: int = 0
    """Units of 1/tokens_per_tile that a visual token advances in `v2pe_fixed`; 1..tokens_per_tile."""
    rope_precision: Literal["exact", "reference"] = "exact"
    """`exact`: float64 angles; `reference`: the release's float32 products, for comparisons."""

    def __post_init__(self) -> None:
        if self.mode == "v2pe_fixed":
            require(
                self.stride >= 1, "position.stride", self.stride, "v2pe_fixed needs a stride of at least 1"
            )
        else:
            require(
                self.stride == 0,
                "position.stride",
                self.stride,
                "only position.mode v2pe_fixed has a stride",
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved and what it resumes from."""

    save_every: int = 0
    """Steps between checkpoints; 0 saves by time, see save_minutes."""
    save_minutes: float = 30.0
    """Minutes between checkpoints where save_every is 0; 0 saves at the end only, and a run that is killed before loses
    everything."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    async_save: bool = True
    """Write checkpoints while training continues, from a copy of each rank's state in host memory; where there is too
    little of it, and at the last step, training waits, as it does with false."""
    resume: bool = True
    """Continue from the newest checkpoint of runtime.run_dir, when there is one."""
    verify: Literal["sizes", "full"] = "sizes"
    """How the files of a checkpoint are checked before it is loaded. sizes: missing, cut and exchanged files are
    found, and any change of a small one; full: every file is read and hashed, which also finds flipped bits."""
    fallback: bool = False
    """Continue from the newest good checkpoint when newer ones are damaged; false stops and names it."""
    allow_changed_data: bool = False
    """Continue although data or seed changed since the checkpoint, with the next step of the new plan, whose samples
    may have been seen already; false stops and says what changed."""
    allow_changed_model: bool = False
    """Continue with the weights of the checkpoint although model.checkpoint or what is frozen changed; false stops and
    says what changed."""

    def __post_init__(self) -> None:
        require(self.save_every >= 0, "checkpoint.save_every", self.save_every, "must be >= 0")
        require(self.save_minutes >= 0, "checkpoint.save_minutes", self.save_minutes, "must be >= 0")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where the run writes, in which precision it computes, how it reports."""

    run_dir: str = ""
    """Folder of this run: resolved config, checkpoints, metrics.jsonl, tensorboard/."""
    seed: int = 42
    """Seed of data order, strides, drop path."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype; bfloat16 keeps float32 main weights and gradients."""
    elementwise: Literal["auto", "compiled", "eager"] = "auto"
    """How element-wise operations run (rotation of queries and keys, SwiGLU, the tower's biases, GELU, LayerScale, drop
    path). compiled: one kernel each, made by torch.compile in the first step; an error where it cannot run; eager:
    operation by operation. auto: compiled on a GPU, eager where that fails, which is reported, and on a CPU."""
    deterministic: bool = False
    """Only algorithms that give the same bits in every run of one layout: torch refuses others; attention backward,
    cuBLAS and NCCL use theirs. Costs speed on a GPU, nothing on a CPU, where runs give the same bits without it."""
    log_every: int = 1
    """Steps between heartbeat lines."""
    validate_every: int = 0
    """Steps between losses of data.validation, which are measured after the last step, too; 0 for none."""
    evaluate_every: int = 0
    """Steps between answers to data.retrieval (the share of samples of which every token is the most probable one),
    which are asked for after the last step, too; 0 for none."""
    tensorboard: bool = True
    """Write curves to <run_dir>/tensorboard."""
    wandb_project: str = ""
    """Project of Weights & Biases that gets the same numbers; empty sends nothing. Needs the extra `track`."""
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient may be NaN or Inf before the run stops. Such a step is not applied and is
    recorded with its samples in <run_dir>/bad_steps.jsonl."""
    hang_timeout_s: float = 1800.0
    """Seconds without a finished step after which a rank writes the stacks of its threads to <run_dir>/stacks and
    ends; 0 turns this off. Collectives wait as long, and never less than 30 minutes (0: a day)."""
    max_loss_ratio: float = 0.0
    """A step whose loss exceeds so many times the median of the last loss_window applied steps counts as bad, as one
    that is not finite does; 0 turns this off."""
    loss_window: int = 32
    """Applied steps whose median loss max_loss_ratio refers to; before there are as many, no loss is too large."""
    profile_from_step: int = 0
    """First step of which a trace is written to <run_dir>/profile; 0 for none. A file <run_dir>/profile_now, or
    SIGUSR2 to a rank, asks for the next steps while the run continues."""
    profile_steps: int = 2
    """Steps that are profiled then, each into a trace of its own."""
    profile_ranks: str = "0"
    """Ranks that write traces: numbers such as 0,8 or all."""

    def __post_init__(self) -> None:
        require(self.log_every >= 1, "runtime.log_every", self.log_every, "must be at least 1")
        require(self.validate_every >= 0, "runtime.validate_every", self.validate_every, "must be >= 0")
        require(self.evaluate_every >= 0, "runtime.evaluate_every", self.evaluate_every, "must be >= 0")
        require(self.max_bad_steps >= 1, "runtime.max_bad_steps", self.max_bad_steps, "must be at least 1")
        require(
            self.hang_timeout_s >= 0 and math.isfinite(self.hang_timeout_s),
            "runtime.hang_timeout_s",
            self.hang_timeout_s,
            "must be >= 0 and finite",
        )
        require(
            self.max_loss_ratio == 0 or 1 < self.max_loss_ratio < math.inf,
            "runtime.max_loss_ratio",
            self.max_loss_ratio,
            "must be above 1 and finite, or 0 to turn it off",
        )
        require(self.loss_window >= 1, "runtime.loss_window", self.loss_window, "must be at least 1")
        require(
            self.profile_from_step >= 0, "runtime.profile_from_step", self.profile_from_step, "must be >= 0"
        )
        require(self.profile_steps >= 1, "runtime.profile_steps", self.profile_steps, "must be at least 1")
        require(
            re.fullmatch(r"all|[0-9]+(,[0-9]+)*", self.profile_ranks) is not None,
            "runtime.profile_ranks",
            self.profile_ranks,
            "must be all, or numbers of ranks with commas between, such as 0,8",
        )
        require(self.seed >= 0, "runtime.seed", self.seed, "must be >= 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for section in fields(self):
            values = getattr(self, section.name)
            for each in fields(values):
                value = getattr(values, each.name)
                is_number = not isinstance(value, float) or math.isfinite(value)
                require(is_number, f"{section.name}.{each.name}", value, "must be finite")
                require_local(f"{section.name}.{each.name}", value)

    def is_frozen(self, part: Part) -> bool:
        """Whether the weights of a part stay as they are."""
        if part == "vision" and self.vision.freeze_large_branch:
            return True
        section, name = FREEZE_FIELDS[part].split(".")
        return getattr(getattr(self, section), name)
