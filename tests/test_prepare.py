"""What data/prepare.py writes: text comes back as it was, splits do not overlap, facts are as options say."""

import gzip
import hashlib
import os
import re
import resource
import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from conftest import assert_fails

from data import corpora, corpus, text, tokenizer, write
from data.facts import exposures_by_zipf
from data.prepare import main
from data.tokenizer import END
from evaluate import exposure_bin
from train import TrainConfig

STORIES = [f"Story {i} has some words.\nAnd {i % 7} more.\n" for i in range(60)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    return tmp_path


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(name):
    """{split: documents} of a corpus, and the corpus."""
    found = corpus.Dataset(name)
    return {split: found.encoding.decode(getattr(found, split).tolist()).split(END)[:-1]
            for split in ("train", "val")}, found


def made_text(data, *names, options=()):
    main(["text", "--overwrite", *options, "--input", *(str(data / name) for name in names)])
    return documents("text")[0]


# --- made-up texts ------------------------------------------------------------------------------------------

def test_facts_are_what_the_options_say(data):
    """On the way: a ready-made corpus takes options, too."""
    main(["facts-2000", "--people=60", "--exposures=20", "--held_out=0.2", "--ask=0.5", "--seed=3"])
    found = corpus.Dataset("facts-2000")
    content = found.encoding.decode(found.train.tolist())
    lines, about = content.split("\n")[:-1], {}
    for question in found.questions:
        name = re.search(r"[A-Z][a-z]+ [A-Z][a-z]+", question["prompt"]).group()
        about.setdefault(name, []).append(question)
    assert len(about) == 60 and sum(question["held_out"] for question in found.questions) == 12 * 4
    for name, asked in about.items():
        told = [line for line in lines if f" {name} " in line or f" {name}?" in line]
        assert len(asked) == 4 and len(told) == 4 * asked[0]["exposures"], "told as often as qa.jsonl says"
        assert any(line.startswith("Question:") for line in told) <= (not asked[0]["held_out"])
        for question in asked:
            assert sum(question["answer"] in line for line in told) >= question["exposures"]
    assert exposures_by_zipf(4, 1, 12).tolist() == [23, 12, 8, 6]  # 48 / (25 / 12) / r
    assert found.encoding.encode_ordinary(content) == found.train.tolist(), "encoded as a text is"
    assert len(found.train) == len(re.findall(r"\w+|[^\w ]", content)), "a word is a token"
    counts = sorted((asked[0]["exposures"] for asked in about.values()), reverse=True)
    assert counts == exposures_by_zipf(60, 1, 20).tolist()
    assert 0.3 < np.mean([line.startswith("Question:") for line in lines]) < 0.5


def test_facts_stay_as_they_were(data):
    """The lines in experiments/results come from this text. A faster generator must make the same bytes."""
    main(["facts", "--people=60", "--exposures=20", "--held_out=0.2", "--ask=0.5", "--zipf=1",
          "--vocab_size=300", "--seed=3"])
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files_in(data / "facts").items()}
    assert sums["train.bin"].startswith("932fc8c58589a23a") and sums["val.bin"].startswith("bdbc5e8de5c04edb")
    assert sums["qa.jsonl"].startswith("5efe7ba9c4d286c1")


def test_a_sample_of_the_questions_has_some_of_each_exposure_bin(data):
    options = ["facts", "--people=300", "--exposures=4"]
    main([*options, "--name=all"])
    main([*options, "--name=some", "--questions=20"])
    assert files_in(data / "all")["train.bin"] == files_in(data / "some")["train.bin"]
    every, some = (corpus.Dataset(name).questions for name in ("all", "some"))
    count = [Counter("held out" if q["held_out"] else exposure_bin(q) for q in asked)
             for asked in (every, some)]
    assert count[1] == {name: min(20, n) for name, n in count[0].items()} and len(count[1]) > 5
    assert [q for q in every if q in some] == some, "the same questions, in the same order"


