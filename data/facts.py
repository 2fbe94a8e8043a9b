"""
Made-up texts of few different words: facts about people, and pairs to be recalled. data/prepare.py has their
options. A text is an array of indices into a list of fragments, so a large corpus takes only seconds.
"""

import numpy as np

from data.tokenizer import END

CITIES = """Accra Algiers Amman Athens Baku Bangkok Beirut Belgrade Berlin Bogota Bergen Cairo
Caracas Chicago Dakar Damascus Delhi Dublin Geneva Glasgow Hanoi Havana Helsinki Istanbul Jakarta
Kabul Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Milan Montreal Nairobi Oslo Paris
Prague Quito Riga Rome Seoul Sofia Tallinn Tunis Vienna Warsaw Zagreb""".split()
JOBS = """actor architect baker banker barber biologist butcher carpenter chemist clerk composer
cook dancer dentist designer diver doctor driver editor electrician engineer farmer firefighter
fisher gardener jeweller journalist judge lawyer librarian mechanic miner nurse painter pharmacist
photographer pilot plumber poet porter potter printer sailor sculptor singer surgeon tailor teacher
translator weaver""".split()
SUBJECTS = """acoustics agronomy algebra anatomy anthropology archaeology astronomy botany
cartography chemistry criminology dance dentistry design ecology economics ethics finance forestry
genetics geography geology geometry history journalism law linguistics literature logic marketing
medicine meteorology music mythology navigation nutrition oceanography optics painting pedagogy
philosophy physics poetry politics psychology rhetoric sociology statistics theology zoology""".split()
MONTHS = "January February March April May June July August September October November December".split()

# attribute: (values, statements, questions). The person comes before the value: a GPT predicts left to right
ATTRIBUTES = {
    "birthplace": (CITIES,
                   ["The birthplace of {} is {}.", "The city where {} was born is {}.",
                    "The records say that {} comes from {}."],
                   ["Where was {} born?", "In which city was {} born?"]),
    "job": (JOBS,
            ["The job of {} is that of a {}.", "For a living {} works as a {}.",
             "The tax form of {} says {}."],
            ["What is the job of {}?", "What does {} do for a living?"]),
    "birthday": ([f"{month} {day}" for month in MONTHS for day in range(1, 29)],
                 ["The birthday of {} is {}.", "Every year {} celebrates on {}.",
                  "The passport of {} gives the date {}."],
                 ["When is the birthday of {}?", "On which day was {} born?"]),
    "subject": (SUBJECTS,
                ["The subject that {} studied is {}.", "At university {} took {}.",
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


def facts_text(config):
    """
    Returns (texts, questions, fragments), arguments of write_corpus. config: a FactsConfig. A model can learn
    these facts only from this corpus.
    """
    rng = np.random.default_rng(config.seed)
    # four times as many possible names as people, so one part of a name does not identify a person
    parts = int(np.ceil(2 * config.people**0.5))
    first, last = make_names(rng, parts, 2), make_names(rng, parts, 3)
    pairs = rng.choice(parts**2, config.people, replace=False)
    law = np.arange(1, config.people + 1) ** -config.zipf
    exposures = np.maximum(1, np.round(law / law.mean() * config.exposures)).astype(int)
    held_out = rng.permutation(config.people) < config.held_out * config.people

    # A line is four fragments: up to the name, first name, last name, and the rest with the value. The number
    # of its rest, in `rests`, says which attribute, statement or question, and value it has
    fragments = [f" {name}" for name in first + last]
    rests, beginnings, offsets = [], [], []  # the fragments of each rest, and of the beginning before it
    for values, statements, questions in ATTRIBUTES.values():
        offsets.append(len(rests))
        for form in (*statements, *(f"Question: {question} Answer: {{}}" for question in questions)):
            beginning, rest = form.split(" {}", 1)
            beginnings += [len(fragments)] * len(values)
            rests += range(len(fragments) + 1, len(fragments) + 1 + len(values))
            fragments += [beginning, *(rest.format(value) + "\n" for value in values)]
    rests, beginnings = np.array(rests), np.array(beginnings)

    told, val, asked = [], [], []  # lines, as person * len(rests) + number of the rest
    for person in range(config.people):
        for offset, (values, statements, questions) in zip(offsets, ATTRIBUTES.values(), strict=True):
            value = rng.integers(len(values))
            asks = (rng.random(exposures[person]) < config.ask) & ~held_out[person]
            asks = np.append(asks, (False, True))  # the last two: a statement for val.bin, and qa.jsonl
            forms = rng.integers(np.where(asks, len(questions), len(statements))) + asks * len(statements)
            lines = person * len(rests) + offset + forms * len(values) + value
            told.append(lines[:-2])
            val.append(lines[-2])
            asked.append(lines[-1])
    told, val, asked = np.concatenate(told), np.array(val), np.array(asked)
    rng.shuffle(told)
    rng.shuffle(val)

    def split_lines(lines):  # (lines, 4): the fragments
        person, rest = np.divmod(lines, len(rests))
        pair = pairs[person]
        return np.stack((beginnings[rest], pair // parts, parts + pair % parts, rests[rest]), axis=1)

    def texts(split):
        lines = told if split == "train" else val
        return (split_lines(lines[i:i + 2**16]).ravel() for i in range(0, len(lines), 2**16))

    if config.questions:  # some of each exposure bin, which double in width (evaluate.py), and of held_out
        bins = np.where(held_out, 0, np.frexp(exposures)[1])[asked // len(rests)]
        order = rng.permutation(len(asked))
        asked = asked[np.sort(np.concatenate([order[bins[order] == number][:config.questions]
                                              for number in np.unique(bins)]))]
    questions = []
    for person, ids in zip(asked // len(rests), split_lines(asked), strict=True):
        prompt, answer = "".join(fragments[i] for i in ids).removesuffix("\n").split(" Answer: ")
        questions.append({"prompt": f"{prompt} Answer:", "answer": answer,
                          "exposures": int(exposures[person]), "held_out": bool(held_out[person])})
    return texts, questions, fragments


def mqar_text(config):
    """
    Returns (texts, questions, fragments), arguments of write_corpus. config: a MqarConfig. A document is one
    line: first all pairs of words, then some of these pairs again. A colon marks the last pair, the question.
    """
    rng = np.random.default_rng(config.seed)
    words = make_names(rng, config.keys + config.values, 3)
    colon, newline, end = len(words), len(words) + 1, len(words) + 2
    fragments = [*(f" {word}" for word in words), " :", "\n", END]

    def draw():  # a line, as fragments; the last four are the question's key, its value, and the end
        keys = rng.choice(config.keys, config.pairs, replace=False)
        values = config.keys + rng.choice(config.values, config.pairs, replace=False)
        pairs = np.stack((keys, values), axis=1)
        asked = pairs[rng.integers(config.pairs, size=config.asks)]
        *context, key, value = *pairs.ravel(), *asked.ravel()
        return np.array([*context, colon, key, value, newline, end])

    few = -(-config.documents // 50)
    lines = {split: [draw() for _ in range(count)]
             for split, count in (("train", config.documents), ("val", few), ("questions", few))}
    questions = []
    for line in lines["questions"]:
        prompt, answer = "".join(fragments[i] for i in line[:-3]), fragments[line[-3]].strip()
        questions.append({"prompt": prompt, "answer": answer})
    return lines.get, questions, fragments
