"""
How fast it is, each figure a median of several, of things measured in turn in one run.

    python bench.py step       a step of the memory, beside what else one could write in PyTorch
    python bench.py search     the search: pruned against full grid, our top_k against torch.topk
    python bench.py model      a training step of the models that evidence.py compares, and a profile of one
    python bench.py kernels    the Triton kernels, compiled for GPUs that need not be here
    python bench.py plan       reckons what a model needs of each of many GPUs: memory, traffic, time

--json=FILE keeps the rows that the table shows; python bench.py step --help has the other options.
"""

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

import kernel
from config import at_least, build, fail, first_word, parse
from evidence import MODELS
from memory import PoolOptimizer, ValuePool, product_key_search, pruned_pairs, top_k
from model import GPT, GPTConfig
from train import TrainConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class BenchConfig:
    json: str = ""  # file for the rows, as JSON
    repeats: int = 9  # measurements of each thing, after one to warm up

    def __post_init__(self):
        at_least(1, self, "repeats")


@dataclass
class StepConfig(BenchConfig):
    rows: tuple[int, ...] = (65_536, 262_144, 1_048_576, 4_194_304)  # sizes of the pool
    tokens: tuple[int, ...] = (512, 2048)  # tokens a step
    reads: tuple[str, ...] = ("uniform", "zipf")  # how rows are chosen
    peers_up_to: int = 1_048_576  # largest pool that peers get; they hold up to 4 times its size
    value_dim: int = 256  # columns of a row
    bag: int = 128  # rows that a token reads

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "value_dim", "bag")
        if any(math.isqrt(rows) ** 2 != rows for rows in self.rows):
            raise ValueError(f"rows={','.join(map(str, self.rows))} must be squares: a pool has num_keys**2 "
                             "rows")
        if self.value_dim % 8:
            raise ValueError(f"value_dim={self.value_dim} must be a multiple of 8")
        if unknown := set(self.reads) - {"uniform", "zipf"}:
            raise ValueError(f"reads={','.join(unknown)} must be of uniform, zipf")


def measure(things: dict, repeats: int) -> dict:
    """{name: function} -> {name: [seconds, ...]}, sorted; one of each in turn: noise hits all alike."""
    times = {name: [] for name in things}
    for i, (name, function) in itertools.product(range(repeats + 1), things.items()):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        t0 = time.perf_counter()
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if i > 0:
            times[name].append(time.perf_counter() - t0)
    return {name: sorted(measured) for name, measured in times.items()}


def ratio(times: dict, a: str, b: str) -> float:
    """How many times as long a takes as b, in the median."""
    return statistics.median(times[a]) / statistics.median(times[b])


