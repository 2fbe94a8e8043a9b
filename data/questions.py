"""
Questions about a corpus: reads data/NAME/qa.jsonl, checks it, and says which answers are right.
"""

import codecs
import difflib
import json
import re
import string
import unicodedata
from pathlib import Path

from data.tokenizer import END
from runtime.cli import fail

QUESTION = "Question: {} Answer:"  # the form that data/prepare.py gives to questions


def read_questions(path: Path) -> list[dict]:
    """
    Reads the questions of a corpus, one JSON object per line. Returns [] if there is no file.

    prompt     what the model continues, such as "Question: ... Answer:"
    answer     the right answer; or answers, a list of answers that are all right
    exposures  optional: how often the training text tells the answer; recall is also given by exposures
    held_out   optional: true if the training text never asks this question; recall counts these apart
    kind       optional: the kind of question, see evaluate.commonest_answers
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n") if path.exists() else []
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    questions, first = [], {}  # first: the number of the line that asks a prompt, and its answers
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                question = parse_question(line)
                answers = sorted(accepted_answers(question))
                earlier, answers_there = first.setdefault(question["prompt"], (number, answers))
                if answers != answers_there:
                    raise ValueError(f'asks the same as line {earlier}: put all right answers into "answers" '
                                     "of one line")
            except ValueError as error:
                fail(f"line {number} of {path} {error}")
            questions.append(question)
    return questions


def parse_question(line: bytes) -> dict:
    """Checks one line of qa.jsonl. A ValueError's message continues "line 3 of qa.jsonl ..."."""
    try:
        question = json.loads(line.decode())
    except ValueError:  # neither JSON nor UTF-8
        question = None
    answers = "answers" if isinstance(question, dict) and "answers" in question else "answer"
    if not isinstance(question, dict) or not {"prompt", answers} <= question.keys():
        raise ValueError('must be {"prompt": "...", "answer": "..."}, or with "answers": ["...", "..."]')
    if {"answer", "answers"} <= question.keys():
        raise ValueError('has "answer" and "answers": leave one out')
    # a text has " lion" as one token after "Answer:", so a space after the prompt would be a token too many
    question["prompt"] = check_text("prompt", question["prompt"]).rstrip(" ")
    if answers == "answer":
        question["answer"] = check_answer(answers, question["answer"])
    elif not isinstance(question["answers"], list) or not question["answers"]:
        raise ValueError('must have a list of texts as "answers"')
    else:
        question["answers"] = [check_answer(answers, answer) for answer in question["answers"]]
    exposures = question.get("exposures", 0)
    if type(exposures) is not int or exposures < 0:  # True is an int for isinstance
        raise ValueError(f'has "exposures": {json.dumps(exposures)}, which must be a whole number; if you do '
                         "not know it, leave it out")
    if not isinstance(question.get("held_out", False), bool):
        raise ValueError(f'has "held_out": {json.dumps(question["held_out"])}, which must be true or false')
    if not isinstance(question.get("kind", ""), str):
        raise ValueError('must have a text as "kind"')
    return question


def check_text(name: str, text) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'must have a text as "{name}", not {json.dumps(text)}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'has half of a character in "{name}"') from None
    return text


def check_answer(name: str, text) -> str:
    """The model's answer is stripped and ends with its line, so no other answer could be right."""
    text = check_text(name, text).strip()
    if "\n" in text or END in text:
        raise ValueError(f'has an answer of several lines, {json.dumps(text)}: the model answers with one')
    return text


def accepted_answers(question: dict) -> list[str]:
    return question["answers"] if "answers" in question else [question["answer"]]


def check_length(questions: list[dict], encoding, block_size: int) -> None:
    """Fails if a question and its answer do not fit into the context, so that its beginning would be lost."""
    for question in questions:
        texts = [f"{question['prompt']} {answer}" for answer in ["", *accepted_answers(question)]]
        if max(len(text.encode()) for text in texts) > block_size:  # a token has a byte or more
            length = max(len(encoding.encode_ordinary(text)) for text in texts)
            if length > block_size:
                fail(f"the question {question['prompt'][:60]!r} has {length} tokens with its answer, more "
                     f"than block_size={block_size}: shorten it, or train with a larger --block_size")


def normalize_answer(text: str) -> str:
    """
    What counts when answers are compared: the words, in lower case, without punctuation and without a, an and
    the. This is the rule of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250). If nothing is left, as of "THE",
    which is an airport, the text counts as it stands.
    """
    text = unicodedata.normalize("NFC", text).lower()  # NFC: accents can be written in two ways
    words = "".join(letter for letter in text if letter not in string.punctuation)
    words = " ".join(re.sub(r"\b(?:a|an|the)\b", " ", words).split())
    return words or text.strip()


def is_right(question: dict, text: str) -> bool:
    return normalize_answer(text) in map(normalize_answer, accepted_answers(question))


# --- finding questions --------------------------------------------------------------------------------------

def find_question(text: str, questions: list[dict]) -> dict:
    """
    The question of the corpus that `text` asks, with or without "Question: ... Answer:" around it, in any
    case and punctuation. If the corpus does not have it: a question without an answer.
    """
    try:
        check_text("question", text)
    except ValueError as error:
        fail(f"--question={text!r} {error}")
    known = {normalize_answer(question["prompt"]): question for question in questions}
    wrapped = QUESTION.format(text.strip())
    for prompt in (text, wrapped):
        if found := known.get(normalize_answer(prompt)):
            return found
    beginning, end = QUESTION.split("{}")
    has_form = not questions or any(question["prompt"].startswith(beginning) for question in questions)
    return {"prompt": wrapped if has_form and not text.rstrip().endswith(end.strip()) else text.rstrip(" "),
            "answers": []}


def name_pattern(name: str) -> re.Pattern:
    if not name.strip():
        fail("--ask= must be a name")
    return re.compile(rf"(?<!\w){re.escape(name.strip())}(?!\w)", re.IGNORECASE)


def questions_about(name: str, questions: list[dict]) -> list[dict]:
    """The questions that contain the name. If there are none, fails and says which names are similar."""
    about = name_pattern(name)
    found = [question for question in questions if about.search(question["prompt"])]
    if not found:
        count = len(re.findall(r"\w+", name))  # similar names have as many words
        words = [re.findall(r"\w+", question["prompt"]) for question in questions]
        names = {" ".join(w[i:i + count]) for w in words for i in range(len(w) - count + 1)}
        lower = {name.lower(): name for name in names}
        similar = [lower[match] for match in difflib.get_close_matches(name.lower(), lower)]
        fail(f"--ask={name}: no question of the corpus contains this name"
             + (f"; similar: {', '.join(similar)}" if similar else ""))
    return found
