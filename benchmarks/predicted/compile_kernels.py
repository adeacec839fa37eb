"""Compile the Triton kernels ahead of time, as they would be launched, for GPUs that this machine does not have.

Prints one line of JSON for each kernel and compute capability: registers, stack, shared memory and counts of machine
instructions. `tests/helpers/kernel_gates.py` holds these to budgets.

It is a program of its own for two reasons: Triton compiles only if its interpreter is off, which is decided when it is
imported; and the version that comes first on the path is the one that is checked.
"""

import copy
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradprune.kernels import cheapest_removals as removals
from gradprune.kernels import grouped_linear_importance as grouped
from gradprune.kernels import linear_importance as linear
from gradprune.kernels import mask_gradient, partial_sums
from gradprune.kernels import taylor_score as taylor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A and B: whole tiles; a width beyond which the last tiles extend; widths that are not multiples of 16.
WIDTHS = {"whole": (4096, 4096), "tail": (4096, 4112), "ragged": (4095, 4097)}
CAPABILITIES = (80, 90)
# Blackwell's data-centre GPUs, and its consumer and workstation GPUs. A few kernels, which do all that others do, stand
# for all.
BLACKWELL = (100, 120)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel, specialised as by one kind of launch.

    types: Triton types by name, of the arguments that are not fp32 pointers, int32 sizes or int64 strides.
    constants: values of the constexpr arguments. options: the compiler's, such as num_warps.
    aligned: pointers, sizes and strides are multiples of 16, and the compiler knows it, except for sizes that launches
        do not specialise on.
    capabilities: the compute capabilities that it is compiled for, 80 for 8.0.
    elements: number of a tile's elements per thread, to which counts of instructions are related; 0 if instructions are
        not counted.
    default: whether it is the first choice for its sizes.
    """

    name: str
    kernel: object
    dtype: str
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int]
    aligned: bool
    capabilities: tuple[int, ...] = CAPABILITIES
    elements: int = 0
    default: bool = True


def main() -> None:
    """Compile and print every variant; with --worsened, the kernels that gates must refuse, with the gates' names."""
    if sys.argv[1:] == ["--worsened"]:
        for gates, variant in worsened():
            print(json.dumps({"gates": gates, **compiled(variant, variant.capabilities[-1])}), flush=True)
        return
    for variant in variants():
        for capability in variant.capabilities:
            print(json.dumps(compiled(variant, capability)), flush=True)


def variants() -> Iterator[Variant]:
    """Yield every kind of code that launches run; code that differs only in addresses or conversions is left out."""
    for dtype in DTYPES:
        yield from linear_importances(dtype)
        yield from grouped_linear_importances(dtype)
        if dtype != "fp16":  # whose code is that of bf16
            yield from taylor_scores(dtype)
            yield from recounts(dtype)
            yield mask_gradients(dtype)
    yield from second_stages()
    for columns in (512, removals.MOST_COLUMNS):
        yield removal(columns)


def taylor_scores(dtype: str) -> Iterator[Variant]:
    """`taylor_score` with row sums, with column sums, and with both."""
    config = taylor.config_for(DTYPES[dtype])
    for rows, columns in ((True, False), (False, True), (True, True)):
        constants = dataclasses.asdict(config) | {"ROW_SUMS": rows, "COLUMN_SUMS": columns}
        options = {"num_warps": constants.pop("num_warps")}
        types = dict.fromkeys(("w_ptr", "g_ptr"), f"*{dtype}")
        elements = config.BLOCK_O * config.BLOCK_I // (32 * config.num_warps)
        name = f"taylor_score {'rows' if rows else ''}{'columns' if columns else ''}"
        kernel = taylor._taylor_score_kernel
        # The launch for both sides contains all that the launch for the rows does.
        capabilities = CAPABILITIES if columns else (90,)
        if rows and columns and dtype == "bf16":
            capabilities = (*CAPABILITIES, *BLACKWELL)
        yield Variant(name, kernel, dtype, types, constants, options, True, capabilities, elements)


