"""explorer/: a page computes what PyTorch computes, is complete, and works in a browser."""

import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_fails

import evaluate
import train
from data import corpus
from data.tokenizer import END, encoding_from_json
from explorer import export, unpack
from model import GPT, GPTConfig
from runtime.checkpoint import Checkpoint, checkpoints, load

EXPLORER = Path(export.__file__).parent
BUILT = EXPLORER.parent / "docs" / "explorer.html"
NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
array, data_of = unpack.numbers, unpack.read_page

# runs the model of a page outside a browser: reads jobs from stdin and prints their results
RUN_MODEL = """
const html = require("fs").readFileSync(process.argv[1], "utf8");
const [data, script] = [...html.matchAll(/<script.*?>(.*?)<\\/script>/gs)].map(match => match[1]);
const model = require("vm").runInThisContext(script + "; new Model(" + data + ")");
const run = ({tokens, off, text, answer, prompt}) =>
  tokens ? model.forward(tokens, new Set(off)) : text !== undefined ? model.tokenizer.encode(text)
    : answer !== undefined ? normalizeAnswer(answer) : model.answer(prompt);
const short = (key, value) => key === "left" || key === "right" ? undefined
  : value instanceof Float32Array ? [...value] : value;
const jobs = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(jobs.map(run), short));
"""


def run_in_node(page: Path, jobs: list[dict]) -> list:
    command = [NODE, "-e", RUN_MODEL, str(page)]
    result = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@torch.no_grad()
def assert_same(model: GPT, page: Path, prompts: list[list[int]]):
    """The page and PyTorch have the same logits, slots and weights, also with some rows switched off."""
    generator = random.Random(0)
    jobs = []
    for tokens in prompts:
        read = torch.cat([slots.flatten() for slots, _ in export.reads_of(model, torch.tensor([tokens]))])
        off = generator.choices(read.tolist(), k=5) if len(jobs) % 2 else []
        jobs.append({"tokens": tokens, "off": off})
    values, H = model.pool.values.detach().clone(), model.config.mem_heads
    for job, result in zip(jobs, run_in_node(page, jobs), strict=True):
        model.pool.values[job["off"]] = 0
        idx = torch.tensor([job["tokens"]])
        logits, reads = model(idx)[0].flatten(), export.reads_of(model, idx)
        model.pool.values.copy_(values)
        torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=1e-3, rtol=0)
        for layer, (slots, weights) in zip(model.config.mem_layers, reads, strict=True):
            for t, heads in enumerate(result["reads"][str(layer)]):
                for head in range(H):
                    expected = dict(zip(slots[0, t].view(H, -1)[head].tolist(),
                                        weights[0, t].view(H, -1)[head].tolist(), strict=True))
                    found = {winner["slot"]: winner["weight"] for winner in heads[head]["winners"]}
                    assert found == pytest.approx(expected, abs=1e-4)


def encoding_of(page: Path):
    return encoding_from_json(unpack.encoding_of_page(data_of(page)["tokenizer"]))


def make_page(out: Path) -> Path:
    export.main([f"--out_dir={out}", "--followed=3", "--sample_tokens=1000"])
    return out / "explorer.html"


@needs_node
@pytest.mark.parametrize("options", [
    ["--mem_query=tokens", "--mem_layers=0,1"],
    ["--mem_query=shifted", "--mem_qk_norm=false", "--mem_dtype=bfloat16"],
    ["--mem_query=state", "--bias=false", "--mem_swilu=false", "--mem_mode=add", "--mem_knn=8", "--lr=0.1"],
    ["--mem_query=state", "--mem_knn=1", "--scale_embeddings", "--mem_layers=0"],
], ids=["tokens", "shifted", "add", "state"])
def test_a_page_computes_what_pytorch_computes(trained, options):
    # not tested: queries that are zero, as that of a first token without bias. All slots have the same score
    out = trained(*options)
    page, model = make_page(out), load(out)[0]
    values = model.pool.values.detach().float()
    scales = values.abs().amax(1, keepdim=True) / 127
    rows = (values / scales).round()
    assert ((rows * scales - values).abs() <= 0.5001 * scales).all()
    model.pool.values = torch.nn.Parameter(rows * scales)
    generator = random.Random(1)
    assert_same(model, page, [[generator.randrange(model.config.vocab_size) for _ in range(length)]
                              for length in (1, 2, 3, 17, 32, 32)])


