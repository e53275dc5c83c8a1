"""The same two optimizer steps under any parallel layout, compared with one rank.

    case  = how documents are packed x where the images lie x position mode          (data, no layout)
    layout = sizes of the parallel axes, and options of the model                    (no data)

    one rank    (case, options) --train_step x 2--> losses, gradient norms, whole gradients and weights --> file
    N ranks     (layout, case)  --train_step x 2--> every rank compares its slices with the file --> largest errors

The steps are those of `train`: `build_model`, `wrap_for_training`, `BatchSharder`, `train_step`. Cases are in
`parity_cases`.
"""

import contextlib
import dataclasses
import gc
import math
import sys
from collections.abc import Callable

import torch

from megatron_v2pe.batch.packed_batch import tile_share
from megatron_v2pe.config.arch.architecture import ExpertsArchitecture
from megatron_v2pe.config.schema import (
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.config.sections.moe import MoEConfig
from megatron_v2pe.verification.prove import slices, steps
from tests.support.parity_cases import ARCH, DOCUMENTS, POSITIONS, pack
from tests.support.spawn import run_ranks

NO_ADAPTERS = LoRAConfig()
# Layer 1 is dense; strong losses, so that they show in gradients and weights.
EXPERTS = ExpertsArchitecture(
    num_experts=4,
    top_k=2,
    ffn_size=40,
    is_sparse=(True, False, True, True),
    normalizes_top_k=True,
    aux_loss_coefficient=0.5,
)
QUANTITIES = ("loss", "norm", "gradient", "weight 1", "weight 2")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the reference must be run with, too: it changes which numbers come out.

    `experts`: mixture of experts as in Qwen3-MoE, with both router losses. `other_parts`: queries, keys and values have
    biases, as in Qwen2; the tower is in the style of InternViT-6B.
    """

    freeze_vision: bool = False
    freeze_projector: bool = False
    freeze_language: bool = False
    tied: bool = False
    other_parts: bool = False
    architecture: str = ARCH.language.architecture
    experts: bool = False
    lora: LoRAConfig = NO_ADAPTERS

    @property
    def arch(self):
        language = dataclasses.replace(
            ARCH.language,
            architecture=self.architecture,
            tie_word_embeddings=self.tied,
            qkv_bias=self.other_parts,
        )
        if self.experts:
            language = dataclasses.replace(
                language, architecture="Qwen3MoeForCausalLM", qk_norm=True, head_dim=12, experts=EXPERTS
            )
        vision = ARCH.vision
        if self.other_parts:
            vision = dataclasses.replace(vision, norm_type="rms_norm", qkv_bias=False, qk_normalization=True)
        return dataclasses.replace(ARCH, language=language, vision=vision)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the axes and what must not change any number."""

    parallel: ParallelConfig
    options: Options = Options()
    recompute: str = "none"
    micro_batch_tiles: int = 0

    def config(self, case):
        return RunConfig(
            parallel=self.parallel,
            position=POSITIONS[case.mode],
            model=ModelConfig(
                recompute=self.recompute,
                loss_chunk_tokens=16,
                freeze_language=self.options.freeze_language,
                freeze_projector=self.options.freeze_projector,
            ),
            vision=VisionConfig(
                freeze=self.options.freeze_vision,
                micro_batch_tiles=self.micro_batch_tiles,
                recompute=self.recompute,
            ),
            lora=self.options.lora,
            moe=MoEConfig(z_loss=0.05),
            # eps 1e-2, above most gradients: see docs/numerics.md. Clipping lets the norm reach every weight.
            optim=OptimConfig(lr=1e-1, min_lr=1e-1, eps=1e-2, clip_grad=0.5, steps=10, global_batch_size=4),
            runtime=RuntimeConfig(dtype="float32"),
        )


def packs_of_rank(case, context):
    """This data parallel rank's micro batches, every dp-th of the step's, as the loader assigns them."""
    plan, ranks = context.plan, context.ranks
    return [
        pack(
            case,
            micro_batch,
            pad_to_multiple=plan.pad_to_multiple,
            tile_range_of=lambda n: (
                tile_share(n, plan.tile_ranks, ranks.tile_rank) if ranks.is_first_stage else (0, 0)
            ),
        )
        for micro_batch in range(ranks.dp_rank, len(DOCUMENTS[case.packing, case.images]), plan.dp)
    ]


def two_steps(layout, case, context):
    """Build, place weights, run two updates."""
    packs = packs_of_rank(case, context)
    outcome = steps.run_steps(layout.config(case), layout.options.arch, context, packs)
    for ours, mcores in zip(outcome.norms, outcome.norms_of_mcore, strict=True):
        assert math.isclose(ours, mcores, rel_tol=1e-6)  # shards and copies are counted by us as mcore does
    return outcome


def join(layout, world_size):
    """The ranks of a layout; groups of the one before are destroyed."""
    from megatron.core import parallel_state

    from megatron_v2pe.parallel.topology import init_distributed, resolve

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        leave_groups()
    plan = resolve(layout.parallel, world_size)
    return init_distributed(plan, seed=1, timeout_minutes=1)


def leave_groups():
    """Destroy every group but the world's: mcore only forgets its own, each of which keeps threads of gloo."""
    torch.distributed.barrier()  # nobody waits in one of them any more
    world = torch.distributed.group.WORLD
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)
    gc.collect()  # models of the last layout hold groups too


