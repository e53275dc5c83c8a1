"""What a file is by its first bytes, for one clear line where another kind was expected."""

from __future__ import annotations

import re

HEAD_BYTES = 4096
CONVERT = "`megatron-v2pe convert-data` writes one record a line from json, gzip, parquet, CSV and TSV files"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file (run  git lfs pull)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\x03\x04", "a zip archive (or an Office document)"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\xfd7zXZ\0", "an xz file"),
    (b"BZh", "a bzip2 file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\xff\xfe\0\0", "UTF-32 text (convert it to UTF-8)"),
    (b"\xff\xfe", "UTF-16 text (convert it to UTF-8)"),
    (b"\xfe\xff", "UTF-16 text (convert it to UTF-8)"),
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an ICO file"),
    (b"icns", "an ICNS file"),
    (b"DDS ", "a DDS texture"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"FLV\x01", "a Flash video"),
    (b"OggS", "an Ogg file"),
    (b"ID3", "an MP3 file"),
    (b"fLaC", "a FLAC file"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"GIF8", "a GIF image"),
)
_BRANDS = {
    b"heic": "a HEIC image", b"heix": "a HEIC image", b"hevc": "a HEIC image", b"mif1": "a HEIF image",
    b"msf1": "a HEIF image", b"avif": "an AVIF image", b"avis": "an AVIF image", b"qt  ": "a QuickTime video",
}  # fmt: skip
_BASE64 = re.compile(rb"[A-Za-z0-9+/\r\n]{256,}={0,2}\s*").fullmatch
_CONTAINERS = {b"WEBP": "a WebP image", b"AVI ": "an AVI video", b"WAVE": "a WAV file"}


def kind_of(head: bytes) -> str:
    """What a file is, with its article: `an HTML page`; empty where the first bytes do not say.

    Args:
        head: the first bytes; `HEAD_BYTES` are enough.
    """
    if not head:
        return "an empty file"
    known = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")
    return known or _container(head) or _text_kind(head)


def _container(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "an MP4 video")
    if head.startswith(b"RIFF"):
        return _CONTAINERS.get(head[8:12], "")
    if head[257:262] == b"ustar":
        return "a tar archive"
    return "a file of zeros" if len(head) >= 16 and not head.strip(b"\0") else ""


def _text_kind(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:512].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page (a download that failed?)"
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in head[:2048]):
        return "an SVG drawing"
    if start.startswith(b"<?xml"):
        return "an XML document (a download that failed?)"
    if start.startswith(b"data:"):
        return "a data: address as text (decode its base64 into the file)"
    if (
        len(head) > 4
        and (head[1:4:2] == b"\0\0" or head[0:4:2] == b"\0\0")
        and head.count(b"\0") * 3 > len(head)
    ):
        return "UTF-16 text (convert it to UTF-8)"
    if not start.startswith((b"{", b"[")) and _BASE64(head[: len(head) - len(head) % 4 or None]):
        return "base64 text (decode it into the file)"
    return ""


def annotation_kind(head: bytes) -> str:
    """What an annotation file is if it is not one json object a line; empty if it may be.

    Args:
        head: the first bytes.
    """
    kind = kind_of(head)
    if kind:
        return kind
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return "one json array"
    first = start.split(b"\n", 1)[0].strip()
    if first == b"{" and b"\n" in start:
        return "json over several lines"
    return _tabular(first) if first and not first.startswith(b"{") else ""


def _tabular(first: bytes) -> str:
    """The separator that the first line has most of."""
    signs = {b"\t": "a table with tabs", b",": "a CSV table", b";": "a table with semicolons"}
    sign = max(signs, key=first.count)
    return signs[sign] if first.count(sign) and b'"from"' not in first else ""
