"""A stand-in for a GPU: meta tensors, which compute nothing; launches are counted, and a host read raises.

What a pass over a model of any size would launch can be seen without the device, the memory or the time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gradprune.kernels import linear_importance, mask_gradient, partial_sums, taylor_score
from gradprune.ops import dispatch

# Ops that launch nothing: they make a view, or take memory.
_FREE = (
    "empty", "detach", "view", "alias", "expand", "slice", "select", "split", "unbind", "transpose", "permute", "t",
    "unsqueeze", "squeeze", "as_strided", "reshape", "_unsafe_view", "promote_types",
)  # fmt: skip
LLAMA = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 126},
}


@dataclass
class Launches(TorchDispatchMode):
    """Counts launches by name. kernels: of Triton's, the name and what the compiler tells apart of the arguments."""

    by_name: Counter[str] = field(default_factory=Counter)
    kernels: list[tuple[str, tuple[object, ...]]] = field(default_factory=list)
    workspace: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if name.split(".")[0] not in _FREE:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.by_name.total()


class _Kernel:
    """Stands for a Triton kernel: records its launches."""

    def __init__(self, name: str, kernel: Any, counted: Launches) -> None:
        self._name, self._counted = name, counted
        # The interpreter's stand-in for a kernel keeps what the kernel was declared with.
        ignored = getattr(kernel, "kwargs", {}).get("do_not_specialize") or getattr(kernel, "do_not_specialize", None)
        self._ignored = {list(kernel.arg_names).index(name) for name in ignored or ()}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **constants: object) -> None:
            told_apart = (_specialised(value) for index, value in enumerate(args) if index not in self._ignored)
            self._counted.by_name[f"triton {self._name}"] += 1
            self._counted.kernels.append((self._name, (*told_apart, *sorted(constants.items()))))
            if self._name == "linear_importance":
                self._counted.workspace = max(self._counted.workspace, args[3].nbytes)

        return launch


def _specialised(value: object) -> object:
    """What of an argument Triton compiles a kernel anew for."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if value in (0, 1) else "multiple of 16" if isinstance(value, int) and value % 16 == 0 else "any"


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Inside, an engine of a model on the meta device runs its Triton kernels, which are counted, not launched."""
    counted = Launches()
    for module in (linear_importance, mask_gradient, partial_sums, taylor_score):
        monkeypatch.setattr(module, "device_of", lambda _tensor: nullcontext())
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(
                module, name, _Kernel(name.strip("_").removesuffix("_kernel"), getattr(module, name), counted)
            )
    monkeypatch.setattr(linear_importance, "descriptors_work", _descriptors_work)
    monkeypatch.setattr(linear_importance, "_describe", lambda a, b, w, _columns, _config: (a, b, w))
    monkeypatch.setattr(linear_importance, "fastest", lambda configs, *_: configs[0])
    triton = dispatch._importance_triton()
    monkeypatch.setattr("gradprune.calibration.engine.select_ops", lambda _backend, _device: triton)
    monkeypatch.setattr("gradprune.calibration.engine.without_autocast", lambda _device: nullcontext())
    # transformers' one host read of a forward pass: whether several texts share a window.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _positions: None)
    monkeypatch.setattr("gradprune.calibration.engine.check_placement", lambda _model: None)
    yield counted


def _descriptors_work(*tensors: torch.Tensor) -> bool:
    steps = [stride * tensor.element_size() for tensor in tensors for stride in tensor.stride()[:-1]]
    return tensors[0].dtype != torch.float32 and all(step > 0 and step % 16 == 0 for step in steps)


def llama(size: str, layers: int) -> PreTrainedModel:
    """A bf16 Llama of that size's shape with so many layers, on the meta device."""
    shape = {**LLAMA[size], "num_hidden_layers": layers}
    config = LlamaConfig(**shape, vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()
