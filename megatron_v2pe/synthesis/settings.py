"""What a run makes, and the folder it makes it in.

out/synthesis.json      what decides the content; another command in the same folder is refused
out/unfinished/         store of passages and finished parts; removed at the end
out/skipped.txt         source files that could not be used, if there were any
out/images/             named by content
out/KIND.jsonl          records, by number
out/mm_niah/TASK.jsonl  evaluation split only
out/meta.json           last: its presence says that everything is there
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import writable_folder, write_atomic
from megatron_v2pe.synthesis.kinds import IMAGE_KINDS, VQA_KINDS
from megatron_v2pe.synthesis.split import Split

MANIFEST, META, WORK, SKIPPED, LOCK = "synthesis.json", "meta.json", "unfinished", "skipped.txt", ".lock"


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """Options of one run; everything but `workers` and the paths decides the content.

    Attributes:
        kinds: kinds of samples.
        lengths: tokens of samples.
        count: samples of each kind and length.
        num_depths: bands of depth, used in turn.
        split: whose material.
        held_out: share of passages and images that belongs to the evaluation split.
        text_per_image: tokens of text after which a document has an image.
        num_decoys: facts or figures that only look like the answer.
        seed: of every choice.
        texts: folder of texts.
        images: folder of images; empty for documents without.
        vqa: jsonl of short questions; empty without Long-VQA.
        vqa_images: folder of their images.
        out: output folder.
        workers: processes; 1 works in this one.
    """

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    count: int
    num_depths: int
    split: Split
    held_out: float
    text_per_image: int
    num_decoys: int
    seed: int
    texts: str
    images: str
    vqa: str
    vqa_images: str
    out: str
    workers: int

    def __post_init__(self) -> None:
        for name, option in (
            ("count", "--count"),
            ("num_depths", "--depths"),
            ("text_per_image", "--text-per-image"),
            ("num_decoys", "--decoys"),
            ("workers", "--workers"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{option} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held-out is {self.held_out}, but must lie between 0 and 1")
        need_images = [kind for kind in self.kinds if kind in IMAGE_KINDS]
        if need_images and not self.images:
            raise ConfigError(
                f"--images is missing, but kind {need_images[0]} is made of images; give a folder"
            )
        need_vqa = [kind for kind in self.kinds if kind in VQA_KINDS]
        if need_vqa and not self.vqa:
            raise ConfigError(
                f"--vqa is missing, but kind {need_vqa[0]} is made of short questions; give their jsonl file, or name "
                "other kinds ('needles' is all that need none)"
            )
        if self.vqa and not need_vqa:
            raise ConfigError(
                f"--vqa is {self.vqa!r}, but no Long-VQA kind is asked for; name one, or omit it"
            )

    def content(self) -> dict[str, Any]:
        """What decides the content, for the manifest."""
        paths = ("texts", "images", "vqa", "vqa_images", "out", "workers")
        kept = {name: value for name, value in asdict(self).items() if name not in paths}
        return json.loads(json.dumps(kept))


def open_folder(out: Path, content: dict[str, Any]) -> None:
    """Make the output folder, or find that a run of ours began it.

    Args:
        out: the folder.
        content: see `SynthesisConfig.content`.

    Raises:
        ConfigError: it cannot be written, holds something else, or data of another command.
    """
    writable_folder(out, field="--out")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in (WORK, LOCK))
    if foreign and not (out / MANIFEST).exists():
        raise ConfigError(
            f"--out: {out} holds {foreign[0]!r} and was not made by synthesize; choose a new folder"
        )
    _compare(out, content)


def claim(out: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest, or continue when the folder belongs to the same command and sources.

    Args:
        out: see `open_folder`.
        wanted: everything that decides the content, as json.

    Raises:
        ConfigError: the folder holds other data.
    """
    _compare(out, wanted)
    write_atomic(out / MANIFEST, json.dumps(wanted, indent=2) + "\n")


def _compare(out: Path, wanted: dict[str, Any]) -> None:
    """Nothing is lost by another command as long as no part is finished."""
    manifest = out / MANIFEST
    if not manifest.exists() or not ((out / META).exists() or any((out / WORK).glob("part-*.jsonl"))):
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out: {manifest}: damaged ({error}); remove the folder") from None
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise ConfigError(
            f"--out: {out} holds data whose {key} is {found.get(key)!r}, not {wanted[key]!r}; choose another folder "
            "or remove this one"
        )
