"""
Compiles the Triton kernels of kernel.py for several GPUs. No GPU is necessary. The compiled kernels tell how
many registers and how much shared memory they need. `python -m experiments.speed kernels` prints a table.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import kernel


def gpu_targets() -> dict:
    from triton.backends.compiler import GPUTarget

    targets = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
    return targets | {"gfx942": GPUTarget("hip", "gfx942", 64)}


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
    if name in ("token_ptr", "seed_ptr"):
        return "*i64"
    if name in ("indices_ptr", "begin_ptr", "end_ptr", "row_ptr", "finite_ptr"):
        return "*i32"
    return "*fp32" if name.endswith("_ptr") else "i32" if name in ("bag", "places") else "fp32"


def compile_kernel(function, dtype: str, constants: dict, target) -> dict:
    """Compiles a kernel for a GPU -> registers, shared memory and so on that it needs there."""
    import triton
    from triton.compiler import ASTSource

    constants = dict(constants)
    num_warps = constants.pop("num_warps")
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name, dtype) for name in names}
    # in training, the address of each tensor is a multiple of 16
    aligned = {(names.index(name),): [["tt.divisibility", 16]]
               for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    result = dict(num_warps=num_warps, shared=compiled.metadata.shared)
    return result | (_amd_usage(compiled) if target.backend == "hip" else _nvidia_usage(compiled, **result))


def _amd_usage(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    counts = {name: int(re.search(rf"\.{name}: +(\d+)", text).group(1))
              for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
    return dict(registers=counts["vgpr_count"], wide_loads=len(re.findall("global_load_dwordx4", text)),
                spilled_bytes=4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"]))


def _nvidia_usage(compiled, num_warps: int, shared: int) -> dict:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", f.name], check=True, capture_output=True,
                               text=True)
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    # a multiprocessor has 65,536 registers, room for 64 warps and 32 programs, and 227 KB of shared memory
    warps = min(64, 65_536 // (32 * -(-counts["REG"] // 8) * 8))
    programs = min(32, warps // num_warps, 227_000 // max(1, shared))
    return dict(registers=counts["REG"], spilled_bytes=counts["STACK"] + counts["LOCAL"],
                wide_loads=len(re.findall(r"ld\.global[\w.]*\.v4\.b32", compiled.asm["ptx"])),
                programs=programs, occupancy=programs * num_warps / 64)
