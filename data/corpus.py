"""
Reads a corpus that data/prepare.py made: its tokens, batches and questions. Turns tokens back into text, and
says which answers are right. Two functions import PyTorch themselves, so data.prepare starts without it.
"""

import difflib
import hashlib
import itertools
import json
import os
import re
import shlex
import unicodedata
from collections import defaultdict
from pathlib import Path

from runtime.cli import fail, print_text, read_lines

import numpy as np
import regex

from data.tokenizer import END, encoding_from_json

BLOCK, HASHED = 2**22, 2**27  # bytes: read at once for a digest, and hashed at each end of a file
DATA = Path(__file__).resolve().parent  # the corpus NAME is the folder DATA / NAME
QUESTION = "Question: {} Answer:"  # the form that a corpus gives to its questions
SEARCHED = 10_000_000  # tokens of the training text in which names are looked for; more takes too long
WORD = re.compile(r"\w+|[^\w\s]")


# --- tokens and text ----------------------------------------------------------------------------------------

def digest(path: Path) -> str:
    """SHA-256 of a file. In the middle of a very large one, only the size counts: this saves seconds."""
    size = path.stat().st_size if path.exists() else 0
    digest = hashlib.sha256(str(size).encode())
    for start in range(0, size, BLOCK):
        if not HASHED <= start < size - HASHED:
            digest.update(np.fromfile(path, np.uint8, BLOCK, offset=start))
    return digest.hexdigest()


