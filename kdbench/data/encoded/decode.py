"""Encoded images to crops of uint8 pixels, as fast as one core can.

Plain JPEG goes through simplejpeg, everything else through Pillow. Both bring libjpeg-turbo and run
it alike: their pixels are equal, so who decoded changes no number. torchcodec gives the same pixels
a little slower, and its wheel loads only beside the CUDA build of torch that it was made for.
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
"""Of a decoded image, Pillow's own bound: 256 MiB of RGB."""
ORIENTATION = 0x0112
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What makes an image upright, by the orientation that EXIF gives."""
START_OF_IMAGE, START_OF_SCAN, EXIF = b"\xff\xd8", b"\xff\xda", b"Exif\0\0"


class UndecodableError(Exception):
    """The bytes are no image, or not a whole one; the message is the reason, without a path."""


def decoder_name() -> str:
    """Which libraries make pixels, with versions, for the notes of a result."""
    return f"simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}"


def decode_crop(encoded: bytes, boxes: Callable[[int, int], Sequence[Box]], size: int) -> Tensor:
    """V crops of one image, decoded once: (V, size, size, 3) uint8, bilinear with antialias.

    `boxes` gets the upright image's height and width and returns V boxes inside it.

    Raises:
        UndecodableError: it is no whole image.
    """
    pixels = decode(encoded)
    height, width, _ = pixels.shape
    views = []
    for top, left, rows, columns in boxes(height, width):
        crop = pixels[top : top + rows, left : left + columns]
        views.append(resized(crop, size, size))
    return torch.stack(views)


def decode_center(encoded: bytes, resize: int, size: int) -> Tensor:
    """The shorter side to `resize`, then the centre: (size, size, 3) uint8.

    Raises:
        UndecodableError: it is no whole image.
    """
    pixels = decode(encoded)
    height, width = shorter_side_to(resize, *pixels.shape[:2])
    if height * width > MAX_PIXELS:
        raise UndecodableError(f"it is too narrow to be resized to {width} x {height} pixels")
    pixels = resized(pixels, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[top : top + size, left : left + size].contiguous()


def decode(encoded: bytes) -> Tensor:
    """The whole image, upright: (H, W, 3) uint8, contiguous. An alpha channel is dropped.

    Raises:
        UndecodableError: it is no whole image.
    """
    pixels = _plain_jpeg(encoded) if encoded.startswith(START_OF_IMAGE) else None
    if pixels is None or _may_be_turned(encoded):
        pixels = _with_pillow(encoded, pixels)
    return torch.from_numpy(pixels)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """(H, W, 3) uint8 to (height, width, 3), bilinear with antialias; the same where it fits."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # The batch axis comes first, or torch misses that channels lie last and takes a slower way.
    batch = pixels[None].permute(0, 3, 1, 2)
    batch = F.interpolate(batch, size=(height, width), mode="bilinear", antialias=True)
    return batch.permute(0, 2, 3, 1)[0]


def shorter_side_to(length: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `length`, rounded as torchvision's Resize does."""
    shorter, longer = min(height, width), int(length * max(height, width) / min(height, width))
    return (length, longer) if shorter == height else (longer, length)


def _plain_jpeg(encoded: bytes) -> np.ndarray | None:
    """The pixels of a JPEG without peculiarities; None where Pillow must look."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
        if space in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(encoded)
    except ValueError as error:  # also of what libjpeg only warns of
        if "premature end" in str(error).lower():  # Pillow may take it, grey where data lack
            raise UndecodableError("its data end before the image does") from None
        return None


def _may_be_turned(encoded: bytes) -> bool:
    """Whether a JPEG's header holds EXIF, or cannot be walked through to the first scan."""
    at = 2
    while encoded[at : at + 1] == b"\xff":
        if encoded[at : at + 2] == START_OF_SCAN:
            return False
        if encoded[at + 4 : at + 10] == EXIF:
            return True
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return True


def _with_pillow(encoded: bytes, known: np.ndarray | None = None) -> np.ndarray:
    """Upright pixels; of those that are `known`, as they lie in the file, nothing is decoded."""
    if not encoded:
        raise UndecodableError("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            # Pillow's own exif_transpose writes EXIF anew, and fails where that is damaged.
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
            if known is not None:
                return known if turn is None else np.array(Image.fromarray(known).transpose(turn))
            return _eight_bits(image if turn is None else image.transpose(turn))
    except UnidentifiedImageError:
        raise UndecodableError("it is in no known image format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UndecodableError(f"it claims more than {MAX_PIXELS:,} pixels") from None
    except UndecodableError:
        raise
    except Exception as error:  # of damaged files Pillow's plug-ins raise a dozen kinds
        raise UndecodableError(str(error).rstrip(".") or type(error).__name__) from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """RGB of any image; 16-bit grey is scaled, where Pillow's own conversion clips it."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise UndecodableError("its pixels have more than 16 bits")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UndecodableError("its pixels are floating-point numbers")
    return np.array(image.convert("RGB"))
