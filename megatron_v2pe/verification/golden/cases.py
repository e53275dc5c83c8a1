"""Forward cases of a golden folder as the packs that training would see; no model is involved.

forward/<key>.json + .safetensors  -->  ForwardFile  -->  Case(pack, wanted numbers)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, parse_architecture
from megatron_v2pe.config.position_modes import POSITION_MODES, PositionMode
from megatron_v2pe.data.collate import collate_pack
from megatron_v2pe.data.samples.encode import EncodedSample
from megatron_v2pe.v2pe.layout import Int64Array, SampleLayout, find_images


@dataclass(frozen=True, kw_only=True)
class ForwardFile:
    """One forward file: a checkpoint, a pool of tiles, and cases over them.

    Attributes:
        key: name of the checkpoint folder under `ckpt/`.
        folder: the golden folder.
        values: contents of the json file.
    """

    key: str
    folder: Path
    values: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, path: Path) -> ForwardFile:
        """Read the json; tensors are read when asked for."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(key=values["ckpt"], folder=folder, values=values)

    @cached_property
    def _tensors(self) -> Any:
        return safe_open(self.folder / "forward" / f"{self.key}.safetensors", framework="pt")

    def tensor(self, name: str) -> Tensor:
        """A stored tensor."""
        return self._tensors.get_tensor(name)

    def has(self, name: str) -> bool:
        """Whether a tensor is stored."""
        return name in self._tensors.keys()  # noqa: SIM118 - safe_open is no mapping

    def names(self, prefix: str) -> list[str]:
        """Stored tensor names that start with `prefix`."""
        return [name for name in self._tensors.keys() if name.startswith(prefix)]  # noqa: SIM118

    @property
    def checkpoint(self) -> Path:
        """Hugging Face folder of the checkpoint."""
        return self.folder / "ckpt" / self.key

    def architecture(self, override: dict[str, Any] | None = None) -> InternVLArchitecture:
        """Architecture with the overrides of a case ("llm_config.max_position_embeddings": 24)."""
        values = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        for path, value in (override or {}).items():
            *sections, key = path.split(".")
            target = values
            for section in sections:
                target = target[section]
            target[key] = value
        return parse_architecture(values, str(self.checkpoint / "config.json"))

    def cases(self) -> Iterator[Case]:
        """All cases of the file."""
        for values in self.values["cases"]:
            yield Case(file=self, values=values)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One forward case."""

    file: ForwardFile
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Name inside the file."""
        return str(self.values["name"])

    @property
    def mode(self) -> PositionMode:
        """Position mode by our name."""
        return POSITION_MODES[self.values["version"]]

    def wanted(self, name: str) -> Tensor:
        """A stored number of this case."""
        return self.file.tensor(f"{self.name}/{name}")

    def names(self, prefix: str) -> list[str]:
        """What of the case's stored numbers starts with `prefix`, without it."""
        whole = f"{self.name}/{prefix}"
        return [name.removeprefix(whole) for name in self.file.names(whole)]

    def tolerance(self, name: str, *, floor: float) -> float:
        """Eight times what float32 and float64 runs of the release differ by in this case, at least `floor`."""
        return max(floor, 8.0 * float(self.values["tolerance"][name]))

    def pixels(self) -> Tensor:
        """Tiles that are scattered into the text, float32 [n, 3, S, S]; those with flag 0 never are."""
        index = self.wanted("tile_index")[self.wanted("image_flags") == 1]
        return self.file.tensor("pixel_pool").float()[index]

    def pack(self, *, pad_to_multiple: int, loss_reduction: str) -> PackedBatch:
        """The case as a pack, made by the code that training uses; it holds no pixels."""
        tokens = self.wanted("input_ids").numpy()
        labels = self.wanted("labels").numpy()
        samples = []
        strides = self._image_strides(tokens)
        for index, (start, stop) in enumerate(self._documents(len(tokens))):
            layout = self._layout(tokens[start:stop], strides)
            strides = strides[layout.num_images :]
            samples.append(
                EncodedSample(
                    tokens=tokens[start:stop],
                    labels=labels[start:stop],
                    layout=layout,
                    media=(),
                    sample_id=f"{self.name}#{index}",
                )
            )
        return collate_pack(
            samples,
            pad_to_multiple=pad_to_multiple,
            pad_token_id=0,
            loss_reduction=loss_reduction,
            image_size=int(self.file.values["image_size"]),
            tile_range_of=lambda _num_tiles: (0, 0),
        )

    def _documents(self, num_tokens: int) -> list[tuple[int, int]]:
        if not self.file.has(f"{self.name}/cu_seqlens"):
            return [(0, num_tokens)]
        cu_seqlens = self.wanted("cu_seqlens").tolist()
        return list(pairwise(cu_seqlens))

    def _num_tiles(self, tokens: Int64Array) -> Int64Array:
        """Tiles of each image, from the distance of its tags."""
        ids = self.file.values["token_ids"]
        starts = np.flatnonzero(tokens == ids["<img>"])
        ends = np.flatnonzero(tokens == ids["</img>"])
        return (ends - starts - 1) // int(self.file.values["num_image_token"])

    def _image_strides(self, tokens: Int64Array) -> Int64Array:
        """Stride of each image of the row; a packed row may have one for each of its samples."""
        default = int(self.file.values["num_image_token"])
        num_images = len(self._num_tiles(tokens))
        if self.values.get("sample_strides"):
            counts = [len(tiles) for tiles in self.values["sample_num_tiles"]]
            per_sample = [stride or default for stride in self.values["sample_strides"]]
            return np.repeat(np.array(per_sample, dtype=np.int64), counts)
        if self.values.get("rnd_strides"):
            return np.array(self.values["rnd_strides"], dtype=np.int64)
        return np.full(num_images, self.values.get("stride") or default, dtype=np.int64)

    def _layout(self, tokens: Int64Array, strides: Int64Array) -> SampleLayout:
        num_tiles = self._num_tiles(tokens)
        tokens_per_tile = int(self.file.values["num_image_token"])
        return SampleLayout(
            num_tokens=len(tokens),
            image_starts=find_images(
                tokens,
                image_token_id=self.file.values["token_ids"]["<IMG_CONTEXT>"],
                num_tiles=num_tiles.tolist(),
                tokens_per_tile=tokens_per_tile,
            ),
            num_tiles=num_tiles,
            strides=strides[: len(num_tiles)],
            tokens_per_tile=tokens_per_tile,
        )


def to_unpadded(rows: Tensor, pack: PackedBatch) -> Tensor:
    """Rows [t, ...] of a padded pack without its padding, in token order."""
    keep = [
        torch.arange(start, start + document.num_tokens)
        for document, start in zip(pack.layout.documents, pack.layout.cu_seqlens.tolist(), strict=False)
    ]
    return rows[torch.cat(keep)]
