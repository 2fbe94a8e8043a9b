"""
Made-up texts of few different words: facts about people, and pairs to be recalled. data/corpora.py says what
their options mean. A text is an array of indices into a list of fragments, so a large corpus takes only
seconds.
"""

import numpy as np

from data.corpus import QUESTION
from data.tokenizer import END

CITIES = """Accra Algiers Amman Athens Baku Bangkok Beirut Belgrade Berlin Bogota Bergen Cairo Caracas
Chicago Dakar Damascus Delhi Dublin Geneva Glasgow Hanoi Havana Helsinki Istanbul Jakarta Kabul Kyoto Lagos
Lima Lisbon London Madrid Manila Melbourne Milan Montreal Nairobi Oslo Paris Prague Quito Riga Rome Seoul
Sofia Tallinn Tunis Vienna Warsaw Zagreb""".split()
JOBS = """actor architect baker banker barber biologist butcher carpenter chemist clerk composer cook dancer
dentist designer diver doctor driver editor electrician engineer farmer firefighter fisher gardener jeweller
journalist judge lawyer librarian mechanic miner nurse painter pharmacist photographer pilot plumber poet
porter potter printer sailor sculptor singer surgeon tailor teacher translator weaver""".split()
SUBJECTS = """acoustics agronomy algebra anatomy anthropology archaeology astronomy botany cartography
chemistry criminology dance dentistry design ecology economics ethics finance forestry genetics geography
geology geometry history journalism law linguistics literature logic marketing medicine meteorology music
mythology navigation nutrition oceanography optics painting pedagogy philosophy physics poetry politics
psychology rhetoric sociology statistics theology zoology""".split()
MONTHS = "January February March April May June July August September October November December".split()

# attribute: (values, statements, questions). The person comes before the value: a GPT predicts left to right
ATTRIBUTES = {
    "birthplace": (CITIES, ["The birthplace of {} is {}.", "The city where {} was born is {}.",
                            "The records say that {} comes from {}."],
                   ["Where was {} born?", "In which city was {} born?"]),
    "job": (JOBS, ["The job of {} is that of a {}.", "For a living {} works as a {}.",
                   "The tax form of {} says {}."],
            ["What is the job of {}?", "What does {} do for a living?"]),
    "birthday": ([f"{month} {day}" for month in MONTHS for day in range(1, 29)],
                 ["The birthday of {} is {}.", "Every year {} celebrates on {}.",
                  "The passport of {} gives the date {}."],
                 ["When is the birthday of {}?", "On which day was {} born?"]),
    "subject": (SUBJECTS, ["The subject that {} studied is {}.", "At university {} took {}.",
                           "The degree of {} is in {}."],
                ["What did {} study?", "In which subject does {} have a degree?"]),
}


def make_names(rng, count: int, syllables: int) -> list[str]:
    """`count` different pronounceable words with a capital."""
    names = {}  # a dict keeps the order
    while len(names) < count:
        parts = [rng.choice(list("bdfghjklmnprstvwz")) + rng.choice(list("aeiou")) for _ in range(syllables)]
        names["".join(parts).capitalize() + rng.choice(["", *"lmnrst"])] = None
    return list(names)


def exposures_by_zipf(count: int, zipf: float, mean: float) -> np.ndarray:
    """
    How often each of `count` things is told: `mean` times on average, the r-th in proportion to r**-zipf, and
    at least once. exposures_by_zipf(4, 1.0, 12) -> [23, 12, 8, 6]
    """
    law = np.arange(1.0, count + 1) ** -zipf
    return np.maximum(1, np.round(law / law.mean() * mean)).astype(int)


def draw_forms(rng, exposures: int, ask: float, statements: list[str], questions: list[str]) -> np.ndarray:
    """
    In which words to tell a fact: numbers of (*statements, *questions), `exposures` of them for train.bin, of
    which a share `ask` are questions, then a statement for val.bin, then a question for qa.jsonl.
    """
    asks = np.append(rng.random(exposures) < ask, (False, True))
    return rng.integers(np.where(asks, len(questions), len(statements))) + asks * len(statements)