def spread(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):8.1f} ms ({1e3 * times[0]:.1f} to {1e3 * times[-1]:.1f})"


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second of a large copy, read and written bytes both counted."""
    source, target = torch.ones(2**26, device=DEVICE), torch.empty(2**26, device=DEVICE)
    times = measure({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.nbytes / statistics.median(times)


# --- step ---------------------------------------------------------------------------------------------------


def our_step(kind: str, num_values: int, indices, weights, dy):
    pool = ValuePool(num_values, dy.size(1)).to(DEVICE)
    optimizer = PoolOptimizer(pool, 1e-3, kind)

    def step():
        optimizer.zero_grad()
        pool(indices, weights.requires_grad_()).backward(dy)
        optimizer.step()

    return step


def peer_step(kind: str, num_values: int, indices, weights, dy):
    parameter = torch.nn.Parameter(torch.empty(num_values, dy.size(1), device=DEVICE).normal_())
    sparse = kind == "embedding_bag, SparseAdam"
    optimizer = torch.optim.SparseAdam([parameter]) if sparse else torch.optim.AdamW([parameter], fused=True)

    def step():
        optimizer.zero_grad()
        w = weights.requires_grad_()
        if kind == "indexing, AdamW":
            y = torch.einsum("nk,nkv->nv", w, parameter[indices])
        else:
            y = F.embedding_bag(indices, parameter, per_sample_weights=w, mode="sum", sparse=sparse)
        y.backward(dy)
        optimizer.step()

    return step


PEERS = ("embedding_bag, AdamW", "embedding_bag, SparseAdam", "indexing, AdamW")


def bench_step(config: StepConfig) -> list[dict]:
    V, bag, table = config.value_dim, config.bag, []
    bandwidth = copy_bandwidth(config.repeats)
    print(f"V={V}, bag={bag}, float32, {DEVICE}, {torch.get_num_threads()} threads; copies run at "
          f"{bandwidth / 1e9:.1f} GB/s. A step: forward, both gradients, optimiser")
    for how, num_values, N in itertools.product(config.reads, config.rows, config.tokens):
        if how == "uniform":
            indices = torch.randint(num_values, (N, bag), device=DEVICE)
        else:  # the r-th row with probability in proportion to 1/r, the rows in random order
            ranks = (num_values ** torch.rand(N, bag, device=DEVICE, dtype=torch.float64)).long() - 1
            indices = (ranks.clamp(max=num_values - 1) * 2_654_435_761) % num_values
        data = num_values, indices, torch.rand(N, bag, device=DEVICE), torch.randn(N, V, device=DEVICE)
        things = {kind: our_step(kind, *data) for kind in ("rowwise", "adam")}
        if num_values <= config.peers_up_to:
            things |= {kind: peer_step(kind, *data) for kind in PEERS}
        times = measure(things, config.repeats)
        touched = len(indices.unique())
        print(f"\n{num_values:,} rows, {N:,} tokens, {how} reads: {touched:,} rows touched")
        fastest = min((times[name] for name in PEERS if name in times), key=statistics.median, default=None)
        for name, measured in times.items():
            # values are read forward and for dw; a row touched is read and written, and its moments too
            adam_state = 4 if name == "adam" else 0
            moved = 4 * V * (2 * N * bag + (2 + adam_state) * touched)
            row = dict(bench="step", method=name, rows=num_values, tokens=N, reads=how, touched=touched,
                       times=measured, seconds=statistics.median(measured))
            line = f"  {name:26}{spread(measured)}"
            if name in ("rowwise", "adam"):
                row |= dict(bytes=moved, seconds_at_copy_bandwidth=moved / bandwidth)
                line += f"; {moved / 1e6:,.0f} MB must move: {1e3 * moved / bandwidth:.1f} ms at copy speed"
                if fastest:
                    row["times_faster_than_peers"] = statistics.median(fastest) / row["seconds"]
                    line += f"; {row['times_faster_than_peers']:.1f} times the fastest peer"
            print(line)
            table.append(row)
        del things
    return table


# --- search -------------------------------------------------------------------------------------------------


def bench_search(config: BenchConfig) -> list[dict]:
    table = []
    for N, H, S, K, D in ((2048, 4, 128, 16, 32), (2048, 4, 1024, 32, 256)):
        queries = torch.randn(N, H, 2, D // 2, device=DEVICE)
        keys = torch.randn(H, 2, S, D // 2, device=DEVICE)
        scores = torch.einsum("nhpd,hpsd->nhps", queries, keys)
        best = scores.topk(K).values
        ranks = torch.tensor(pruned_pairs(K), device=DEVICE).expand(N, H, -1, -1)
        things = {
            "full grid": lambda best=best, K=K: top_k(
                (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2), K
            ),
            "pruned grid": lambda best=best, K=K, ranks=ranks: top_k(
                torch.add(*best.gather(-1, ranks).unbind(2)), K
            ),
            "torch.topk of the halves": lambda scores=scores, K=K: scores.topk(K),
            "top_k of the halves": lambda scores=scores, K=K: top_k(scores, K),
            "whole search": lambda queries=queries, keys=keys, K=K: product_key_search(queries, keys, K),
        }
        times = measure(things, config.repeats)
        print(f"\n{N:,} tokens, {H} heads, {S} half-keys a side, knn {K}, key_dim {D}, on {DEVICE}")
        for name, measured in times.items():
            print(f"  {name:30}{spread(measured)}")
            seconds = statistics.median(measured)
            table.append(dict(bench="search", method=name, num_keys=S, knn=K, seconds=seconds))
        for fast, slow in (("pruned grid", "full grid"), ("top_k of the halves", "torch.topk of the halves")):
            print(f"  {fast}: {ratio(times, slow, fast):.1f} times as fast")
    return table


# --- model --------------------------------------------------------------------------------------------------


def train_step(config: TrainConfig):
    torch.manual_seed(0)
    model = GPT(config).to(DEVICE).train()
    optimizers = model.optimizers(lr=1e-3, value_lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    x = torch.randint(config.vocab_size, (config.batch_size, config.block_size), device=DEVICE)

    def step():
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x, x)[1].backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def bench_model(config: BenchConfig) -> list[dict]:
    configs = {name: TrainConfig(vocab_size=754, **options)  # the vocabulary of facts-4000
               for name, options in MODELS.items() if "max_steps" not in options}
    steps = {name: train_step(c) for name, c in configs.items()}
    times = measure(steps, 3 * config.repeats)
    print("a training step of the models of evidence.py facts:")
    for name, measured in times.items():
        macs = f"{configs[name].macs_per_token():,} multiply-adds a token"
        print(f"  {name:10}{spread(measured)}, {ratio(times, name, 'dense'):.2f} times dense; {macs}")
    print("\nwhere the time of memory+ goes:")
    with torch.profiler.profile() as profile:
        steps["memory+"]()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    return [dict(bench="model", method=name, seconds=statistics.median(measured),
                 macs=configs[name].macs_per_token()) for name, measured in times.items()]


# --- kernels ------------------------------------------------------------------------------------------------

H100_BANDWIDTH = 3.35e12  # bytes a second
BAG = 128  # rows that a token reads


def kernel_sources(V: int, dtype: str):
    """(name, function, constants) of each kernel, for values of `dtype`."""
    gather = kernel.gather_settings(V, {"fp32": 4, "bf16": 2}[dtype])
    update = {"STOCHASTIC": dtype == "bf16"}
    yield "gather_sum", kernel.gather_sum_kernel, gather
    yield "gather_dot", kernel.gather_dot_kernel, gather
    yield "rowwise", kernel.update_kernel, kernel.update_settings(V, 8, 4) | update | {"exp_avg_ptr": None}
    yield "adam", kernel.update_kernel, kernel.update_settings(V, 1, 4) | update


def argument_type(name: str, dtype: str) -> str:
    """As at a launch in training: values of `dtype`, everything else of float32, and indices of int64."""
    if name in ("indices_ptr", "begin_ptr", "end_ptr", "rows_ptr", "token_ptr"):
        return "*i64"
    if name == "values_ptr":
        return f"*{dtype}"
    return "*fp32" if name.endswith("_ptr") else "i32" if name in ("bag", "seed") else "fp32"


def compile_kernel(function, dtype: str, constants: dict, target) -> dict:
    """Compiles for a GPU that need not be here, and reads what the result needs of it."""
    import triton
    from triton.compiler import ASTSource

    constants = dict(constants)
    num_warps = constants.pop("num_warps")
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name, dtype) for name in names}
    # as at a launch: tensors begin at a multiple of 16 bytes
    aligned = {(names.index(name),): [["tt.divisibility", 16]]
               for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    result = dict(num_warps=num_warps, shared=compiled.metadata.shared)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        number = {name: int(re.search(rf"\.{name}: +(\d+)", text).group(1))
                  for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
        return result | dict(registers=number["vgpr_count"],
                             wide_loads=len(re.findall("global_load_dwordx4", text)),
                             spilled_bytes=4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", f.name], check=True, capture_output=True,
                               text=True)
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    warps = min(64, 65_536 // (32 * -(-number["REG"] // 8) * 8))  # that a multiprocessor has registers for
    programs = min(32, warps // num_warps, 227_000 // max(1, result["shared"]))
    return result | dict(registers=number["REG"], spilled_bytes=number["STACK"] + number["LOCAL"],
                         wide_loads=len(re.findall(r"ld\.global[\w.]*\.v4\.b32", compiled.asm["ptx"])),
                         programs=programs, occupancy=programs * num_warps / 64)


def bench_kernels(config: BenchConfig) -> list[dict]:
    if kernel.triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        fail("bench.py kernels needs the package triton, and TRITON_INTERPRET unset")
    from triton.backends.compiler import GPUTarget

    targets = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
    targets["gfx942"] = GPUTarget("hip", "gfx942", 64)
    table = []
    print("kernel     values    V  target  registers  spilled  shared  wide loads  warps  programs  "
          "occupancy  in flight")
    for dtype, V in (("fp32", 256), ("fp32", 1024), ("bf16", 256), ("bf16", 1024)):
        for name, function, constants in kernel_sources(V, dtype):
            for target_name, target in targets.items():
                row = dict(bench="kernels", kernel=name, dtype=dtype, V=V, target=target_name)
                row |= compile_kernel(function, dtype, constants, target)
                tile = constants["ROWS"] * V * (2 if dtype == "bf16" and "gather" in name else 4)
                # bytes that a multiprocessor has asked for at once: the tiles of all programs that fit it
                in_flight = f"{row['programs'] * tile / 1024:.0f} KB" if "programs" in row else "-"
                occupancy = f"{row['occupancy']:.0%}" if "occupancy" in row else "-"
                print(f"{name:10} {dtype:6} {V:5}  {target_name:6} {row['registers']:10} "
                      f"{row['spilled_bytes']:8} {row['shared']:7} {row['wide_loads']:11} "
                      f"{row['num_warps']:6} {row.get('programs', '-'):>9} {occupancy:>10} {in_flight:>10}")
                table.append(row)
    V = 1024
    print(f"\nbytes that must move a token, float32, V={V}, bag={BAG}, each row read once; time on an H100:")
    for name, rows_moved in (("gather_sum", 1), ("gather_dot", 1), ("rowwise update", 2), ("adam update", 6)):
        moved = 4 * V * BAG * rows_moved
        print(f"  {name:16} {moved / 1e6:6.2f} MB  {1e9 * moved / H100_BANDWIDTH:6.0f} ns")
    if DEVICE == "cuda":
        table += measure_operations(config)
    return table


def measure_operations(config: BenchConfig, num_values: int = 1_048_576, V: int = 256) -> list[dict]:
    """Bytes a second of each operation on this device, and their share of what a copy does."""
    N, table = 4096, []
    bandwidth = copy_bandwidth(config.repeats)
    values = torch.randn(num_values, V, device=DEVICE)
    indices = torch.randint(num_values, (N, BAG), device=DEVICE)
    weights, dy = torch.rand(N, BAG, device=DEVICE), torch.randn(N, V, device=DEVICE)
    state = {"v": torch.zeros(num_values, 8, device=DEVICE)}
    row_bytes, touched = V * values.element_size(), len(indices.unique())
    reads, betas = [(indices, weights, dy)], (0.9, 0.99)
    times = measure({
        "gather_sum": lambda: kernel.gather_sum(values, indices, weights),
        "gather_dot": lambda: kernel.gather_dot(values, indices, dy),
        "rowwise update": lambda: kernel.scatter_update(values, state, reads, 1e-3, betas, 1e-8),
    }, config.repeats)
    print(f"\non this {DEVICE} device, where a copy moves {bandwidth / 1e9:,.0f} GB/s:")
    for name, measured in times.items():
        moved = row_bytes * (2 * touched if name == "rowwise update" else N * BAG)
        speed = moved / statistics.median(measured)
        print(f"  {name:16}{spread(measured)}, {speed / 1e9:,.0f} GB/s, {speed / bandwidth:.0%} of a copy")
        table.append(dict(bench="operations", method=name, bytes_per_second=speed,
                          share_of_copy=speed / bandwidth))
    return table


# --- plan ---------------------------------------------------------------------------------------------------


@dataclass
class PlanConfig(GPTConfig):
    """The largest of Berges et al. 2024: 64M slots of 2,048 beside a GPT of 1.3B; Llama 3's vocabulary."""

    vocab_size: int = 128_256  # tokens in the vocabulary
    block_size: int = 4096
    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 2048
    mem_layers: tuple[int, ...] = (4, 12, 20)
    mem_num_keys: int = 8192
    mem_knn: int = 32
    mem_key_dim: int = 1024
    mem_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    json: str = ""  # file for the rows, as JSON
    gpus: int = 64  # processes, a GPU each
    mem_group_size: int = 0  # GPUs that share the pool's columns; 0: all of them
    tokens: int = 16_384  # a step and GPU
    value_blocks: int = 64  # second moments a row, of rowwise; as many as GPUs share the pool, or more
    flops: float = 400e12  # a second and GPU that matrix products reach; an H100 has 989e12 on paper
    bandwidth: float = 3.35e12  # bytes a second of a GPU's memory
    link: float = 50e9  # bytes a second that a GPU sends: 50e9 for 400 Gb/s, 450e9 in a DGX H100
    gpu_memory: float = 80e9  # bytes

    def __post_init__(self):
        super().__post_init__()
        for name in ("gpus", "tokens", "value_blocks", "flops", "bandwidth", "link", "gpu_memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        if self.mem_kind == "peer":
            raise ValueError("mem_kind=peer is not planned for: it reads two rows where the others read one")
        if not self.mem_layers:
            raise ValueError("mem_layers: name at least one: python bench.py plan --mem_layers=4,12,20")
        self.mem_group_size = self.mem_group_size or self.gpus
        for name, total in (("gpus", self.gpus), ("n_embd", self.n_embd),
                            ("value_blocks", self.value_blocks)):
            if total % self.mem_group_size:
                raise ValueError(f"mem_group_size={self.mem_group_size} must divide {name}={total}")


def bytes_sent(c: PlanConfig) -> dict[str, float]:
    """
    Bytes that a GPU sends for each of its tokens and each memory layer; all activations are of float32.

    Of G GPUs that share a pool, each sends every bag to all others, and gets dots back for it; sums and their
    gradients are cut up, so that 1/G stays. Groups with the same columns send each other their reads.
    """
    G, bag, V = c.mem_group_size, c.mem_heads * c.mem_knn, c.n_embd
    return {"bags": (G - 1) * bag * (4 + 4),
            "sums": (G - 1) / G * V * 4,
            "gradients of sums": (G - 1) / G * V * 4,
            "gradients of weights": (G - 1) * bag * 4,
            "reads to replicas": (c.gpus // G - 1) * (G * bag * (4 + 4) + V * 4)}


def bench_plan(c: PlanConfig) -> list[dict]:
    with torch.device("meta"):
        counts = GPT(c).count_parameters()
    G, bag, V, layers = c.mem_group_size, c.mem_heads * c.mem_knn, c.n_embd, len(c.mem_layers)
    size = {"float32": 4, "bfloat16": 2}[c.mem_dtype]
    slots = counts["memory"] // V
    print(f"{counts['dense'] / 1e9:.2f}B dense parameters; a pool of {slots:,} slots x {V:,} = "
          f"{counts['memory'] / 1e9:.1f}B ({c.mem_dtype}), read by {layers} layers, {bag} slots a token;\n"
          f"{c.gpus} GPUs, each {G} of which share it, {c.tokens:,} tokens a GPU and step\n")
    parts = {
        "dense: weights, gradients, AdamW": counts["dense"] * 16,
        "values": counts["memory"] * size / G,
        "slot use": slots * 4,
    }
    lazy = {  # for want of a gradient
        "reads of a step": layers * c.tokens * (c.gpus // G) * (G * bag * (4 + 4) + V * 4),
        # of a place where a row was read: index and weight, twice, token, thrice, and the sort's order
        "sorting them": layers * c.tokens * c.gpus * bag * (2 * (4 + 4) + 3 * 8 + 8),
    }
    learners = {
        "rowwise": {"state": slots * c.value_blocks * 4 / G} | lazy,
        "adam": {"state": counts["memory"] * 8 / G} | lazy,
        "adam and a dense gradient": {"state": counts["memory"] * 8 / G,
                                      "gradient": counts["memory"] * size / G},
    }
    table = []
    print("GB a GPU, without activations, for which a tenth is left:")
    for name, part in parts.items():
        print(f"  {name:34}{part / 1e9:9.2f}")
    for name, extra in learners.items():
        total = sum(parts.values()) + sum(extra.values())
        verdict = "fits" if total < 0.9 * c.gpu_memory else f"does not fit {c.gpu_memory / 1e9:.0f} GB"
        shown = ", ".join(f"{what} {part / 1e9:.2f}" for what, part in extra.items())
        print(f"  + {name}: {shown}; in all {total / 1e9:.1f}: {verdict}")
        table.append(dict(bench="plan", learner=name, bytes_per_gpu=total))

    sent = bytes_sent(c)
    print("\nbytes sent a token and memory layer:")
    for name, part in sent.items():
        print(f"  {name:34}{part:12,.0f}")
    # read for sums and dots; read and written by the update, as if each read were of another row
    pool_bytes = layers * bag * V * size * 4
    sent_bytes = layers * sum(sent.values()) + 2 * 4 * counts["dense"] / c.tokens  # and AdamW's gradients
    flops = 6 * c.macs_per_token()
    work = {"matrix products": (flops, "FLOPs", c.flops),
            "the pool's rows": (pool_bytes, "bytes", c.bandwidth),
            "traffic": (sent_bytes, "bytes", c.link)}
    print("\na token of training, forward and backward:")
    for name, (amount, unit, speed) in work.items():
        print(f"  {name:16}{amount:18,.0f} {unit:5} {1e6 * amount / speed:8.2f} us at {speed:.3g} a second")
        table.append(dict(bench="plan", work=name, amount=amount, seconds=amount / speed))
    slowest = max(work, key=lambda name: work[name][0] / work[name][2])
    print(f"the bottleneck: {slowest}. No time here is measured, and nothing is assumed to overlap.")
    return table


BENCHES = {  # name: (what is done, its options)
    "step": (bench_step, StepConfig),
    "search": (bench_search, BenchConfig),
    "model": (bench_model, BenchConfig),
    "kernels": (bench_kernels, BenchConfig),
    "plan": (bench_plan, PlanConfig),
}


def main(argv: list[str] | None = None) -> None:
    name, options = first_word(argv, BENCHES, __doc__, "a measurement")
    bench, config_class = BENCHES[name]
    _, given = parse(config_class, options, description=__doc__)
    config = build(config_class, given)
    table = bench(config)
    if config.json:
        Path(config.json).write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")


if __name__ == "__main__":
    main()
