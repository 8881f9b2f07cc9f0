"""An encoder as bytes, and bytes as something that represents images: safetensors, ONNX, a torch.export program.

The graph formats take normalised images [N, 3, H, W], float32, and give h [N, D]. Any number of images; any side too,
but for sides at which the network is another program (see `free_sides`). They carry no paths of the machine they were
made on, and need nothing of Twinview.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
from collections.abc import Callable
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.norm import GlobalBatchNorm2d
from model.resnet import EncoderConfig, ResNet
from tools.export_counterparts import Counterpart
from train.cli import UnfitEnvironment

Format = Literal["safetensors", "onnx", "torch_export"]
SUFFIXES: dict[Format, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}
OPSET = 18  # the one that torch's exporter writes without converting; every onnxruntime since 1.14 runs it
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_MAX_BYTES = 2**31 - 2**20  # of a protobuf message, less what is not weights
METADATA_KEY = "twinview"
INPUT, OUTPUT = "images", "representation"
Represent = Callable[[Tensor], Tensor]


def check_packages(file_format: Format) -> None:
    """Refuse a format whose packages are missing.

    Raises:
        UnfitEnvironment: names them.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if file_format == "onnx" and missing:
        raise UnfitEnvironment(
            f"`--format onnx` needs {', '.join(ONNX_PACKAGES)}, of which {', '.join(missing)} cannot be found; "
            "pip install -r requirements-export.txt"
        )


def free_sides(config: EncoderConfig, side: int) -> int | None:
    """The side that images must exceed where any will do, or None where it must be the side trained on.

    A map of one position is a case of its own to torch.export, and so is the parity of maps to selective kernels'
    shortcuts, which pad odd ones.
    """
    stride = 32 if config.stem == "imagenet" else 8
    return None if config.selective_kernel or side <= stride else stride


def to_safetensors(encoder: ResNet, description: dict[str, Any]) -> bytes:
    """The weights under the encoder's own names, which are torchvision's and timm's."""
    metadata = {"format": "pt", METADATA_KEY: json.dumps(description)}
    return bytes(safetensors.torch.save(dict(encoder.state_dict()), metadata))


def to_program(encoder: ResNet, side: int, above: int | None, description: dict[str, Any]) -> bytes:
    """A `.pt2` file for `torch.export.load`."""
    file = io.BytesIO()
    torch.export.save(_trace(encoder, side, above), file, extra_files={f"{METADATA_KEY}.json": json.dumps(description)})
    return file.getvalue()


def to_onnx(encoder: ResNet, side: int, above: int | None, description: dict[str, Any]) -> bytes:
    """An ONNX model of opset 18, its batch norms folded into the convolutions.

    Raises:
        ValueError: it is larger than an ONNX file can be.
    """
    num_bytes = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    if num_bytes > ONNX_MAX_BYTES:
        raise ValueError(
            f"an ONNX file holds at most 2 GiB, got weights of {num_bytes / 2**30:.1f} GiB; use `--format torch_export`"
        )
    import onnx

    axes = {0: "batch"} if above is None else {0: "batch", 2: "height", 3: "width"}
    program = torch.onnx.export(
        _trace(encoder, side, above),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={"x": axes},
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(description)})
    return bytes(model.SerializeToString())


def from_safetensors(content: bytes, counterpart: Counterpart) -> Represent:
    """The counterpart with the weights of a file, which it must take one and all."""
    model = counterpart.build()
    model.load_state_dict(safetensors.torch.load(content))
    return model.eval()


def from_program(content: bytes) -> Represent:
    """The program of a `.pt2` file."""
    program: Represent = torch.export.load(io.BytesIO(content)).module()
    return program


def from_onnx(content: bytes) -> Represent:
    """The model of an ONNX file, in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def represent(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return represent


def _trace(encoder: ResNet, side: int, above: int | None) -> ExportedProgram:
    axes = {0: Dim("batch")}
    if above is not None:
        axes |= {2: Dim("height", min=above + 1), 3: Dim("width", min=above + 1)}
    # The example has two images: torch.export takes a single one for the only number that there will be.
    example = torch.zeros(2, 3, side, side)
    program = torch.export.export(_plain(encoder), (example,), dynamic_shapes={"x": axes}, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the source's paths on this machine
    return program


def _plain(encoder: ResNet) -> nn.Module:
    """A copy with torch's own batch norms, which compute the same in evaluation."""
    copied = copy.deepcopy(encoder).requires_grad_(False).eval()
    for module in copied.modules():
        if isinstance(module, GlobalBatchNorm2d):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return copied
