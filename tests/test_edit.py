"""edit.py: the method against plain counts and gradients, and the commands on a small trained model."""

import contextlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import assert_fails, tensors

import edit
import sample
import train
from data import corpus, prepare
from data.corpus import QUESTION
from data.facts import ATTRIBUTES, facts_text
from experiments.facts_edited import by_person, name_in, share_right
from runtime.checkpoint import find_trained, load


@pytest.fixture
def untrained(trained):
    """A tiny model that knows nothing: model, encoding, corpus."""
    model, encoding, config = load(trained("--max_steps=1"))
    return model, encoding, corpus.load_dataset(config["dataset"])


def recorded(model, tokens):
    """All slots that one pass over these tokens reads, (tokens, slots), recorded without edit.py."""
    reads = []
    forward = model.pool.forward
    model.pool.forward = lambda indices, weights: reads.append(indices) or forward(indices, weights)
    with torch.no_grad():
        model(torch.tensor([tokens]))
    del model.pool.forward
    return torch.cat(reads, dim=1).tolist()


def test_the_batch_has_the_tokens_that_the_model_would_see(untrained):
    _, encoding, _ = untrained
    prompts, answers = ["Question: What? Answer:", "", "The"], [" a b", "The job of x is y.", " job"]
    x, y = edit.make_batch(encoding, prompts, answers)
    for row_x, row_y, prompt, text in zip(x.tolist(), y.tolist(), prompts, answers, strict=True):
        tokens, length = encoding.encode(prompt + text), len(encoding.encode(prompt))
        assert row_x[:len(tokens) - 1] == tokens[:-1]
        expected = [token if i >= length else -1 for i, token in enumerate(tokens)][1:]
        assert row_y == expected + [-1] * (len(row_y) - len(expected))


def test_tf_idf_is_a_count(untrained, monkeypatch):
    """
    Against counts in plain Python, of each text alone, without a batch and without padding. One text is not
    taken for many: single letters would be the texts.
    """
    model, encoding, data = untrained
    texts = ["The job of Ann Lee is that of a baker.", "What?", data.questions[0]["prompt"]]
    counts = Counter(slot for text in texts for slots in recorded(model, encoding.encode(text))
                     for slot in slots)  # the last token of a text is read, its newline is not
    count, df, pieces = 70, Counter(), []
    draw = edit.draw_batch
    monkeypatch.setattr(edit, "draw_batch", lambda *key: pieces.append(draw(*key)) or pieces[-1])
    idf = edit.inverse_document_frequency(model, data.train, count)
    pieces = [row for x, _ in pieces for row in x.tolist()]
    assert len(pieces) == count and {len(piece) for piece in pieces} == {edit.PIECE}
    for piece in pieces:
        df.update({slot for slots in recorded(model, piece) for slot in slots})
    expected = [counts[slot] / counts.total() * math.log((count + 1) / (df[slot] + 1))
                for slot in range(model.pool.num_values)]
    x, y = edit.text_batch(encoding, texts)
    scores = edit.tf_idf(model, x, y >= 0, idf)
    torch.testing.assert_close(scores, torch.tensor(expected))
    best = edit.top_slots(scores, 10)
    assert len(best) == 10 and scores[best].min() >= scores.sort(descending=True).values[9] > 0
    assert sorted(edit.top_slots(scores, 10**6).tolist()) == (scores > 0).nonzero()[:, 0].tolist()
    with pytest.raises(ValueError, match="a list of texts"):
        edit.text_batch(encoding, "The job")


