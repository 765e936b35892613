"""Decoding: agreement with Pillow, orientation, image formats and invalid files."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pictures import claims, claims_jpeg, encode, photo, sixteen_bits, turned, ycck
from PIL import Image
from torchvision.transforms import v2

from kdbench.data.encoded import decode as decode_module
from kdbench.data.encoded.decode import UndecodableError, decode, decode_center, decode_crop

# Maximum mean differences in gray levels of 255: from Pillow's resize of the same pixels, and from
# the image before lossy compression.
NEAR, JPEG_NEAR = 0.05, 6.0


def difference(pixels: torch.Tensor, image: Image.Image) -> float:
    return float(np.abs(pixels.numpy().astype(int) - np.asarray(image).astype(int)).mean())


def pil(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def test_views_share_one_decoding_and_equal_pils_bilinear_resize_of_each_box(monkeypatch):
    encoded, sizes, decoded = encode(photo(240, 320)), [], []
    monkeypatch.setattr(decode_module, "decode", lambda data: decoded.append(data) or decode(data))
    boxes = [(0, 0, 240, 320), (30, 41, 97, 150), (10, 200, 20, 30)]
    views = decode_crop(encoded, lambda *size: sizes.append(size) or boxes, 64)
    assert (len(decoded), sizes) == (1, [(240, 320)])
    assert views.shape == (3, 64, 64, 3) and views.dtype == torch.uint8 and views.is_contiguous()
    for box, view in zip(boxes, views, strict=True):
        top, left, height, width = box
        crop = pil(encoded).crop((left, top, left + width, top + height))
        assert difference(view, crop.resize((64, 64), Image.Resampling.BILINEAR)) < NEAR
        assert torch.equal(view, decode_crop(encoded, lambda *_, box=box: [box], 64)[0])


@pytest.mark.parametrize("size", [(100, 151), (151, 100), (40, 60), (64, 64), (64, 90)])
def test_the_centre_crop_equals_torchvision(size):
    encoded = encode(photo(*size))
    center = decode_center(encoded, 64, 56)
    assert center.shape == (56, 56, 3) and center.is_contiguous()
    transform = v2.Compose([v2.Resize(64), v2.CenterCrop(56)])
    assert difference(center, transform(pil(encoded))) < NEAR


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_of_jpeg_make_the_same_pixels(mode, options):
    encoded = encode(photo(67, 81).convert(mode), **options)
    plain = decode_module._plain_jpeg(encoded)
    assert plain is not None, "simplejpeg takes it"
    assert np.array_equal(plain, np.asarray(pil(encoded)))
    assert np.array_equal(decode_module._decode_with_pillow(encoded), plain)


def test_threads_do_not_change_pixels():
    encoded, pixels = encode(photo(240, 320)), []
    for threads in (3, 1):  # tests run with one thread
        torch.set_num_threads(threads)
        pixels.append(decode_crop(encoded, lambda h, w: [(1, 2, h - 5, w - 9)], 96))
    assert torch.equal(*pixels)


GREY = photo().convert("L")
PALETTE = photo().quantize(256)
CONVERTED = {
    "grey JPEG": (encode(GREY), GREY),
    "CMYK JPEG": (encode(photo().convert("CMYK")), photo()),
    "YCCK JPEG": (ycck(photo()), photo()),
    "JPEG with bytes to spare": (encode(photo()) + b"\0" * 100, photo()),
    "palette PNG": (encode(PALETTE, "PNG"), PALETTE),
    "transparent palette": (encode(PALETTE, "PNG", transparency=b"\x80" * 9), PALETTE),
    "RGBA PNG": (encode(Image.merge("RGBA", [*photo().split(), GREY]), "PNG"), photo()),
    "LA PNG": (encode(Image.merge("LA", [GREY, GREY]), "PNG"), GREY),
    "bilevel PNG": (encode(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "GIF": (encode(PALETTE, "GIF"), PALETTE),
    "WebP": (encode(photo(), "WEBP", lossless=True), photo()),
    "turned JPEG": (turned(photo()), photo()),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_images_of_all_kinds_become_upright_rgb(kind, recwarn):
    encoded, expected = CONVERTED[kind]
    pixels = decode(encoded)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert difference(pixels, expected.convert("RGB")) < JPEG_NEAR
    assert not recwarn.list


def test_sixteen_bits_are_scaled_not_clipped():
    pixels = decode(sixteen_bits())
    assert torch.equal(pixels[0], torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 3))


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_becomes_upright(orientation):
    encoded = turned(photo(), orientation)
    pixels = decode(encoded)
    assert difference(pixels, photo()) < JPEG_NEAR
    assert torch.equal(pixels, torch.from_numpy(decode_module._decode_with_pillow(encoded)))
    assert decode_crop(encoded, lambda h, w: [(0, 0, h, w - 40)], 120).shape == (1, 120, 120, 3)


@pytest.mark.parametrize("at", range(8, 32, 2))
def test_damaged_exif_is_ignored(at):
    encoded = turned(photo(), 3)
    at += encoded.index(b"Exif")
    pixels = decode(encoded[:at] + b"\xff\xff" + encoded[at + 2 :])
    assert min(difference(pixels, image) for image in (photo(), photo().rotate(180))) < JPEG_NEAR


WHOLE = encode(photo())
END_OF_IMAGE = b"\xff\xd9"
ENDS = "its data is truncated"
NO_IMAGES = {
    "nothing": (b"", "empty"),
    "text": (b"<html>404 Not Found</html>", "not in a known image format"),
    "half a JPEG": (WHOLE[: len(WHOLE) // 2], ENDS),
    "half a JPEG with an end": (WHOLE[: len(WHOLE) // 2] + END_OF_IMAGE, ENDS),
    "a JPEG without its last part": (WHOLE[:-200], ENDS),
    "a JPEG's first bytes": (WHOLE[:20], ""),
    "half a grey JPEG": (encode(GREY)[:1500], ENDS),
    "half a progressive JPEG": (encode(photo(), progressive=True)[:3000], ENDS),
    "half a turned JPEG": (turned(photo())[:4000] + END_OF_IMAGE, ENDS),
    "half a CMYK JPEG": (encode(photo().convert("CMYK"))[:9000], "truncated"),
    "half a PNG": (encode(photo(), "PNG")[:9000], "truncated"),
    "a bomb": (claims(60_000, 60_000), "more than 89,478,485 pixels"),
    "a bomb in a JPEG": (claims_jpeg(65_000, 65_000), "more than 89,478,485 pixels"),
    "a small bomb": (claims(10_000, 10_000), "more than 89,478,485 pixels"),
    "floating-point numbers": (encode(GREY.convert("F"), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_an_incomplete_image_is_refused_with_a_reason(kind, recwarn):
    encoded, words = NO_IMAGES[kind]
    with pytest.raises(UndecodableError) as of_crop:
        decode_crop(encoded, lambda h, w: [(0, 0, h, w)], 32)
    with pytest.raises(UndecodableError) as of_center:
        decode_center(encoded, 64, 56)
    for reason in (str(of_crop.value), str(of_center.value)):
        assert reason and words in reason and not reason.endswith(".")
        assert not any(part in reason for part in ("\n", "/", "0x"))
    assert not recwarn.list


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_damaged_image_gives_pixels_or_a_reason(kind):
    whole, draws = CONVERTED[kind][0], np.random.default_rng(len(kind))
    for _ in range(60):
        damaged = bytearray(whole[: draws.integers(len(whole) // 2, 2 * len(whole))])
        for at in draws.integers(0, min(len(damaged), draws.choice([60, 600, 10**6])), 3):
            damaged[at] = draws.integers(256)
        with contextlib.suppress(UndecodableError):
            assert decode(bytes(damaged)).dtype == torch.uint8


def test_an_extremely_narrow_image_does_not_exhaust_memory():
    thread = encode(photo(2, 40_000), "PNG")
    assert decode_crop(thread, lambda h, w: [(0, 100, h, 2)], 32).shape == (1, 32, 32, 3)
    with pytest.raises(UndecodableError, match="narrow"):
        decode_center(thread, 256, 224)


def test_the_decoders_name_has_versions():
    name = decode_module.decoder_name()
    assert Image.__version__ in name and "simplejpeg" in name
