"""data/prepare.py: text comes back as it was, splits do not overlap, and facts are what their options say."""

import gzip
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from conftest import listen_to_ctrl_c

from data import corpus, prepare, tokenizer
from data.corpus import Dataset
from data.facts import make_names
from data.prepare import END, main
from data.tokenizer import encoding_from_json
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
        main(["facts", "--people=20", "--exposures=3", "--overwrite", *options])
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
    assert len(set(make_names(np.random.default_rng(0), 3000, 2))) == 3000


def test_a_mistake_leaves_the_data_that_was_there(data):
    main(["facts", "--people=5", "--exposures=3"])
    (data / "empty").write_bytes(b"")
    files = {path: path.read_bytes() for path in (data / "facts").iterdir()}
    assert len(files) == 4
    for mistake in (["facts", "--people=5", "--exposures=3", "--tokenizer=gtp2", "--overwrite"],
                    ["facts", "--people=6"], ["facts", "--people=5"], ["mqar", "--tokenizer=gtp2"],
                    ["text", "--name=facts", "--input", str(data / "empty"), "--overwrite"],
                    ["text", "--name=facts", "--input", str(data / "facts" / "qa.jsonl")]):
        with pytest.raises(SystemExit):
            main(mistake)
        assert {path: path.read_bytes() for path in files} == files
    assert sorted(path.name for path in data.iterdir()) == ["empty", "facts"], "nothing half-written is left"


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
        main(["code", "--val_share=0.3", "--overwrite", *options])
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
    main(["facts", "--name=text", "--people=5", "--overwrite"])
    assert (data / "text" / "qa.jsonl").read_text() != "mine"


def prepared_text(data, *names, options=()):
    """Makes a corpus of these files in `data`. Returns its documents."""
    main(["text", "--overwrite", *options, "--input", *(str(data / name) for name in names)])
    _, encoding, splits = load(data / "text")
    return {split: encoding.decode(ids.tolist()).split(END)[:-1] for split, ids in splits.items()}


STORIES = [f"Story {i} has some words.\nAnd {i % 7} more.\n" for i in range(200)]


@pytest.mark.parametrize("line", [f"{END}\n", f"{END}\r\n\r\n", END])
def test_end_of_text_in_a_file_is_the_end_of_a_document(line):
    stories = STORIES[:60]
    for text in (line.join(stories), line.join(stories) + line):  # at the end of a file it changes nothing
        for block in (1, 7, 50, 2**16):
            def documents():
                blocks = (text[i:i + block] for i in range(0, len(text), block))  # noqa: B023
                return prepare.split_documents(blocks)
            assert "".join(documents()) == END.join([*stories, ""])
            for border in (1, 500, 501, 530, 531, 540, 550, 1900, 10**6):
                train, val = ("".join(prepare.cut_at_border(documents(), border, split)).split(END)
                              for split in ("train", "val"))
                assert train[-1] == val[-1] == "", "the last document has an END, too"
                assert "".join(train + val) == "".join(stories), "nothing is lost or in both"
                assert train[:-2] == stories[:len(train) - 2], "the border cuts one story at most"
                assert len("".join(train)) <= border + 200


def test_a_file_of_stories(data):
    (data / "stories").write_text(f"{END}\n".join(STORIES))
    documents = prepared_text(data, "stories")
    tokens = load(data / "text")[2]["train"]
    assert (tokens == tokens.max()).sum() == len(documents["train"]) > 170, "END is the last token"
    assert "".join(documents["train"] + documents["val"]) == "".join(STORIES) and len(documents["val"]) > 15


def test_files_as_other_systems_write_them(data):
    text = "".join(STORIES) + "naïve — 日本語\n" * 9
    (data / "plain").write_text(text, encoding="utf-8")
    (data / "bom").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (data / "utf16").write_bytes(text.encode("utf-16"))
    (data / "utf16be").write_bytes(b"\xfe\xff" + text.encode("utf-16-be"))
    (data / "plain.txt.gz").write_bytes(gzip.compress(text.encode()))
    (data / "empty").write_bytes(b"")
    documents = prepared_text(data, "plain")
    assert documents["train"][0] + documents["val"][0] == text
    for name in ("bom", "utf16", "utf16be", "plain.txt.gz"):
        assert "".join(prepare.read_checked(data / name)) == text, name
    assert prepared_text(data, "empty", "plain.txt.gz", "empty") == documents, "an empty file is no document"


