"""What a class uses: docs/tiny.py, the two exercises with their solutions, and the slides."""

import importlib
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train
from experiments import slides

DOCS = Path(train.__file__).parent / "docs"


# --- docs/tiny.py -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    """The variables of docs/tiny.py after it has run."""
    return runpy.run_path(str(DOCS / "tiny.py"))


def test_tiny_learns_twenty_facts_and_forgets_one(tiny, capsys):
    assert tiny["loss"] < 0.05
    right = tiny["p"].diag() > 0.5
    assert not right[tiny["erased"]] and right.sum() == 19
    tiny["show"](tiny["erased"])
    line = capsys.readouterr().out
    assert line.startswith("L Egypt  river     ?          0.05   rows "), "all words are equally likely"


def test_facts_about_one_country_stand_in_the_same_lines_of_the_square(tiny):
    lines = [set((slots // tiny["S"]).tolist()) for slots in tiny["slots"]]
    assert all(lines[a] & lines[b] for a in range(20) for b in range(20) if a // 4 == b // 4)


@pytest.mark.parametrize("N, S, K, D", [(1, 1, 1, 1), (5, 9, 9, 3), (17, 32, 8, 5), (3, 100, 4, 16)])
@pytest.mark.parametrize("with_ties", [False, True])
def test_tiny_finds_what_brute_force_finds(tiny, N, S, K, D, with_ties):
    torch.manual_seed(S)
    queries, half_keys = torch.randn(N, 2, D).double(), torch.randn(2, S, D).double()
    if with_ties:
        queries, half_keys = queries.round(), half_keys.round()
    scores, slots = tiny["search"](queries, half_keys, K)
    left, right = torch.einsum("npd,psd->pns", queries, half_keys)
    all_scores = (left.unsqueeze(2) + right.unsqueeze(1)).flatten(1)  # (N, S*S)
    torch.testing.assert_close(scores, all_scores.topk(K).values)
    torch.testing.assert_close(all_scores.gather(1, slots), scores)
    assert all(len(found.unique()) == K for found in slots)


# --- the exercises ------------------------------------------------------------------------------------------

SEARCH = [  # what belongs in the blanks, from top to bottom
    "torch.einsum('npd,psd->nps', queries, half_keys)",
    "half_scores.topk(K)",
    "best[:, 0, :, None] + best[:, 1, None, :]",
    "sums.flatten(1).topk(K)",
    "keys[:, 0].gather(1, places // K)",
    "keys[:, 1].gather(1, places % K)",
    "S * left + right",
]
LOADS = ["tl.load(weights_ptr + n * bag + j)",
         "tl.load(values_ptr + row * V + column, mask=inside, other=0.0)"]
TRITON = [
    *LOADS,
    "weight * value",
    "tl.store(y_ptr + n * V + column, y, mask=inside)",
    *LOADS,
    "tl.sum(value * dy)",
    "tl.atomic_add(d_values_ptr + row * V + column, weight * dy, mask=inside)",
]


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    """verdict(exercise, answers) -> what the tests of docs/test_exercise.py say about these answers."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("exercise_search", "exercise_triton", "test_exercise")
    for name in names:
        shutil.copy(DOCS / f"{name}.py", tmp_path)

    def verdict(exercise: str, answers: list[str]) -> str:
        first, *rest = (DOCS / f"exercise_{exercise}.py").read_text(encoding="utf-8").split("...")
        filled_in = "".join(answer + part for answer, part in zip(answers, rest, strict=True))
        (tmp_path / f"exercise_{exercise}.py").write_text(first + filled_in, encoding="utf-8")
        tests = vars(importlib.import_module("test_exercise"))
        sentences = []
        for test in (tests[name] for name in tests if name.startswith(f"test_{exercise}")):
            try:
                test()
            except pytest.fail.Exception as failure:
                sentences.append(str(failure))
        return " ".join(sentences)

    yield verdict
    for name in names:
        sys.modules.pop(name, None)


def changed(answers: list[str], others: dict[int, str]) -> list[str]:
    return [others.get(blank, answer) for blank, answer in enumerate(answers)]


def test_the_solution_of_the_search_is_right(verdict):
    assert verdict("search", SEARCH) == ""


@pytest.mark.parametrize("others, sentence", [
    ({blank: "..." for blank in range(7)}, "Blanks left in search, the three dots: 7."),
    ({6: "..."}, "Blanks left in search, the three dots: 1."),
    ({0: "queries @ half_keys"}, "Line 30 does not work: half_scores = queries @ half_keys  #"),
    ({1: "half_scores.max(K)"}, "Line 31 does not work: best, keys = half_scores.max(K)  #"),
    ({4: "places // K", 5: "places % K"}, "which half-keys belong to a place"),  # ranks are no half-keys
    ({4: "keys[:, 0].gather(1, places % K)", 5: "keys[:, 1].gather(1, places // K)"}, "which half-keys"),
    ({6: "K * left + right"}, "which half-keys"),
    ({6: "S * S * left"}, "whole numbers from 0 to 15"),
    ({5: "keys[:, 1].gather(1, 0 * places)", 4: "keys[:, 0].gather(1, 0 * places)"}, "A slot is there twice"),
    ({6: "(S * left + right)[:, :1]"}, "slots must have the shape (N, K) = (1, 3)"),
    ({3: "sums.flatten(1)[:, ::K + 1], torch.arange(0, K * K, K + 1).expand(len(sums), K)"},
     "is a pair left out"),
    ({2: "half_scores[:, 0, :, None] + half_scores[:, 1, None, :]", 4: "places // S", 5: "places % S"},
     "Do not look at all slots"),
])
def test_wrong_searches_hear_what_is_wrong(verdict, others, sentence):
    assert sentence in verdict("search", changed(SEARCH, others))


def test_the_solution_in_triton_is_right(verdict):
    pytest.importorskip("triton")
    assert verdict("triton", TRITON) == ""


@pytest.mark.parametrize("others, sentence", [
    ({blank: "..." for blank in range(8)}, "Blanks left in gather_sum_kernel, the three dots: 4."),
    ({7: "..."}, "Blanks left in gradient_kernel, the three dots: 1."),
    ({2: "value"}, "y[0] is ["),
    ({3: "tl.store(y_ptr + n * V + column, y)"}, "gather_sum_kernel writes past the end of y"),
    ({5: "tl.load(values_ptr + row * V + column)"}, "gradient_kernel reads past the end"),
    ({6: "tl.sum(value)"}, "d_weights[0] is ["),
    ({2: "weight * values"}, "does not work: y += weight * values\nNameError: name 'values' is not defined"),
    ({6: "tl.sum(value * dy, 3)"}, "does not work: d_weight = tl.sum(value * dy, 3)  #"),
    ({7: TRITON[7].replace("atomic_add", "store")}, "d_values[1] is ["),  # only the last token counts
])
def test_wrong_kernels_hear_what_is_wrong(verdict, others, sentence):
    pytest.importorskip("triton")
    assert sentence in verdict("triton", changed(TRITON, others))


def test_pytest_leaves_the_exercises_to_the_students(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]


# --- the slides ---------------------------------------------------------------------------------------------

def test_the_slides_are_drawn_from_the_results_and_need_no_network():
    page = (DOCS / "slides.html").read_text(encoding="utf-8")
    assert slides.erase_table() in page and slides.image((DOCS / "product_keys.svg").read_bytes()) in page
    assert page.count("<section>") == 5 and page.count("<img") == 4 and "http" not in page
