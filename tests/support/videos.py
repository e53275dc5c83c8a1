"""Small videos in which the brightness of a frame is its number."""

from fractions import Fraction

import numpy as np
from PIL import Image

LEVELS = 6  # brightness between neighbours; codecs are lossy, so less would not do


def frame_pixels(number, *, width=64, height=48):
    """A grey frame; number 0..39."""
    return np.full((height, width, 3), 8 + LEVELS * number, dtype=np.uint8)


def frame_number(pixels):
    """The number that `frame_pixels` was given."""
    return round((float(np.asarray(pixels, dtype=np.float64).mean()) - 8) / LEVELS)


def write_video(path, count, *, fps=10, codec="mpeg4", gop=8, durations=None, container=None, size=(64, 48)):
    """`count` frames; `durations` (in 1/fps) makes the frame rate vary."""
    import av

    options = {"g": str(gop), "bf": "0"} if gop else {}
    if codec.startswith("mpeg"):
        options["qmax"] = "2"  # the levels of grey must survive
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.bit_rate = 4_000_000
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        time = 0
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(
                frame_pixels(number, width=size[0], height=size[1]), format="rgb24"
            )
            frame.pts, frame.time_base = time, Fraction(1, fps)
            time += durations[number] if durations else 1
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def write_frames(folder, count, *, name="frame_{}.png"):
    """A folder of frames with unpadded numbers, and a file that is none."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(frame_pixels(number)).save(folder / name.format(number))
    (folder / "Thumbs.db").write_bytes(b"x")