def test_a_slot_that_is_left_out_is_an_empty_slot(untrained):
    model, encoding, data = untrained
    x, y = edit.question_batch(model, encoding, data.questions[0])
    before, known = model.pool.values.detach().clone(), edit.log_probability(model, x, y)
    slots = torch.tensor(recorded(model, x[0].tolist())).flatten().unique()
    parts = [slots[:1], slots[:0], slots[1:9], slots]
    lost = edit.losses_without(model, x, y, parts)  # a batch of 4 rows: equal to a batch of 1 to rounding
    for part, loss in zip(parts, lost, strict=True):
        edit.erase(model, part)
        torch.testing.assert_close(known - edit.log_probability(model, x, y), loss[None], atol=1e-5, rtol=0)
        assert part.numel() or torch.equal(model.pool.values, before), "erasing nothing changes nothing"
        with torch.no_grad():
            model.pool.values.copy_(before)
    assert torch.equal(edit.log_probability(model, x, y), known), "the hook is gone"
    found = edit.find(model, x, y)
    assert sorted(found["slots"].tolist()) == slots.tolist()
    alone = edit.losses_without(model, x, y, found["slots"].split(1))
    torch.testing.assert_close(alone, alone.sort(descending=True).values, atol=1e-5, rtol=0)
    assert found["top"][len(slots)] == pytest.approx(lost[3].item(), abs=1e-5)
    token = recorded(model, x[0].tolist())[3]  # this model has one memory layer
    assert found["places"][3].item() == pytest.approx(
        edit.losses_without(model, x, y, [torch.tensor(token)]).item(), abs=1e-5)


def test_only_the_chosen_rows_learn(untrained):
    model, encoding, data = untrained
    statements = ["The job of Ann Lee is that of a baker.", "Ann Lee bakes."]
    before = {name: part.clone() for name, part in model.state_dict().items()}
    values, old = model.pool.values, model.pool.values.detach().clone()
    x, y = edit.text_batch(encoding, statements)
    assert all(row[row >= 0][-1] == encoding.encode("\n")[0] for row in y)
    model(x, y)[1].backward()
    gradient = values.grad.to_dense()  # of all slots. teach must not use what is left here
    idf = edit.inverse_document_frequency(model, data.train, 20)
    with torch.no_grad():
        chosen = edit.teach(model, x, y, idf, slots=9, steps=1, lr=0.5)
    model.zero_grad()
    assert len(chosen) == 9 and gradient[chosen].any(1).all()
    expected = old.clone()
    expected[chosen] -= 0.5 * gradient[chosen]
    torch.testing.assert_close(values.detach(), expected)
    with torch.no_grad():
        values.copy_(old)
    at = torch.zeros_like(x, dtype=torch.bool)
    at[0, 3:5] = True
    chosen = edit.teach(model, x, y, idf, slots=9, steps=1, lr=0.5, at=at)
    there = edit.read_slots(model, x)[at].unique()
    assert set(chosen.tolist()) <= set(there.tolist()) and torch.equal((values != old).any(1).nonzero()[:, 0],
                                                                      chosen.sort().values)
    with torch.no_grad():
        values.copy_(old)
    chosen = edit.teach(model, x, y, idf, slots=9, steps=5, lr=0.5)
    rest = torch.ones(len(values), dtype=torch.bool)
    rest[chosen] = False
    assert torch.equal(values[rest], old[rest]) and not (values[chosen] == old[chosen]).all(1).any()
    for name, part in model.state_dict().items():
        assert name == "pool.values" or torch.equal(part, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_of_several_right_answers_the_one_that_the_model_gives_counts(untrained, monkeypatch):
    model, encoding, data = untrained
    question = {"prompt": data.questions[0]["prompt"], "answers": ["Oslo", "Rome"]}
    for given, counts in (("Rome", "Rome"), ("rome", "rome"), ("Paris", "Oslo"), ("Oslo", "Oslo")):
        monkeypatch.setattr(edit, "answer", lambda *_, given=given: [encoding.encode(f" {given}\n")])
        _, y = edit.question_batch(model, encoding, question)
        assert y[y >= 0].tolist() == encoding.encode(f" {counts}")


def learn_four(trained, options):
    """Teaches four sentences that only the memory can know: the other parameters never saw them."""
    model, encoding, config = load(trained("--max_steps=1", "--mem_layers=0,1", "--mem_num_keys=32",
                                           "--n_embd=64", options))
    data = corpus.load_dataset(config["dataset"])
    names = sorted(by_person(data.questions))[::3][:4]
    words = sorted({question["answer"] for question in data.questions
                    if len(encoding.encode(" " + question["answer"])) == 1})
    data.questions = [{"prompt": f" {name}", "answer": word}
                      for name, word in zip(names, words, strict=False)]
    assert share_right(model, encoding, data.questions) == 0
    idf = edit.inverse_document_frequency(model, data.train, 200)

    def learn(questions):
        statements = [f"{question['prompt']} {question['answer']}" for question in questions]
        edit.teach(model, *edit.text_batch(encoding, statements), idf, slots=1024, steps=150, lr=300.0)
    learn(data.questions)
    assert share_right(model, encoding, data.questions) == 1
    return model, encoding, data, idf, learn


@pytest.mark.parametrize("options", ["--mem_query=tokens", "--mem_query=state", "--mem_kind=hash"])
def test_what_was_taught_can_be_erased(trained, options):
    model, encoding, data, idf, _ = learn_four(trained, options)
    questions = data.questions
    taught = model.pool.values.detach().clone()
    for question in questions:
        others = [other for other in questions if other is not question]
        about = edit.about_batches(model, encoding, [question], [question["prompt"]] * 8)
        slots = edit.choose_slots(model, *about, idf)
        edit.erase(model, slots)
        assert share_right(model, encoding, [question]) == 0 and share_right(model, encoding, others) == 1
        with torch.no_grad():
            model.pool.values.copy_(taught)


def test_what_was_erased_is_remembered_and_erased_again(trained, capsys):
    """What comes back is a line of its own, and no improvement of others."""
    model, encoding, data, _, learn = learn_four(trained, "--mem_query=tokens")
    names, erased = [question["prompt"].strip() for question in data.questions], []
    given = model, encoding, data, lambda: 0.0, erased
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="nothing was forgotten"):
        patch.setattr(edit, "erase", lambda model, slots: slots)
        edit.erase_answers(*given, tuple(names[:2]), "", 0)
    capsys.readouterr()
    edit.erase_answers(*given, tuple(names[:2]), "", 0)
    text = capsys.readouterr().out
    assert all(f"erasing what is known about {name} (questions: 1)" in text for name in names[:2])
    assert "answers about others: 2 of 2 right before, 2 after" in text and "erased before" not in text
    assert "these answers: 2 of 2 right before, 0 after" in text.splitlines()[-2:]  # then how near they are
    assert [(old["name"], old["answers"]) for old in erased] == [
        (name, [question["answer"]]) for name, question in zip(names[:2], data.questions, strict=False)]
    learn(data.questions[:1])
    edit.erase_answers(*given, (names[2],), "", 0)
    text = capsys.readouterr().out
    assert f"answers erased before, about {names[0]}, {names[1]}: 1 of 2 right before, 0 after" in text
    assert f"came back, and is erased again: {names[0]}\n" in text
    assert "these answers: 1 of 1 right before, 0 after" in text
    assert "answers about others: 1 of 1 right before, 1 after" in text and len(erased) == 3
    assert share_right(model, encoding, data.questions) == 0.25
    edit.erase_answers(*given, (names[0],), "", 0)
    assert "these answers: 0 of 1 right before, 0 after" in capsys.readouterr().out and len(erased) == 3