def linear_importances(dtype: str) -> Iterator[Variant]:
    """Every configuration of `linear_importance` that a launch may choose, with and without descriptors."""
    for widths, (height, width) in WIDTHS.items():
        for descriptors in (False, True) if dtype != "fp32" and widths != "ragged" else (False,):
            default, *others = linear.configs_for(height, width, DTYPES[dtype], descriptors)
            if descriptors:
                yield from by_descriptors(widths, dtype, default, others)
            elif widths != "whole":  # pointers are masked for whole tiles too, so these add nothing
                yield from by_pointers(widths, dtype, default)
    if dtype == "bf16":
        yield from by_descriptors_on_blackwell()


def by_descriptors_on_blackwell() -> Iterator[Variant]:
    """The variants with descriptors for Blackwell's GPUs, for tiles that extend beyond the matrix."""
    for capability in BLACKWELL:
        configs = linear.configs_for(*WIDTHS["tail"], torch.bfloat16, True, from_registers=capability == 120)
        variants = [linear_importance("tail", "bf16", configs[0], columns, True) for columns in (False, True)]
        # The configuration between the first and the last differs from the first by a division.
        other = dataclasses.replace(linear_importance("tail", "bf16", configs[-1], False, True), default=False)
        for variant in (*variants, other):
            yield dataclasses.replace(variant, capabilities=(capability,))


def by_descriptors(
    widths: str, dtype: str, default: linear.LinearImportanceConfig, others: list[linear.LinearImportanceConfig]
) -> Iterator[Variant]:
    """The variants with descriptors for Hopper, fewer for fp16, which is multiplied in the same way as bf16.

    Tiles that extend beyond the matrix do everything that whole tiles do, and more.
    """
    whole = widths == "whole"
    yield linear_importance(widths, dtype, default, False, True)
    if dtype == "fp16":
        return
    yield linear_importance(widths, dtype, default, True, True)
    if not whole:
        yield from (persistent(dtype, linear.PERSISTENT, columns) for columns in (False, True))
    for config in others:
        same_code = dataclasses.replace(config, GROUP_A=default.GROUP_A) == default  # except for a division
        for columns in (False,) if same_code else (False, True):
            if whole == same_code:
                yield dataclasses.replace(linear_importance(widths, dtype, config, columns, True), default=False)


def by_pointers(widths: str, dtype: str, config: linear.LinearImportanceConfig) -> Iterator[Variant]:
    """The variants with pointers, none for fp16, which is multiplied in the same way as bf16.

    On Hopper, half precision whose widths are multiples of 16 is rarely read by pointers.
    """
    if dtype != "fp16":
        yield linear_importance(widths, dtype, config, False, False)
        by_columns = linear_importance(widths, dtype, config, True, False)
        fp32 = (*CAPABILITIES, *BLACKWELL) if widths == "tail" else CAPABILITIES
        spare = {"fp32": fp32, "bf16": (80,) if widths == "tail" else (90,)}
        yield dataclasses.replace(by_columns, capabilities=spare[dtype])


def linear_importance(
    widths: str, dtype: str, config: linear.LinearImportanceConfig, columns: bool, descriptors: bool
) -> Variant:
    """`linear_importance` with one configuration, by rows or by columns."""
    flags = {"COLUMNS": columns, "DESCRIPTORS": descriptors, "TAIL": widths != "whole"}
    constants = dataclasses.asdict(config) | flags | {"STATISTICS_ROWS": linear.STATISTICS_ROWS}
    options = _options(constants)
    types = _described(dtype, config, columns) if descriptors else dict.fromkeys(("a", "b", "w"), f"*{dtype}")
    name = (
        f"linear_importance {config.BLOCK_A}x{config.BLOCK_B}x{config.BLOCK_T} stages={config.num_stages} "
        f"group={config.GROUP_A} {widths} {'columns' if columns else 'rows'} "
        f"{'descriptors' if descriptors else 'pointers'}"
    )
    elements = config.BLOCK_A * config.BLOCK_B // (32 * config.num_warps)
    capabilities = (90,) if descriptors else CAPABILITIES
    return Variant(
        name, linear._linear_importance_kernel, dtype, types, constants, options, widths != "ragged", capabilities,
        elements,
    )  # fmt: skip


