"""Synthetic photographs in every valid or invalid encoding that a dataset may contain."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps


def photo(height: int = 120, width: int = 160, seed: int = 0) -> Image.Image:
    """Return an image of smooth colors with some noise."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = draws.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **({"quality": 95} if form == "JPEG" else {}) | options)
    return stream.getvalue()


def turned(image: Image.Image, orientation: int = 6) -> bytes:
    """Encode an upright image as a rotated camera stores it, with its EXIF orientation."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = back.get(orientation)
    return encode(image if turn is None else image.transpose(Image.Transpose(turn)), exif=exif)


def ycck(image: Image.Image) -> bytes:
    """Encode CMYK as Photoshop does: inverted, with the first three channels as YCbCr."""
    inks = ImageOps.invert(image)
    stored = [*inks.convert("YCbCr").split(), Image.new("L", image.size, 255)]
    cmyk = Image.merge("CMYK", [band.point(lambda value: 255 - value) for band in stored])
    encoded = encode(cmyk)  # Pillow inverts what it stores
    marker = encoded.index(b"Adobe") + 11
    return encoded[:marker] + b"\x02" + encoded[marker + 1 :]


def sixteen_bits() -> bytes:
    """Return a 16-bit PNG with a gray gradient from 0 to 65,535 in 256 steps."""
    row = np.arange(256, dtype=np.uint16) * 257
    return encode(Image.fromarray(np.tile(row, (16, 1))), "PNG")


def claims(height: int, width: int) -> bytes:
    """Return a PNG whose header claims a size that its data does not have."""
    encoded = encode(photo(), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + encoded[24:29]
    return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]


def claims_jpeg(height: int, width: int) -> bytes:
    """Return a JPEG whose header claims a size that its data does not have."""
    encoded = encode(photo())
    size = encoded.index(b"\xff\xc0") + 5
    return encoded[:size] + struct.pack(">HH", height, width) + encoded[size + 4 :]