def test_paths_as_people_type_them(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    monkeypatch.chdir(data)
    for name in ("texts/a.txt", "texts/more/b.txt"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(f"{name} has words\n" * 50)
    prepared_text(data, "texts/a.txt", "texts/more/b.txt")
    both = (data / "text" / "train.bin").read_bytes()
    for words in (["~/texts"], ["texts/*.txt", "texts/**/b.txt"], ["texts", "./texts/a.txt"]):
        main(["text", "--input", *words])  # not --overwrite: these are the same options
        assert (data / "text" / "train.bin").read_bytes() == both, words


def test_words_are_not_cut_where_a_file_is(data):
    """Files of 500 bytes gave more than twice the tokens of one file."""
    text = " ".join(STORIES)
    (data / "one").write_text(text)
    names = [f"part{i:02}" for i in range(len(text) // 500 + 1)]
    for i, name in enumerate(names):
        (data / name).write_text(text[i * 500:(i + 1) * 500])
    prepared_text(data, "one")
    one = sum(map(len, load(data / "text")[2].values()))
    prepared_text(data, *names)
    parts = sum(map(len, load(data / "text")[2].values()))
    assert parts < 1.25 * one + 2 * len(names), "two ENDs per file, and few words that a file cuts"


def test_a_name_that_is_taken_is_not_overwritten(data, capsys):
    (data / "words").write_text("some words\n" * 200)
    make = ["text", "--name=mine", "--input", str(data / "words")]
    main(make)
    main(make)  # the same options: the same corpus again
    first = (data / "mine" / "meta.json").read_bytes()
    for other in ([*make, "--vocab_size=300"], ["facts", "--name=mine", "--people=5"]):
        with pytest.raises(SystemExit):
            main(other)
        assert "mine has a corpus that was made with other options" in capsys.readouterr().err
        assert (data / "mine" / "meta.json").read_bytes() == first
    main(["facts", "--name=mine", "--people=5", "--overwrite"])
    assert json.loads((data / "mine" / "meta.json").read_text())["options"]["people"] == 5
    (data / "mine" / "meta.json").unlink()  # whose train.bin is this?
    with pytest.raises(SystemExit):
        main(["facts", "--name=mine", "--people=5"])


def run_prepare(data, *arguments, **options):
    program = ("import sys; from data import prepare; prepare.DATA = prepare.Path(sys.argv[1]);"
               "prepare.main(sys.argv[2:])")
    return subprocess.Popen([sys.executable, "-c", program, str(data), *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=Path(prepare.__file__).parents[1], **options)


def test_a_full_disk_is_one_line_and_the_old_corpus_stays(data):
    main(["facts", "--people=5"])
    files = {path: path.read_bytes() for path in (data / "facts").iterdir()}

    def no_large_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = run_prepare(data, "facts", "--people=100", "--overwrite", preexec_fn=no_large_files)
    _, err = process.communicate()
    assert process.returncode == 2 and err.endswith(f"error: {data / 'facts'}: File too large\n"), err
    assert {path: path.read_bytes() for path in files} == files and len(list(data.iterdir())) == 1


@pytest.mark.parametrize("at", ["tokenizer from", ".text-"])
def test_ctrl_c_leaves_the_old_corpus(data, at):
    """Stopped while it learns a tokenizer, and while it writes."""
    (data / "words").write_text("".join(f"{i} and {i * i % 997} make {i * 7}\n" for i in range(40_000)))
    (data / "few").write_text("some words\n" * 200)
    main(["text", "--input", str(data / "few")])
    files = {path: path.read_bytes() for path in (data / "text").iterdir()}
    process = run_prepare(data, "text", "--input", data / "words", "--overwrite", preexec_fn=listen_to_ctrl_c)
    if at == "tokenizer from":
        process.stdout.readline()
    else:
        while process.poll() is None and not list(data.glob(".text-*/train.bin")):
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert {path: path.read_bytes() for path in files} == files
    assert sorted(path.name for path in data.iterdir()) == ["few", "text", "words"]


def test_a_vocabulary_above_65536_takes_four_bytes_per_token(data, monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" story": 99_999}
    large = tiktoken.Encoding("o200k_base", pat_str=r"\s?\w+|.|\s", mergeable_ranks=ranks,
                              special_tokens={END: 100_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    (data / "a").write_text("a story\n" * 100)
    documents = prepared_text(data, "a", options=["--tokenizer=o200k_base"])
    assert documents["train"][0] + documents["val"][0] == "a story\n" * 100
    meta, encoding, splits = load(data / "text")
    assert meta["dtype"] == "uint32" and splits["train"].max() == 100_000 and encoding.n_vocab == 100_001
    assert meta["options"]["tokenizer"] == meta["encoding"]["name"] == "o200k_base"


def test_bytes_and_characters_of_a_corpus(data, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "DATA", data)
    (data / "a").write_text("naïve — 日本語\n" * 100, encoding="utf-8")
    val = prepared_text(data, "a")["val"][0]
    assert Dataset("text").val_bytes == len(val.encode())
    characters = float(re.search(r"([\d.]+) characters per token", capsys.readouterr().out)[1])
    tokens = len(load(data / "text")[2]["train"]) - 1
    assert characters == pytest.approx((12 * 100 - len(val)) / tokens, rel=0.02)


def test_a_warning_if_most_characters_are_single_bytes(data, capsys):
    rng = np.random.default_rng(0)
    words = rng.integers(0x4E00, 0x9FA5, 3000)
    (data / "a").write_text("".join(map(chr, words)), encoding="utf-8")
    prepared_text(data, "a")
    assert "most characters are cut into single bytes" in capsys.readouterr().out
    (data / "a").write_text("".join(map(chr, words[:10])) * 400, encoding="utf-8")
    prepared_text(data, "a")
    assert "single bytes" not in capsys.readouterr().out


def test_a_large_text_gives_a_sample_to_the_tokenizer(data, monkeypatch):
    """Blocks from all parts of the text. The tokens of the text do not depend on the size of the blocks."""
    monkeypatch.setattr(prepare, "SAMPLE", 1)
    monkeypatch.setattr(tokenizer, "BLOCK", 100)
    (data / "a").write_text("early words\n" * 500 + "later thoughts\n" * 500)
    documents = prepared_text(data, "a")
    assert documents["train"][0] + documents["val"][0] == (data / "a").read_text()
    encoding = load(data / "text")[1]
    assert len(encoding.encode(" words")) == len(encoding.encode(" thoughts")) == 1


def test_shakespeare_is_text_with_its_name(data):
    (data / "input.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50)
    main(["shakespeare", "--input", str(data / "input.txt")])
    main(["text", "--input", str(data / "input.txt")])
    for name in ("train.bin", "val.bin"):
        assert (data / "shakespeare" / name).read_bytes() == (data / "text" / name).read_bytes()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name a corpus"),
        (["fact"], "name a corpus"),
        (["text"], "name the files: --input FILE"),
        (["text", "--input", "nowhere.txt"], "nowhere.txt: No such file"),
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
        (["facts", "--vocab_size=9999999"], "at most 1048576"),
        (["facts", "--tokenizer=gpt2"], "could not download"),
        (["text", "--input", "LATIN"], "iconv -f LATIN1"),
        (["text", "--input", "ZEROS"], "zero bytes"),
        (["text", "--input", "BROKEN"], "broken.gz: Not a gzipped file"),
        (["text", "--input", "CUT"], "cut.gz: Compressed file ended"),
        (["text", "--input", "STREAM"], "can be read only once"),
        (["text", "--input", "-"], "save a stream to a file"),
        (["text", "--input", "nowhere/*.txt"], "No such file"),
        (["text", "--input", "FOLDER"], "the folder has no .txt files"),
        (["text", "--input", "SOME", "--name=prepare.py"], "prepare.py"),
        (["shakespeare"], "https://raw.githubusercontent.com/"),
        (["code", "--site_packages"], "without --input, code takes all installed packages"),
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
def test_a_mistake_is_one_line_and_status_2(data, argv, message, capsys, monkeypatch):
    os.mkfifo(data / "stream")
    (data / "folder").mkdir()
    (data / "prepare.py").write_text("a file where the folder should be")
    for file, content in {"latin": b"caf\xe9 " * 9, "zeros": "no mark".encode("utf-16-le"), "empty": b"",
                          "broken.gz": b"no gzip", "cut.gz": gzip.compress(b"text " * 99)[:-9],
                          "some": b"some words\n" * 99}.items():
        (data / file).write_bytes(content)
    files = {path.name.split(".")[0].upper(): str(path) for path in data.iterdir()}
    argv = [files.get(word, word) for word in argv]

    def no_network(name):
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