def test_mqar_asks_what_it_told(data):
    main(["mqar", "--documents=200", "--pairs=5", "--asks=6", "--keys=9", "--values=20", "--seed=2"])
    made, found = documents("mqar")
    assert len(made["train"]) == 200 and len(made["val"]) == len(found.questions) == 4
    known, asked = {}, Counter()
    lines = [f"{question['prompt']} {question['answer']}\n" for question in found.questions]
    for document in made["train"] + made["val"] + lines:
        context, last = document.split(" : ")
        pairs = re.findall(r" (\w+ \w+)", context)
        told = pairs[:5]
        assert "".join(f" {pair}" for pair in pairs) == context and len(pairs) == 5 + 6 - 1
        asked.update(told.index(pair) for pair in [*pairs[5:], last.removesuffix("\n")])
        assert len({word for pair in told for word in pair.split()}) == 10, "all differ"
        for pair in told:
            known.setdefault(pair.split()[0], set()).add(pair.split()[1])
    assert len(known) == 9 and len(set.union(*known.values()) - known.keys()) == 20
    assert min(map(len, known.values())) > 15, "no key has a value for good"
    assert len(asked) == 5 and min(asked.values()) > 0.8 * sum(asked.values()) / 5, "all are asked alike"
    assert len(found.encoding.encode(made["val"][0])) == 11 * 2 + 2, "a word is a token"


# --- Python and other text ----------------------------------------------------------------------------------

def test_python_files_are_taken_once_and_split_by_name(data, monkeypatch):
    bodies = [f"module_{i} = {i}\n" * 5 for i in range(60)]
    for i, body in enumerate([*bodies, bodies[0], bodies[7]]):  # the last two are copies
        path = data / f"v{i % 2}" / "site-packages" / f"package_{i // 10}" / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    (path.parent / "broken.py").write_bytes(b"# coding: utf-8\n\xff\xfe")
    (path.parent / "notes.txt").write_text("no source")
    folders = [str(data / f"v{i}" / "site-packages") for i in range(2)]
    main(["code", "--val_share=0.3", "--input", *folders])
    files = documents("code")[0]
    assert sorted(files["train"] + files["val"]) == sorted(bodies) and len(files["val"]) > 5
    assert files["train"] != sorted(files["train"], key=bodies.index), "the first tokens are a sample"
    monkeypatch.setattr(corpora.sys, "path", ["/nowhere", *folders])
    main(["code", "--val_share=0.3", "--overwrite"])
    assert documents("code")[0] == files, "without --input: all packages that Python would find"
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(data / "v0")})
    with pytest.raises(SystemExit):
        main(["stdlib"])  # the library does not contain site-packages
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": folders[0]})
    main(["stdlib", "--val_share=0.3"])
    assert sorted(sum(documents("stdlib")[0].values(), [])) == sorted(bodies[::2])


def test_text_keeps_the_end_of_each_file_for_validation(data):
    contents = ["".join(f"line {i}\n" for i in range(500)), "ohne Zeilenende " * 400, "三个字节的字" * 800,
                "a\r\n" * 1000]
    for name, content in zip("abcd", contents, strict=True):
        (data / name).write_bytes(content.encode())
    made = made_text(data, *"abcd", options=["--val_share=0.2"])
    assert corpus.Dataset("text").val_bytes == len("".join(made["val"]).encode())
    for content, train, val in zip(contents, made["train"], made["val"], strict=True):
        assert train + val == content, "nothing is lost or in both"
        assert 0.1 < len(val) / len(content) < 0.25


