"""
Says what is wrong with your answers to the two exercises, exercise_search.py and exercise_triton.py:

    python -m pytest docs/test_exercise.py -k search
    python -m pytest docs/test_exercise.py -k triton    # skipped where Triton is not installed; -rs says so
"""

import contextlib
import inspect
import math
import os
import re
import traceback

import pytest
import torch
from torch.overrides import TorchFunctionMode

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on the CPU
from exercise_search import search  # noqa: E402

try:
    import triton
except ImportError:
    triton = None
needs_triton = pytest.mark.skipif(triton is None,
                                  reason="the package triton is not installed: it exists for Linux")


def wrong(sentence: str):
    pytest.fail(sentence, pytrace=False)


def check_blanks(function, source):
    if blanks := re.findall(r"(?:= |^ +)\.\.\.", inspect.getsource(source), re.MULTILINE):
        wrong(f"Blanks left in {function}, the three dots: {len(blanks)}. Fill them in from top to bottom.")


@contextlib.contextmanager
def mistakes_of(function):
    """Says which line of the exercise raised an error."""
    try:
        yield
    except Exception as error:
        reason, file = error, inspect.getsourcefile(function)
        while reason and not (lines := [part for part in traceback.extract_tb(reason.__traceback__)
                                        if part.filename == file]):
            reason = reason.__cause__  # Triton's interpreter raises an error of its own
        if not reason:
            raise
        wrong(f"Line {lines[-1].lineno} does not work: {lines[-1].line}\n{type(reason).__name__}: {reason}")


def rounded(x) -> list:
    return x.double().round(decimals=2).tolist()


# --- the search ---------------------------------------------------------------------------------------------

def all_scores(queries, half_keys):
    """Brute force: the scores of all slots (N, S*S), from whole keys."""
    S = half_keys.size(1)
    keys = torch.stack([torch.cat([half_keys[0, i], half_keys[1, j]]) for i in range(S) for j in range(S)])
    return queries.flatten(1) @ keys.T


def check_search(queries, half_keys, K):
    with mistakes_of(search):
        scores, slots = search(queries, half_keys, K)
    N, S = len(queries), half_keys.size(1)
    for name, x in (("scores", scores), ("slots", slots)):
        if x.shape != (N, K):
            wrong(f"{name} must have the shape (N, K) = {(N, K)}, but yours is {tuple(x.shape)}.")
    if slots.is_floating_point() or slots.min() < 0 or slots.max() >= S * S:
        wrong(f"With S = {S}, slots are whole numbers from 0 to {S * S - 1}. Yours are {slots.tolist()}.")
    right_scores = all_scores(queries, half_keys)  # (N, S*S)
    right_best = right_scores.topk(K).values
    for n in range(N):
        mine = f"With S = {S} and K = {K}, you found the slots {slots[n].tolist()} with the scores " \
               f"{rounded(scores[n])}. "
        if len(slots[n].unique()) < K:
            wrong(mine + "A slot is there twice.")
        if not torch.allclose(right_scores[n, slots[n]], scores[n], atol=1e-4):
            wrong(mine + f"But these slots have the scores {rounded(right_scores[n, slots[n]])}. Look at "
                  "left, right and slots: which half-keys belong to a place of the grid?")
        if not torch.allclose(right_best[n], scores[n], atol=1e-4):
            wrong(mine + f"But the best scores of all slots are {rounded(right_best[n])}. Look at sums and "
                  "scores: is a pair left out?")


def test_search_finds_what_brute_force_finds():
    check_blanks("search", search)
    example, equal = [[1.0, 6, 3, 0], [3, 0, 5, 1]], [[1.0, 1, 1, 0], [2, 0, 2, 0]]  # half-scores
    for half_scores in (example, equal):  # where scores are equal, any of their slots will do
        check_search(torch.ones(1, 2, 1), torch.tensor(half_scores).unsqueeze(2), K=3)
    torch.manual_seed(0)
    for N, S, K, D in ((1, 1, 1, 1), (4, 5, 5, 3), (7, 12, 4, 8)):
        check_search(torch.randn(N, 2, D), torch.randn(2, S, D), K)


