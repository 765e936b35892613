"""The file formats of exported networks: writing and opening them."""

import importlib.util
import io
import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.export import Dim, ExportedProgram

from kdbench.backbones import build
from kdbench.errors import UserError
from kdbench.export.card import Card
from kdbench.export.student import DeployedNetwork
from kdbench.validation import describe_problems

CARD_KEY = "kdbench"
"""Metadata key of the card."""

MAX_CARD_BYTES = 2**20
"""Maximum size of an unpacked card."""

ONNX_OPSET = 20
"""ONNX opset version."""

Network = Callable[[Tensor], Tensor]
"""Function from images (B, 3, H, W), float32 in [0, 1], to logits (B, C)."""


@dataclass(frozen=True)
class Format:
    """A file format, as functions that encode and open a network."""

    encode: Callable[[DeployedNetwork, Card], bytes]
    open: Callable[[Path, torch.device], tuple[Card, Network]]
    """Open a file, which may come from anyone; raises UserError if it is not valid."""


def encode_safetensors(network: DeployedNetwork, card: Card) -> bytes:
    """Encode the weights under the names of kdbench's backbone, with normalization in the card.

    Raises:
        UserError: The network differs from the one that its architecture's name builds.
    """
    state = {name: tensor.contiguous() for name, tensor in network.network.state_dict().items()}
    try:
        rebuilt = _rebuild(card, state)
    except RuntimeError:
        rebuilt = None
    images = torch.rand(2, 3, card.image_size, card.image_size)
    if rebuilt is None or not torch.equal(rebuilt(images), network(images)):
        raise UserError(
            f"'{card.identity.method}' deploys a network that differs from a plain "
            f"{card.architecture}, which safetensors cannot describe; use --format onnx or pt2."
        )
    return safetensors.torch.save(state, {"format": "pt", CARD_KEY: card.model_dump_json()})


def load_safetensors(file: str | Path) -> DeployedNetwork:
    """Load the network of a .safetensors file, in eval mode and without pickle.

    Raises:
        UserError: The file was not exported by kdbench, or its weights do not fit.
    """
    return _open_safetensors(Path(file), torch.device("cpu"))[1]


def _open_safetensors(file: Path, device: torch.device) -> tuple[Card, DeployedNetwork]:
    try:
        with safe_open(file, "pt", device=str(device)) as content:
            card = _parse_card(file, (content.metadata() or {}).get(CARD_KEY))
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return card, _rebuild(card, state).to(device)
    except SafetensorError as error:
        raise _cannot_open(file, error) from error
    except RuntimeError as error:  # from load_state_dict
        raise UserError(
            f"'{file}' does not hold the weights of a {card.architecture} "
            f"with {card.classes} classes."
        ) from error


def _rebuild(card: Card, state: dict[str, Tensor]) -> DeployedNetwork:
    with torch.device("meta"):  # a forged card cannot allocate more than the file's weights
        network = build(card.architecture, card.classes)
    network.load_state_dict(state, strict=True, assign=True)
    return DeployedNetwork(network.float(), card.mean, card.std)


def encode_pt2(network: DeployedNetwork, card: Card) -> bytes:
    """Encode an ExportedProgram, which `torch.export.load` opens without kdbench."""
    stream = io.BytesIO()
    program = _export_program(network, card)
    torch.export.save(program, stream, extra_files={CARD_KEY: card.model_dump_json()})
    return stream.getvalue()


def _open_pt2(file: Path, device: torch.device) -> tuple[Card, Network]:
    """Open a .pt2 file. `torch.export.load` unpickles it, so the file may run code."""
    content = file.read_bytes()
    card = _parse_card(file, _read_pt2_card(file, content))
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # hides the traceback that it logs
    try:
        module = torch.export.load(io.BytesIO(content)).module().to(device)
    except Exception as error:  # damaged files may raise anything
        raise UserError(
            f"'{file}' cannot be opened: it is damaged, or torch {torch.__version__} does not "
            "support it."
        ) from error
    return card, module


