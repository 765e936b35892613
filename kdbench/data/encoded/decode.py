"""Decoding of images to crops of uint8 pixels.

simplejpeg decodes plain JPEG images and Pillow all others. Both use libjpeg-turbo in the same way,
so their pixels are equal. torchcodec gives the same pixels a little slower, and its wheel only
loads with the CUDA build of torch that it was made for.
"""

import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import PIL
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

MAX_PIXELS = 89_478_485
"""Maximum number of pixels of an image, which is Pillow's own limit (256 MiB of RGB)."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
TRANSPOSITIONS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""Transposition that makes an image upright, by EXIF orientation."""
START_OF_IMAGE, START_OF_SCAN, EXIF = b"\xff\xd8", b"\xff\xda", b"Exif\0\0"


class UndecodableError(Exception):
    """Raised for bytes that are not a complete image; the message is the reason, without a path."""


def decoder_name() -> str:
    """Return the names and versions of the decoding libraries, for the notes of a result."""
    return f"simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}"


def decode_crop(encoded: bytes, boxes: Callable[[int, int], Sequence[Box]], size: int) -> Tensor:
    """Decode an image once and return V crops of it.

    Args:
        encoded: the encoded image.
        boxes: returns V boxes inside an upright image of the given height and width.
        size: side of the crops in pixels.

    Returns:
        Crops (V, size, size, 3) uint8, resized bilinearly with antialiasing.

    Raises:
        UndecodableError: The bytes are not a complete image.
    """
    pixels = decode(encoded)
    height, width, _ = pixels.shape
    views = []
    for top, left, rows, columns in boxes(height, width):
        crop = pixels[top : top + rows, left : left + columns]
        views.append(resize_pixels(crop, size, size))
    return torch.stack(views)


def decode_center(encoded: bytes, resize: int, size: int) -> Tensor:
    """Resize the shorter side to `resize` and return the center crop, (size, size, 3) uint8.

    Raises:
        UndecodableError: The bytes are not a complete image.
    """
    pixels = decode(encoded)
    height, width = shorter_side_to(resize, *pixels.shape[:2])
    if height * width > MAX_PIXELS:
        raise UndecodableError(f"it is too narrow to be resized to {width} x {height} pixels")
    pixels = resize_pixels(pixels, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[top : top + size, left : left + size].contiguous()


def decode(encoded: bytes) -> Tensor:
    """Return the whole upright image, (H, W, 3) uint8, contiguous, without alpha channel.

    Raises:
        UndecodableError: The bytes are not a complete image.
    """
    pixels = _plain_jpeg(encoded) if encoded.startswith(START_OF_IMAGE) else None
    if pixels is None or _may_be_rotated(encoded):
        pixels = _decode_with_pillow(encoded, pixels)
    return torch.from_numpy(pixels)


def resize_pixels(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize (H, W, 3) uint8 pixels to (height, width, 3), bilinearly with antialiasing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # With a batch axis, torch recognizes the channels-last layout, which is faster.
    batch = pixels[None].permute(0, 3, 1, 2)
    batch = F.interpolate(batch, size=(height, width), mode="bilinear", antialias=True)
    return batch.permute(0, 2, 3, 1)[0]


def shorter_side_to(length: int, height: int, width: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side at `length`, rounded like torchvision."""
    shorter, longer = min(height, width), int(length * max(height, width) / min(height, width))
    return (length, longer) if shorter == height else (longer, length)


def _plain_jpeg(encoded: bytes) -> np.ndarray | None:
    """Return the pixels of a plain JPEG image; None if Pillow must decode it."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
        if space in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(encoded)
    except ValueError as error:  # also raised where libjpeg only warns
        if "premature end" in str(error).lower():  # Pillow might fill the rest with gray
            raise UndecodableError("its data is truncated") from None
        return None


def _may_be_rotated(encoded: bytes) -> bool:
    """Return True if a JPEG's header has EXIF, or cannot be parsed up to the first scan."""
    at = 2
    while encoded[at : at + 1] == b"\xff":
        if encoded[at : at + 2] == START_OF_SCAN:
            return False
        if encoded[at + 4 : at + 10] == EXIF:
            return True
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return True


def _decode_with_pillow(encoded: bytes, known: np.ndarray | None = None) -> np.ndarray:
    """Return upright pixels, decoded by Pillow or turned from already decoded pixels."""
    if not encoded:
        raise UndecodableError("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            # Pillow's exif_transpose rewrites EXIF data, which fails if it is damaged.
            turn = TRANSPOSITIONS.get(image.getexif().get(ORIENTATION, 1))
            if known is not None:
                return known if turn is None else np.array(Image.fromarray(known).transpose(turn))
            return _eight_bits(image if turn is None else image.transpose(turn))
    except UnidentifiedImageError:
        raise UndecodableError("it is not in a known image format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UndecodableError(f"it claims more than {MAX_PIXELS:,} pixels") from None
    except UndecodableError:
        raise
    except Exception as error:  # damaged files raise many kinds of errors
        raise UndecodableError(str(error).rstrip(".") or type(error).__name__) from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return any image as RGB. 16-bit gray is scaled, because Pillow would clip it."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise UndecodableError("its pixels have more than 16 bits")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UndecodableError("its pixels are floating-point numbers")
    return np.array(image.convert("RGB"))
