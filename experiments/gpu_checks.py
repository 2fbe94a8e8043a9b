"""
Are the Triton kernels right for large pools? Results are compared with float64, for some tokens and rows.
Each operation runs twice and must give the same bits.

    python -m experiments.gpu_checks           pools of 1M and 4M rows with 1,024 columns, on a GPU with 70 GB
    python -m experiments.gpu_checks small     a small pool, on a GPU or CPU (used with compute-sanitizer)
    python -m experiments.gpu_checks nccl      the collectives of runtime/distributed.py, with one process

Without a GPU, the first command checks the small pool too. Some rows are read much more often than others
(Zipf's law), and every token reads row 3.
"""

import json
import sys

import torch
import torch.distributed as dist

from experiments.speed import DEVICE, device_name, draw_indices
from kernel import gather_dot, gather_sum, scatter_update

# the largest allowed difference from float64, divided by the largest number of the result
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def error(ours, exact) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def update(before, read, blocks: int = 8):
    """One step of the optimiser rowwise, on a copy of the values."""
    values = before.clone()
    state = {"v": torch.zeros(len(values), blocks, device=DEVICE),
             "step": torch.ones((), dtype=torch.int64, device=DEVICE)}
    scatter_update(values, [read], state, lr=0.1)
    return values, state["v"]


def check(num_values: int, V: int, N: int, bag: int, dtype: torch.dtype, sample: int = 200) -> dict:
    torch.manual_seed(0)
    values = torch.empty(num_values, V, dtype=dtype, device=DEVICE).normal_()
    indices = draw_indices("zipf", num_values, N, bag).int()
    indices[:, 0] = 3
    weights, dy = torch.rand(N, bag, device=DEVICE), torch.randn(N, V, device=DEVICE)
    y, dw = gather_sum(values, indices, weights), gather_dot(values, indices, dy)
    same_bits = torch.equal(y, gather_sum(values, indices, weights))
    same_bits &= torch.equal(dw, gather_dot(values, indices, dy))

    tokens = torch.randperm(N, device=DEVICE)[:sample]
    chosen = values[indices[tokens]].double()  # (tokens, bag, V)
    errors = dict(gather_sum=error(y[tokens], torch.einsum("nk,nkv->nv", weights[tokens].double(), chosen)),
                  gather_dot=error(dw[tokens], torch.einsum("nkv,nv->nk", chosen, dy[tokens].double())))

    new, v = update(values, (indices, weights, dy))
    new_again, v_again = update(values, (indices, weights, dy))
    same_bits &= torch.equal(new, new_again) and torch.equal(v, v_again)
    rows_read, counts = indices.unique(return_counts=True)
    not_read = torch.ones(num_values, dtype=torch.bool, device=DEVICE)
    not_read[rows_read.long()] = False
    unchanged = all(torch.equal(a[part], b[part]) for a, b, part in
                    zip(new.split(2**18), values.split(2**18), not_read.split(2**18), strict=True))
    most_read = rows_read[counts.topk(min(20, len(rows_read))).indices]  # Triton sums these in pieces
    some_rows = rows_read[torch.randperm(len(rows_read), device=DEVICE)[:sample]]
    for row in torch.cat((most_read, some_rows)).tolist():
        token, j = (indices == row).nonzero(as_tuple=True)
        g = weights[token, j].double() @ dy[token].double()  # (V,)
        mean_sq = g.view(8, -1).square().mean(1)  # in the first step, v is this mean
        exact = values[row].double() - 0.1 * (g.view(8, -1) / mean_sq.sqrt().unsqueeze(1)).flatten()
        for name, row_error in (("update", error(new[row], exact)), ("v", error(v[row], mean_sq))):
            errors[name] = max(errors.get(name, 0.0), row_error)
    # Triton (on a GPU) computes sums of 16-bit values in float32, but PyTorch (on a CPU) in 16 bits
    sums = TOLERANCE[torch.float32 if DEVICE == "cuda" else dtype]
    limits = dict(gather_sum=sums, gather_dot=sums, v=TOLERANCE[torch.float32], update=TOLERANCE[dtype])
    return dict(bench="check", device=device_name(), rows=num_values, V=V, tokens=N, bag=bag,
                dtype=str(dtype)[6:], errors=errors, same_bits=same_bits, others_unchanged=unchanged,
                most_reads_of_a_row=counts.max().item(),
                passed=same_bits and unchanged and all(errors[name] <= limits[name] for name in errors))


def check_nccl() -> dict:
    """With one process, the collectives of NCCL must return their input."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    x = torch.randn(4, 8, device=DEVICE)
    reduced, gathered, exchanged = x.clone(), [torch.empty_like(x)], torch.empty_like(x)
    dist.all_reduce(reduced)
    dist.all_gather(gathered, x)
    dist.all_to_all_single(exchanged, x)
    passed = all(torch.equal(x, y) for y in (reduced, *gathered, exchanged))
    dist.destroy_process_group()
    return dict(bench="nccl", device=device_name(), passed=passed)


def main(argv: list[str]) -> int:
    if argv == ["nccl"]:
        row = check_nccl()
        print(json.dumps(row))
        return 0 if row["passed"] else 1
    small = argv == ["small"] or DEVICE == "cpu"
    if small:
        cases = [(1024, 64, 64, 6, dtype) for dtype in (torch.float32, torch.bfloat16)]
    else:
        cases = [(rows, 1024, 4096, 64, dtype) for rows in (2**20, 2**22)
                 for dtype in (torch.float32, torch.bfloat16)]
    rows = [check(*case, sample=10 if small else 200) for case in cases]
    for row in rows:
        print(json.dumps(row), flush=True)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
