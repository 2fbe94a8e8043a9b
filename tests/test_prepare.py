"""data/prepare.py: text comes back as it was, splits do not overlap, and facts are what their options say."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import tiktoken

from data import prepare
from data.prepare import END, build_encoding, encoding_from_json, encoding_to_json, main
from evaluate import exposure_bin


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    return tmp_path


def load(folder):
    meta = json.loads((folder / "meta.json").read_text())
    encoding = encoding_from_json(meta["encoding"])
    return (
        meta,
        encoding,
        {split: np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val")},
    )


TEXTS = ["Hello hello world, it's 42 o'clock.\n\n  def f(x):\n\treturn x", "naïve — 日本語 \u0000\r\n", ""]


@pytest.mark.parametrize("vocab_size", [257, 270, 4096])
def test_any_text_decodes_to_itself(vocab_size):
    encoding = build_encoding(TEXTS[:1] * 3, vocab_size)
    assert encoding.n_vocab <= vocab_size and encoding.eot_token == encoding.n_vocab - 1
    for text in [*TEXTS, "unseen Wörter \U0001f600"]:
        assert encoding.decode(encoding.encode(text)) == text
    again = encoding_from_json(json.loads(json.dumps(encoding_to_json(encoding))))
    assert again.encode(TEXTS[0] + END, allowed_special={END}) == encoding.encode(
        TEXTS[0], allowed_special={END}
    ) + [encoding.eot_token]


def test_frequent_pieces_are_one_token_each():
    encoding = build_encoding(["the cat saw the dog saw the cat"], 256 + 1 + 3)
    assert [encoding.decode([token]) for token in encoding.encode("x the saw")] == ["x", " the", " saw"]


def test_a_named_encoding_survives_the_checkpoint_s_json():
    """gpt2 itself is a download; an encoding of the same make stands in for it."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 257}
    encoding = tiktoken.Encoding(
        "made", pat_str=prepare.GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={END: 300}
    )
    again = encoding_from_json(json.loads(json.dumps(encoding_to_json(encoding))))
    assert (
        again.encode("abcab" + END, allowed_special={END})
        == encoding.encode("abcab" + END, allowed_special={END})
        == [257, 256, 300]
    )


def test_facts_are_what_the_options_say(data):
    main(["facts", "--people=60", "--exposures=20", "--held_out=0.2", "--ask=0.5", "--zipf=1", "--seed=3"])
    meta, encoding, splits = load(data / "facts")
    assert meta["train_tokens"] == len(splits["train"]) and meta["val_tokens"] == len(splits["val"])
    assert max(splits["train"].max(), splits["val"].max()) < meta["vocab_size"] == encoding.n_vocab
    lines = encoding.decode(splits["train"].tolist()).split("\n")[:-1]
    questions = [json.loads(line) for line in open(data / "facts" / "qa.jsonl")]
    assert len(questions) == 60 * 4 and sum(question["held_out"] for question in questions) == 12 * 4
    name_of = {}
    for question in questions:
        name_of.setdefault(re.search(r"[A-Z][a-z]+ [A-Z][a-z]+", question["prompt"]).group(), []).append(
            question
        )
    assert len(name_of) == 60, "every person has another name"
    counts = []
    for name, asked in name_of.items():
        told = [line for line in lines if f" {name} " in line or f" {name}?" in line]
        exposures = asked[0]["exposures"]
        assert len(told) == 4 * exposures, "each attribute is told as often as qa.jsonl says"
        assert any(line.startswith("Question:") for line in told) <= (not asked[0]["held_out"])
        for question in asked:
            assert sum(question["answer"] in line for line in told) >= exposures
        counts.append(exposures)
    counts.sort(reverse=True)
    law = 1 / np.arange(1, 61)
    assert np.abs(np.array(counts) - law / law.mean() * 20).max() <= 0.5, "Zipf's law over people"
    share = np.mean([line.startswith("Question:") for line in lines])
    assert 0.3 < share < 0.5


def test_facts_repeat_with_the_seed(data):
    def made(*options):
        main(["facts", "--people=20", "--exposures=3", *options])
        return [
            (data / "facts" / name).read_bytes() for name in ("train.bin", "val.bin", "qa.jsonl", "meta.json")
        ]

    first = made()
    assert made() == first and made("--seed=2")[0] != first[0]


def test_facts_stay_as_they_were(data):
    """The lines in experiments/results come from this text. A faster generator must make the same bytes."""
    main(["facts", "--people=60", "--exposures=20", "--held_out=0.2", "--ask=0.5", "--zipf=1", "--seed=3",
          "--vocab_size=300"])
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (data / "facts").iterdir()}
    assert sums["train.bin"].startswith("932fc8c58589a23a") and sums["val.bin"].startswith("bdbc5e8de5c04edb")
    assert sums["qa.jsonl"].startswith("5efe7ba9c4d286c1")