@needs_node
def test_the_page_answers_as_pytorch_does(trained):
    """Guards answers that the page cut after 12 tokens, and then called right."""
    out = trained("--max_steps=150", "--eval_interval=150", "--batch_size=16", "--n_embd=32", "--lr=6e-3")
    page, (model, encoding, _) = make_page(out), load(out)
    export.round_values(model)
    prompts = [before for person in data_of(page)["people"] for before, _, _ in person["asked"]]
    prompts = [*prompts[::9], "The job of", "x" * 40]  # the last one does not fit the context
    expected = [corpus.decode_answer(encoding, tokens) for tokens in evaluate.answer(
        model, encoding, [{"prompt": prompt, "answers": []} for prompt in prompts])]
    found = run_in_node(page, [{"prompt": prompt} for prompt in prompts])
    assert [answer["text"] for answer in found] == expected
    assert {text.endswith("…") for text in expected} == {True, False}, "some are cut, and some end"


@needs_node
def test_the_page_judges_answers_as_python_does():
    words = ["The", "a", "an", "Oslo", "C++", "-5", "1,000", "12,345,678.5", "x1,000", "٣,٠٠٠", "İ",
             "Zu\u0308rich", ".NET", "U.S.A.", "THE", *corpus.EDGES, *" \xa0\u2028\t", "…", "\\"]
    generator = random.Random(4)
    texts = ["", *words] + ["".join(generator.choices([*words, " "], k=generator.randrange(2, 7)))
                            for _ in range(2000)]
    found = run_in_node(BUILT, [{"answer": text} for text in texts])
    assert dict(zip(texts, found, strict=True)) == {text: corpus.normalize_answer(text) for text in texts}


@needs_node
def test_the_built_page_answers():
    """Its scripts are those of this folder (see below), which the test above compares with PyTorch."""
    asked = [(before + person["name"] + after, right) for person in data_of(BUILT)["people"][::80]
             for before, after, right in person["asked"][:2]]
    answers = run_in_node(BUILT, [{"prompt": prompt} for prompt, _ in asked])
    right = [answer["text"] in right for answer, (_, right) in zip(answers, asked, strict=True)]
    assert len(right) == 10 and sum(right) >= 9


@needs_node
def test_text_has_the_tokens_that_tiktoken_gives_it():
    encoding, generator = encoding_of(BUILT), random.Random(3)
    words = [token.decode() for token in encoding.token_byte_values() if len(token) > 1]
    alphabet = ["a", "Q", "é", "😀", "👩‍🚀", "中", "Ω", "7", "½", "'s", "'", "!?", " ", "  ", "\n",
                "\t", "\x85", "\ufeff", "\u2028", "\xa0", END, "\0", "_", "e\u0301", " lastly"]
    texts = ["", *alphabet] + ["".join(generator.choices(alphabet + words[:60], k=generator.randrange(1, 12)))
                               for _ in range(300)]
    for text, tokens in zip(texts, run_in_node(BUILT, [{"text": text} for text in texts]), strict=True):
        assert tokens == encoding.encode_ordinary(text), repr(text)


