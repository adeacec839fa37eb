"""A stand-in for a GPU that counts what a pass launches, on meta tensors, which compute nothing.

Counting takes neither the device nor the memory nor the time that a model of this size needs. Code that reads a number
back to the host raises, because meta tensors have none. The bytes of a launch are those of its tensors, each read or
written once; floating-point operations are those of matrix products, triangular solves and attention.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.jobs.models import llama_config
from gradprune.kernels import cheapest_removals, linear_importance, mask_gradient, partial_sums, taylor_score
from gradprune.ops import dispatch

# Ops that launch nothing: they make a view or only allocate memory.
_FREE = (
    "empty", "empty_like", "new_empty", "empty_strided", "detach", "view", "alias", "expand", "slice", "select",
    "split", "split_with_sizes", "unbind", "transpose", "permute", "t", "unsqueeze", "squeeze", "as_strided", "reshape",
    "unflatten", "_unsafe_view", "promote_types", "diagonal",
)  # fmt: skip
# Ops that read only those elements of their first tensor that they return.
_TAKING = ("index_select", "gather", "index", "embedding")
# Formulas for floating-point operations. PyTorch has none for an in-place addmm, nor for a triangular solve.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.linalg_solve_triangular: lambda a, b, **_: b.numel() * a.shape[-1],
}
# The shape of Llama 3.1 405B; `llama_config` has the others.
LLAMA_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 126}


@dataclass(frozen=True)
class Launch:
    """The launch of one kernel.

    name: of the op or kernel.
    bytes: that it reads and writes.
    flops: floating-point operations of its products.
    dtype: element type of a product's factors.
    samples, tokens: of the gradients that a `linear_importance` forms; 0 for other kernels.
    steps: number of steps of a kernel with a single program, each of which waits for the one before; 0 for others.
    """

    name: str
    bytes: int
    flops: float = 0
    dtype: torch.dtype | None = None
    samples: int = 0
    tokens: int = 0
    steps: int = 0


@dataclass
class Counted(TorchDispatchMode):
    """Context manager that counts what is launched while it is active.

    launches: all launches, in order.
    kernels: of each launch of a Triton kernel, its name and the properties of its arguments that it is specialised for.
    workspace: the largest number of bytes of partial sums of a `linear_importance`.
    held, peak: bytes of the tensors made while active, now and at most.
    """

    launches: list[Launch] = field(default_factory=list)
    kernels: list[tuple[str, tuple[object, ...]]] = field(default_factory=list)
    workspace: int = 0
    held: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        """Initialise the dispatch mode."""
        super().__init__()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op of PyTorch and count its launch and the memory of its results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        used, made = (
            [value for value in tree_leaves(values) if isinstance(value, Tensor)] for values in ((args, kwargs), out)
        )
        there = {tensor.untyped_storage()._cdata for tensor in used}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in there:
                self._hold(tensor)
        name = func.name().removeprefix("aten::")
        kind = name.split(".")[0]
        if kind not in _FREE:
            formula = _FORMULAS.get(func._overloadpacket)
            flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
            dtype = used[0].dtype if used else None
            read = [*made, *used[1:]] if kind in _TAKING else used
            self.launches.append(Launch(name, sum(map(_bytes_of, (*read, *made))), flops, dtype))
        return out

    def forget(self) -> None:
        """Reset the counts and the peak; `held` remains, because tensors may still be alive."""
        self.launches.clear()
        self.kernels.clear()
        self.workspace = self.peak = 0

    @property
    def by_name(self) -> Counter[str]:
        """The number of launches of each kernel."""
        return Counter(launch.name for launch in self.launches)

    @property
    def total(self) -> int:
        """The number of launches."""
        return len(self.launches)

    @property
    def bytes(self) -> int:
        """Bytes that all launches read and write."""
        return sum(launch.bytes for launch in self.launches)

    def _hold(self, tensor: Tensor) -> None:
        """Count a tensor's memory as held until its storage is freed, with the last view of it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor that a kernel reads or writes; of an expanded tensor, those of its storage."""
    size: int = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes())


