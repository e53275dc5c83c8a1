"""What reading a picture loses, known from its header: counted by the index, said once at the start of a run.

header --traits_of--> ("alpha", "exif") --index--> counts --trait_text--> "12 images with transparency (dropped, ...)"
"""

from __future__ import annotations

from typing import Any

from PIL import ExifTags, Image

DEEP, ALPHA, EXIF, ANIMATED, CMYK = "deep", "alpha", "exif", "animated", "cmyk"
_DEEP_MODES = ("I", "F")  # and I;16, I;16B, ...
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_SEVERAL_PICTURES = ("MPO",)  # the picture and previews of it
_TURNED_BY_PILLOW = ("TIFF",)
_TEXTS = {
    DEEP: "of 16 bits or float (values above 255 become white)",
    ALPHA: "with transparency",
    EXIF: "with an EXIF rotation",
    ANIMATED: "with several frames (the first is read)",
    CMYK: "in CMYK (converted without a color profile)",
}
TRAITS = tuple(_TEXTS)


def trait_text(trait: str, *, exif: str, alpha: str) -> str:
    """What follows `N images`: what is special about them, and what a run with these policies does with it.

    Args:
        trait: one of `TRAITS`.
        exif: `data.exif`.
        alpha: `data.alpha`.
    """
    if trait == ALPHA:
        done = (
            "laid on white"
            if alpha == "white"
            else "dropped as in the release, mostly black; data.alpha: white"
        )
        return f"{_TEXTS[ALPHA]} ({done})"
    if trait == EXIF:
        done = "applied" if exif == "apply" else "ignored as in the release; data.exif: apply"
        return f"{_TEXTS[EXIF]} ({done})"
    return _TEXTS[trait]


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels of an opened image can be transparent."""
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1..8 of an image that is not decoded yet; 1 where there is none, or Pillow applies it itself."""
    if image.format in _TURNED_BY_PILLOW:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata are no reason to refuse the pixels; Pillow raises a dozen kinds here
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def is_turned(orientation: int) -> bool:
    """Whether an orientation exchanges width and height."""
    return orientation >= 5


def traits_of(image: Image.Image, orientation: int) -> tuple[str, ...]:
    """Traits of an image that Pillow opened and has not decoded."""
    found = {
        DEEP: image.mode in _DEEP_MODES or image.mode.startswith("I;16"),
        ALPHA: has_alpha(image),
        EXIF: orientation > 1,
        ANIMATED: image.format not in _SEVERAL_PICTURES and _is_animated(image),
        CMYK: image.mode == "CMYK",
    }
    return tuple(trait for trait in TRAITS if found[trait])


def _is_animated(image: Any) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame, which is not read
        return True
