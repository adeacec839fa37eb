"""GGUF files, which llama.cpp and programs built on it load. The `gguf` library writes them."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.checkpoint.atomic_file import atomic_file
from gradprune.errors import ExportError, one_line
from gradprune.export.gguf_model import GGUFModel, GGUFTensor, check_config, lay_out
from gradprune.export.gguf_tokenizer import add_tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Outtype = Literal["f32", "f16", "bf16", "q8_0"]

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# Values per block of a q8_0 row.
_BLOCK = 32
# What every GGUF file begins with.
_MAGIC = b"GGUF"


@torch.no_grad()
def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: str | Path,
    *,
    outtype: Outtype | str = "f16",
    overwrite: bool = False,
) -> None:
    """Write a dense or pruned causal LM and its tokenizer as one GGUF file.

    Models whose layers all have the original architecture's shape keep that architecture's name. Others are written as
    `deci` or `openelm`, which llama.cpp builds layer by layer. Only one converted tensor is in memory at a time.

    Args:
        model: a supported causal LM, any width per layer.
        tokenizer: byte-level BPE with a pre-tokenizer that llama.cpp knows, or sentencepiece BPE.
        output: the file to write; it appears whole or not at all, with the same bytes every time.
        outtype: type of the matrices; vectors are always f32. With q8_0, MLPs are widened to whole blocks of 32
            channels by zeros, which changes nothing they compute; a matrix whose rows are still not whole blocks is
            stored as f16.
        overwrite: replace an existing GGUF file.

    Raises:
        ExportError: as `check_export`; llama.cpp cannot represent the model or its tokenizer; a weight is beyond f16's
            range.
    """
    check_export(output, outtype, overwrite=overwrite, model=model.name_or_path)
    gguf, tokenizer = _library(), _needed(tokenizer)
    laid_out = lay_out(model, width_multiple=_BLOCK if outtype == "q8_0" else 1)
    with _written(output) as path:
        writer = gguf.GGUFWriter(path, laid_out.architecture)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[outtype]])
        if outtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        laid_out.add_keys(writer)
        add_tokenizer(writer, tokenizer, model.config)
        _write(writer, laid_out, outtype)


def check_export(output: str | Path, outtype: str, *, overwrite: bool, model: str | None) -> None:
    """Refuse what no file can come of, before the model is loaded.

    Args:
        output, outtype, overwrite: as for `export_gguf`.
        model: path of the model that is read, if it has one; a GGUF file is not written over itself.

    Raises:
        ExportError: `output` may not be replaced or cannot be written; `outtype` is unknown; the gguf library is not
            installed.
    """
    path = Path(output)
    with _told(output):
        if not str(output):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            path.lstat()
        except FileNotFoundError:
            pass
        else:
            _check_replaced(path, overwrite, model)
        # Where folders are missing, the one that the first of them is made in.
        folder = next(above for above in path.absolute().parents if os.path.lexists(above))
        with TemporaryFile(dir=folder):
            pass
    if outtype not in get_args(Outtype):
        raise ExportError(f"outtype: '{outtype}' is unknown; choose one of {', '.join(get_args(Outtype))}")
    _library()


def _check_replaced(path: Path, overwrite: bool, model: str | None) -> None:
    """Refuse to replace what is at `path`, unless it is a GGUF file other than the model and may be overwritten."""
    if path.is_dir():
        raise ExportError(f"output: '{path}' is a folder; name a file")
    if not _is_gguf(path):
        raise ExportError(f"output: '{path}' exists, is no GGUF file, and is never overwritten; choose another name")
    if model and Path(model).is_file() and path.samefile(model):
        raise ExportError(f"output: '{path}' is the model that is read; choose another name")
    if not overwrite:
        raise ExportError(f"output: '{path}' exists; choose another name or overwrite it (--overwrite)")


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, alike: bool) -> None:
    """Refuse a model that `export_gguf` would refuse once it is pruned.

    Args:
        model, tokenizer: before pruning.
        alike: whether its layers will all have the same widths.

    Raises:
        ExportError: with the reason.
    """
    gguf = _library()
    check_config(model.config, alike=alike)
    # Without a file: it only collects.
    add_tokenizer(gguf.GGUFWriter(None, "llama"), _needed(tokenizer), model.config)


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ExportError("model: it has no tokenizer, which llama.cpp needs; add the tokenizer's files")
    return tokenizer


def _library() -> Any:
    """The `gguf` library, imported when it is needed."""
    try:
        import gguf
    except ImportError as error:
        raise ExportError("format: 'gguf' needs the gguf extra (pip install 'gradprune[gguf]')") from error
    return gguf


@contextmanager
def _written(output: str | Path) -> Iterator[Path]:
    """Yield a hidden file that takes the name `output` when the body ends; deleted if the body fails."""
    path = Path(output)
    with _told(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Short, so that every name that the file system allows is possible.
        with atomic_file(path, f".gguf.{secrets.token_hex(8)}") as partial:
            yield partial


@contextmanager
def _told(output: str | Path) -> Iterator[None]:
    """Turn OS errors into one line that names the option."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"output: '{output}' cannot be written: {one_line(error)}; choose another") from error


def _write(writer: "GGUFWriter", laid_out: GGUFModel, outtype: str) -> None:
    """The header, then each tensor, converted only when its turn comes."""
    from gguf import quant_shape_to_byte_shape

    types = [_stored_type(tensor, outtype) for tensor in laid_out.tensors]
    for tensor, stored in zip(laid_out.tensors, types, strict=True):
        shape = quant_shape_to_byte_shape(tensor.shape, stored)
        # For types that numpy lacks, the library expects the shape in bytes.
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, stored in zip(laid_out.tensors, types, strict=True):
            writer.write_tensor_data(_converted(tensor, stored).view(_Bytes))
    finally:
        writer.close()


class _Bytes(np.ndarray[Any, Any]):
    """An array that writes itself so that a full disk is told.

    The error of numpy's own `tofile` has no reason, and there is none where only the last bytes did not fit.
    """

    def tofile(self, fid: Any, /, sep: str = "", format: str = "%s") -> None:
        """Write the bytes to an open file, which raises the system's error."""
        fid.write(self.data)


def _stored_type(tensor: GGUFTensor, outtype: str) -> "GGMLQuantizationType":
    from gguf import GGMLQuantizationType

    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    if outtype == "q8_0" and tensor.shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[outtype.upper()]


def _converted(tensor: GGUFTensor, stored: "GGMLQuantizationType") -> NDArray[Any]:
    """The tensor's bytes in the stored type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = tensor.values()
    assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
    array = values.to(torch.float32).contiguous().cpu().numpy()
    if not np.isfinite(array).all():
        raise ExportError(f"model: {tensor.name} has values that are not finite; check the checkpoint's weights")
    if stored == GGMLQuantizationType.F16 and np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
        raise ExportError(f"outtype: {tensor.name} has values beyond f16's range; choose bf16 or f32")
    return np.ascontiguousarray(quantize(array, stored))