def persistent(dtype: str, config: linear.LinearImportanceConfig, columns: bool) -> Variant:
    """The persistent kernel, which only the sweep runs, for a width beyond which tiles extend."""
    constants = dataclasses.asdict(config) | {"COLUMNS": columns, "TAIL": True}
    constants |= {"STATISTICS_ROWS": linear.STATISTICS_ROWS}
    options = _options(constants)
    tile = f"{config.BLOCK_A}x{config.BLOCK_B}x{config.BLOCK_T}"
    name = f"persistent {tile} stages={config.num_stages} tail {'columns' if columns else 'rows'}"
    elements = config.BLOCK_A * config.BLOCK_B // (32 * config.num_warps)
    types, kernel = _described(dtype, config, columns), linear._persistent_linear_importance_kernel
    return Variant(name, kernel, dtype, types, constants, options, True, (90,), elements, default=False)


def _options(constants: dict[str, object]) -> dict[str, int]:
    """Remove a configuration's compiler options, and `persistent`, from the kernel's constants; return the options."""
    del constants["persistent"]
    return {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}


def _described(dtype: str, config: linear.LinearImportanceConfig, columns: bool) -> dict[str, str]:
    """The Triton types of a, b and w as tensor descriptors."""
    a, b = ([1, config.BLOCK_T, block] for block in (config.BLOCK_A, config.BLOCK_B))
    w = [config.BLOCK_B, config.BLOCK_A] if columns else [config.BLOCK_A, config.BLOCK_B]
    return {name: f"tensordesc<{dtype}{box}>" for name, box in (("a", a), ("b", b), ("w", w))}


def grouped_linear_importances(dtype: str) -> Iterator[Variant]:
    """The configurations that launches for a layer's experts choose; none for fp16, which is multiplied as bf16 is."""
    for widths in ("whole", "ragged") if dtype != "fp16" else ():
        config = grouped.config_for(*WIDTHS[widths], DTYPES[dtype])
        for columns in (False, True):
            constants = dataclasses.asdict(config) | {"COLUMNS": columns}
            options = _options(constants)
            types = dict.fromkeys(("a_ptr", "b_ptr", "w_ptr"), f"*{dtype}") | {"offsets_ptr": "*i64"}
            name = (
                f"grouped_linear_importance {config.BLOCK_A}x{config.BLOCK_B}x{config.BLOCK_T} {widths} "
                f"{'columns' if columns else 'rows'}"
            )
            elements = config.BLOCK_A * config.BLOCK_B // (32 * config.num_warps)
            kernel = grouped._grouped_linear_importance_kernel
            yield Variant(name, kernel, dtype, types, constants, options, widths == "whole", CAPABILITIES, elements)


def recounts(dtype: str) -> Iterator[Variant]:
    """The error path of `linear_importance`, once for each size of tile.

    With the tiles of pointers it is compiled for compute capability 8.0, which has the least shared memory; with those
    of descriptors for 9.0, the only one that has them.
    """
    for widths, descriptors, capability in (("tail", False, 80), ("ragged", False, 80), ("tail", True, 90)):
        if dtype == "fp32" and descriptors:
            continue
        config = linear.configs_for(*WIDTHS[widths], DTYPES[dtype], descriptors)[0]
        constants = {"TILE_A": config.BLOCK_A, "TILE_B": config.BLOCK_B, **linear._RECOUNT}
        types = dict.fromkeys(("a_ptr", "b_ptr"), f"*{dtype}")
        options = {"num_warps": 8, "num_stages": 1}
        name = f"recount {config.BLOCK_A}x{config.BLOCK_B} {widths}"
        aligned = widths != "ragged"
        yield Variant(name, linear._recount_kernel, dtype, types, constants, options, aligned, (capability,))