def test_whom_a_question_is_about():
    names = ["Jean-Luc", "Ludwig van Beethoven", "Sean O'Brien", "Port-au-Prince", "Jean-Luc Picard",
             "Ada Lovelace", "Ludwig Wittgenstein", "Alan Turing", "Emmy Noether", "Grace Hopper",
             "Kurt Gödel", "Marie Curie"]
    for forms in (["Where was {} born?", "In which city was {} born?", "Who is {}?"], ["{} is who?"]):
        questions = {QUESTION.format(form.format(name)): name for name in names for form in forms}
        corpus_questions = [{"prompt": prompt} for prompt in questions]
        for prompt, name in questions.items():
            assert corpus.find_name({"prompt": prompt}, corpus_questions) == name
        unknown = {"prompt": QUESTION.format(forms[0].format("Zoe of Ys"))}
        assert corpus.find_name(unknown, corpus_questions) == "Zoe of Ys"
    first, last = ["Ada", "Bob", "Cid"], [f"L{i}" for i in range(40)]
    namesakes = [{"prompt": f"Who is {a} {b}?"} for a in first for b in last]
    assert corpus.find_name(namesakes[0], namesakes) is None, "the first name could be a word of the form"
    assert corpus.find_name(namesakes[0], namesakes[:1]) is None


