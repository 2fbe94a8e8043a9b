"""
The pool of values that memory layers read, its gradient and its optimiser.

    ValuePool         the pool: `values` (num_values, value_dim), and weighted sums of its rows
    FactoredGradient  the gradient, values.grad: a list of reads, instead of a tensor as large as the pool
    PoolOptimizer     the optimiser: a torch.optim.Optimizer that learns from this gradient
    MemoryUsage       how much of the pool is in use

A training step reads few rows of the pool. Its time and memory depend on the number of rows that it reads,
not on the size of the pool. For each time that a layer reads the pool, the backward pass keeps one *read*:
the tuple (indices, weights, dy), where dy is the gradient of the loss with respect to the weighted sums. From
the reads, PoolOptimizer computes the gradient of a few rows, updates them, and goes on to the next rows
(kernel.py).

`values` is an ordinary parameter. zero_grad() clears its gradient, backward() adds up the gradients of all
micro-batches and layers, and requires_grad_(False) freezes it. Gradient clipping and other optimisers would
need the whole gradient: they raise an error.
"""

import functools
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.function import once_differentiable

from kernel import check_kernel, gather_dot, gather_sum, row_gradients, scatter_update, sort_reads

MANY_READS = 500  # in one gradient: probably nobody clears it


# --- the rows -----------------------------------------------------------------------------------------------

class ValuePool(nn.Module):
    """
    The table of rows that memory layers read: `values` (num_values, value_dim). The pool is an argument of a
    layer's forward, so several layers can share one pool (Berges et al. 2024, section 2.2).

    values.grad is a FactoredGradient: only PoolOptimizer can learn from it. kernel: 'auto', 'triton' or
    'torch' (see kernel.py). dtype: float32, float64, bfloat16 or float16.
    """

    def __init__(self, num_values: int, value_dim: int, dtype: torch.dtype = torch.float32,
                 kernel: str = "auto", device=None):
        super().__init__()
        if not 1 <= num_values < 2**31:
            raise ValueError(f"num_values={num_values} must be between 1 and {2**31 - 1}: indices are int32")
        self.num_values, self.value_dim, self.kernel = num_values, value_dim, kernel
        self.values = nn.Parameter(torch.empty(num_values, value_dim, dtype=dtype, device=device))
        self.usage = MemoryUsage(num_values)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal with standard deviation value_dim**-0.5. 4,096 rows at a time, to need little memory."""
        if self.values.is_meta:
            return
        for rows in self.values.split(4096):
            rows.copy_(torch.randn(len(rows), self.value_dim, device=rows.device) * self.value_dim**-0.5)

    @torch.compiler.disable  # a compiled graph cannot hold a gradient that is a list of reads
    def forward(self, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """indices, weights (N, bag) -> weighted sums of rows (N, value_dim), in the dtype of weights."""
        indices = self.check(indices, weights, weights.shape)
        self.count(indices, weights)
        return self.read(gather_sum, indices, weights)

    @torch.compiler.disable
    def dot(self, indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """
        indices (N, bag), x (N, value_dim) -> dot products of rows with x (N, bag), in the dtype of x. For
        PEER (baselines.py). It does not count as use, because PEER also reads the same slots with forward.
        """
        return self.read(gather_dot, self.check(indices, x, (len(x), indices.size(-1))), x)

    def read(self, operation, indices, x) -> torch.Tensor:
        """gather_sum or gather_dot of the values. In a ShardedPool, processes exchange tensors here."""
        learns = self.training and self.values.requires_grad
        if learns and dist.is_initialized() and dist.get_world_size() > 1:
            warn_once("each process now learns a ValuePool of its own: use ShardedPool from "
                      "runtime/distributed.py, also with FSDP")
        return Gather.apply(operation, self.values, indices, x, self.kernel)

    def check(self, indices, other, shape) -> torch.Tensor:
        """Returns the indices as int32. On a GPU, their range is not checked: the CPU would have to wait."""
        if indices.dim() != 2 or indices.shape != shape or not indices.size(1):
            raise ValueError(f"indices {tuple(indices.shape)} must be (N, bag) with bag >= 1, and fit "
                             f"the shape of the other argument, {tuple(other.shape)}")
        if indices.dtype not in (torch.int32, torch.int64) or not other.is_floating_point():
            raise ValueError(f"indices must be int32 or int64 and the other argument floating point, not "
                             f"{indices.dtype} and {other.dtype}")
        if indices.is_cpu and has_numbers(indices) and indices.numel():
            low, high = (bound.item() for bound in indices.aminmax())
            if low < 0 or high >= self.num_values:
                raise IndexError(f"indices from {low} to {high} in a pool of {self.num_values} rows")
        return indices.int()

    def count(self, indices, weights) -> None:
        """In training, counts the use of the slots. A forward pass inside of backward() does not count."""
        is_training = self.training and not is_in_backward() and not torch.is_inference_mode_enabled()
        if is_training and has_numbers(indices):
            self.usage.add(indices, weights)

    def _apply(self, fn, recurse=True):
        """For to(), half() and so on: converts the gradient too, as PyTorch does for other parameters."""
        gradient = self.values.grad
        if not isinstance(gradient, FactoredGradient):
            return super()._apply(fn, recurse)
        self.values.grad = None
        try:
            return super()._apply(fn, recurse)
        finally:
            self.values.grad = FactoredGradient(self.values, gradient.reads)
            self.values.grad.agree = gradient.agree


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def has_numbers(x: torch.Tensor) -> bool:
    """False for a tensor without numbers: on the meta device, or of PyTorch's FakeTensorMode."""
    return type(x) is torch.Tensor and not x.is_meta