def run_reference(rank, world_size, wanted, path):
    """One rank: whole tensors of every (case, options) in `wanted`, saved to `path`.

    Returns:
        {(case, options): {key: largest gradient}}.
    """
    results = {}
    for case, options in wanted:
        layout = Layout(ParallelConfig(), options)
        outcome = two_steps(layout, case, join(layout, 1))
        results[str(case), options] = steps.wholes(outcome, vocab_size=ARCH.language.vocab_size)
    torch.save(results, path)
    return {name: result["gradient_scales"] for name, result in results.items()}


@dataclasses.dataclass(frozen=True)
class Work:
    """Cases to run under a layout, and, for wrong variants, a context manager function to run them under."""

    name: str
    layout: Layout
    cases: tuple
    mutation: Callable = contextlib.nullcontext


def compare(rank, world_size, work, path):
    """{(name, case): errors} of this rank against what `run_reference` wrote to `path`."""
    references = torch.load(path, weights_only=False)
    found = {}
    for row in work:
        context = join(row.layout, world_size)
        for case in row.cases:
            sys.stderr.write(f"{row.name} [{case}]\n")  # shown when a rank fails
            with row.mutation():
                outcome = two_steps(row.layout, case, context)
            found[row.name, str(case)] = errors(outcome, references[str(case), row.layout.options])
    return found


def errors(outcome, wanted):
    """{"loss": (error, where), ...}: relative deviations, with the parameter that deviates most.

    "held" says which parts of which whole tensors were compared.
    """
    return {**steps.compare(outcome, wanted), "held": slices.held_by(outcome.gradients)}


def reference_file(folder, wanted, *, timeout=200):
    """Run the reference in a process of its own; returns the file and what `run_reference` returns."""
    path = folder / "reference.pt"
    (scales,) = run_ranks(run_reference, 1, wanted, str(path), timeout=timeout)
    return path, scales


def compare_ranks(world_size, work, reference, *, timeout):
    """{(name, case): {quantity: (error, where)}}, the worst of all ranks.

    Raises:
        AssertionError: the ranks together did not hold every element of every parameter.
    """
    path, scales = reference
    by_rank = run_ranks(compare, world_size, work, str(path), timeout=timeout)
    for row in work:
        for case in row.cases:
            held = [found[row.name, str(case)]["held"] for found in by_rank]
            assert slices.not_compared(held, scales[str(case), row.layout.options]) == []
    return {
        name: {quantity: max(found[name][quantity] for found in by_rank) for quantity in QUANTITIES}
        for name in by_rank[0]
    }
