"""What the run reads: its checkpoint, its data list, images of a few samples."""

from __future__ import annotations

from pathlib import Path

from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.files.folder import hf_path, read_info
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.image import ImageFile, read_rgb
from megatron_v2pe.data.media.medium import MediaRules
from megatron_v2pe.data.samples.records import Record, parse_line
from megatron_v2pe.data.sources import storage
from megatron_v2pe.data.sources.meta import DatasetEntry, read_meta
from megatron_v2pe.preflight.findings import Finding

PICTURED = 4  # samples with images of each data set
LINES = 64  # read of each at most


def read_model(config: RunConfig) -> InternVLArchitecture:
    """Architecture of the run's model.

    Raises:
        CheckpointError: it is missing or not complete.
    """
    if config.model.hf_path:
        open_hf(config.model.hf_path)
        return read_architecture(Path(config.model.hf_path))
    read_info(config.model.checkpoint)
    return read_architecture(hf_path(config.model.checkpoint))


def check_data(config: RunConfig) -> Finding:
    """Each data set's first lines, and the images of its first samples, decoded.

    Raises:
        DataError: something cannot be read, with file and line.
    """
    entries = read_meta(config.data.meta)
    num_images = sum(_decode_images(entry, max_pixels=config.data.max_image_pixels) for entry in entries)
    text = f"{config.data.meta}: {len(entries)} data sets, {num_images} images of their first samples decoded"
    return Finding(name="data", verdict="go", text=text)


def _decode_images(entry: DatasetEntry, *, max_pixels: int) -> int:
    records = _first_records(entry)
    if not records:
        raise DataError(f"{entry.annotation}: is empty; a data set needs at least one sample")
    pictures = [[each.path for each in record.media if isinstance(each, ImageFile)] for record in records]
    paths = [path for own in [own for own in pictures if own][:PICTURED] for path in own]
    for path in paths:
        read_rgb(path, MediaRules(max_pixels=max_pixels))
    return len(paths)


def _first_records(entry: DatasetEntry) -> list[Record]:
    with storage.open_binary(entry.annotation) as file:
        lines = [line for line, _ in zip(file, range(LINES), strict=False)]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [parse_line(line, entry=entry, line_number=number) for number, line in numbered]