def is_in_backward() -> bool:
    """True during backward(). torch.utils.checkpoint then runs the forward pass of a block a second time."""
    return torch._C._current_graph_task_id() != -1


class Gather(torch.autograd.Function):
    """
    operation: gather_sum (x: weights) or gather_dot, with gradients. Each is the gradient of the other.
    share: what becomes of the gradient of the values, if many processes share them (ShardedPool).
    """

    @staticmethod
    def forward(ctx, operation, values, indices, x, kernel, share=None):
        # with saved values, PyTorch raises an error if they change between forward and backward
        ctx.save_for_backward(values, indices, x)
        ctx.operation, ctx.kernel, ctx.share = operation, kernel, share
        return operation(values, indices, x, kernel)  # (N, V), or (N, bag)

    @staticmethod
    @torch.compiler.disable
    @once_differentiable
    def backward(ctx, dy):
        values, indices, x = ctx.saved_tensors
        _, values_need_grad, _, x_needs_grad, *_ = ctx.needs_input_grad
        dy, is_sum, gradient, dx = dy.contiguous(), ctx.operation is gather_sum, None, None
        if values_need_grad:
            # copies: autograd may change dy in place later, and you may change weights or indices
            read = (part.detach().clone(memory_format=torch.contiguous_format)
                    for part in ((indices, x, dy) if is_sum else (indices, dy, x)))
            gradient = FactoredGradient(values, [tuple(read)])
            gradient = ctx.share(gradient) if ctx.share else gradient
        if x_needs_grad:
            dx = (gather_dot if is_sum else gather_sum)(values, indices, dy, ctx.kernel)
        return None, gradient, None, dx, None, None


# --- the gradient -------------------------------------------------------------------------------------------

