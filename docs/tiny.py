"""
A product-key memory on one page. It learns twenty facts, shows where each one is, and forgets one.

    python docs/tiny.py       # a few seconds. It needs PyTorch and nothing else

The memory is a table of S*S rows. Row (i, j) belongs to left half-key i and right half-key j. Its number, the
slot, is S*i + j. A question such as "Egypt river" is a query in two halves: Egypt left, river right. A row
has one number per word: how much it speaks for this word.
"""

import torch
from torch import nn
from torch.nn.functional import normalize


def search(queries, half_keys, K):  # (N, 2, D), (2, S, D) -> scores (N, K), slots (N, K)
    """The best K of S*S rows, exactly, from 2*S dot products. Row (i, j) has the score left[i] + right[j]."""
    scores = torch.einsum("npd,psd->nps", queries, half_keys)  # (N, 2, S): left and right
    best, keys = scores.topk(K)  # (N, 2, K): any other half-key has K better ones, with the same partners
    sums = best[:, 0, :, None] + best[:, 1, None, :]  # (N, K, K): left[i] + right[j]
    best, pairs = sums.flatten(1).topk(K)  # (N, K): pair K*a + b has rank a on the left, and b on the right
    i, j = keys[:, 0].gather(1, pairs // K), keys[:, 1].gather(1, pairs % K)  # (N, K) each
    return best, half_keys.size(1) * i + j


FACTS = """     capital   language    money  river
       France   Paris     French      euro   Seine
       Japan    Tokyo     Japanese    yen    Shinano
       Egypt    Cairo     Arabic      pound  Nile
       Brazil   Brasilia  Portuguese  real   Amazon
       India    Delhi     Hindi       rupee  Ganges"""
S, K, D = 16, 4, 8  # half-keys per side, rows that a question reads, numbers in a half-key

torch.manual_seed(0)
subjects, *lines = [line.split() for line in FACTS.splitlines()]
country, subject = torch.cartesian_prod(torch.arange(5), torch.arange(4)).T  # (20,) each: of each question
words = [word for line in lines for word in line[1:]]  # word n is the answer to question n

left, right = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.randn(4, D))  # the halves of queries
half_keys = nn.Parameter(torch.randn(2, S, D))
table = nn.Parameter(torch.zeros(S * S, 20))  # a row of zeros says nothing


def ask():
    """Asks all questions -> the probability of each word (20, 20), and the slots that are read (20, K)."""
    queries = torch.stack([left[country], right[subject]], 1)  # (20, 2, D)
    scores, slots = search(normalize(queries, dim=2), normalize(half_keys, dim=2), K)  # only directions count
    y = (scores.softmax(1).unsqueeze(2) * table[slots]).sum(1)  # (20, 20): K weighted rows
    return y.softmax(1), slots


optimizer = torch.optim.Adam([{"params": [left, right, half_keys]}, {"params": table, "lr": 0.1}], lr=0.01)
for step in range(201):
    loss = -ask()[0].diag().log().mean()
    optimizer.zero_grad()
    loss.backward()  # the table's gradient is 0, except in the rows that were read
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}  loss {loss.item():.3f}")


def show(n):
    question = f"{lines[country[n]][0]:7}{subjects[subject[n]]:9}"
    answer = words[p[n].argmax()] if p[n].max() > 0.5 else "?"
    print(LETTERS[n], question, f"{answer:11}{p[n].max():.2f}   rows", *slots[n].tolist())


LETTERS = "ABCDEFGHIJKLMNOPQRST"  # one for each fact
p, slots = ask()
print("\nEach fact, the answer, its probability, and the rows that it comes from:")
for n in range(20):
    show(n)

print("\nThe table as a square of half-keys. A letter: this fact reads the row. *: several facts do.")
for i in range(S):
    readers = [[n for n in range(20) if S * i + j in slots[n]] for j in range(S)]
    print(f"{S * i:3} ", *("*" if len(ns) > 1 else LETTERS[ns[0]] if ns else "." for ns in readers))

erased = words.index("Nile")
table.data[slots[erased]] = 0
p, _ = ask()
print(f"\nThe rows of {words[erased]} are 0 now. Facts that shared a row with it are less sure:")
for n in range(20):
    if torch.isin(slots[n], slots[erased]).any():
        show(n)
print("right answers:", (p.diag() > 0.5).sum().item(), "of 20")
