"""
Exercise: write the search that finds the best K of S*S slots with only 2*S dot products.

Each blank is three dots. Write one expression in its place, and ask for a verdict as often as you like:

    python -m pytest docs/test_exercise.py -k search
"""

import torch


def search(queries: torch.Tensor, half_keys: torch.Tensor, K: int):
    """
    queries (N, 2, D): N queries in two halves. half_keys (2, S, D): S left half-keys and S right ones.
    Returns the K highest scores (N, K), the highest first, and their slots (N, K).

    Slot S*i + j belongs to left half-key i and right half-key j. Its score is the half-score of i (the dot
    product of the left half of the query with left half-key i) plus the half-score of j.

    Example: N = 1, D = 1, S = 4, K = 3. The halves of the query are [1] and [1]. The left half-keys are [1],
    [6], [3], [0], and the right ones [3], [0], [5], [1]. So these are the half-scores, too. The best on the
    left are 6, 3, 1, of the half-keys 1, 2, 0. The best on the right are 5, 3, 1, of the half-keys 2, 0, 3.

        their sums    5   3   1      The best three sums are 11, 9, 8. They stand at the places 0, 1, 3
                 6 | 11   9   7      when the grid is flat, and belong to the half-keys (1, 2), (1, 0) and
                 3 |  8   6   4      (2, 2). So the slots are 4*1 + 2 = 6, 4*1 + 0 = 4 and 4*2 + 2 = 10.
                 1 |  6   4   2      The result is [[11, 9, 8]] and [[6, 4, 10]].
    """
    S = half_keys.size(1)
    half_scores = ...  # (N, 2, S): each half of a query with the S half-keys of its side
    best, keys = ...  # (N, 2, K) each: the best K half-scores of each side, and their half-keys
    sums = ...  # (N, K, K): best[n, 0, a] + best[n, 1, b] in line a and column b
    scores, places = ...  # (N, K) each: the best K sums, and their places in the flat grid
    left = ...  # (N, K): the left half-key of each place, from 0 to S - 1
    right = ...  # (N, K): the right half-key of each place
    slots = ...  # (N, K)
    return scores, slots
