"""
Compiles the Triton kernels of kernel.py for GPUs that are not here, and prints what each kernel needs there:
one JSON line per kernel and GPU. tests/test_kernel.py starts it, as its own process interprets the kernels.

    python -m tests.compile_kernels sm_80 sm_90 sm_100 gfx942
    python -m tests.compile_kernels --few sm_90     the search in one size only, in a quarter of the time
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernel


def kernel_sources(V: int, dtype: str):
    """Yields (name, function, constants) of each kernel for values of `dtype`."""
    size = {"fp32": 4, "bf16": 2}[dtype]
    by_row = kernel.update_settings(V, 1, 4) | {"STOCHASTIC": dtype == "bf16"}
    by_block = by_row | kernel.update_settings(V, 8, 4)
    yield "gather_sum", kernel.gather_sum_kernel, kernel.gather_settings(V, size)
    yield "gather_dot", kernel.gather_dot_kernel, kernel.gather_dot_settings(V, size)
    yield "sum_pieces", kernel.sum_pieces_kernel, kernel.gather_settings(V, 4) | {"PIECE": kernel.PIECE}
    no_v, no_adam = {"v_ptr": None}, {"exp_avg_ptr": None, "exp_avg_sq_ptr": None}
    yield "rowwise", kernel.update_kernel, by_block | no_adam
    yield "adam", kernel.update_kernel, by_row | no_v
    yield "sgd", kernel.update_kernel, by_row | no_v | no_adam


def argument_type(name: str, dtype: str) -> str:
    """The type of an argument in training. `dtype` is that of the values, and most others are float32."""
    if name == "values_ptr":
        return f"*{dtype}"
    if name in ("token_ptr", "seed_ptr", "chosen_ptr"):
        return "*i64"
    if name in ("indices_ptr", "begin_ptr", "end_ptr", "row_ptr", "finite_ptr"):
        return "*i32"
    return "*fp32" if name.endswith("_ptr") else "i32" if name in ("bag", "places") else "fp32"


def compile_kernel(function, dtype: str, constants: dict, target: GPUTarget):
    num_warps = constants["num_warps"]
    constants = {name: value for name, value in constants.items() if name != "num_warps"}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name, dtype) for name in names}
    # in training, the address of each tensor is a multiple of 16
    aligned = {(names.index(name),): [["tt.divisibility", 16]]
               for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def usage(compiled, backend: str) -> dict:
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = {name: int(re.search(rf"\.{name}: +(\d+)", text).group(1))
                  for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
        return dict(registers=counts["vgpr_count"], wide_loads=len(re.findall("global_load_dwordx4", text)),
                    spilled_bytes=4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        printed = subprocess.run([cuobjdump, "--dump-resource-usage", f.name], check=True,
                                 capture_output=True, text=True).stdout
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return dict(registers=counts["REG"], spilled_bytes=counts["STACK"] + counts["LOCAL"],
                wide_loads=len(re.findall(r"ld\.global[\w.]*\.v4\.b32", compiled.asm["ptx"])))


if __name__ == "__main__":
    few, targets = "--few" in sys.argv, [target for target in sys.argv[1:] if target != "--few"]
    for target in targets:
        gpu = GPUTarget("hip", target, 64) if target[:3] == "gfx" else GPUTarget("cuda", int(target[3:]), 32)
        for dtype in ("fp32", "bf16"):
            for V in (256, 1024):
                for name, function, constants in kernel_sources(V, dtype):
                    compiled = compile_kernel(function, dtype, constants, gpu)
                    print(json.dumps(dict(kernel=name, target=target, dtype=dtype, V=V,
                                          **usage(compiled, gpu.backend))))
        for S, K in [(1024, 32)] if few else itertools.product((128, 512, 1024, 2048, 8192), (16, 32, 64)):
            for name, settings in (("best_slots", kernel.search_settings(S, K)),
                                   ("half_score_gradients", kernel.gradient_settings(S, K))):
                function = getattr(kernel, f"{name}_kernel")
                compiled = compile_kernel(function, "fp32", settings, gpu)
                print(json.dumps(dict(kernel=name, target=target, S=S, K=K, warps=settings["num_warps"],
                                      **usage(compiled, gpu.backend))))
