"""qa.jsonl: each mistake is named before training; which answers are right; the corpus of airports."""

import json
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_fails

import evaluate
from data import airports, corpus, facts, prepare
from data.corpus import accepted_answers, check_length, is_right, normalize_answer, read_questions
from data.tokenizer import END, make_encoding, word_encoding


def written(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


# --- reading qa.jsonl ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, prompt, answers", [
    ('{"prompt": "x? ", "answer": " lion\\n"}', "x?", ["lion"]),
    ('{"prompt": " x?\\n", "answers": ["lion ", "the king"]}', " x?\n", ["lion", "the king"]),
    (b'\xef\xbb\xbf{"prompt": "x?", "answer": "a\xe2\x80\xa8b", "id": 7}\r\n', "x?", ["a\u2028b"]),
])
def test_spaces_and_line_ends_do_not_make_an_answer_wrong(tmp_path, line, prompt, answers):
    question, = read_questions(written(tmp_path / "qa.jsonl", line, "", " "))
    assert question["prompt"] == prompt and accepted_answers(question) == answers
    assert is_right(question, answers[-1])
    twice = written(tmp_path / "qa.jsonl", line, json.dumps(question))
    assert read_questions(twice) == [question] * 2, "allowed, as the answers are the same"


@pytest.mark.parametrize("line, message", [
    ("{", 'must be {"prompt"'),
    ('{"prompt": "y?"}', 'must be {"prompt"'),
    ('{"prompt": ["y"], "answer": "y"}', 'has the prompt ["y"], which must be a text'),
    ('{"prompt": "y?", "answer": " "}', 'has the answer " ", which must be a text'),
    ('{"prompt": "y?", "answers": ["y", 1.5]}', 'has the answer 1.5, which must be a text: write "1.5"'),
    ('{"prompt": "\\ud800?", "answer": "y"}', "must be a text"),
    ('{"prompt": "y?", "answers": []}', 'list of texts as "answers"'),
    ('{"prompt": "y?", "answer": "y", "answers": ["y"]}', 'in place of "answer"'),
    ('{"prompt": "y?", "answer": "y<|endoftext|>"}', "answer of several lines"),
    ('{"prompt": "y?", "answer": "y", "exposures": true}', '"exposures": true, which must be int'),
    ('{"prompt": "y?", "answer": "y", "held_out": "false"}', '"held_out": "false"'),
    ('{"prompt": "x? ", "answer": "z"}', "asks the same as an earlier line"),
])
def test_a_mistake_is_named_with_its_line(tmp_path, line, message):
    path = written(tmp_path / "qa.jsonl", '{"prompt": "x?", "answer": "y"}', line)
    with pytest.raises(ValueError, match=re.escape(f"line 2 of {path} ")) as error:
        read_questions(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_training_refuses_wrong_questions_before_it_starts(run, facts_folder, tmp_path, monkeypatch, capsys):
    """Guards the traceback at the first evaluation, and a recall of 0 for ever."""
    shutil.copytree(facts_folder / "facts", tmp_path / "data" / "facts")
    monkeypatch.setattr(corpus, "DATA", tmp_path / "data")
    for line, message in (({"prompt": "Oslo " * 32, "answer": "Oslo"}, "more than block_size=32"),
                          ({"prompt": "x?", "answer": "y", "exposures": None}, "line 1 of")):
        written(tmp_path / "data" / "facts" / "qa.jsonl", json.dumps(line))
        assert_fails(run, message, capsys)
        assert not list(run.out.glob("*")), "nothing was written"


def test_a_question_fits_if_prompt_and_answer_fill_the_context():
    encoding = make_encoding([], 257)  # a token is a byte
    questions = [{"prompt": "12345", "answer": "78"}, {"prompt": "1", "answers": ["3", "345678"]}]
    check_length(questions, encoding, 8)
    for question in questions:
        with pytest.raises(ValueError, match=re.escape(repr(question["prompt"])) + " has 8 tokens"):
            check_length([question], encoding, 7)


# --- which answers are right --------------------------------------------------------------------------------

@pytest.mark.parametrize("text, normal", [
    *((text, text) for text in ("1.5", "-5", "1/2", "3:00", "50%", "$5", ".5", "1,5", "1,0000", "+", "!", "…",
                                "c++", "c#", ".net", "o'brien", "state-of-the-art", "the–a", "5 - 3", "")),
    ("The Denver  Broncos!", "denver broncos"),
    ("(Oslo, the capital.)", "oslo capital"),
    ("“Oslo” .", "oslo"),
    ("¿Oslo?", "oslo"),
    ("奥斯陆。", "奥斯陆"),
    ("U.S.A.", "u.s.a"),
    ("\".NET\",", ".net"),
    ("(C++).", "c++"),
    ("1,000", "1000"),
    ("-1,234,567.5.", "-1234567.5"),
    ("Zu\u0308rich", "zürich"),  # an accent of its own
    ("A Vitamin A", "vitamin a"),  # an article stands before a word
    ("THE", "the"),  # an airport
])
def test_what_counts_of_an_answer(text, normal):
    assert normalize_answer(text) == normal
    assert normalize_answer(normal) == normal


@pytest.mark.parametrize("text, found", [
    *((text, text) for text in ("Who made C++?", "Who made C?", "Who made C#?", "Is US big?", "Is us big?")),
    ("who made the C++", "Who made C++?"),
    (" who  made c#? ", "Who made C#?"),
    ("Question: What is 5-3 Answer:", "What is 5-3?"),
    ("Where is Zu\u0308rich?", "Where is Zürich?"),
    (" Who\n made  C?", "Who made C?"),
    *((text, None) for text in ("Who made D?", "What is 5*3?", "What is 53?", "What is 5 - 3?")),
])
def test_a_question_is_found_by_its_exact_words_or_by_words_that_only_one_has(text, found):
    """Guards another question, such as one about C in place of C++: its answer would be erased."""
    texts = ["Who made C++?", "Who made C?", "Who made C#?", "Is US big?", "Is us big?", "What is 5+3?",
             "What is 5-3?", "Where is Zürich?"]
    questions = {text: dict(prompt=corpus.QUESTION.format(text), answer="x") for text in texts}
    prompt = corpus.QUESTION.format(text)
    for asked in {text, text if text.startswith("Question") else prompt}:
        assert corpus.find_question(asked, list(questions.values()) * 2) == questions.get(
            found, {"prompt": prompt, "answers": []})


def test_a_question_that_may_be_one_of_several_is_refused():
    questions = [dict(prompt=prompt, answer="x") for prompt in ("Is US big?", "Is us big?", "Is it big?")]
    with pytest.raises(ValueError, match="type it exactly: 'Is US big\\?', 'Is us big\\?'$"):
        corpus.find_question("Is US big", questions)


@pytest.mark.parametrize("text, prompt", [
    ("was ann lee old", "was Ann Lee old"), ("Is Zoe\n or  OLGA smith-jones at bgo?", None),
    ("ANN  LEE or ann leer?", "Ann Lee or ann leer?"), ("is d'arcy lu in", "is D’Arcy Lu in")])
def test_a_new_question_has_names_as_the_corpus_writes_them(text, prompt, capsys):
    questions = [dict(prompt=corpus.QUESTION.format(text), answer="x")
                 for text in ("Who is Ann Lee?", "Is Olga Smith-Jones in?", "What is BGO?",
                              "Is D’Arcy Lu in?")]
    prompt = prompt or "Is Zoe or Olga Smith-Jones at bgo?"
    assert corpus.find_question(text, questions) == {"prompt": f"Question: {prompt} Answer:", "answers": []}
    assert capsys.readouterr().out.startswith("the corpus writes ")


@pytest.mark.parametrize("name, similar", [
    ("Lee Ann", "Ann Lee"), ("ann le", "Ann Lee"), ("Bert O'Neil", "Bert O'Neill"), ("Who is", None)])
def test_only_names_are_offered(name, similar):
    questions = [dict(prompt=f"Question: Who is {known}? Answer:") for known in ("Ann Lee", "Bert O'Neill")]
    with pytest.raises(ValueError, match=f"similar: {similar}$" if similar else "contains this name$"):
        corpus.questions_about(name + "x" * (not similar), questions)


def test_a_name_that_is_whole_is_not_that_of_others():
    jose, ruiz, both = (dict(prompt=corpus.QUESTION.format(text)) for text in (
        "Where was José born?", "Where was José Ruiz born?", "Does José know José Ruiz?"))
    for name in ("josé", " JOSÉ ", "Jose\u0301"):
        assert corpus.about_whole_name(name, [ruiz, jose, both]) == [jose, both]
    assert corpus.about_whole_name("Ruiz", [ruiz, both]) == [ruiz, both]


@pytest.mark.parametrize("name, text, found", [
    ("ann lee", "Where is Ann Lee?", True), ("Ann", "Where is Anna?", False), ("Ann", "JoAnn is", False),
    (" ann  lee ", "Is Ann Lee in?", True),
    ("C", "Who made C?", True), ("C", "Who made C++?", False), ("C++", "Who made C++?", True),
    ("Jean", "Who is Jean-Luc?", False), ("luc", "Who is Jean-Luc?", False), ("Jean", "Jean - or not", True),
    ("jean-luc", "In Jean-Luc's", True), ("Jean-Luc", "Who is Jean-Luc?", True),
    ("D'Arcy Lu", "Is D’Arcy Lu in?", True), ("D’Arcy", "Is D'Arcy in?", True),
    ("DArcy", "Is D’Arcy in?", False),
    ("Zu\u0308rich", "In ZÜRICH?", True), ("Zürich", "In Zu\u0308rich?", True),
    ("Jose", "Is Jose\u0301 in?", False), ("José", "Is Jose\u0301s in?", False),
    ("Ng\u00f4 \u1ea5", "Ngo\u0302 a\u0302\u0301?", True),
    ("小明", "问题：小明在哪里？", True), ("Ken", "私はKenです", True), ("Ken", "私はKenjiです", False),
    ("ミラー", "ミラーは", True), ("สมชาย", "สมชายเกิดที่ไหน", True), ("สม", "สมี", False),
    ("김민수", "김민수는", True), ("김", "\u1100\u1175\u11b7은", True),
    ("राम", "राम कहाँ", True), ("राम", "रामा कहाँ", False)])
def test_a_name_is_found_in_every_script(name, text, found):
    assert (corpus.name_pattern(name).search(text) is not None) == found
    questions = [dict(prompt=text, answer="x")]
    if found:
        assert corpus.questions_about(name, questions) == questions
    else:
        with pytest.raises(ValueError, match="no question of the corpus contains this name") as error:
            corpus.questions_about(name, questions)
        assert not str(error.value).endswith(f"similar: {name}")


@pytest.mark.parametrize("question, unknown", [
    ("Where is Ann Lee?", []), ("where is Zu\u0308rich", []), ("Who is ann?", []), ("WHO IS EVE?", []),
    ("Eve, what is BGO?", []), ("Who is Eve", ["Eve"]),
    ("Was Ann Eve in Oslo, Rome or Bergen?", ["Ann Eve", "Rome"]),
    ("Is it Jean-Luc Bo of Port-au-Prince?", []), ("Is it Jean Bo of Port?", ["Jean Bo", "Port"]),
    ("Question: Where is Le Answer:", ["Le"])])
def test_names_that_the_training_text_does_not_have(question, unknown):
    text = ("The airport BGO serves Bergen.\nAnn Lee is in Oslo.\nANN LEE is in Zürich.\n"
            "Jean-Luc Bo is in Port-au-Prince.")
    encoding = make_encoding([], 257)
    data = SimpleNamespace(encoding=encoding, train=np.array(encoding.encode(text)))
    assert corpus.unknown_names(question, data) == unknown
    data.train = np.broadcast_to(data.train[:1], corpus.SEARCHED + 1)
    assert corpus.unknown_names(question, data) == [], "the text is too long to search"


def test_one_of_several_answers_is_enough():
    question = {"prompt": "x?", "answers": ["Gimpo", "the Seoul airport"]}
    assert is_right(question, "gimpo!") and is_right(question, "Seoul  Airport")
    assert not any(is_right(question, text) for text in ("Gimpo Seoul", "", "the"))


def test_an_answer_that_was_cut_is_wrong():
    """Guards "Oslo" of a model that would go on with "the best city"."""
    encoding = word_encoding([" Oslo the best city\n"], [1], 300)
    question = {"prompt": "x?", "answer": "Oslo"}
    for text, right in ((" Oslo the", False), (" Oslo\r the", True), (" Oslo", False), (" Oslo\n the", True),
                        (" Oslo" + END, True), (" Oslo the best\n", False)):
        text = corpus.decode_answer(encoding, encoding.encode(text, allowed_special="all"))
        assert is_right(question, text) == right and text.startswith("Oslo")


def test_a_bin_is_named_after_its_smallest_number():
    bins = [evaluate.exposure_bin({"exposures": n}) for n in (0, 1, 2, 3, 4, 7, 8, 1000)]
    assert bins == ["0", "1", "2", "2", "4", "4", "8", "512"] and evaluate.exposure_bin({}) == "1"


def test_a_guess_knows_the_commonest_answer_of_each_kind():
    questions = [dict(prompt="1", answer="x", kind="a"), dict(prompt="2", answer="y", kind="a"),
                 dict(prompt="3", answers=["y", "z"], kind="a", exposures=9), dict(prompt="4", answer="v"),
                 dict(prompt="5", answer="w", held_out=True), dict(prompt="6", answer="w", exposures=2)]
    guesses = evaluate.commonest_answers(questions)
    assert guesses == ["y", "y", "y", "w", "w", "w"]
    assert evaluate.shares(questions, guesses) == {
        "all": 3 / 5, "held_out": 1.0, "by_exposure": {"2": 1.0, "8": 1.0}}


# --- airports -----------------------------------------------------------------------------------------------

def airport(code, city, country, zone, name="X"):
    return {"iata": code, "city": city, "country": country, "tz": zone, "name": name}


AIRPORTS = [airport("OSL", "Oslo", "NO", "Europe/Oslo"), airport("BGO", "Bergen", "NO", "Europe/Oslo"),
            airport("JFK", "New York", "US", "America/New_York"),
            airport("THE", "Teresina", "BR", "America/Fortaleza"),
            airport("LGA", "New York", "US", "America/New_York"),
            airport("NUL", "", "US", "America/New_York"),
            airport("PRN", "Pristina", "XK", "Europe/Belgrade"),  # the list of countries has no XK
            airport("GVA", "Geneva", "CH", "Europe/Zurich", "Geneva Cointrin International Airport"),
            airport("ZRH", "Zürich", "CH", "Europe/Zurich")]
COUNTRIES = {"NO": "Norway", "US": "United States", "BR": "Brazil", "CH": "Switzerland"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    table = {airport["iata"]: airport for airport in AIRPORTS}
    monkeypatch.setitem(sys.modules, "airportsdata", SimpleNamespace(load=lambda kind: dict(table)))
    monkeypatch.setattr(airports, "country_names", lambda: COUNTRIES)
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    return tmp_path


def test_airports_are_told_and_asked_as_the_options_say(data):
    prepare.main(["airports", "--exposures=40", "--zipf=1", "--held_out=0.3", "--ask=0.5", "--seed=2"])
    found = corpus.Dataset("airports")
    lines = Counter(found.encoding.decode(found.train.tolist()).split("\n"))
    assert len({question["prompt"] for question in found.questions}) == len(found.questions) == 3 * 7 + 6
    counts, held_out = {}, {}
    for row in AIRPORTS:
        code, city, country = row["iata"], row["city"], COUNTRIES.get(row["country"])
        told = {line: n for line, n in lines.items() if re.search(rf" {code}\b", line)}
        if not city or not country:
            assert not told
            continue
        for kind, answer in (("city", city), ("country", country), ("time zone", row["tz"])):
            forms = [form.format(code, answer) for form in airports.KINDS[kind][0]]
            forms += [f"Question: {form.format(code)} Answer: {answer}" for form in airports.KINDS[kind][1]]
            question, = (q for q in found.questions if q["kind"] == kind and f" {code}" in q["prompt"])
            assert sum(lines[form] for form in forms) == question["exposures"]
            assert question["answers"] == [answer]
        counts[code], held_out[city] = question["exposures"], question["held_out"]
        assert any(line.startswith("Question") for line in told) <= (not question["held_out"])
    question, = (q for q in found.questions if q["kind"] == "code" and " New York?" in q["prompt"])
    assert set(question["answers"]) == {"JFK", "LGA"} and question["held_out"] == held_out["New York"]
    assert question["exposures"] == counts["JFK"] + counts["LGA"]
    order = sorted(counts, key=counts.get, reverse=True)
    assert [counts[code] for code in order] == facts.exposures_by_zipf(7, 1, 40).tolist()
    assert set(order[:3]) == {"OSL", "JFK", "LGA"} and order[3] == "GVA", "well known airports come first"
    assert 0 < sum(held_out.values()) < 6 and any(line.startswith("Question") for line in lines)


def test_a_code_has_as_many_tokens_as_the_option_says(data):
    for code_tokens, pieces in ((1, [" BGO"]), (2, [" B", "GO"]), (3, [" B", "G", "O"])):
        prepare.main(["airports", f"--code_tokens={code_tokens}", "--overwrite"])
        encoding = corpus.Dataset("airports").encoding
        words = [encoding.decode([token]) for token in encoding.encode("The airport BGO serves Bergen.\n")]
        assert words == ["The", " airport", *pieces, " serves", " Bergen", ".", "\n"]


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    monkeypatch.setitem(sys.modules, "airportsdata", None)
    assert_fails(lambda: prepare.main(["airports"]), "pip install airportsdata tzdata", capsys)


def test_the_real_packages_have_what_the_corpus_needs():
    pytest.importorskip("airportsdata"), pytest.importorskip("tzdata")
    by_code = {airport["airport"]: airport for airport in airports.load_airports(np.random.default_rng(1))}
    assert by_code["BGO"] == {"airport": "BGO", "city": "Bergen", "country": "Norway",
                              "time zone": "Europe/Oslo", "rank": 2}
    assert len(by_code) > 5000 and by_code["LHR"]["rank"] == 0 and by_code["GVA"]["rank"] == 1