@pytest.mark.parametrize("line", [f"{END}\n", f"{END}\r\n\r\n", END])
def test_end_of_text_in_a_file_is_the_end_of_a_document(line):
    for content in (line.join(STORIES), line.join(STORIES) + line):  # at the end it changes nothing
        for size in (1, 7, 50, 2**16):
            blocks = [content[i:i + size] for i in range(0, len(content), size)]
            assert "".join(text.split_documents(blocks)) == END.join([*STORIES, ""])
        for border in range(1, len(content) - 50, 7):
            parts = [list(text.cut_at_border([content], border, split)) for split in ("train", "val")]
            train, val = ("".join(text.split_documents(part)).split(END) for part in parts)
            assert train[-1] == val[-1] == "", "the last document has an END, too"
            assert "".join(train + val) == "".join(STORIES), "nothing is lost or in both"
            assert train[:-2] == STORIES[:len(train) - 2], "the border cuts one story at most"
            assert border <= len("".join(parts[0])) < border + 200


def test_files_as_other_systems_write_them(data):
    content = "".join(STORIES) + "naïve — 日本語\n" * 9
    (data / "bom").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (data / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    (data / "utf16").write_text(content, encoding="utf-16", newline="")
    (data / "empty").write_bytes(b"")
    made = made_text(data, "empty", "a.txt.gz", "bom", "empty", "utf16")
    assert [train + val for train, val in zip(*made.values(), strict=True)] == [content] * 3


def test_paths_as_people_type_them(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    monkeypatch.chdir(data)
    for name in ("texts/a.txt", "texts/more/b.txt"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(f"{name} has words\n" * 50)
    both = made_text(data, "texts/a.txt", "texts/more/b.txt")
    for words in (["~/texts"], ["texts/*.txt", "texts/**/b.txt"], ["texts", "./texts/a.txt"]):
        main(["text", "--input", *words])  # not --overwrite: these are the same options
        assert documents("text")[0] == both, words


def test_a_vocabulary_above_65536_takes_four_bytes_per_token(data, monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" story": 99_999}
    large = tiktoken.Encoding("large", pat_str=r"\s?\w+|.|\s", mergeable_ranks=ranks,
                              special_tokens={END: 100_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    (data / "a").write_text("a story\n" * 100)
    made = made_text(data, "a", options=["--tokenizer=o200k_base"])
    assert made["train"][0] + made["val"][0] == "a story\n" * 100
    assert corpus.Dataset("text").train.max() == 100_000


def test_a_small_text_gets_few_tokens_and_a_large_one_is_read_in_all_parts(data, monkeypatch):
    content = "early words\n" * 500 + "later thoughts\n" * 500
    (data / "a").write_text(content)
    made_text(data, "a")
    assert corpus.Dataset("text").encoding.n_vocab == 257 + len(content) // 2048
    monkeypatch.setattr(write, "CHARACTERS", 1)
    monkeypatch.setattr(tokenizer, "BLOCK", 100)
    made = made_text(data, "a")
    assert made["train"][0] + made["val"][0] == content
    encode = corpus.Dataset("text").encoding.encode
    assert len(encode(" words")) == len(encode(" thoughts")) == 1


def test_a_longer_text_can_keep_its_tokenizer(data):
    """So that training can go on with it."""
    (data / "a").write_text("early words\n" * 900)
    main(["text", "--name=mine", "--input", str(data / "a")])
    before = corpus.Dataset("mine").encoding_json
    (data / "a").write_text("early words\n" * 900 + "later thoughts\n" * 900)
    for options, is_same in (([], False), (["--tokenizer=mine"], True)):
        main(["text", f"--name=new-{is_same}", *options, "--input", str(data / "a")])
        assert (corpus.Dataset(f"new-{is_same}").encoding_json == before) == is_same
    main(["text", "--name=mine", "--tokenizer=mine", "--overwrite", "--input", str(data / "a")])
    made, found = documents("mine")
    assert found.encoding_json == before and "later thoughts" in made["train"][0]


# --- nothing gets lost --------------------------------------------------------------------------------------

def test_what_was_read_and_a_text_that_is_too_small_are_reported(data, capsys):
    for name in ("a.txt", "B.TXT", "c.md", "d.text", "e.md", "f.md"):
        (data / name).write_text("some words\n" * 9 * (name != "B.TXT"))
    main(["text", "--input", str(data)])
    text = capsys.readouterr().out
    assert ": files: 2; with text: 1; left out, because they are not .txt: 4 (c.md, d.t" in text
    assert "2,048 characters allow one more token" in text
    assert f"its --block_size, {TrainConfig.block_size} by default" in text
    main(["text", "--input", str(data / "a.txt"), "--overwrite"])
    assert "files: 1; with text: 1\n" in capsys.readouterr().out


def test_a_name_that_is_taken_is_not_overwritten(data, capsys, tmp_path_factory):
    (data / "words").write_text("some words\n" * 200)
    empty = tmp_path_factory.mktemp("other") / "empty"
    empty.write_text("")
    make = ["text", "--name=mine", "--input", str(data / "words")]
    main(make)
    (data / "mine" / "qa.jsonl").write_text("")
    main(make)  # the same options: the same corpus again
    before = files_in(data / "mine")
    assert "qa.jsonl" in before, "these questions are the user's"
    for mistake, message in (([*make, "--vocab_size=300"], "made with other options"),
                             (["facts", "--name=mine"], "made with other options"),
                             ([*make, "--tokenizer=gtp2", "--overwrite"], "It downloads gpt2"),
                             (["text", "--name=mine", "--input", str(empty), "--overwrite"], "be empty"),
                             (["mqar", "--tokenizer=gtp2"], "It downloads gpt2")):
        assert_fails(lambda mistake=mistake: main(mistake), message, capsys)
        assert files_in(data / "mine") == before
    assert sorted(path.name for path in data.iterdir()) == ["mine", "words"], "nothing half-written is left"
    main(["facts", "--name=mine", "--people=5", "--overwrite"])
    for damage in (lambda path: path.write_text("{"), os.remove):  # whose train.bin is this?
        damage(data / "mine" / "meta.json")
        assert_fails(lambda: main(["facts", "--name=mine", "--people=5"]), "made with other options", capsys)


def test_a_folder_may_be_a_link_to_another_disk(data):
    """Guards moving the files from one disk to the other, which failed when meta.json was already gone."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == data.stat().st_dev:
        pytest.skip("this machine has one disk")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        (data / "facts").symlink_to(other)
        for _ in range(2):
            main(["facts", "--people=5"])
            assert len(corpus.Dataset("facts").questions) == 20 and len(os.listdir(other)) == 4


@pytest.mark.parametrize("last", ["val.bin", "train.bin", "qa.jsonl", "meta.json"])
def test_a_kill_while_the_files_are_replaced_leaves_a_whole_corpus_or_is_found(data, monkeypatch, last):
    """Guards the tokenizer, which only meta.json has: the old one went before the new one came."""
    main(["facts", "--people=5"])
    before, replace = files_in(data / "facts"), Path.replace

    def killed(path, target):
        replace(path, target)
        if path.name == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", killed)
        main(["facts", "--people=5", "--seed=2", "--overwrite"])
    after = files_in(data / "facts")
    if last == "meta.json":
        assert not any(after[name] == before[name] for name in after) and corpus.Dataset("facts")
    else:
        assert after["meta.json"] == before["meta.json"]
        with pytest.raises(ValueError, match="is damaged .*: make it again"):
            corpus.Dataset("facts")
        main(["facts", "--people=5"])
        assert files_in(data / "facts") == before


def test_a_digest_is_of_both_ends_of_a_large_file(tmp_path, monkeypatch):
    path = tmp_path / "file"

    def digest(content):
        path.write_bytes(content)
        return corpus.digest(path)

    content, changed = b"012345678", [b"012345678".replace(b"%d" % i, b"x") for i in range(9)]
    assert len(set(map(digest, [content, *changed]))) == 10
    monkeypatch.setattr(corpus, "HASHED", 3)
    monkeypatch.setattr(corpus, "BLOCK", 1)
    assert [digest(content) == digest(other) for other in changed] == [False] * 3 + [True] * 3 + [False] * 3
    assert len({digest(content[:size]) for size in range(10)}) == 10, "the middle counts by its length"


def test_a_full_disk_is_one_line_and_the_old_corpus_stays(data, capsys):
    main(["facts", "--people=5"])
    before = files_in(data / "facts")
    old, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        assert_fails(lambda: main(["facts", "--people=100", "--overwrite"]), "facts: File too large", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert files_in(data / "facts") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_old_corpus(data, monkeypatch, number):
    (data / "words").write_text("some words\n" * 200)
    make = ["text", "--input", str(data / "words")]
    main(make)
    before, handlers = files_in(data / "text"), list(map(signal.getsignal, signal.valid_signals()))

    def stopped(*arguments):
        yield np.zeros(9, np.int64)
        assert next(data.glob("text/.new-*/train.bin")).exists()
        if number == signal.SIGINT:
            raise KeyboardInterrupt  # the tests may run in a job that ignores Ctrl-C
        signal.raise_signal(number)

    monkeypatch.setattr(tokenizer, "encode_texts", stopped)
    with pytest.raises(SystemExit, match=str(128 + number)):
        main(make)
    assert files_in(data / "text") == before
    assert list(map(signal.getsignal, signal.valid_signals())) == handlers


@pytest.mark.parametrize("argv, message", [
    ([], "name a corpus"),
    (["fact"], "fact is not a corpus: name a corpus, then its options: facts|"),
    (["text"], "data.prepare text --input FILE ..."),
    (["text", "--input", "nowhere.txt"], "--input nowhere.txt: no such file"),
    (["text", "--input", "EMPTY"], "too short"),
    (["text", "--name=../x", "--input", "SOME"], "must be a plain name"),
    (["text", "--name=prepare.py", "--input", "SOME"], "prepare.py"),
    (["text", "--input", "LATIN"], "iconv -f LATIN1 -t UTF-8"),
    (["text", "--input", "ZEROS"], "zero bytes"),
    (["text", "--input", "BROKEN"], "broken.gz: Not a gzipped file"),
    (["text", "--input", "CUT"], "cut.gz: Compressed file ended"),
    (["text", "--input", "FOLDER"], "folder: this folder has no .txt files. Name files, or a pattern"),
    (["text", "--input", "STREAM"], "save a stream to a file"),
    (["code", "--input", "nowhere"], "--input nowhere: no such folder"),
    (["facts", "--tokenizer=gtp2"], "It downloads gpt2"),
    (["facts", "--vocab_size=10"], "--vocab_size=10 must be between 257 and 1048576"),
    (["facts-2000", "--people=0"], "--people=0 must be between"),
    (["facts", "--zipf=nan"], "--zipf=nan must be between 0 and"),
    (["mqar", "--keys=3"], "--pairs=4 needs as many --keys"),
    (["stdlib", "--val_share=1"], "--val_share=1.0 must be between"),
])
def test_a_mistake_is_one_line_and_status_2(data, argv, message, capsys, monkeypatch):
    os.mkfifo(data / "stream")
    (data / "folder").mkdir()
    for file, content in {"latin": b"caf\xe9 " * 9, "zeros": "no mark".encode("utf-16-le"), "empty": b"",
                          "broken.gz": b"no gzip", "cut.gz": gzip.compress(b"text " * 99)[:-9],
                          "some": b"some words\n" * 99, "prepare.py": b"not a folder"}.items():
        (data / file).write_bytes(content)
    files = {path.name.split(".")[0].upper(): str(path) for path in data.iterdir()}

    def no_network(name):
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    assert_fails(lambda: main([files.get(word, word) for word in argv]), message, capsys)