class _Kernel:
    """A stand-in for a Triton kernel that only records launches."""

    def __init__(self, name: str, kernel: Any, counted: Counted) -> None:
        self._name, self._counted = name, counted
        # Under the interpreter the kernel is another object, which keeps the arguments of its decorator.
        ignored = getattr(kernel, "kwargs", {}).get("do_not_specialize") or getattr(kernel, "do_not_specialize", None)
        self._ignored = {list(kernel.arg_names).index(name) for name in ignored or ()}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: object) -> None:
            specialised = (_specialised(value) for index, value in enumerate(args) if index not in self._ignored)
            self._counted.kernels.append((self._name, (*specialised, *sorted(constants.items()))))
            self._counted.launches.append(self._launch(args))
            if self._name == "linear_importance":
                self._counted.workspace = max(self._counted.workspace, args[3].nbytes)

        return launch

    def _launch(self, args: tuple[Any, ...]) -> Launch:
        tensors = [value for value in args if isinstance(value, Tensor)]
        name = f"triton {self._name}"
        if self._name == "recount":  # it reads only the statistics if all are finite
            return Launch(name, _bytes_of(tensors[2]))
        if self._name == "cheapest_removals":  # every later step reads the rows s and d again
            steps, columns = tensors[2].shape
            return Launch(name, tensors[2].element_size() * columns * steps**2, steps=steps)
        moved = sum(map(_bytes_of, tensors))
        if self._name != "linear_importance":
            return Launch(name, moved)
        a, b = tensors[:2]
        samples, tokens, height = a.shape
        flops = 2 * samples * tokens * height * b.shape[2]
        return Launch(name, moved, flops, a.dtype, samples, tokens)


def _specialised(value: object) -> object:
    """The property of an argument that Triton specialises a kernel for."""
    if isinstance(value, Tensor):
        return value.dtype
    return value if value in (0, 1) else "multiple of 16" if isinstance(value, int) and value % 16 == 0 else "any"


class _ScaledDotProductAttention(torch.autograd.Function):
    """A stand-in for fused causal attention, which meta tensors lack: makes its result and one number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, counted: Counted) -> Tensor:
        out = torch.empty_like(query)
        per_query = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, per_query)
        ctx.counted = counted
        # Two products, half of which the causal mask leaves.
        flops = 2 * query.numel() * key.shape[-2]
        moved = sum(map(_bytes_of, (query, key, value, out, per_query)))
        counted.launches.append(Launch("attention", moved, flops, query.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, per_query = ctx.saved_tensors
        found = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        moved = sum(map(_bytes_of, (query, key, value, out, per_query, gradient, *found)))
        # Five products, halved in the same way.
        flops = 5 * query.numel() * key.shape[-2]
        ctx.counted.launches.append(Launch("attention backward", moved, flops, query.dtype))
        return (*found, None)


@contextmanager
def counted_gpu() -> Iterator[Counted]:
    """Context manager under which engines with a model on the meta device use Triton kernels, without launching them.

    It yields the counter, itself a context manager: launches are counted while that is active.
    """
    counted = Counted()
    triton = dispatch._importance_triton()

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _ScaledDotProductAttention.apply(query, key, value, counted)  # type: ignore[no-any-return, no-untyped-call]

    with ExitStack() as stack:
        for module in (cheapest_removals, linear_importance, mask_gradient, partial_sums, taylor_score):
            stack.enter_context(patch.object(module, "device_of", lambda _tensor: nullcontext()))
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                kernel = _Kernel(name.strip("_").removesuffix("_kernel"), getattr(module, name), counted)
                stack.enter_context(patch.object(module, name, kernel))
        for name, stand_in in {
            "gradprune.kernels.linear_importance.descriptors_work": _descriptors_work,
            "gradprune.kernels.linear_importance._describe": lambda a, b, w, _columns, _config: (a, b, w),
            "gradprune.kernels.linear_importance.fastest": lambda configs, *_: configs[0],
            "gradprune.calibration.engine.select_ops": lambda _backend, _device, _dtype: triton,
            "gradprune.calibration.engine.without_autocast": lambda _device: nullcontext(),
            "gradprune.surgery.distillation.without_autocast": lambda _device: nullcontext(),
            "gradprune.calibration.engine.check_placement": lambda _model: None,
            # The chunk of logits that a GPU gets; only this constant depends on the device.
            "gradprune.models.loss.LOGITS": 2**27,
            # The only host read in a forward pass of transformers: whether several texts share a window.
            "transformers.masking_utils.find_packed_sequence_indices": lambda _positions: None,
            "torch.nn.functional.scaled_dot_product_attention": attention,
        }.items():
            stack.enter_context(patch(name, stand_in))
        yield counted


def _descriptors_work(*tensors: Tensor) -> bool:
    steps = [stride * tensor.element_size() for tensor in tensors for stride in tensor.stride()[:-1]]
    return tensors[0].dtype != torch.float32 and all(step > 0 and step % 16 == 0 for step in steps)


def llama(size: str, layers: int | None = None) -> PreTrainedModel:
    """A bf16 Llama of the shape "8B", "70B" or "405B" on the meta device, with `layers` layers (None: with all)."""
    if size == "405B":
        config = LlamaConfig(**LLAMA_405B, vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192)
    else:
        config = llama_config(size)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()
