"""Export to GGUF, the file format of llama.cpp and programs built on it. The `gguf` library writes the files."""

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
# Number of values in a block of q8_0, the unit that each row of a matrix is divided into.
_BLOCK = 32
# The first bytes of every GGUF file.
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

    If all layers have the same widths and llama.cpp's implementation of the original architecture allows them, the file
    names that architecture. Otherwise it is written as `deci` or `openelm`, for which llama.cpp builds each layer with
    its own widths. Only one converted tensor is in memory at a time.

    Args:
        model: a supported causal LM, whose layers may have any widths.
        tokenizer: byte-level BPE with a pre-tokenizer that llama.cpp has, or sentencepiece BPE.
        output: the file to write; it appears completely or not at all, and has the same bytes every time.
        outtype: type of the matrices; vectors are always f32. With q8_0, zero channels are added to MLPs up to a
            multiple of 32, a whole number of blocks, which does not change what they compute; a matrix whose rows are
            still not whole blocks is stored as f16.
        overwrite: whether an existing GGUF file may be replaced.

    Raises:
        ExportError: see `check_export`; or llama.cpp cannot represent the model or its tokenizer; or a weight is not
            finite or exceeds the range of f16.
    """
    check_export(output, outtype, overwrite=overwrite, model=model.name_or_path)
    gguf, tokenizer = _library(), _required(tokenizer)
    laid_out = lay_out(model, width_multiple=_BLOCK if outtype == "q8_0" else 1)
    with _output_file(output) as path:
        writer = gguf.GGUFWriter(path, laid_out.architecture)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[outtype]])
        if outtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        laid_out.add_keys(writer)
        add_tokenizer(writer, tokenizer, model.config)
        _write(writer, laid_out, outtype)


def check_export(output: str | Path, outtype: str, *, overwrite: bool, model: str | None) -> None:
    """Refuse an export that is bound to fail, before the model is loaded.

    Args:
        output, outtype, overwrite: see `export_gguf`.
        model: the model's path, or None if it has none; a GGUF file that is the model itself is never replaced.

    Raises:
        ExportError: `output` may not be replaced or cannot be written; `outtype` is unknown; the gguf library is not
            installed.
    """
    path = Path(output)
    with _as_export_error(output):
        if not str(output):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            path.lstat()
        except FileNotFoundError:
            pass
        else:
            _check_replaced(path, overwrite, model)
        # The nearest existing parent, in which missing folders would be created.
        folder = next(above for above in path.absolute().parents if os.path.lexists(above))
        with TemporaryFile(dir=folder):
            pass
    if outtype not in get_args(Outtype):
        raise ExportError(f"outtype: '{outtype}' is unknown; choose one of {', '.join(get_args(Outtype))}")
    _library()


def _check_replaced(path: Path, overwrite: bool, model: str | None) -> None:
    """Refuse to replace `path` unless it is a GGUF file, is not the model itself, and `overwrite` is True."""
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
    """Refuse, before pruning, a model that `export_gguf` would refuse after it.

    Args:
        model, tokenizer: the model and its tokenizer before pruning.
        alike: whether all layers will have the same widths.

    Raises:
        ExportError: the pruned model cannot be written; the message gives the reason.
    """
    gguf = _library()
    check_config(model.config, alike=alike)
    # A writer without a file only collects values, so only the checks of `add_tokenizer` take effect.
    add_tokenizer(gguf.GGUFWriter(None, "llama"), _required(tokenizer), model.config)


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ExportError("model: it has no tokenizer, which llama.cpp needs; add the tokenizer's files")
    return tokenizer


def _library() -> Any:
    """Import the optional `gguf` library and return it, or raise an `ExportError` that names the extra to install."""
    try:
        import gguf
    except ImportError as error:
        raise ExportError("format: 'gguf' needs the gguf extra (pip install 'gradprune[gguf]')") from error
    return gguf


@contextmanager
def _output_file(output: str | Path) -> Iterator[Path]:
    """Yield a hidden file that is given the name `output` when the body ends, or deleted if the body fails."""
    path = Path(output)
    with _as_export_error(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A short name independent of `output`, so that `output` may be as long as the file system allows.
        with atomic_file(path, f".gguf.{secrets.token_hex(8)}") as partial:
            yield partial


@contextmanager
def _as_export_error(output: str | Path) -> Iterator[None]:
    """Context manager that turns OS errors into one line that names the option and the path."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"output: '{output}' cannot be written: {one_line(error)}; choose another") from error


def _write(writer: "GGUFWriter", laid_out: GGUFModel, outtype: str) -> None:
    """Write the header, then convert and write one tensor after the other."""
    from gguf import quant_shape_to_byte_shape

    types = [_stored_type(tensor, outtype) for tensor in laid_out.tensors]
    for tensor, stored in zip(laid_out.tensors, types, strict=True):
        shape = quant_shape_to_byte_shape(tensor.shape, stored)
        # The library expects the shape in bytes for types that numpy lacks, with uint8 as the dtype.
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
    """A byte array whose `tofile` reports a full disk properly.

    The error of numpy's own `tofile` does not give the reason, and there is no error at all if only the last bytes do
    not fit.
    """

    def tofile(self, fid: Any, /, sep: str = "", format: str = "%s") -> None:
        """Write the bytes with the file's own `write`, which raises the system's error; ignore `sep` and `format`."""
        fid.write(self.data)


def _stored_type(tensor: GGUFTensor, outtype: str) -> "GGMLQuantizationType":
    from gguf import GGMLQuantizationType

    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    if outtype == "q8_0" and tensor.shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[outtype.upper()]


def _converted(tensor: GGUFTensor, stored: "GGMLQuantizationType") -> NDArray[Any]:
    """Compute the tensor's values and return their bytes in the stored type.

    Raises:
        ExportError: a value is not finite, or exceeds the range of f16.
    """
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