def test_a_sample_of_the_questions_has_some_of_each_exposure_bin(data):
    options = ["facts", "--people=300", "--exposures=4"]
    main([*options, "--name=all"])
    main([*options, "--name=some", "--questions=20"])
    assert (data / "all" / "train.bin").read_bytes() == (data / "some" / "train.bin").read_bytes()
    every, some = (list(map(json.loads, open(data / name / "qa.jsonl"))) for name in ("all", "some"))
    count = [Counter("held out" if q["held_out"] else exposure_bin(q) for q in asked)
             for asked in (every, some)]
    assert count[1] == {name: min(20, n) for name, n in count[0].items()} and len(count[1]) > 5
    assert [q for q in every if q in some] == some, "the same questions, in the same order"


def test_every_word_of_facts_is_one_token(data):
    main(["facts", "--people=300", "--exposures=2"])
    _, encoding, splits = load(data / "facts")
    text = encoding.decode(splits["train"].tolist())
    assert encoding.encode_ordinary(text) == splits["train"].tolist(), "fragments are encoded as a text is"
    assert len(splits["train"]) == len(re.findall(r"\w+|[^\w ]", text))


def test_many_people_get_as_many_names():
    assert len(set(prepare.make_names(np.random.default_rng(0), 3000, 2))) == 3000


def test_a_mistake_leaves_the_data_that_was_there(data):
    main(["facts", "--people=5", "--exposures=3"])
    (data / "empty").write_bytes(b"")
    files = {path: path.read_bytes() for path in (data / "facts").iterdir()}
    assert len(files) == 4
    for mistake in (["facts", "--tokenizer=gtp2"], ["text", "--name=facts", "--input", str(data / "empty")]):
        with pytest.raises(SystemExit):
            main(mistake)
        assert {path: path.read_bytes() for path in files} == files


def test_mqar_asks_what_it_told(data):
    main(["mqar", "--documents=200", "--pairs=5", "--asks=6", "--keys=9", "--values=20", "--seed=2"])
    _, encoding, splits = load(data / "mqar")
    documents = {split: encoding.decode(ids.tolist()).split(END)[:-1] for split, ids in splits.items()}
    assert len(documents["train"]) == 200 and len(documents["val"]) == 4
    known, words, asked = {}, Counter(), Counter()
    questions = [json.loads(line) for line in open(data / "mqar" / "qa.jsonl")]
    assert len(questions) == 4
    lines = [f"{question['prompt']} {question['answer']}\n" for question in questions]
    for document in documents["train"] + documents["val"] + lines:
        context, last = document.split(" : ")
        pairs = re.findall(r" (\w+ \w+)", context)
        told = pairs[:5]
        assert "".join(f" {pair}" for pair in pairs) == context and len(pairs) == 5 + 6 - 1
        for pair in [*pairs[5:], last.removesuffix("\n")]:
            asked[told.index(pair)] += 1
        assert len({word for pair in told for word in pair.split()}) == 10, "all differ"
        for pair in told:
            known.setdefault(pair.split()[0], set()).add(pair.split()[1])
            words.update(pair.split())
    assert len(known) == 9 and len(words) == 29, "keys and values are different words"
    assert min(map(len, known.values())) > 15, "no key has a value for good"
    assert len(asked) == 5 and min(asked.values()) > 0.8 * sum(asked.values()) / 5, "all are asked alike"
    tokens = encoding.encode(documents["val"][0])
    assert len(tokens) == 11 * 2 + 2, "a word is a token"


def test_text_keeps_windows_line_ends(data):
    (data / "a.txt").write_bytes(b"a\r\n" * 1000)
    main(["text", "--input", str(data / "a.txt")])
    _, encoding, splits = load(data / "text")
    assert encoding.decode([*splits["train"], *splits["val"]]).replace(END, "") == "a\r\n" * 1000


