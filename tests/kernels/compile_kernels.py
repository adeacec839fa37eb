"""Compile every Triton kernel in its shipped configuration without a GPU; prints one line of resource usage each.

Run as a program, because Triton compiles only where its interpreter is off, which is chosen at import.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradprune.kernels.taylor_score import TaylorScoreConfig, _taylor_score_kernel


def main() -> None:
    config = TaylorScoreConfig()
    tiles = {"ROWS": config.ROWS, "BLOCK_O": config.BLOCK_O, "BLOCK_I": config.BLOCK_I}
    for dtype in ("bf16", "fp16", "fp32"):
        signature = {
            "w_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "rows_ptr": "*fp32", "columns_ptr": "*fp32",
            "statistics_ptr": "*fp32", "O": "i32", "I": "i32", "stride_wo": "i64", "stride_go": "i64",
            **dict.fromkeys(tiles, "constexpr"),
        }  # fmt: skip
        source = ASTSource(fn=_taylor_score_kernel, signature=signature, constexprs=tiles)
        for capability in (80, 90):
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options={"num_warps": config.num_warps})
            print("taylor_score", dtype, f"sm_{capability}", resource_usage(compiled.asm["cubin"]))


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