def mask_gradients(dtype: str) -> Variant:
    """`mask_gradient` with the configuration that is shipped."""
    config = mask_gradient.MaskGradientConfig()
    constants = dataclasses.asdict(config)
    options = {"num_warps": constants.pop("num_warps")}
    types = dict.fromkeys(("x_ptr", "dx_ptr"), f"*{dtype}")
    elements = config.BLOCK_T * config.BLOCK_I // (32 * config.num_warps)
    kernel = mask_gradient._mask_gradient_kernel
    capabilities = (*CAPABILITIES, *BLACKWELL) if dtype == "bf16" else CAPABILITIES
    return Variant("mask_gradient", kernel, dtype, types, constants, options, True, capabilities, elements)


def second_stages() -> Iterator[Variant]:
    """The kernel that adds programs' partial results, and the one that merges statistics before, if they are many."""
    constants = {"BLOCK": partial_sums._BLOCK, "PARTS": partial_sums._PARTS}
    yield Variant("partial_sums", partial_sums._add_kernel, "fp32", {}, constants, {}, True)
    constants = {"ENTRIES": partial_sums._ENTRIES, "LANES": partial_sums._PARTS * partial_sums._BLOCK}
    yield Variant("merge", partial_sums._merge_kernel, "fp32", {}, constants, {}, True)


def removal(columns: int) -> Variant:
    """`cheapest_removals` of at most `columns` columns."""
    constants = dataclasses.asdict(removals.CheapestRemovalsConfig())
    options = {"num_warps": constants.pop("num_warps")}
    types = dict.fromkeys(("inverse_ptr", "gram_ptr", "s_ptr", "d_ptr", "costs_ptr"), "*fp64") | {"taken_ptr": "*i64"}
    name = f"cheapest_removals {columns}"
    kernel = removals._cheapest_removals_kernel
    return Variant(name, kernel, "fp64", types, constants | {"BLOCK": columns}, options, True)


def compiled(variant: Variant, capability: int) -> dict[str, object]:
    """Compile a variant for one compute capability; return its resources and counts of instructions."""
    kernel = variant.kernel
    constants = variant.constants
    signature = {name: variant.types.get(name) or _argument_type(name, constants) for name in kernel.arg_names}
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if variant.aligned and kind != "constexpr" and not kind.startswith("tensordesc") and name not in unspecialised
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    registers, stack = resource_usage(made.asm["cubin"])
    return {
        "triton": triton.__version__,
        "name": variant.name,
        "dtype": variant.dtype,
        "capability": capability,
        "warps": variant.options.get("num_warps", 4),
        "registers": registers,
        "stack": stack,
        "shared": made.metadata.shared,
        "elements": variant.elements,
        "default": variant.default,
        # Disassembling takes as long as compiling.
        **(instructions(made.asm["cubin"]) if variant.elements else {}),
    }