def test_search_does_not_look_at_all_slots():
    class Largest(TorchFunctionMode):
        """Remembers the size of the largest tensor that a function of PyTorch returns."""
        numbers = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for x in result if isinstance(result, tuple) else (result,):
                self.numbers = max(self.numbers, x.numel() if torch.is_tensor(x) else 0)
            return result

    check_blanks("search", search)
    with mistakes_of(search), Largest() as largest:
        search(torch.randn(1, 2, 4), torch.randn(2, 50, 4), 3)
    if largest.numbers > 2 * 50 * 4:
        wrong(f"With N = 1, S = 50, K = 3 and D = 4, you made a tensor with {largest.numbers:,} numbers. But "
              "2*S = 100 half-scores and K*K = 9 sums are enough. Do not look at all slots.")


# --- the kernels --------------------------------------------------------------------------------------------

def memory(x):
    """A copy of x, and the 64 numbers behind it in memory. They are NaN: nobody should read or write them."""
    copy = torch.cat([x.flatten(), torch.full((64,), math.nan)])
    return copy[:-64].view(x.shape), copy[-64:]


def check_kernel(name, outputs, inputs):
    """Runs a kernel for some sizes, and compares its outputs with those of PyTorch."""
    import exercise_triton  # here: a slip there does not stop the first exercise
    kernel = getattr(exercise_triton, name)
    check_blanks(name, kernel.fn)
    for N, bag, R, V in ((1, 1, 1, 4), (3, 2, 8, 4), (5, 4, 6, 5), (4, 3, 9, 1)):
        torch.manual_seed(V)
        values, weights, dy = torch.randn(R, V), torch.rand(N, bag), torch.randn(N, V)
        indices = torch.randint(R, (N, bag))
        indices[-1, -1] = R - 1  # the last row: behind it, the memory ends
        given = dict(values=memory(values)[0], weights=weights, indices=indices, dy=dy)
        leaves = values.requires_grad_(), weights.clone().requires_grad_()
        y = (leaves[1].unsqueeze(2) * leaves[0][indices]).sum(1)
        d_values, d_weights = torch.autograd.grad(y, leaves, dy)
        right = dict(y=y, d_values=d_values, d_weights=d_weights)
        mine = {output: memory(torch.zeros_like(right[output])) for output in outputs}
        COLUMNS = 2 ** math.ceil(math.log2(V))
        with mistakes_of(kernel.fn):
            kernel[(N,)](*(x for x, _ in mine.values()), *(given[i] for i in inputs), bag, V,
                         COLUMNS=COLUMNS)
        sizes = f"With N = {N}, bag = {bag}, R = {R}, V = {V} and COLUMNS = {COLUMNS}, "
        for output, (x, behind) in mine.items():
            if not behind.isnan().all():
                wrong(f"{sizes}{name} writes past the end of {output}. Is mask=inside missing?")
            if x.isnan().any():
                wrong(f"{sizes}{output} has numbers that are NaN: {name} reads past the end of values. Are "
                      "mask=inside and other=0.0 missing?")
            n = (x - right[output]).abs().amax(1).argmax().item()  # the worst line
            if not torch.allclose(x[n], right[output][n], atol=1e-5):
                wrong(f"{sizes}{output}[{n}] is {rounded(x[n])}. PyTorch says {rounded(right[output][n])}. "
                      f"The indices are {indices.tolist()}, and the weights {rounded(weights)}.")


@needs_triton
def test_triton_gather_sum():
    check_kernel("gather_sum_kernel", ["y"], ["values", "indices", "weights"])


@needs_triton
def test_triton_gradient():
    check_kernel("gradient_kernel", ["d_weights", "d_values"], ["values", "indices", "weights", "dy"])