def test_stdlib_splits_by_file(data, monkeypatch):
    root = data / "lib"
    bodies = {}
    for i in range(60):
        path = root / ("email" if i % 2 else "json") / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        bodies[i] = f"module_{i} = {i}\n" * 5
        path.write_text(bodies[i])
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text("not_of_the_library = 1\n")
    (root / "broken.py").write_bytes(b"# coding: utf-8\n\xff\xfe")
    monkeypatch.setattr(prepare.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    main(["stdlib", "--val_share=0.3"])
    _, encoding, splits = load(data / "stdlib")
    files = {split: encoding.decode(ids.tolist()).split(END)[:-1] for split, ids in splits.items()}
    assert sorted(files["train"] + files["val"]) == sorted(bodies.values())
    assert Counter(files["train"]).keys().isdisjoint(files["val"]) and len(files["val"]) > 5


def test_code_takes_each_file_once_and_splits_by_name(data, monkeypatch):
    bodies = [f"module_{i} = {i}\n" * 5 for i in range(60)]
    for i, body in enumerate([*bodies, bodies[0], bodies[7]]):  # the last two are copies
        path = data / f"v{i % 2}" / "site-packages" / f"package_{i // 10}" / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    (path.parent / "broken.py").write_bytes(b"# coding: utf-8\n\xff\xfe")
    (path.parent / "notes.txt").write_text("no source")
    folders = [str(data / f"v{i}" / "site-packages") for i in range(2)]

    def made(*options):
        main(["code", "--val_share=0.3", *options])
        _, encoding, splits = load(data / "code")
        return {split: encoding.decode(ids.tolist()).split(END) for split, ids in splits.items()}

    files = made("--input", *folders)
    train, val = files["train"][:-1], files["val"][:-1]
    assert sorted(train + val) == sorted(bodies) and len(val) > 5
    assert train != sorted(train, key=bodies.index), "packages are mixed: the first tokens are a sample"
    monkeypatch.setattr(prepare.sys, "path", ["/nowhere", *folders])
    assert made() == files, "without --input: all packages that Python would find"
    few = made("--tokens=300")
    assert len(load(data / "code")[2]["train"]) == 300 and few["val"] == files["val"]
    assert few["train"][:-1] == train[:len(few["train"]) - 1]


def test_text_keeps_the_end_of_each_file_for_validation(data):
    (data / "a.txt").write_text("".join(f"line {i} of a\n" for i in range(500)))
    (data / "b.txt").write_text("ohne Zeilenende " * 400, encoding="utf-8")
    (data / "c.txt").write_text("三个字节的字" * 800, encoding="utf-8")
    files = [str(data / f"{name}.txt") for name in "abc"]
    main(["text", "--input", *files, "--name=mine", "--val_share=0.2"])
    _, encoding, splits = load(data / "mine")
    train, val = (encoding.decode(splits[split].tolist()).split(END) for split in ("train", "val"))
    for i, name in enumerate("abc"):
        whole = (data / f"{name}.txt").read_text(encoding="utf-8")
        assert train[i] + val[i] == whole, "nothing is lost or in both"
        assert 0.1 < len(val[i]) / len(whole) < 0.25


def test_text_leaves_questions_that_are_the_user_s(data, capsys):
    (data / "a.txt").write_text("some words\n" * 200)
    main(["text", "--input", str(data / "a.txt")])
    (data / "text" / "qa.jsonl").write_text("mine")
    main(["text", "--input", str(data / "a.txt")])
    assert (data / "text" / "qa.jsonl").read_text() == "mine"
    assert "qa.jsonl stay" in capsys.readouterr().out
    main(["facts", "--name=text", "--people=5"])
    assert (data / "text" / "qa.jsonl").read_text() != "mine"


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name a corpus"),
        (["fact"], "name a corpus"),
        (["text"], "name the files: --input FILE"),
        (["text", "--input", "nowhere.txt"], "nowhere.txt: No such file"),
        (["text", "--input", "BINARY"], "not UTF-8"),
        (["text", "--input", "EMPTY"], "too short"),
        (["facts", "--people=0"], "--people=0 must be between"),
        (["facts", "--seed=-1"], "--seed=-1 must not be negative"),
        (["facts", "--zipf=nan"], "--zipf=nan must not be negative"),
        (["facts", "--zipf=inf"], "--zipf=inf must be finite"),
        (["facts", "--exposures=nan"], "--exposures=nan must be at least 1"),
        (["text", "--name=", "--input", "EMPTY"], "must be a plain name"),
        (["text", "--name=../x", "--input", "EMPTY"], "must be a plain name"),
        (["facts", "--name=../x", "--people=5"], "must be a plain name"),
        (["facts", "--ask=2"], "--ask=2.0 must be between"),
        (["facts", "--tokenizer=gtp2"], "tiktoken has"),
        (["facts", "--vocab_size=10"], "at least 257"),
        (["facts", "--questions=-1"], "--questions=-1 must not be negative"),
        (["stdlib", "--val_share=1"], "between 0 and 1"),
        (["code", "--tokens=-1"], "--tokens=-1 must not be negative"),
        (["code", "--input", "nowhere"], "--input nowhere: no such folder"),
        (["mqar", "--documents=0"], "--documents=0 must be at least 1"),
        (["mqar", "--keys=3"], "--keys=3 must be at least pairs=4"),
        (["mqar", "--values=3"], "--values=3 must be at least pairs=4"),
        (["mqar", "--seed=-1"], "--seed=-1 must not be negative"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(data, argv, message, capsys):
    (data / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    (data / "empty").write_bytes(b"")
    argv = [{"BINARY": str(data / "binary"), "EMPTY": str(data / "empty")}.get(word, word) for word in argv]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