def worsened() -> Iterator[tuple[tuple[str, ...], Variant]]:
    """Yield kernels with mistakes that gates exist to find, each with the names of the gates that must refuse it."""
    products = {}
    for widths, descriptors in (("tail", True), ("tail", False), ("ragged", False)):
        config = linear.configs_for(*WIDTHS[widths], torch.bfloat16, descriptors)[0]
        products[widths, descriptors] = linear_importance(widths, "bf16", config, False, descriptors)
    default = products["tail", True]
    few_warps = "no register is spilled", "tensor cores run at full rate", "linear_importance waits for little"
    yield few_warps, _with_options(default, num_warps=2)
    yield ("a block fits its device", "two blocks fit on an SM"), _with_options(default, num_stages=8)
    yield ("two blocks fit on an SM",), _with_options(default, maxnreg=None)
    for gate, product in zip(("by descriptors", "by pointers", "of ragged widths"), products.values(), strict=True):
        longer = _rewritten(product, "+= of_rows_abs", "+= of_rows_abs + tl.sum(tl.sqrt_rn(g * g), 1)")
        yield (f"a short epilogue {gate}",), longer
    in_turn = persistent("bf16", linear.PERSISTENT, False)
    longer = _rewritten(in_turn, "g, w, row", "tl.sqrt_rn(g * g), w, row")
    yield ("a persistent loop with its epilogue",), longer

    by_rows = next(grouped_linear_importances("bf16"))
    yield (
        ("a short epilogue of ragged tokens",),
        _rewritten(by_rows, "tl.abs(product)", "tl.sqrt_rn(product * product)"),
    )

    of_all = "mask_gradient waits for nothing", "a short loop of mask_gradient"
    yield of_all, _rewritten(mask_gradients("bf16"), "+= x * dx", "+= tl.sum(x * dx, 0)[None]")
    # If the compiler does not know that rows begin at multiples of 16 bytes, it loads the elements one by one.
    by_rows, by_columns, _ = (dataclasses.replace(variant, aligned=False) for variant in taylor_scores("bf16"))
    yield ("taylor_score waits for little", "a short loop of taylor_score by rows"), by_rows
    yield ("a short loop of taylor_score by columns",), by_columns


def _with_options(variant: Variant, **options: int | None) -> Variant:
    return dataclasses.replace(variant, options=variant.options | options)


def _rewritten(variant: Variant, old: str, new: str) -> Variant:
    """A variant whose kernel's source has `new` in place of `old`."""
    kernel = copy.copy(variant.kernel)
    assert old in kernel.src
    kernel._unsafe_update_src(kernel.src.replace(old, new))
    return dataclasses.replace(variant, kernel=kernel)


def _argument_type(name: str, constants: dict[str, object]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*fp32"
    return "i64" if name.startswith("stride") else "i32"


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and its bytes of stack and local memory, to which registers are spilled."""
    shown = _inspect("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert found, shown
    return int(found[1]), int(found[2]) + int(found[3])


def instructions(cubin: bytes) -> dict[str, int]:
    """Counts of instructions in the machine code (SASS) of a kernel.

    wgmma: matrix products that take operands from shared memory: Hopper's wgmma, or tcgen05 of Blackwell's data-centre
        GPUs.
    loop: instructions of the longest innermost loop.
    loop_barriers: barriers (BAR) inside innermost loops, without those that products need.
    epilogue: instructions after the last of these products; 0 if there is none.
    """
    code = [line for line in _inspect("nvdisasm", "-c", cubin).splitlines() if _is_instruction(line) or _is_label(line)]
    products = [at for at, line in enumerate(code) if "GMMA" in line or "UTCHMMA" in line]
    barriers = [at for at, line in enumerate(code) if re.search(r"\bBAR\.", line)]
    loops = list(_loops(code))
    return {
        "wgmma": len(products),
        "loop": max((sum(map(_is_instruction, code[start:end])) for start, end in loops), default=0),
        "loop_barriers": sum(any(start <= at < end for start, end in loops) for at in barriers),
        "epilogue": sum(map(_is_instruction, code[products[-1] :])) if products else 0,
    }


def _is_instruction(line: str) -> bool:
    return bool(re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)) and "NOP" not in line


def _is_label(line: str) -> bool:
    return bool(re.match(r"\s*\.L_x?_?\w+:", line))


def _loops(code: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last line of each innermost loop: from a label to a jump back to it, with none inside."""
    labels = {line.strip().rstrip(":"): at for at, line in enumerate(code) if _is_label(line)}
    jumps = [(labels.get(found[1], len(code)), at) for at, line in enumerate(code)
             if (found := re.search(r"\bBRA(?:\.\w+)*\s.*?`\((\.L_\w+)\)", line))]  # fmt: skip
    back = [(start, end) for start, end in jumps if start < end]
    for start, end in back:
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in back):
            yield start, end


def _inspect(tool: str, option: str, cubin: bytes) -> str:
    program = next(Path(triton.__file__).parent.rglob(tool), None)
    if program is None:
        sys.exit(f"{tool} is not in this triton package")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