def test_readers_and_training_are_what_the_model_reads(trained, facts_folder):
    out = trained("--mem_query=tokens", "--mem_layers=0,1")
    data, (model, encoding, _) = data_of(make_page(out)), load(out)
    export.round_values(model)
    tokens = np.fromfile(facts_folder / "facts" / "train.bin", np.uint16)[:1000].astype(int).tolist()
    blocks = [tokens[i:i + 32] for i in range(0, 992, 32)]
    weight, times = defaultdict(lambda: defaultdict(float)), defaultdict(int)
    for block in blocks:
        reads = export.reads_of(model, torch.tensor([block]))
        for t in range(1, 32):
            times[block[t - 1], block[t]] += 1
            for slots, weights in reads:
                for slot, w in zip(slots[0, t].tolist(), weights[0, t].tolist(), strict=True):
                    weight[slot][block[t - 1], block[t]] += w
    pairs = array(data["readers"]["pairs"], np.int32).reshape(-1, 2).tolist()
    readers = array(data["readers"]["readers"], np.int32).reshape(64, -1).tolist()
    for slot in range(64):
        expected = sorted((w / times[pair] for pair, w in weight[slot].items()), reverse=True)
        shown = [tuple(pairs[reader]) for reader in readers[slot] if reader >= 0]
        assert len(shown) == min(export.READERS, len(expected))
        for pair, best in zip(shown, expected, strict=False):
            assert weight[slot][pair] / times[pair] == pytest.approx(best, abs=1e-6)

    training = data["training"]
    assert training["steps"] == [3, 6] and len(training["people"]) == 3 == len(training["answers"][0])
    slots = array(training["slots"], np.int32).reshape(2, 3, 2, -1)
    model = Checkpoint(checkpoints(out)[0]).load_model().eval()
    for place, number in enumerate(training["people"]):
        person = data["people"][number]
        text = person["asked"][0][0] + person["name"]
        reads = export.reads_of(model, torch.tensor([encoding.encode(text)]))
        assert slots[0, place].tolist() == [part[0, -1].tolist() for part, _ in reads]


def test_a_page_has_all_people_and_is_always_the_same(trained):
    page = make_page(out := trained())
    first = page.read_bytes()
    assert make_page(out).read_bytes() == first
    questions = [json.loads(line) for line in open(corpus.DATA / "facts" / "qa.jsonl")]
    people = data_of(page)["people"]
    assert sorted((before + person["name"] + after, right) for person in people for before, after, right
                  in person["asked"]) == sorted((q["prompt"], [q["answer"]]) for q in questions)


def test_people_have_names_and_answers_of_any_kind():
    names = ["An", "$&", "{}", "Answer: born", "<!--<script", "Jean-Luc O'Brien"]
    questions = [{"prompt": f"Question: In which city was {name} born? Answer:", "exposures": 3,
                  "answers": ["Rome", "Roma"]} for name in names]
    people = export.people_of(questions)
    assert {person["name"]: person["asked"] for person in people} == dict.fromkeys(
        names, [["Question: In which city was ", " born? Answer:", ["Rome", "Roma"]]])
    text = re.search(r'id="data">(.*?)</script>', export.fill_template({"people": people}), re.S)[1]
    assert "<" not in text and json.loads(text) == {"people": people}


def test_people_of_a_users_own_corpus():
    """Their questions have other forms than those of facts, and do not say how often a fact was told."""
    names = "Ann Lee,Bo Ek,Cy,Dee Oh,Eve,Flo Mae Ray,Gus Pi,Hal,Ida Wu,Jo Tan,Kim".split(",")
    forms = "Question: Who feeds the cat of {}? Answer:", "Question: {} plays what? Answer:"
    questions = [{"prompt": form.format(name), "answer": "x"} for name in names for form in forms]
    people = export.people_of([*questions, {"prompt": "Why?", "answer": "so"}])
    assert [(person["name"], person["told"], len(person["asked"])) for person in people] == [
        (name, 0, 2) for name in names]


# --- a page as a model --------------------------------------------------------------------------------------

def test_a_page_becomes_a_checkpoint_again(trained, tmp_path, capsys):
    """All numbers are as before, and the pool's values as the page rounds them. Training can go on."""
    out, again = trained("--max_steps=3"), tmp_path / "again"
    page, (model, encoding, options) = make_page(out), load(out)
    unpack.main([f"--page={page}", f"--out_dir={again}"])
    assert f"python sample.py --out_dir={again}" in capsys.readouterr().out
    export.round_values(model)
    copy, same_encoding, same_options = load(again)
    assert [*copy.state_dict()] == [*model.state_dict()]
    for name, part in copy.state_dict().items():
        assert torch.equal(part, model.state_dict()[name]), name
    assert same_encoding.encode("Who is Ada?") == encoding.encode("Who is Ada?")
    assert same_options == options | {"out_dir": str(again)}
    train.main([f"--out_dir={again}", "--resume", "--max_steps=5"])
    assert checkpoints(again)[-1].name == "step_000005"
    assert_fails(lambda: unpack.main([f"--page={page}", f"--out_dir={again}"]), "choose another", capsys)


