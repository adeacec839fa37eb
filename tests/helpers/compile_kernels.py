"""Compile every Triton kernel in its shipped configuration without a GPU; prints one line of resource usage each.

Run as a program, because Triton compiles only where its interpreter is off, which is chosen at import.
"""

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradprune.kernels.linear_importance import _linear_importance_kernel, config_for
from gradprune.kernels.taylor_score import TaylorScoreConfig, _taylor_score_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# O, I: whole tiles, a width that tiles reach beyond, one that is not a multiple of 16.
SHAPES = ((4096, 4096), (4096, 4112), (4095, 4097))
BOTH_SIDES = {"ROW_SUMS": True, "COLUMN_SUMS": True}


def main() -> None:
    for dtype in DTYPES:
        compile_taylor_score(dtype)
        compile_linear_importance(dtype)


def compile_taylor_score(dtype: str) -> None:
    config = TaylorScoreConfig()
    tiles = {"ROWS": config.ROWS, "BLOCK_O": config.BLOCK_O, "BLOCK_I": config.BLOCK_I} | BOTH_SIDES
    types = dict.fromkeys(("w_ptr", "g_ptr"), f"*{dtype}")
    compile_kernel("taylor_score", _taylor_score_kernel, dtype, types, tiles, {"num_warps": config.num_warps}, False)


def compile_linear_importance(dtype: str) -> None:
    """Every configuration that `config_for` chooses, as a launch would specialise it."""
    variants = {}
    for shape in SHAPES:
        config = config_for(*shape, DTYPES[dtype])
        variants[config, shape[1] % config.BLOCK_I != 0, shape[1] % 16 == 0] = None
    for config, has_i_tail, aligned in variants:
        constants = dataclasses.asdict(config) | {"HAS_I_TAIL": has_i_tail} | BOTH_SIDES
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        widths = "multiple_of_16" if aligned else "ragged"
        name = f"linear_importance {config.BLOCK_O}x{config.BLOCK_I}x{config.BLOCK_T} {widths} {has_i_tail=}"
        types = dict.fromkeys(("x_ptr", "dy_ptr", "w_ptr"), f"*{dtype}")
        compile_kernel(name, _linear_importance_kernel, dtype, types, constants, options, aligned)


def compile_kernel(
    name: str, kernel, dtype: str, types: dict[str, str], constants: dict, options: dict, aligned: bool
) -> None:
    """types: of the arguments that are not fp32 pointers, int32 sizes or int64 strides.

    aligned: every pointer, size and stride is a multiple of 16, and the compiler is told so.
    """
    signature = {name: types.get(name) or _argument_type(name, constants) for name in kernel.arg_names}
    known = [i for i, name in enumerate(signature) if aligned and signature[name] != "constexpr"]
    attributes = {(index,): [["tt.divisibility", 16]] for index in known}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    for capability in (80, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        matrix = "wgmma" if "wgmma.mma_async" in compiled.asm["ptx"] else "no wgmma"
        used = f"{resource_usage(compiled.asm['cubin'])} {compiled.metadata.shared} bytes shared"
        print(name, dtype, f"sm_{capability}", used, matrix)


def _argument_type(name: str, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*fp32"
    return "i64" if name.startswith("stride") else "i32"


def resource_usage(cubin: bytes) -> str:
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)
    if tool is None:
        sys.exit("cuobjdump is not in this triton package")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+", shown.stdout)
    assert found, shown.stdout
    return found[0]


if __name__ == "__main__":
    main()