class Dataset:
    """
    The corpus in data/NAME: token ids `train` and `val` (memory-mapped files), `val_bytes` (of the validation
    text as UTF-8; 0: unknown), `encoding`, `questions`, `note`, a sentence about the corpus or "", and
    `digests`, SHA-256 of {"text": train.bin and val.bin, "questions": qa.jsonl}.
    """

    def __init__(self, name: str):
        self.name, folder = name, DATA / name
        if not (folder / "meta.json").exists():
            there = ", ".join(sorted(path.parent.name for path in DATA.glob("*/meta.json")))
            fail(f"no corpus in {folder}; there are: {there or 'none'}. From your own text: python -m "
                 f"data.prepare text --name={shlex.quote(name)} --input FILE ...; others: "
                 "python -m data.prepare --help")
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.encoding_json, self.encoding = meta["encoding"], encoding_from_json(meta["encoding"])
            self.note, self.val_bytes = meta.get("note", ""), meta.get("val_bytes", 0)
            self.train, self.val = (np.memmap(folder / name, meta["dtype"], "r")
                                    for name in ("train.bin", "val.bin"))
            if (len(self.train), len(self.val)) != (meta["train_tokens"], meta["val_tokens"]):
                raise ValueError("train.bin or val.bin has another size")
            text = [digest(folder / name) for name in ("train.bin", "val.bin")]
            if meta.get("sha256", text) != text:  # prepare was killed while it replaced the files
                raise ValueError("train.bin or val.bin is not the one that meta.json describes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"the data in {folder} is damaged ({error}): make it again with python -m data.prepare")
        self.questions = read_questions(folder / "qa.jsonl")
        self.digests = {"text": " ".join(text), "questions": digest(folder / "qa.jsonl")}


def load_dataset(name: str) -> Dataset:
    """Loads the same corpus in all processes."""
    from runtime.distributed import gather_objects
    data = Dataset(name)
    copies = gather_objects((data.encoding_json, data.digests))
    if any(copy != copies[0] for copy in copies):
        fail(f"{name} differs between machines: copy data/{name} from one to the others")
    return data


def draw_batch(tokens: np.ndarray, count: int, block_size: int, *key: int):
    """
    Draws `count` windows of `tokens` with random numbers that depend only on `key`. Returns this process's
    share: x, y (count / processes, block_size), int64. y has the next token for each token of x.
    """
    import torch

    from runtime.distributed import RANK, WORLD_SIZE
    starts = np.random.default_rng(key).integers(len(tokens) - block_size, size=count)[RANK::WORLD_SIZE]
    windows = torch.from_numpy(np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def token_bytes(encoding, token: int) -> bytes:
    """b"" for an id that the encoding does not use: an untrained model may produce it."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return b""


def decode(encoding, tokens: list[int]) -> str:
    return b"".join(token_bytes(encoding, token) for token in tokens).decode(errors="replace")


def line_ends(encoding) -> set[int]:
    """The tokens that end an answer: those with the end of a line in them, such as ".\\n", and END."""
    return {encoding.eot_token} | {token for text, token in encoding._mergeable_ranks.items()
                                   if b"\n" in text or b"\r" in text}


def decode_answer(encoding, tokens: list[int]) -> str:
    """tokens -> text, up to the end of the line or document. An answer that was cut ends with "…"."""
    text = decode(encoding, tokens)
    answer = re.split(rf"[\r\n]|{re.escape(END)}", text)[0]
    return answer.strip() + "…" * (answer == text)


# --- reading questions --------------------------------------------------------------------------------------

def read_questions(path: Path) -> list[dict]:
    """
    Reads the questions of a corpus, one JSON object per line. Returns [] if there is no file.

    prompt     what the model continues, such as "Question: ... Answer:"
    answer     the right answer; or answers, a list of answers that are all right
    exposures  optional: how often the training text tells the answer; recall is also given by exposures
    held_out   optional: true if the training text never asks this question; recall counts these apart
    kind       optional: the kind of question, see evaluate.commonest_answers
    """
    questions, answers_to = [], {}
    for number, line in enumerate(read_lines(path) if path.exists() else [], 1):
        if line.strip():
            try:
                question = parse_question(line)
                answers = set(accepted_answers(question))
                if answers_to.setdefault(question["prompt"], answers) != answers:
                    raise ValueError('asks the same as an earlier line: put all right answers into "answers"')
            except ValueError as error:
                fail(f"line {number} of {path} {error}")
            questions.append(question)
    return questions


def parse_question(line: str) -> dict:
    """Checks one line of qa.jsonl. A ValueError's message continues "line 3 of qa.jsonl ..."."""
    try:
        question = json.loads(line)
    except ValueError:
        question = None
    if (not isinstance(question, dict) or "prompt" not in question
            or ("answer" in question) == ("answers" in question)):
        raise ValueError('must be {"prompt": "...", "answer": "..."}, or with "answers": ["...", "..."] '
                         'in place of "answer"')
    if not isinstance(accepted_answers(question), list) or not accepted_answers(question):
        raise ValueError('must have a list of texts as "answers"')
    answers = [check_text(text, "answer").strip() for text in accepted_answers(question)]
    if any(re.search(rf"[\r\n]|{re.escape(END)}", text) for text in answers):
        raise ValueError("has an answer of several lines: the model answers with one")
    question |= {"answers": answers} if "answers" in question else {"answer": answers[0]}
    # a text has " lion" as one token after "Answer:", so a space after the prompt would be a token too many
    question["prompt"] = check_text(question["prompt"], "prompt").rstrip(" ")
    for name, kind in {"exposures": int, "held_out": bool, "kind": str}.items():
        if type(question.get(name, kind())) is not kind:  # not isinstance: True is an int, too
            raise ValueError(f'has "{name}": {json.dumps(question[name])}, which must be {kind.__name__}')
    return question


def check_text(text, name: str) -> str:
    # the pattern is half of a character, which has no UTF-8
    if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
        quotes = f': write "{text}", in quotes' if isinstance(text, (int, float)) else ""
        raise ValueError(f"has the {name} {json.dumps(text)}, which must be a text{quotes}")
    return text


def check_length(questions: list[dict], encoding, block_size: int) -> None:
    """Fails if a question and its answer do not fit into the context, so that its beginning would be lost."""
    for question in questions:
        for answer in accepted_answers(question) or [""]:
            length = len(encoding.encode_ordinary(f"{question['prompt']} {answer}"))
            if length > block_size:
                fail(f"the question {question['prompt'][:60]!r} has {length} tokens with its answer, more "
                     f"than block_size={block_size}: shorten it, or train with a larger --block_size")


# --- which answers are right --------------------------------------------------------------------------------

def accepted_answers(question: dict) -> list[str]:
    return question["answers"] if "answers" in question else [question["answer"]]


# what does not count at the edge of a word: the marks of sentences, quotes and brackets
EDGES = ".,;:!?¿¡\"'`“”„‘’‚«»‹›()[]{}。，、；：！？「」『』（）《》【】،؛؟۔।"
THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?!,?\d)")


def normalize_answer(text: str) -> str:
    """
    What counts when answers are compared: the words, in lower case, without a, an and the before a word, and
    without the marks of sentences at their edges: "The Denver Broncos!" -> "denver broncos". A mark that
    belongs to a word or number counts: "C++", "-5", "1.5", ".NET". If nothing is left, the text counts as it
    stands.
    """
    text = unicodedata.normalize("NFC", text).lower()  # NFC: accents can be written in two ways
    words = [word.lstrip(EDGES.replace(".", "")).rstrip(EDGES) for word in text.split()]
    words = list(filter(None, words))
    words = [word for word in words[:-1] if word not in ("a", "an", "the")] + words[-1:]
    return THOUSANDS.sub(lambda match: match[0].replace(",", ""), " ".join(words)) or text.strip()


def is_right(question: dict, text: str) -> bool:
    return normalize_answer(text) in map(normalize_answer, accepted_answers(question))


# --- finding questions --------------------------------------------------------------------------------------

def find_question(text: str, questions: list[dict]) -> dict:
    """
    The question of the corpus that `text` asks, with or without "Question: ... Answer:" around it, word for
    word or with other case and punctuation. If the corpus does not have it: a question without an answer,
    with names as the corpus writes them.
    """
    if not text.strip():
        fail("name a question: --question='Who is ...?'")
    wrapped = QUESTION.format(" ".join(text.split()))
    known = {question["prompt"]: question for question in questions}
    for prompt in (text.rstrip(" "), wrapped):
        if prompt in known:
            return known[prompt]
    asked = {normalize_answer(text), normalize_answer(wrapped)}
    alike = [prompt for prompt in known if normalize_answer(prompt) in asked]
    if len(alike) > 1:
        fail(f"--question={text} may be one of these, type it exactly: {', '.join(map(repr, alike[:9]))}"
             + ", ..." * (len(alike) > 9))
    if alike:
        return known[alike[0]]
    beginning, end = QUESTION.split(" {} ")
    has_form = not questions or any(question["prompt"].startswith(beginning) for question in questions)
    is_bare = has_form and not text.rstrip().endswith(end)
    return {"prompt": restore_names(wrapped if is_bare else text.rstrip(" "), questions), "answers": []}


# scripts that write words without spaces, or a name and what follows it as one word
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
SPACED = rf"[^\W{UNSPACED}]"  # a letter or digit of the other scripts


APOSTROPHES = "'’ʼ"


def name_pattern(name: str) -> regex.Pattern:
    """
    Finds a name in any case, with any apostrophe, and with each accent as one character or two. It must be a
    whole word, and Jean is not found in Jean-Luc. In scripts without spaces it may stand anywhere: 小明 is
    found in 小明在哪里.
    """
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    if not name:
        fail("name whom or what, as in --ask='Ann Lee'")
    letters = []
    for letter in regex.findall(r"\X", name):  # with its accents
        forms = APOSTROPHES if letter in APOSTROPHES else dict.fromkeys(
            regex.escape(unicodedata.normalize(form, letter)) for form in ("NFC", "NFD"))
        letters.append(f"(?:{'|'.join(forms)})")
    before = "" if regex.match(f"[{UNSPACED}]", name) else rf"(?<!{SPACED}-?)"
    after = r"(?!\p{M})" if regex.search(rf"[{UNSPACED}]\Z", name) else rf"(?!-?{SPACED}|[+#])"  # C++
    return regex.compile(before + "".join(letters) + after, regex.IGNORECASE)


# capitalised words, but not the first of a sentence: "Is Ann O'Neill or Eve Lu-Roe in?" has two names
CAPITALISED = r"(?:\p{Lu}['’])?\p{Lu}\w+(?:-\w+| (?:\p{Lu}['’])?\p{Lu}\w+)*"
NAME = regex.compile(rf"(?<=[\p{{Ll}}\p{{M}},] ){CAPITALISED}")


def names_in(questions: list[dict]) -> set[str]:
    return {name for question in questions for name in NAME.findall(question["prompt"])}


def known_names(text: str, questions: list[dict]) -> list[str]:
    """The names of the questions that a text has, too."""
    return [name for name in names_in(questions) if name in text and name_pattern(name).search(text)]


def restore_names(text: str, questions: list[dict]) -> str:
    """
    Writes the names of the questions as these do: "Is ann lee in?" -> "Is Ann Lee in?". In another case they
    have other tokens. Names of one word stay: "the" may be the airport THE.
    """
    def plain(text):
        return text.lower().translate(dict.fromkeys(map(ord, APOSTROPHES), "'"))

    lower = plain(text)  # finds most names faster than their patterns do
    for name in names_in(questions):
        if " " in name and name not in text and plain(name) in lower and name_pattern(name).search(text):
            print_text(f"the corpus writes {name}")
            text = name_pattern(name).sub(lambda _, name=name: name, text)
    return text


def unknown_names(prompt: str, data: Dataset) -> list[str]:
    """The names in a question that the training text does not have: "Where is Ada Lu?" -> ["Ada Lu"]."""
    beginning, end = QUESTION.split("{}")
    names = NAME.findall(prompt.removeprefix(beginning).removesuffix(end))
    if not names or len(data.train) > SEARCHED:
        return []
    text = data.encoding.decode(data.train.tolist())
    return [name for name in names if not name_pattern(name).search(text)]


def questions_about(name: str, questions: list[dict]) -> list[dict]:
    about = name_pattern(name)
    if not questions:
        fail(f"--ask={name}: the corpus has no questions (docs/airports.md tells how to write some)")
    found = [question for question in questions if about.search(question["prompt"])]
    if not found:
        names = {" ".join(sorted(known.lower().split())): known for known in sorted(names_in(questions))}
        similar = difflib.get_close_matches(" ".join(sorted(name.lower().split())), names)  # in any order
        fail(f"--ask={name}: no question of the corpus contains this name"
             + (f"; similar: {', '.join(map(names.get, similar))}" if similar else ""))
    return found


def about_whole_name(name: str, questions: list[dict]) -> list[dict]:
    """Of questions about Ann and about Ann Lee: those about Ann, if there are any."""
    about = name_pattern(name)
    return [part for part in questions if any(map(about.fullmatch, names_in([part])))] or questions


def find_name(question: dict, questions: list[dict]) -> str | None:
    """
    Whom a question is about: what it has where others of its form have something else. Questions of a form
    begin with the same words, and end with the same words. Of all forms, the one counts where the most
    different words come next at both ends, in few questions. None if that is not clear.
    """
    own = list(WORD.finditer(question["prompt"]))
    asked = list(map(WORD.findall, dict.fromkeys(part["prompt"] for part in [question, *questions])))
    words, forms = asked[0], defaultdict(list)
    for other in asked:
        first, last = (len(os.path.commonprefix([words[::step], other[::step]])) for step in (1, -1))
        for i in range(first + 1):  # i words are the same at the beginning, and j at the end
            for j in range(min(last + 1, len(words) - i, len(other) - i)):
                forms[i, j].append(other)
    different = {(i, j): min(len({other[i] for other in part}), len({other[-1 - j] for other in part}))
                 for (i, j), part in forms.items()}
    i, j = max(forms, key=lambda form: different[form]**4 / len(forms[form]))
    beside = max(len({other[i - 1] for other in forms[i - 1, j]}),
                 len({other[-j] for other in forms[i, j - 1]}))
    # other questions have the same names, but not the same clauses: "Where was Ann born" is no name
    text = "\n".join(f" {' '.join(words)} " for words in asked)
    names = [f" {' '.join(other[i:len(other) - j])} " for other in forms[i, j][:9]]
    are_names = sum(text.count(name) > 1 for name in names) > len(names) / 2
    if different[i, j] > (4 if are_names else 9) and beside < 3:  # 3: a word beside it may belong to the name
        return question["prompt"][own[i].start():own[-1 - j].end()]


def lines_with(name: str, data: Dataset) -> list[str]:
    """The lines of the training text that contain the name; of long lines, what stands near it."""
    lines, about = decode(data.encoding, data.train[:SEARCHED].tolist()).split("\n"), name_pattern(name)
    return [line[max(0, match.start() - 200):match.end() + 200]
            for line in lines if (match := about.search(line))]


def warn_of_new_words(statements: list[str], data: Dataset) -> None:
    """Says which names and words are new to the corpus and more than two tokens, and offers names of two."""
    def tokens(text):
        return len(data.encoding.encode_ordinary(f" {text}"))

    words = dict.fromkeys(regex.findall(rf"(?:{CAPITALISED})|[^\W\d_]{{2,}}", "\n".join(statements)))
    if cut := [word for word in words if tokens(word) > 2 and not lines_with(word, data)]:
        known = [name.split() for name in sorted(names_in(data.questions)) if tokens(name) == 2]
        names = (f"{a[0]} {b[1]}" for a, b in itertools.pairwise(known) if len(a) == len(b) == 2)
        names = list(itertools.islice((name for name in names if not lines_with(name, data)), 3))
        new = ", ".join(f"{word} ({tokens(word)} tokens)" for word in cut)
        print_text(f"new to the corpus: {new}. A name of more than two tokens may not be learnt."
                   f"{' These have two: ' * bool(names)}{', '.join(names)}")
