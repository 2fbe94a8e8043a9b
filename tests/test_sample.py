"""sample.py: it needs nothing but a checkpoint, asks, continues, traces, and names each mistake."""

import json
import os
import re

import pytest
import torch
from conftest import assert_fails

import sample
from data import corpus, prepare
from evaluate import record_reads
from experiments.facts_edited import name_in
from model import GPT
from runtime import checkpoint
from runtime.checkpoint import load


def printed(capsys, *options) -> str:
    capsys.readouterr()
    sample.main([*options, "--device=cpu"])
    return capsys.readouterr().out


def test_text_needs_the_checkpoint_only(trained, capsys, monkeypatch, tmp_path):
    out = trained()
    monkeypatch.setattr(corpus, "DATA", tmp_path / "nothing")
    options = [f"--out_dir={out}", "--prompt=The job of", "--num_samples=2", "--max_new_tokens=5"]
    text = printed(capsys, *options)
    assert text.count("The job of") == 2 and "--- sample 2 of 2" in text and "slots" not in text
    assert printed(capsys, *options) == text and printed(capsys, *options, "--seed=9") != text
    assert "--- sample 1" in printed(capsys, options[0], "--prompt=<|fim_prefix|>", "--max_new_tokens=2")


def test_questions_are_judged_as_training_judged_them(trained, capsys, facts_folder):
    out = trained("--max_steps=150", "--eval_interval=150", "--batch_size=16", "--n_embd=32", "--lr=6e-3")
    questions = [json.loads(line) for line in open(facts_folder / "facts" / "qa.jsonl")]
    text = printed(capsys, f"--out_dir={out}", f"--questions={len(questions)}")
    right = int(re.search(rf"(\d+) of {len(questions)} right", text).group(1))
    assert right == text.count("[right, told") and len(questions) - right == text.count("[wrong: ")
    shares = [json.loads(line) for line in open(out / "log.jsonl")][-1]["recall"]
    held_out = sum(question["held_out"] for question in questions)
    assert right == round(shares["all"] * (len(questions) - held_out) + shares["held_out"] * held_out)
    text = printed(capsys, f"--out_dir={out}", f"--qa={facts_folder / 'facts' / 'qa.jsonl'}")
    assert f"{right} of {len(questions)} right" in text
    rows = dict(re.findall(r"^ *(.*?)  +(\d\.\d{3})  \d\.\d{3}$", text, re.MULTILINE))
    bins = {f"told {low} to {2 * int(low) - 1} times": share for low, share in shares["by_exposure"].items()}
    bins["asked about in training"] = shares["all"]
    bins["never asked about in training"] = shares["held_out"]
    assert rows == {label: f"{share:.3f}" for label, share in bins.items()}


@pytest.mark.parametrize("kind", ["product-key", "peer"])  # PEER has negative weights
def test_trace_shows_what_each_layer_read(trained, capsys, kind):
    out = trained("--mem_layers=1,0", f"--mem_kind={kind}")
    text = printed(capsys, f"--out_dir={out}", "--prompt=The job of", "--max_new_tokens=3", "--trace")
    model, encoding, _ = load(out)
    with record_reads(model.pool) as reads:
        model(torch.tensor([encoding.encode("The job of")]))
    lines = [line for line in text.splitlines() if "slots" in line]
    prompt = len(reads[0][0])
    assert len(lines) % 2 == 0 and 2 * prompt <= len(lines) <= 2 * (prompt + 2), "the last token is not read"
    for i, line in enumerate(lines[:2 * prompt]):
        layer, row = i % 2, i // 2
        indices, weights = (part[row] for part in reads[layer])
        use = torch.zeros(64).index_add_(0, indices, weights.abs()) / weights.abs().sum()
        shown = re.findall(r"(\d+) +(\d+)%", line.split("slots")[1])
        assert f"layer  {layer}" in line and len(shown) == 4
        assert [round(float(use[int(slot)]) * 100) for slot, _ in shown] == [int(part) for _, part in shown]
        assert int(shown[0][0]) == use.argmax()
    text = printed(capsys, f"--out_dir={out}", "--prompt=" + " job of" * 20, "--max_new_tokens=1", "--trace")
    labels = [line.split(" layer")[0].strip() for line in text.splitlines() if "layer  0," in line]
    assert labels == 16 * ["' job'", "' of'"], "only the last tokens fit into the context"


def asked(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Question: ")]


def test_questions_of_a_file_about_a_name_and_of_the_user(trained, capsys, facts_folder, tmp_path):
    here = f"--out_dir={trained()}"
    path = facts_folder / "facts" / "qa.jsonl"
    questions = [json.loads(line) for line in open(path)]
    every = printed(capsys, here, f"--qa={path}")
    assert [line.split(" Answer:")[0] for line in asked(every)] == [
        question["prompt"].removesuffix(" Answer:") for question in questions], "in the order of the file"
    first = questions[0]
    name = name_in(first)
    about = printed(capsys, here, f"--ask={name.lower()}")
    assert asked(about) == [line for line in asked(every) if name in line] and " of 4 right" in about
    bare = first["prompt"].removeprefix("Question: ").removesuffix(" Answer:")
    for text in (bare, first["prompt"], bare.lower().removesuffix("?")):
        line, = asked(printed(capsys, here, f"--question={text}"))
        assert line.startswith(first["prompt"]) and f"wrong: {first['answer']}, told" in line
    stranger = name.split()[0] + " Ada"  # half of the name is known
    for text, unknown in ((f"Was {name} old", []), (f"Is {stranger} old?", [stranger])):
        text = printed(capsys, here, f"--question={text}")
        assert "[not in qa.jsonl, so not checked]\n" in text and "right" not in text
        assert re.findall("^the training text does not have the name (.*)", text, re.MULTILINE) == unknown
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "Q: x? A:", "answers": ["a", "b"], "held_out": true, "exposures": 1}\n'
                    '{"prompt": "Q: y? A:", "answer": "a", "kind": "letter", "exposures": 1}\n')
    text = printed(capsys, here, f"--qa={mine}")
    assert re.search(r"Q: x\? A: .*\[wrong: a or b, told once, never asked in training]", text)
    assert "0 of 2 right, 0.0%" in text and "kind: letter                       0.000  1.000\n" in text
    assert "never asked about in training      0.000  1.000" in text and "  told once  " in text
    own = {"prompt": "Question: Where?", "answer": "Porto"}
    assert sample.verdict(own, "Answer: Porto") == 'wrong: Porto, its prompt lacks " Answer:" at the end'
    assert sample.share_rows([own], ["Porto"]) == {"all questions": 1.0}