@pytest.mark.parametrize("people", [2, 3, 4, 5, 6, 8, 12])
def test_a_clause_is_no_name_where_few_people_are_asked_about(people):
    _, questions, _ = facts_text(people, 2, 0, 0.5, 0, 0, seed=1)
    for question in questions:
        assert corpus.find_name(question, questions) in (None, name_in(question))


@pytest.mark.slow
def test_the_demonstration_forgets_a_person_and_learns_another(tmp_path, monkeypatch):
    """Two minutes: the model of `make train`. Others keep 0.99 of what they knew."""
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    prepare.main(["facts"])
    train.main([f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--eval_interval=700"])
    model, encoding, config = load(tmp_path / "out")
    data = corpus.load_dataset(config["dataset"])
    idf = edit.inverse_document_frequency(model, data.train)
    values = model.pool.values
    start, gone, stayed = values.detach().clone(), [], []
    rarely_told = [name for name, about in by_person(data.questions).items() if about[0]["exposures"] < 64]
    for name in rarely_told[:10]:
        about = by_person(data.questions)[name]
        others = [question for question in data.questions if question not in about]
        known = share_right(model, encoding, others)
        batches = edit.about_batches(model, encoding, about, edit.lines_with(name, data))
        slots = edit.choose_slots(model, *batches, idf)
        edit.erase(model, slots)
        gone.append(share_right(model, encoding, about))
        stayed.append(share_right(model, encoding, others) / known)
        with torch.no_grad():
            values.copy_(start)
    assert sum(gone) / 10 <= 0.1 and min(stayed) >= 0.99, (gone, stayed)

    names = [name.split() for name in by_person(data.questions)]
    name = next(f"{first} {last}" for first, _ in names for _, last in names if [first, last] not in names)
    told, asked = [], []
    for options, statements, questions in ATTRIBUTES.values():
        told += [form.format(name, options[3]) for form in statements]
        asked += [{"prompt": QUESTION.format(form.format(name)), "answer": options[3]} for form in questions]
    before = share_right(model, encoding, data.questions)
    assert share_right(model, encoding, asked) <= 0.25
    edit.teach(model, *edit.text_batch(encoding, told), idf)
    assert share_right(model, encoding, asked) >= 0.75, "in words that no statement has"
    assert share_right(model, encoding, data.questions) >= 0.99 * before


def test_edited_checkpoints_are_new_and_complete(trained, capsys, tmp_path, monkeypatch):
    """Guards the old checkpoint: its files are mapped into memory, and must not change with the model."""
    out = trained("--mem_layers=0,1", "--mem_num_keys=32", "--n_embd=64", "--mem_query=tokens",
                  "--value_lr=0.3")
    old, here = find_trained(out).folder, f"--out_dir={out}"
    files = {path: path.read_bytes() for path in old.iterdir()}
    question = json.loads(open(corpus.DATA / "facts" / "qa.jsonl").readline())["prompt"]
    name = name_in({"prompt": question})
    edit.main(["find", here, f"--question={question}"])
    text = capsys.readouterr().out
    assert question in text and "slots with most effect" in text and "layer 1" in text
    edit.main(["erase", here, f"--ask={name.lower()}", "--dry_run"])
    text = capsys.readouterr().out
    assert not (tmp_path / "out-erase").exists() and text.count(" -> ") == 4
    assert f"erasing what is known about {name.lower()} (questions: 4)" in text
    monkeypatch.setattr(edit, "is_gone", lambda *_: False)
    edit.main(["erase", here, f"--question={question}", f"--ask={name}", "--slots=7"])
    text = capsys.readouterr().out
    assert "changed 7 of 1,024 slots" in text and text.count(" -> ") == 1 and " of 3 right before" in text
    *_, outcome, left, _ = text.splitlines()
    assert outcome.startswith("these answers: ") and left == (
        "in 1 of 1 the right word is still more than a tenth as likely as the likeliest")
    erased = load(tmp_path / "out-erase")[0].pool.values
    changed = (erased != load(out)[0].pool.values).any(1)
    assert changed.sum() == 7 and not erased[changed].any()
    (remembered,) = find_trained(tmp_path / "out-erase").meta["erased"]
    assert (remembered["name"], remembered["prompt"]) == (name, question)
    edit.main(["erase", here, f"--question=was {name.lower()} here", "--dry_run"])
    assert f"erasing what is known about {name} (questions: 1)" in capsys.readouterr().out
    edit.main(["teach", f"--out_dir={tmp_path / 'out-erase'}", "--statement=x", "--steps=1", "--slots=1"])
    assert f"answers erased before, about {name}: 0 of 1 right before, 0 after" in capsys.readouterr().out
    assert find_trained(tmp_path / "out-erase-teach").meta["erased"] == [remembered]

    taught = tmp_path / "taught" / "run"
    (tmp_path / "new.txt").write_text("The job of Ann Lee is that of a baker.\n\nAnn Lee bakes.\n")
    edit.main(["teach", here, f"--file={tmp_path / 'new.txt'}", "--statement", "One.", f"{name} weaver",
               "--slots=400", "--lr=300", "--question", "Who bakes?", f"--save_to={taught}"])
    text = capsys.readouterr().out
    warning, names = text.split("changed 400 of 1,024 slots")[0].split("may not be learnt. These have two: ")
    assert "new to the corpus: One (4 tokens), Ann Lee (8 tokens), " in warning
    encoding, prompts = load(out)[1], (corpus.DATA / "facts" / "qa.jsonl").read_text()
    for new in names.strip().split(", "):
        assert len(encoding.encode(f" {new}")) == 2 and new not in prompts
    assert "old answers with the same names: 0 of 4" in text and "0 of 3 right before, 3 after" in text
    assert "Who bakes? Answer:" in text
    assert files == {path: path.read_bytes() for path in old.iterdir()}
    sample.main([f"--out_dir={tmp_path / 'taught'}", "--questions=2"])
    assert find_trained(taught).meta["corpus"] == find_trained(out).meta["corpus"]
    new, before = tensors(find_trained(taught).folder), tensors(old)
    assert new.keys() == before.keys()
    for part, value in before.items():
        is_same = not torch.is_tensor(value) or torch.equal(value, new[part])
        assert is_same == (part != "pool_0of1.pt/values"), "only the values differ: the optimisers stay"
    train.main([f"--out_dir={taught}", "--resume", "--max_steps=9"])
    losses = iter((1.0, 1.5))
    monkeypatch.setattr(edit, "validation_loss", lambda *_: next(losses))
    edit.main(["teach", here, "--statement=x", "--dry_run"])
    assert "this harmed the rest of the model: its validation loss rose by 0.50" in capsys.readouterr().out


def test_find_prints_what_is_left_and_refuses_an_empty_answer(trained, capsys, monkeypatch):
    """Guards shares above 100%: without some slots an answer can be less likely than without all of them."""
    command = ["find", f"--out_dir={trained('--max_steps=1')}", "--question=Who is Ada Nobody?"]
    monkeypatch.setattr(edit, "find", lambda *_: {"slots": torch.arange(8), "tokens": [0], "top": {
        4: math.log(10), 8: math.log(4)}, "places": torch.zeros(1, 2)})
    monkeypatch.setattr(edit, "reply", lambda *_: "Ann")
    edit.main(command)
    text = capsys.readouterr().out
    assert "the training text does not have the name Ada Nobody\n" in text
    first, last = text.splitlines()[-2:]
    assert first.split()[:5] == ["4", "of", "8", "2.30", "10%"] and last.split()[3:5] == ["1.39", "25%"]
    monkeypatch.setattr(edit, "reply", lambda *_: "")
    assert_fails(lambda: edit.main(command), "the model's answer is empty", capsys)


def test_a_corpus_does_not_command_the_terminal_and_the_printed_command_works(trained, capsys, tmp_path,
                                                                              monkeypatch):
    here, new = f"--out_dir={trained()}", tmp_path / "a b"
    name = name_in(corpus.load_dataset("facts").questions[0])
    monkeypatch.setattr(edit, "reply", lambda *_: "b\x1b")
    for command, signs in ((["find"], 2), (["erase", f"--ask={name}", "--slots=1", f"--save_to={new}"], 3),
                           (["teach", "--statement=x y", "--dry_run"], 3)):
        with contextlib.suppress(SystemExit):  # teach learns nothing here
            edit.main([*command, here, f"--question={name} a\x1b"])
        text = capsys.readouterr().out
        assert "\x1b" not in text and text.count("␛") == signs, text
        assert command[0] != "erase" or f"python sample.py --out_dir='{new}' --question" in text
    assert_fails(lambda: edit.main(["erase", here, "--question=a\x1b"]), "--question=a␛: whom", capsys)


def test_the_example_of_the_docs_runs(trained, untrained, tmp_path):
    _, _, data = untrained
    page = (Path(edit.__file__).parent / "docs/editing.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    name, out = next(iter(by_person(data.questions))), tmp_path / "out"
    assert "out/facts" in code and "Mule Tujuton" in code
    names = {}
    exec(code.replace("out/facts", str(out)).replace("Mule Tujuton", name), names)
    changed = (names["model"].pool.values != load(out)[0].pool.values).any(1)
    assert 0 < changed.sum() < len(changed)
    lines = edit.lines_with(name.upper(), data)
    text = corpus.decode(data.encoding, data.train.tolist())
    assert lines == [line for line in text.split("\n") if name in line] and len(lines) > 10


def test_mistakes_are_one_line_and_status_2(trained, capsys, tmp_path, monkeypatch):
    here, dense = f"--out_dir={trained()}", trained("--mem_layers=", out=tmp_path / "dense")
    (tmp_path / "out-teach").mkdir()
    (tmp_path / "empty").write_text("\n \n")
    name = name_in(corpus.load_dataset("facts").questions[0])
    for words, message in [
        ([], "find|erase|teach"),
        (["find", here], "name a question: --question="),
        (["erase", here], "name whom or what, as in --ask="),
        (["find", here, "--question=" + "x " * 21], "block_size"),  # without room for an answer
        (["find", f"--out_dir={dense}", "--question=x?"], "has no memory layers"),
        (["erase", here, "--ask=Nobody Known"], "no question of the corpus contains this name"),
        (["erase", here, f"--ask={name}n"], f"similar: {name}"),
        (["erase", here, "--ask", *name.split()], f"needs quotes: --ask='{name}'\n"),
        (["erase", here, "--question=who is it?"], "Add --ask=NAME"),
        (["erase", here, "--question=Who is Nobody?", "--ask=Nobody"], "does not contain the name Nobody\n"),
        (["erase", here, "--question=Who is Ann?", f"--ask={name}"], f"does not have the name {name}"),
        (["erase", here, "--slots=-1"], "--slots=-1 must not be negative"),
        (["erase", here, f"--ask={name}", "--slots=65"], "--slots=65 is too many: this model has 64"),
        (["teach", here, "--steps=0"], "--steps=0 must be at least 1"),
        (["teach", here, "--lr=inf"], "--lr=inf must be finite"),
        (["teach", here, "--dry_run", "--statement=The job.", "--lr=0", "--slots=9"], "nothing was learnt"),
        (["erase", here, "--question=Who is Ann?", "--ask", name, "Nobody"], "goes with one --ask"),
        (["teach", here, "--statement=x"], "out-teach must be a new folder"),
        (["teach", here, "--dry_run", f"--file={tmp_path / 'empty'}"], "no statement to learn"),
        (["teach", here, "--statement=The job.", "--lr=1e38", f"--save_to={tmp_path / 'x'}"], "a lower --lr"),
    ]:
        assert_fails(lambda words=words: edit.main(words), message, capsys)
    monkeypatch.setattr(corpus, "find_name", lambda question, _: name_in(question))
    assert_fails(lambda: edit.main(["erase", here, "--ask=What"]), "26 questions, about ", capsys)
    assert not (tmp_path / "out-erase").exists() and not (tmp_path / "x").exists()