def _read_pt2_card(file: Path, content: bytes) -> str | None:
    """Return the card of a .pt2 file as text, or None if it is missing or too large."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (inner,) = (n for n in archive.namelist() if n.endswith(f"/extra/{CARD_KEY}"))
            if archive.getinfo(inner).file_size > MAX_CARD_BYTES:
                return None
            return archive.read(inner).decode()
    except ValueError:  # there is no such entry, or it is not text
        return None
    except Exception as error:  # damaged files may raise anything
        raise _cannot_open(file, error) from error


def encode_onnx(network: DeployedNetwork, card: Card) -> bytes:
    """Encode an ONNX model from `images` to `logits`, for any batch size.

    Raises:
        UserError: ONNX is not installed.
    """
    _require_packages("--format onnx", "onnx", "onnxscript")
    program = torch.onnx.export(
        _export_program(network, card),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: Dim("batch")},),
        opset_version=ONNX_OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    model.metadata_props.add(key=CARD_KEY, value=card.model_dump_json())
    content: bytes = model.SerializeToString()
    return content


def _open_onnx(file: Path, device: torch.device) -> tuple[Card, Network]:
    _require_packages("An .onnx file", "onnxruntime")
    import onnxruntime  # type: ignore[import-untyped]

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        card = _parse_card(file, session.get_modelmeta().custom_metadata_map.get(CARD_KEY))
    except UserError:
        raise
    except Exception as error:  # the errors of onnxruntime have no common base class
        raise _cannot_open(file, error) from error

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(images.device)

    return card, run


FORMATS = {
    "safetensors": Format(encode_safetensors, _open_safetensors),
    "onnx": Format(encode_onnx, _open_onnx),
    "pt2": Format(encode_pt2, _open_pt2),
}
"""Formats by name, which is also the suffix of their files."""


def open_exported(file: Path, device: torch.device) -> tuple[Card, Network]:
    """Open an exported file and return its card and its network on the device.

    Opening a .pt2 file may run code; only use files you trust. The other formats are safe.

    Raises:
        UserError: The file was not exported by kdbench.
    """
    file_format = FORMATS.get(file.suffix.removeprefix("."))
    if file_format is None:
        raise UserError(
            f"'{file}' is not an exported file; its suffix must be one of .{', .'.join(FORMATS)}."
        )
    if not file.is_file():
        raise UserError(f"'{file}' does not exist.")
    card, network = file_format.open(file, device)

    def run_checked(images: Tensor) -> Tensor:
        try:
            logits = network(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a foreign program may raise anything
            raise UserError(f"'{file}' cannot be run: {_first_line(error)}.") from error
        if not isinstance(logits, Tensor) or logits.shape != (len(images), card.classes):
            raise UserError(
                f"'{file}' does not return the {card.classes} logits that its card names."
            )
        return logits

    return card, run_checked


def _export_program(network: DeployedNetwork, card: Card) -> ExportedProgram:
    """Export the network for any batch size, without stack traces that would contain paths."""
    images = torch.zeros(2, 3, card.image_size, card.image_size)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: Dim("batch")},))
    for node in program.graph.nodes:
        node.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
    return program


def _parse_card(file: Path, text: str | None) -> Card:
    if text is None:
        raise UserError(
            f"'{file}' has no card; only files written by `kdbench export` can be evaluated."
        )
    try:
        return Card.model_validate_json(text)
    except ValidationError as error:
        problem = describe_problems(error, Card)[0]
        raise UserError(f"'{file}' does not have a valid card: {problem}.") from None


def _require_packages(feature: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{feature} needs {package}: pip install 'kdbench[onnx]'.")


def _cannot_open(file: Path, error: Exception) -> UserError:
    return UserError(f"'{file}' cannot be opened: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