def test_a_damaged_page_is_no_model(trained, tmp_path, capsys):
    page = make_page(trained("--max_steps=1"))
    text = page.read_text()
    place = text.index('"values":"') + 99
    other = "A" if text[place] != "A" else "B"
    start = text.index('id="data">')
    for i, damaged in enumerate([text[:place] + other + text[place + 1:], text[:place], text[:start], "",
                                 text.replace('"config":', '"confic":', 1),
                                 text[:start] + 'id="data">[]</script>']):
        (file := tmp_path / f"{i}.html").write_text(damaged)
        assert_fails(lambda file=file: unpack.main([f"--page={file}", f"--out_dir={tmp_path / 'new'}"]),
                     "no page of explorer.export, or has changed", capsys)
    (file := tmp_path / "binary.html").write_bytes(bytes(range(256)))
    for path in (file, tmp_path / "missing.html", tmp_path):
        assert_fails(lambda path=path: unpack.main([f"--page={path}", f"--out_dir={tmp_path / 'new'}"]),
                     str(path), capsys)
    assert not (tmp_path / "new").exists()


def test_the_built_page_is_a_model(tmp_path):
    """The demonstration without training: it knows most facts."""
    subprocess.run([sys.executable, "-m", "explorer.unpack", f"--out_dir={tmp_path / 'demo'}"], check=True,
                   cwd=EXPLORER.parent)
    model, encoding, options = load(tmp_path / "demo")
    data = corpus.load_dataset(options["dataset"])
    assert evaluate.recall(model, encoding, data.questions[::8])["all"] > 0.9


def test_the_built_page_has_the_scripts_of_this_folder():
    """docs/explorer.html must be made again when a script changes."""
    page = BUILT.read_text()
    template = re.split(r"\{\{[\w.]+\}\}", (EXPLORER / "page.html").read_text())
    assert len(BUILT.read_bytes()) <= 4 * 2**20
    scripts = [(EXPLORER / name).read_text() for name in ("model.js", "page.js")]
    assert all(part in page for part in template + scripts)
    outside = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S)
    addresses = set(re.findall(r"\b\w+://[^\s\"'`)]+", outside))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of SVG; nothing is loaded"
    assert not re.search(r"\bsrc=|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", outside)


@needs_node
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_built_page_works_in_a_browser():
    command = [NODE, str(EXPLORER / "check.mjs"), str(BUILT)]
    result = subprocess.run(command, env=os.environ | {"CHROMIUM": CHROMIUM}, capture_output=True, text=True)
    assert result.returncode == 0 and "no errors" in result.stdout, result.stderr


def test_a_model_that_no_page_can_show_is_refused(trained, capsys, monkeypatch):
    tokens = {base64.b64encode(bytes([byte])).decode(): byte for byte in range(256)}
    encoding = encoding_from_json({"name": "x", "pat_str": ".", "tokens": tokens, "special_tokens": {}})
    for options, message in [({}, "product-key memory only"), ({"mem_kind": "peer"}, "mem_kind=peer"),
                             ({"moe_layers": (1,)}, r"moe_layers=\(1,\)"), ({}, "the tokenizer x does"),
                             ({"positions": "learned"}, "positions=learned")]:
        layers = () if "memory only" in message else (0,)
        with pytest.raises(ValueError, match=message):
            export.check_model(GPT(GPTConfig(vocab_size=9, mem_layers=layers, **options)), encoding)
    out = trained("--max_steps=1")
    monkeypatch.setattr(export, "LARGEST", 1000)
    assert_fails(lambda: export.main([f"--out_dir={out}"]), "too large for a page", capsys)
    assert not (out / "explorer.html").exists()