class FactoredGradient(torch.Tensor):
    """
    The gradient of a pool's values, as a list of reads. To PyTorch it looks like a tensor with the shape,
    dtype and device of the values, but its numbers are not in memory.

    reads: [(indices (N, bag), weights (N, bag), dy (N, value_dim)), ...]. Row r of the gradient is the sum of
    weights[n, j] * dy[n] over all reads and all (n, j) with indices[n, j] = r. to_dense() computes all rows.
    The tensors of a read are copies, and never change.
    """

    is_sparse = True  # so AdamW and most other optimisers refuse this gradient before they change a value

    @staticmethod
    def __new__(cls, like: torch.Tensor, reads: list, dtype=None, device=None):
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=dtype or like.dtype, device=device or like.device,
            dispatch_sizes_strides_policy="strides")  # __torch_dispatch__ then refuses access to the memory

    def __init__(self, like: torch.Tensor, reads: list, dtype=None, device=None):
        self.reads = [tuple(x.to(self.device) for x in read) for read in reads]
        self.agree = getattr(like, "agree", None)  # a function for `bound`, of processes that share a pool

    def __repr__(self):
        return f"FactoredGradient({len(self.reads)} reads, shape={tuple(self.shape)}, dtype={self.dtype})"

    def coalesce(self):
        """For GradScaler, which unscales _values() of a sparse gradient."""
        return self

    _values = coalesce

    def share_memory_(self):
        raise ValueError("the gradient of a pool cannot be in shared memory: set it to None first")

    def to_dense(self) -> torch.Tensor:  # type: ignore[override]
        """The gradient as an ordinary tensor, as large as the pool. Training does not need it."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if sum(indices.numel() for indices, _, _ in self.reads):
            for rows, g in row_gradients(*sort_reads(self.reads)):
                dense[rows] = g.to(dense.dtype)
        return dense

    def bound(self) -> torch.Tensor:
        """No number of the gradient has a larger absolute value. inf or nan if a number of a read is."""
        bounds = [weights.abs().amax().float() * dy.abs().amax() * indices.numel()
                  for indices, weights, dy in self.reads if indices.numel()]
        bound = sum(bounds, torch.zeros((), device=self.device))
        return bound if self.agree is None else self.agree(bound)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """PyTorch calls this for operations on a gradient. Only copying, adding and zeroing work."""
        aten = torch.ops.aten
        if operation is aten.sym_stride.default:
            return None  # the default
        if operation is aten._amp_foreach_non_finite_check_and_unscale_.default:  # GradScaler
            gradients, found_inf, factor = args
            if all(isinstance(g, cls) for g in gradients):
                for g in gradients:
                    found_inf.logical_or_(~g.bound().isfinite())
                    # with two dimensions, the factor makes dy float32. In float16, small numbers would be 0
                    g.reads[:] = [(indices, weights, dy * factor.view(1, 1))
                                  for indices, weights, dy in g.reads]
                return None
        if operation is aten.new_empty_strided.default:  # backward() may copy a gradient into a new one
            return cls(args[0], [])
        if operation in (aten.clone.default, aten._to_copy.default):  # the reads keep their dtype
            return cls(args[0], args[0].reads, kwargs.get("dtype"), kwargs.get("device"))
        if operation is aten.detach.default:
            detached = cls(args[0], [])
            detached.reads = args[0].reads  # the same list, as detach() shares memory
            return detached
        if not kwargs and all(isinstance(x, cls) for x in args) and len({x.shape for x in args}) == 1:
            a, b = args[0], args[-1]
            if operation is aten.add.Tensor:
                return cls(a, a.reads + b.reads)
            reads_in_place = {aten.add_.Tensor: a.reads + b.reads, aten.copy_.default: b.reads,
                              aten.zero_.default: []}
            if operation in reads_in_place:
                a.reads[:] = reads_in_place[operation]
                if len(a.reads) > MANY_READS:
                    warn_once(f"the gradient of a pool has more than {MANY_READS} reads: does a "
                              "PoolOptimizer learn from it, and does zero_grad() clear it?")
                return a
            if operation is aten.isnan.default:  # detect_anomaly: one bool is enough
                return a.bound().isnan()
        raise ValueError(f"the gradient of a pool is a list of reads, and cannot do {operation.name()}. Only "
                         "PoolOptimizer learns from it: leave the pool's values out of other optimisers, "
                         "clipping, DDP and FSDP (docs/processes.md), or take values.grad.to_dense()")


# --- the optimiser ------------------------------------------------------------------------------------------

class PoolOptimizer(torch.optim.Optimizer):
    """
    The optimiser for the values of pools: PoolOptimizer(pool.parameters(), lr=6e-2). Give all other
    parameters to another optimiser. A step changes only the rows that were read, and its time
    depends on their number. There is no weight decay.

    kind='rowwise'  one second moment for each of `value_blocks` equal blocks of a row's columns
    kind='adam'     two moments for each value, as torch.optim.SparseAdam
    kind='sgd'      no moments; for finetuning
    kernel.scatter_update has the formulas. For values with 16 bits, the moments are float32.

    You need not clip the gradient: a constant factor changes no step of rowwise and adam. The factor of
    GradScaler changes, so call scaler.step(pool_optimizer). If a gradient is inf or nan, or so large that its
    square could overflow, the step is skipped: no value and no moment changes, and skipped_steps counts the
    step. On a GPU, the CPU does not wait for this test.

    stochastic_rounding, seed: for bfloat16 values, see scatter_update. kernel: see kernel.py.
    """

    def __init__(self, params, lr: float, kind: str = "rowwise", value_blocks: int = 8,
                 betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-12,
                 stochastic_rounding: bool = False, seed: int = 0, kernel: str = "auto"):
        super().__init__(params, dict(lr=lr, kind=kind, value_blocks=value_blocks, betas=betas, eps=eps,
                                      stochastic_rounding=stochastic_rounding, seed=seed, kernel=kernel))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict) -> None:
        if not 0 <= group["lr"] < math.inf:
            raise ValueError(f"lr={group['lr']} must be at least 0 and finite")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']} must be at least 0 and less than 1")
        if not 0 < group["eps"] < math.inf:  # with eps=0, a gradient of 0 is divided by 0
            raise ValueError(f"eps={group['eps']} must be more than 0")
        if group["kind"] not in ("rowwise", "adam", "sgd"):
            raise ValueError(f"kind={group['kind']!r} must be 'rowwise', 'adam' or 'sgd'")
        check_kernel(group["kernel"])
        if group.get("weight_decay"):
            raise ValueError(f"weight_decay={group['weight_decay']} must be 0: PoolOptimizer has none")
        blocks = group["value_blocks"]
        for p in group["params"]:
            if p.dim() != 2:
                raise ValueError(f"PoolOptimizer is for the values of pools, not for a parameter of shape "
                                 f"{tuple(p.shape)}")
            if group["kind"] == "rowwise" and (blocks < 1 or p.size(1) % blocks):
                raise ValueError(f"value_blocks={blocks} must divide the {p.size(1)} columns of the values")
            if group["stochastic_rounding"] and p.dtype != torch.bfloat16:
                raise ValueError(f"stochastic_rounding is for bfloat16 values, not {p.dtype}")

    @staticmethod
    def _shapes(p, group: dict) -> dict[str, tuple]:
        """The names and shapes of the state of p: its moments, and the numbers of steps done and skipped."""
        moments = {"rowwise": {"v": (len(p), group["value_blocks"])}, "sgd": {},
                   "adam": {"exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}}[group["kind"]]
        return moments | {"step": (), "skipped": ()}

    def _new_state(self, p, group: dict) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(p.dtype, torch.float32)
        return {name: torch.zeros(shape, dtype=dtype if shape else torch.int64, device=p.device)
                for name, shape in self._shapes(p, group).items()}

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure=None):
        """Updates all pools that were read. closure: as in torch.optim. Returns the loss of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, group in params:
            if p not in self.state:
                self.state[p] = self._new_state(p, group)
            self._check_state(p, group, self.state[p])
            if not isinstance(p.grad, FactoredGradient) and p.grad.any():
                raise ValueError("a parameter of PoolOptimizer has an ordinary gradient: give PoolOptimizer "
                                 "pool.parameters(), and nothing else")
        # torch.distributed.checkpoint makes ordinary zeros, only to create the state
        params = [(p, group) for p, group in params if isinstance(p.grad, FactoredGradient)]
        # one test for all pools. It squares the bound, because a second moment must never become inf
        bounds = [p.grad.bound() for p, _ in params]
        finite = sum(bound.to(bounds[0].device) for bound in bounds).square().isfinite() if bounds else None
        for p, group in params:
            state, is_finite = self.state[p], finite.to(p.device)
            state["step"] += is_finite
            state["skipped"] += ~is_finite
            seed = group["seed"] if group["stochastic_rounding"] else None
            scatter_update(p, p.grad.reads, state, group["lr"], group["betas"], group["eps"], seed,
                           is_finite, group["kernel"])
        return loss

    @property
    def skipped_steps(self) -> int:
        """The number of skipped steps, because a gradient was too large or nan. The CPU waits for a GPU."""
        return max((int(state["skipped"]) for state in self.state.values()), default=0)

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises a ValueError if the state is from another kind of optimiser, or a pool of another size."""
        saved_groups, state = state_dict["param_groups"], state_dict["state"]
        kernels = [group["kernel"] for group in self.param_groups]  # they depend on the machine
        for group, saved in zip(self.param_groups, saved_groups, strict=False):
            if saved.get("kind") != group["kind"]:
                raise ValueError(f"the state is from kind={saved.get('kind')!r}, not {group['kind']!r}")
            self._check(group | saved | {"params": group["params"], "kernel": group["kernel"]})
            for p, number in zip(group["params"], saved["params"], strict=False):
                self._check_state(p, group, state.get(number))
        super().load_state_dict(state_dict)
        # torch has converted the moments to the dtype of the values, which may be 16 bits. Take the originals
        for group, saved, kernel in zip(self.param_groups, saved_groups, kernels, strict=True):
            group["kernel"] = kernel
            for p, number in zip(group["params"], saved["params"], strict=True):
                if number in state:
                    self.state[p] |= {name: x.to(p.device) for name, x in state[number].items()}
                    self.state[p].setdefault("skipped", torch.zeros_like(self.state[p]["step"]))

    def _check_state(self, p, group: dict, state: dict | None) -> None:
        expected = self._shapes(p, group)
        shapes = {name: tuple(x.shape) for name, x in (state or {}).items()}
        if shapes and shapes | {"skipped": ()} != expected:  # an older state does not have "skipped"
            raise ValueError(f"the state has the shapes {shapes}, and this pool needs {expected}")


# --- how much is in use -------------------------------------------------------------------------------------

class MemoryUsage:
    """How much of a pool was used since `reset`. The measures are from Lample et al. 2019, section 4.2."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.reset()

    def reset(self) -> None:
        self.total_weight: torch.Tensor | None = None  # (num_slots,), float32; None: nothing was read

    def add(self, indices, weights) -> None:
        if self.total_weight is None:
            self.total_weight = torch.zeros(self.num_slots, dtype=torch.float32, device=indices.device)
        self.total_weight = self.total_weight.to(indices.device)  # the model may have moved
        weights = weights.detach().abs().flatten()  # PEER has negative weights too
        self.total_weight.index_add_(0, indices.flatten(), weights.to(self.total_weight))

    def summary(self) -> tuple[float, float]:
        """
        Returns two numbers: the share of the slots that were read, and the KL divergence of their use from
        uniform use, in nats. The divergence is 0 if all slots are used equally, and ln(num_slots) if only
        one slot is used. Returns (0, 0) if nothing was read.
        """
        if self.total_weight is None or not self.total_weight.any():
            return 0.0, 0.0
        used = self.total_weight[self.total_weight > 0].double()
        p = used / used.sum()
        return len(used) / self.num_slots, math.log(self.num_slots) + (p * p.log()).sum().item()