def facts_text(people: int, exposures: float, zipf: float, ask: float, held_out: float, questions: int,
               seed: int):
    """Returns (texts, questions, fragments), arguments of write_corpus."""
    rng = np.random.default_rng(seed)
    # four times as many possible names as people, so one part of a name does not identify a person
    parts = int(np.ceil(2 * people**0.5))
    first, last = make_names(rng, parts, 2), make_names(rng, parts, 3)
    names = np.stack(np.divmod(rng.choice(parts**2, people, replace=False), parts), axis=1) + (0, parts)
    exposures = exposures_by_zipf(people, zipf, exposures)
    is_held_out = rng.permutation(people) < held_out * people

    # A line is six fragments: up to the name, first name, last name, up to the value, the value, and the end
    fragments = [f" {name}" for name in first + last]
    attributes = []  # each with the numbers of its values (n,) and of the other fragments of its forms (n, 3)
    for values, statements, asked in ATTRIBUTES.values():
        value_ids = len(fragments) + np.arange(len(values))
        fragments += [f" {value}" for value in values]
        forms = [*statements, *(QUESTION.format(question) + " {}" for question in asked)]
        form_ids = len(fragments) + np.arange(3 * len(forms)).reshape(-1, 3)
        fragments += [part for form in forms for part in (form + "\n").split(" {}")]
        attributes.append((value_ids, form_ids, statements, asked))

    lines = []  # of each fact: those for train.bin, one for val.bin, one for qa.jsonl
    for person in range(people):
        for value_ids, form_ids, statements, asked in attributes:
            value = value_ids[rng.integers(len(value_ids))]
            drawn = draw_forms(rng, exposures[person], ask * (not is_held_out[person]), statements, asked)
            fact = np.empty((len(drawn), 6), np.int32)
            fact[:, [0, 3, 5]] = form_ids[drawn]
            fact[:, [1, 2, 4]] = *names[person], value
            lines.append(fact)
    train, val = np.concatenate([fact[:-2] for fact in lines]), np.stack([fact[-2] for fact in lines])
    shuffled = {"train": train[rng.permutation(len(train))], "val": val[rng.permutation(len(val))]}

    def texts(split):
        lines = shuffled[split]
        return (lines[i:i + 2**16].ravel() for i in range(0, len(lines), 2**16))

    person_of, chosen = np.arange(people).repeat(len(attributes)), range(len(lines))
    if questions:  # some of each exposure bin, which double in width (evaluate.py), and of those held out
        bins = np.where(is_held_out, 0, np.frexp(exposures)[1])[person_of]
        order = rng.permutation(len(lines))
        chosen = np.sort(np.concatenate([order[bins[order] == number][:questions]
                                         for number in np.unique(bins)]))
    found = []
    for fact in chosen:
        *prompt, value, _ = (fragments[i] for i in lines[fact][-1])
        found.append({"prompt": "".join(prompt), "answer": value.strip(),
                      "exposures": int(exposures[person_of[fact]]),
                      "held_out": bool(is_held_out[person_of[fact]])})
    return texts, found, fragments


def mqar_text(documents: int, pairs: int, asks: int, keys: int, values: int, seed: int):
    """
    A document is one line: first all pairs of words, then some of these pairs again. A colon marks the last
    pair, which the model must complete. Returns (texts, questions, fragments), arguments of write_corpus.
    """
    rng = np.random.default_rng(seed)
    words = make_names(rng, keys + values, 3)
    colon, newline, end = range(len(words), len(words) + 3)
    fragments = [*(f" {word}" for word in words), " :", "\n", END]

    def draw():  # a line, as fragments; the last four are the question's key, its value, and the end
        told = np.stack((rng.choice(keys, pairs, replace=False),
                         keys + rng.choice(values, pairs, replace=False)), axis=1)
        *context, key, value = *told.ravel(), *told[rng.integers(pairs, size=asks)].ravel()
        return np.array([*context, colon, key, value, newline, end])

    few = -(-documents // 50)
    texts = {"train": [draw() for _ in range(documents)], "val": [draw() for _ in range(few)]}
    questions = [{"prompt": "".join(fragments[i] for i in line[:-3]), "answer": fragments[line[-3]].strip()}
                 for line in (draw() for _ in range(few))]
    return texts.get, questions, fragments
