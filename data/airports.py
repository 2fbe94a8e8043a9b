"""
The text and the questions of the corpus "airports": the IATA codes of real airports, their cities, countries
and time zones. The data come from two packages: pip install airportsdata tzdata. See docs/airports.md.
"""

from importlib.resources import files

from runtime.cli import fail

import numpy as np

from data.corpus import QUESTION
from data.facts import draw_forms, exposures_by_zipf

# kind of fact: (statements, questions). The first {} is what the fact is about, the second is the answer. A
# code is about a city, everything else about an airport
KINDS = {
    "city": (["The airport {} serves {}.", "Flights to {} land near {}.", "The city with the code {} is {}."],
             ["Which city has the airport {}?", "Which city does {} serve?"]),
    "country": (["The country of {} is {}.", "The airport {} is on the soil of {}.",
                 "Passengers who fly to {} need a visa for {}."],
                ["In which country is {}?", "Which country has the airport {}?"]),
    "time zone": (["The time zone of {} is {}.", "Clocks at the airport {} show the time of {}.",
                   "The timetable for {} is in the time of {}."],
                  ["What is the time zone of {}?", "Which time zone does {} use?"]),
    "code": (["The airport code of {} is {}.", "Bags for the city of {} carry the tag {}.",
              "An airport in the city of {} has the code {}."],
             ["What is the airport code of {}?", "Which code is on bags for the city of {}?"]),
}
SPLITS = {  # tokens per code: what a tokenizer splits off before it splits a text into words
    1: "",  # " BGO"
    2: r" [A-Z](?=[A-Z]{2}\b)|",  # " B", "GO"
    3: r" ?[A-Z](?![a-z])|",  # " B", "G", "O"
}


def country_names() -> dict[str, str]:
    """{"NO": "Norway", ...} from the time zone database."""
    lines = (files("tzdata") / "zoneinfo" / "iso3166.tab").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


def load_airports(rng) -> list[dict]:
    """
    The airports whose city and country have names. First come those of cities that a time zone is named
    after, such as Europe/Oslo, then those named International, then all others; each group in random order.
    """
    try:
        import airportsdata
        countries = country_names()
    except ImportError as error:
        fail(f"{error}: the corpus airports needs two packages: pip install airportsdata tzdata")
    airports = []
    for code, airport in sorted(airportsdata.load("IATA").items()):
        if airport["city"] and airport["country"] in countries:
            names_zone = airport["tz"].split("/")[-1].replace("_", " ") == airport["city"]
            airports.append({"airport": code, "city": airport["city"], "time zone": airport["tz"],
                             "country": countries[airport["country"]],
                             "rank": 0 if names_zone else 1 if "International" in airport["name"] else 2})
    rng.shuffle(airports)
    return sorted(airports, key=lambda airport: airport["rank"])


def airport_text(airports: int, exposures: float, zipf: float, ask: float, held_out: float, seed: int):
    """Returns (texts, questions, fragments), arguments of write_corpus: each fragment is a line."""
    rng = np.random.default_rng(seed)
    chosen = load_airports(rng)[:airports or None]
    counts = exposures_by_zipf(len(chosen), zipf, exposures).tolist()
    cities = dict.fromkeys(airport["city"] for airport in chosen)
    cities_held_out = {city for city in cities if rng.random() < held_out}

    lines, texts, asked = {}, {"train": [], "val": []}, {}  # lines: {line: its number}
    for airport, count in zip(chosen, counts, strict=True):
        is_held_out = airport["city"] in cities_held_out
        for kind, (statements, questions) in KINDS.items():
            about, answer = ((airport["city"], airport["airport"]) if kind == "code" else
                             (airport["airport"], airport[kind]))
            forms = [*statements, *(f"{QUESTION.format(question)} {{}}" for question in questions)]
            drawn = draw_forms(rng, count, ask * (not is_held_out), statements, questions)
            told = [lines.setdefault(forms[i].format(about, answer) + "\n", len(lines)) for i in drawn[:-1]]
            texts["train"] += told[:-1]
            texts["val"] += told[-1:]
            # a city with several airports is asked about once, and any of their codes is right
            prompt = forms[drawn[-1]].format(about, "").rstrip()
            question = asked.setdefault((kind, about), {"prompt": prompt, "answers": [], "exposures": 0,
                                                        "held_out": is_held_out, "kind": kind})
            question["answers"].append(answer)
            question["exposures"] += count
    texts = {split: [rng.permutation(numbers)] for split, numbers in texts.items()}
    return texts.get, list(asked.values()), list(lines)
