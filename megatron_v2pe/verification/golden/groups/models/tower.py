"""Inside one rank's model: vision tower, projector and the decoder's hidden states, layer by layer.

Run at one rank only: what is compared here is whole on every rank, or is covered by the logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.checkpoint.model_loading import load_model
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import RunConfig, RuntimeConfig
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.models.projector import Projector, pixel_shuffle
from megatron_v2pe.parallel.topology import ParallelContext
from megatron_v2pe.verification.golden.cases import ForwardFile
from megatron_v2pe.verification.golden.checkpoints import Imported
from megatron_v2pe.verification.golden.rows import Row, compared, unsupported

VISION_ATOL = 5e-5  # float32 against float64 of the release's own code differs by 6e-6
POSITION_TABLE_ATOL = 1e-5  # one bicubic interpolation in float32


def load_whole_model(checkpoint: Path, context: ParallelContext) -> InternVL:
    """The model of an imported checkpoint on one rank, in float32."""
    arch = read_architecture(hf_path(checkpoint))
    config = RunConfig(runtime=RuntimeConfig(dtype="float32"))
    (model,) = load_model(checkpoint, config, arch, context)
    return model.eval()


def vision_rows(folder: Path, checkpoints: Mapping[str, Imported], context: ParallelContext) -> Iterator[Row]:
    """Tower and projector on each file's pool of tiles, and on tiles of another size."""
    for key, checkpoint in checkpoints.items():
        path = folder / "forward" / f"{key}.json"
        if not path.exists():
            continue
        if isinstance(checkpoint, CheckpointError):
            yield unsupported(f"model/{key}/vision", "all", reason=str(checkpoint).splitlines()[0])
            continue
        with torch.no_grad():
            model = load_whole_model(checkpoint, context)
            yield from _tower_rows(ForwardFile.open(folder, path), model, device=context.ranks.device)
    path = folder / "forward" / "vision_resize.json"
    if path.exists():
        yield from _resize_rows(path, checkpoints, context)


def _tower_rows(file: ForwardFile, model: InternVL, *, device: torch.device) -> Iterator[Row]:
    name = f"model/{file.key}/vision"
    pixels = file.tensor("pixel_pool").float().to(device)
    assert model.vision is not None
    assert isinstance(model.projector, Projector)
    layers = _outputs_of(model.vision.encoder.layers)
    hidden = model.vision(pixels)
    states = [model.vision.embed(pixels), *[output.transpose(0, 1) for output in layers.values()]]
    for wanted_name in file.names("vision/tile0_hidden_"):
        index = int(wanted_name.rsplit("_", 1)[1])
        yield _row(name, f"tile0_hidden_{index}", states[index][0], file.tensor(wanted_name))
    yield _row(name, "vit_last_hidden", hidden, file.tensor("vision/vit_last_hidden"))
    patches = hidden[:1, 1:]
    side = round(patches.shape[1] ** 0.5)
    shuffled = pixel_shuffle(
        patches.reshape(1, side, side, -1), ratio=model.projector.ratio, version=model.projector.version
    )
    yield _row(name, "pixel_shuffled", shuffled, file.tensor("vision/pixel_shuffled"))
    yield _row(name, "mlp1_out", model.projector(hidden), file.tensor("vision/mlp1_out"))


def _resize_rows(path: Path, checkpoints: Mapping[str, Imported], context: ParallelContext) -> Iterator[Row]:
    tensors = load_file(path.with_suffix(".safetensors"))
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        name, checkpoint = f"model/vision_resize/{case['name']}", checkpoints.get(case["ckpt"])
        if isinstance(checkpoint, CheckpointError):
            yield unsupported(name, "all", reason=str(checkpoint).splitlines()[0])
        elif checkpoint is not None:  # else the family was not asked for
            with torch.no_grad():
                model = load_whole_model(checkpoint, context)
                yield from _resized(name, model, case, tensors, device=context.ranks.device)


def _resized(
    name: str, model: InternVL, case: dict[str, Any], tensors: dict[str, Tensor], *, device: torch.device
) -> Iterator[Row]:
    prefix = f"{case['name']}/"
    pixels = tensors[prefix + "pixel_values_f16"].float().to(device)
    assert model.vision is not None
    assert isinstance(model.projector, Projector)
    table = model.vision.positions(int(case["input_size"]) // model.vision.patch_size)
    wanted_table = tensors[prefix + "resized_position_embedding"]
    error = float((table.cpu().reshape(wanted_table.shape) - wanted_table).abs().max())
    yield compared(name, "resized_position_embedding", error=error, tolerance=POSITION_TABLE_ATOL)
    hidden = model.vision(pixels)
    yield _row(name, "embeddings_out", model.vision.embed(pixels), tensors[prefix + "embeddings_out"])
    yield _row(name, "vit_last_hidden", hidden, tensors[prefix + "vit_last_hidden"])
    if prefix + "mlp1_out" in tensors:
        yield _row(name, "mlp1_out", model.projector(hidden), tensors[prefix + "mlp1_out"])


def _row(name: str, quantity: str, value: Tensor, wanted: Tensor) -> Row:
    error = float((value.cpu().reshape(wanted.shape) - wanted).abs().max())
    return compared(name, quantity, error=error, tolerance=VISION_ATOL)


def _outputs_of(layers: torch.nn.ModuleList) -> dict[int, Tensor]:
    """Filled with each layer's output when the model next runs."""
    outputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(keep(index))
    return outputs
