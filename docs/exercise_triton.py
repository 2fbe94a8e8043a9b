"""
Exercise: write what a memory layer does with its rows as two Triton kernels, forward and backward.

Each blank is three dots. Write one expression or one statement in its place, and ask for a verdict:

    python -m pytest docs/test_exercise.py -k triton

No GPU is needed: the test lets Triton's interpreter run the kernels, on the CPU. So you can also print() in a
kernel. Triton starts one program per token. A program computes with whole rows: COLUMNS is V rounded up to a
power of two, because Triton has no other sizes, and `inside` says which of these columns exist.

    values   (R, V)  R rows      indices, weights  (N, bag)  which rows a token reads, and with which weights
    y        (N, V)              dy                (N, V)    the gradient of the loss with respect to y

A tensor arrives as a pointer to its first number, and its lines follow each other. So values[r, c] stands at
values_ptr + r * V + c. tl.load reads one number or, if you add a tl.arange, many. You also need tl.store,
tl.sum, and for the last blank a function of Triton whose name begins with atomic_.
"""

import triton
import triton.language as tl


@triton.jit
def gather_sum_kernel(y_ptr, values_ptr, indices_ptr, weights_ptr, bag, V, COLUMNS: tl.constexpr):
    """
    y[n] = sum over j of weights[n, j] * values[indices[n, j]]

    Example: token 0 reads the rows 7 and 1 with the weights 0.75 and 0.25: y[0] = 0.75 * values[7] + 0.25 *
    values[1].
    """
    n = tl.program_id(0)  # the token of this program
    column = tl.arange(0, COLUMNS)  # (COLUMNS,): 0, 1, 2 and so on
    inside = column < V  # (COLUMNS,)
    y = tl.zeros((COLUMNS,), tl.float32)
    for j in range(bag):
        row = tl.load(indices_ptr + n * bag + j)  # one number: indices[n, j]
        weight = ...  # one number: weights[n, j]
        value = ...  # (COLUMNS,): values[row], and 0 in the columns that do not exist
        y += ...
    ...  # store y as y[n]


@triton.jit
def gradient_kernel(d_weights_ptr, d_values_ptr, values_ptr, indices_ptr, weights_ptr, dy_ptr, bag, V,
                    COLUMNS: tl.constexpr):
    """
    d_weights[n, j] = the dot product of values[indices[n, j]] and dy[n]
    d_values[r] = sum of weights[n, j] * dy[n] over all n and j with indices[n, j] = r

    d_values (R, V) is full of zeros at the start. Several programs may add to the same row at the same time.
    Example: token 0 reads row 7 with the weight 0.75, token 1 reads it with 0.5, and nobody else does: then
    d_values[7] = 0.75 * dy[0] + 0.5 * dy[1].
    """
    n = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < V
    dy = tl.load(dy_ptr + n * V + column, mask=inside, other=0.0)  # (COLUMNS,): dy[n]
    for j in range(bag):
        row = tl.load(indices_ptr + n * bag + j)
        weight = ...  # as above
        value = ...  # as above
        d_weight = ...  # one number
        tl.store(d_weights_ptr + n * bag + j, d_weight)
        ...  # add to row `row` of d_values
