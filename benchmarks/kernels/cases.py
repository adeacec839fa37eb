"""The benchmarks' cases: shapes of weights of models that people prune, and awkward shapes."""

from benchmarks.kernels.op import Case

# [out, in]
LLAMA_8B = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
LLAMA_70B = {"q": (8192, 8192), "k": (1024, 8192), "gate": (28672, 8192), "down": (8192, 28672)}
QWEN_7B = {"q": (3584, 3584), "k": (512, 3584), "gate": (18944, 3584), "down": (3584, 18944)}
# One more and one less than a round number; few long rows; many short rows.
AWKWARD = {"odd": (4097, 4095), "flat": (127, 28673), "thin": (50000, 63)}
MODELS = {"Llama-3-8B": LLAMA_8B, "Llama-3-70B": LLAMA_70B, "Qwen2.5-7B": QWEN_7B, "awkward": AWKWARD}

# On a CPU one weight of each kind, because the largest take seconds in eager PyTorch. True: torch.compile is measured
# too.
_CPU = {
    ("Llama-3-8B", "q"): True,
    ("Llama-3-8B", "k"): False,
    ("Llama-3-8B", "down"): False,
    ("Qwen2.5-7B", "q"): False,
    ("awkward", "odd"): True,
}
_GPU_COMPILED = {("Llama-3-8B", "q"), ("Llama-3-8B", "down"), ("Llama-3-70B", "gate"), ("awkward", "odd")}
_TOY = {("toy", "small"): (48, 80), ("toy", "odd"): (33, 17)}


def matrices(device: str, size: str) -> list[Case]:
    """The cases of `taylor_score`: weights in every element type; `size` is "full", "quick" or "toy"."""
    if size == "toy":
        return [Case(" ".join(name), (shape,), dtype) for name, shape in _TOY.items() for dtype in ("fp32", "bf16")]
    if device == "cuda":
        names = {(model, part): (model, part) in _GPU_COMPILED for model, weights in MODELS.items() for part in weights}
    else:
        names = dict(_CPU)
    if size == "quick":
        names = {("Llama-3-8B", "k"): True, ("awkward", "odd"): False}
    dtypes = ("fp32", "bf16") if size == "quick" else _dtypes(device)
    return [
        Case(f"{model} {part}", (MODELS[model][part],), dtype, compiled=compiled)
        for dtype in dtypes
        for (model, part), compiled in names.items()
    ]


def token_counts(device: str, size: str) -> list[Case]:
    """The cases of ops with samples: weights, and samples of different numbers of tokens; `size` as for `matrices`."""
    if size == "toy":
        return [Case("toy", ((24, 40),), dtype, samples=2, tokens=8) for dtype in ("fp32", "bf16")]
    tokens: dict[tuple[str, str], tuple[int, ...]] = {("Llama-3-8B", "q"): (128, 512), ("awkward", "odd"): (512,)}
    if device == "cuda":
        tokens["Llama-3-8B", "q"] = (128, 512, 2048)
        names = [("Llama-3-8B", "k"), ("Llama-3-8B", "down"), ("Qwen2.5-7B", "gate"), ("Llama-3-70B", "gate")]
        tokens |= dict.fromkeys(names, (128, 512, 2048))
    if size == "quick":
        tokens = {("Llama-3-8B", "k"): (128, 512)}
    return [
        Case(f"{model} {part}", (MODELS[model][part],), dtype, samples=4 if device == "cuda" else 1, tokens=count)
        for dtype in (_dtypes(device) if size == "full" else ("fp32", "bf16"))
        for (model, part), counts in tokens.items()
        for count in counts
    ]


def gradient_lists(device: str, size: str) -> list[Case]:
    """The cases of ops on lists: all gradients of a decoder layer, and many small ones; `size` as for `matrices`."""
    many = tuple((1 + 37 * k % 4099,) for k in range(64 if size == "toy" else 1024))
    if size == "toy":
        return [Case("many small", many, dtype) for dtype in ("fp32", "bf16")]
    cases = {"Qwen2.5-0.5B layer": _layer(896, 128, 4864), "many small": many}
    if device == "cuda" and size == "full":
        cases["Llama-3-8B layer"] = _layer(4096, 1024, 14336)
        cases["Llama-3-70B layer"] = _layer(8192, 1024, 28672)
        cases["Qwen2.5-0.5B, all 24 layers"] = _layer(896, 128, 4864) * 24
    dtypes = _dtypes(device) if size == "full" else ("fp32", "bf16")
    return [Case(label, shapes, dtype) for dtype in dtypes for label, shapes in cases.items()]


def _dtypes(device: str) -> tuple[str, str, str]:
    """The element types, the one that a model's weights most likely have first."""
    return ("bf16", "fp32", "fp16") if device == "cuda" else ("fp32", "bf16", "fp16")


def _layer(hidden: int, key_value: int, channels: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of q, k, v, o, gate, up, down and the two norms of a decoder layer."""
    attention = ((hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden))
    return (*attention, (channels, hidden), (channels, hidden), (hidden, channels), (hidden,), (hidden,))
