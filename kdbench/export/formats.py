"""The formats of an exported network: how each is made, and how it is opened again."""

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
from kdbench.export.student import Deployed
from kdbench.validation import describe

KEY = "kdbench"
"""Under which a file carries its card."""

LARGEST_CARD = 2**20
"""Bytes; what unpacks to more is none."""

OPSET = 20
"""Of ONNX."""

Network = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W), float32 in [0, 1] -> logits (B, C)."""


@dataclass(frozen=True)
class Format:
    encode: Callable[[Deployed, Card], bytes]
    open: Callable[[Path, torch.device], tuple[Card, Network]]
    """Raises UserError for what is no such file; it may come from anyone."""


def as_safetensors(network: Deployed, card: Card) -> bytes:
    """Weights under the names of kdbench's backbone; normalisation stands in the card.

    Raises:
        UserError: the network is another than its architecture's name builds.
    """
    state = {name: tensor.contiguous() for name, tensor in network.network.state_dict().items()}
    try:
        twin = _rebuilt(card, state)
    except RuntimeError:
        twin = None
    images = torch.rand(2, 3, card.image_size, card.image_size)
    if twin is None or not torch.equal(twin(images), network(images)):
        raise UserError(
            f"'{card.identity.method}' deploys another network than the name {card.architecture} "
            "builds; use --format onnx or pt2."
        )
    return safetensors.torch.save(state, {"format": "pt", KEY: card.model_dump_json()})


def load_safetensors(file: str | Path) -> Deployed:
    """The network of a file, in evaluation mode, without pickle; strict on names and shapes.

    Raises:
        UserError: it is no file that kdbench exported.
    """
    return _open_safetensors(Path(file), torch.device("cpu"))[1]


def _open_safetensors(file: Path, device: torch.device) -> tuple[Card, Deployed]:
    try:
        with safe_open(file, "pt", device=str(device)) as content:
            card = _card(file, (content.metadata() or {}).get(KEY))
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return card, _rebuilt(card, state).to(device)
    except SafetensorError as error:
        raise _refusal(file, error) from error
    except RuntimeError as error:  # of load_state_dict
        raise UserError(
            f"'{file}' does not hold the weights of a {card.architecture} "
            f"of {card.classes} classes."
        ) from error


def _rebuilt(card: Card, state: dict[str, Tensor]) -> Deployed:
    with torch.device("meta"):  # whatever the card claims, nothing is allocated but the weights
        network = build(card.architecture, card.classes)
    network.load_state_dict(state, strict=True, assign=True)
    return Deployed(network.float(), card.mean, card.std)


def as_pt2(network: Deployed, card: Card) -> bytes:
    """An ExportedProgram; `torch.export.load` needs nothing of kdbench to open it."""
    stream = io.BytesIO()
    program = _program(network, card)
    torch.export.save(program, stream, extra_files={KEY: card.model_dump_json()})
    return stream.getvalue()


def _open_pt2(file: Path, device: torch.device) -> tuple[Card, Network]:
    """`torch.export.load` unpickles, and so runs what the file says: only its card is safe."""
    content = file.read_bytes()
    card = _card(file, _card_text(file, content))
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it logs a traceback, and raises
    try:
        module = torch.export.load(io.BytesIO(content)).module().to(device)
    except Exception as error:  # what is damaged or hostile may raise anything
        raise UserError(
            f"'{file}' cannot be opened: it is damaged, or no program of torch {torch.__version__}."
        ) from error
    return card, module


def _card_text(file: Path, content: bytes) -> str | None:
    """What lies in a .pt2 file as its card."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (inner,) = (n for n in archive.namelist() if n.endswith(f"/extra/{KEY}"))
            if archive.getinfo(inner).file_size > LARGEST_CARD:
                return None
            return archive.read(inner).decode()
    except ValueError:  # none of that name, or no text
        return None
    except Exception as error:  # what is damaged or hostile may raise anything
        raise _refusal(file, error) from error


def as_onnx(network: Deployed, card: Card) -> bytes:
    """An ONNX model of opset OPSET: `images` -> `logits`, of any batch size.

    Raises:
        UserError: ONNX is not installed.
    """
    _require("--format onnx", "onnx", "onnxscript")
    program = torch.onnx.export(
        _program(network, card),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: Dim("batch")},),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    model.metadata_props.add(key=KEY, value=card.model_dump_json())
    content: bytes = model.SerializeToString()
    return content


def _open_onnx(file: Path, device: torch.device) -> tuple[Card, Network]:
    _require("An .onnx file", "onnxruntime")
    import onnxruntime  # type: ignore[import-untyped]

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        card = _card(file, session.get_modelmeta().custom_metadata_map.get(KEY))
    except UserError:
        raise
    except Exception as error:  # onnxruntime's have no common kind
        raise _refusal(file, error) from error

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(images.device)

    return card, run


FORMATS = {
    "safetensors": Format(as_safetensors, _open_safetensors),
    "onnx": Format(as_onnx, _open_onnx),
    "pt2": Format(as_pt2, _open_pt2),
}
"""By name, which is also the suffix of their files."""


def open_exported(file: Path, device: torch.device) -> tuple[Card, Network]:
    """The card of an exported file, and its network on the device.

    A .pt2 file may run code when it is opened: use files you trust. The others cannot.

    Raises:
        UserError: it is no file that kdbench exported.
    """
    form = FORMATS.get(file.suffix.removeprefix("."))
    if form is None:
        raise UserError(
            f"'{file}' is none of .{', .'.join(FORMATS)}, which `kdbench export` writes."
        )
    if not file.is_file():
        raise UserError(f"'{file}' does not exist.")
    card, network = form.open(file, device)

    def checked(images: Tensor) -> Tensor:
        try:
            logits = network(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a program of others may take and do anything
            raise UserError(f"'{file}' cannot be run: {_first_line(error)}.") from error
        if not isinstance(logits, Tensor) or logits.shape != (len(images), card.classes):
            raise UserError(
                f"'{file}' does not give the {card.classes} logits that its card names."
            )
        return logits

    return card, checked


def _program(network: Deployed, card: Card) -> ExportedProgram:
    """For any batch size, and without the places in the code that it came from."""
    images = torch.zeros(2, 3, card.image_size, card.image_size)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: Dim("batch")},))
    for node in program.graph.nodes:
        node.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
    return program


def _card(file: Path, text: str | None) -> Card:
    if text is None:
        raise UserError(f"'{file}' carries no card of kdbench; `kdbench export` writes such files.")
    try:
        return Card.model_validate_json(text)
    except ValidationError as error:
        problem = describe(error, Card)[0]
        raise UserError(f"'{file}' has no valid card: {problem}.") from None


def _require(what: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what} needs {package}: pip install 'kdbench[onnx]'.")


def _refusal(file: Path, error: Exception) -> UserError:
    return UserError(f"'{file}' cannot be opened: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