def test_each_token_is_printed_when_it_is_there(trained, monkeypatch):
    """Guards characters of several tokens: half of one must not be printed as a question mark."""
    model, encoding, _ = load(trained())
    text = "Zürich 東京 \U0001f600"
    tokens = [*encoding.encode(text), encoding.n_vocab + 5, 0xE6, 0xFF]  # the last two are no characters
    shown = []

    def generate(idx, stop, on_token):
        for i, token in enumerate(tokens):
            on_token(torch.tensor([[token]]))
            so_far = "".join(shown)
            assert ("x" + sample.decode(encoding, tokens)).startswith(so_far)
            assert len("x" + sample.decode(encoding, tokens[:i + 1])) - len(so_far) in (0, 1), "no delay"
        return torch.cat((idx, torch.tensor([tokens])), dim=1)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr("builtins.print", lambda text, end="\n", flush=False: shown.append(text + end))
    sample.continue_text(model, encoding, "x")
    assert "".join(shown) == "x" + sample.decode(encoding, tokens) + "\n"
    assert len(shown) > len(tokens)


def test_a_corpus_does_not_command_the_terminal(trained, capsys, tmp_path, monkeypatch):
    """Here the model answers and continues with ESC, as its corpus does; file and prompt have it, too."""
    here = f"--out_dir={(out := trained())}"
    escape, = load(out)[1].encode("\x1b")

    def generate(model, idx, *arguments, on_token=None, **options):
        model(idx)
        token = torch.full((len(idx), 1), escape)
        if on_token:
            on_token(token)
        return torch.cat((idx, token), dim=1)

    monkeypatch.setattr(GPT, "generate", generate)
    questions = tmp_path / "qa.jsonl"
    questions.write_text(json.dumps({"prompt": "a\x1b", "answer": "b\x1b", "kind": "c\x1b"}))
    for option, signs in ((f"--qa={questions}", 4), ("--prompt=a\x1b", 2)):
        for trace in (False, True):
            text = printed(capsys, here, option, f"--trace={trace}")
            assert "\x1b" not in text and text.count("␛") == signs and ("slots" in text) == trace, text


def test_of_several_runs_the_newest_is_used(trained, capsys, tmp_path):
    """Without other options it asks questions, and judges them."""
    for name, age, options in (("old", 1, ["--max_steps=1"]), ("new", 2, ["--mem_layers="])):
        for folder in trained(*options, out=tmp_path / name).glob("step_*"):
            os.utime(folder, (age, age))
    text = printed(capsys, f"--out_dir={tmp_path}")
    assert f"the newest of 2 runs in {tmp_path}; --out_dir={tmp_path}/NAME takes another:" in text
    assert "new/step_000006" in text
    assert text.count("Question: ") == 5 and "slots" not in text
    os.utime(tmp_path / "new" / "step_000006", (0, 0))
    text = printed(capsys, f"--out_dir={tmp_path}", "--questions=2")
    assert "old/step_000001" in text and text.count("Question: ") == 2
    missing = f"--out_dir={tmp_path / 'old' / 'step_000009'}"
    assert_fails(lambda: sample.main([missing]), "no checkpoint in", capsys)


def test_mistakes_are_one_line_and_status_2(trained, capsys, tmp_path, monkeypatch):
    here = f"--out_dir={trained('--mem_layers=')}"
    for options, message in [
        ([f"--out_dir={tmp_path / 'nowhere'}"], "no checkpoint in"),
        ([here, "--trace"], "no memory layers"),
        ([here, "--questions=1", "--prompt=x"], "choose one"),
        ([here, "--questions=1", "--temperature=0.5"], "--temperature has no effect with --questions"),
        ([here, "--questions=0"], "--questions=0 must be at least 1"),
        ([here, "--question="], "name a question: --question="),
        ([here, "--qa=nowhere"], "--qa=nowhere: no such file"),
        ([here, "--question=" + "x " * 40], "more than block_size=32"),
    ]:
        assert_fails(lambda options=options: sample.main(options), message, capsys)
    monkeypatch.setattr(checkpoint, "WORLD_SIZE", 2)
    assert_fails(lambda: sample.main([here, "--prompt=x"]), "start this program without torchrun", capsys)


def test_questions_of_a_corpus_made_again_are_refused(trained, capsys, facts_folder, tmp_path, monkeypatch):
    """Other people have the same tokens, so all answers would seem wrong."""
    here = f"--out_dir={trained('--max_steps=1')}"
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    prepare.main(["facts", "--people=9"])
    for option in ("--questions=1", "--question=Who is Ann?"):
        assert_fails(lambda option=option: sample.main([here, option]), "different tokenizers", capsys)
