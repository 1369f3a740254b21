"""Generate the corpora of the demo: SQuAD 2.0 files for task span, CausalQA files for task text.

Both are synthetic. A model that scores well has learned to match a question to a sentence, and nothing about
the world. The SQuAD corpus: reports about invented people and places; train and dev share objects and verbs,
but no people or places, and therefore no facts. The CausalQA corpus: a context has three sentences. One
states why something happened; the other two are distractors, which name a thing that is not the cause ("in
spite of", "long before", "came later"). The model must find the cause and copy it. A small model can learn
this from scratch; guessing among the three is right a third of the time.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST = (
    "Ada Boris Clara Dario Edda Farid Greta Hugo Ines Jonas Kira Leon Mira Nils Olga Pavel Rosa Samir Tilda"
)
LAST_START = (
    "Ald Bren Cor Dren El Fal Gar Hol Ib Jor Kest Lor Mar Nor Or Pel Quin Ros Sel Tor Ul Ver Wal Yar Zan"
)
LAST_END = "berg dal feld gren holm lund mann ner quist rup son strand vik wood"
PLACE_START = (
    "Amber Birch Cedar Dun East Fern Glen Hazel Iron Juniper King Lark Moss North Oak Pine Raven Salt West"
)
PLACE_END = (
    "bay bridge brook cliff dale field ford gate haven hill marsh mouth ridge shore stead ton vale water"
)
PART = {"train": 0, "dev": 1}


@dataclass(frozen=True)
class Kind:
    """A kind of fact: templates of sentences that state it, and of questions about it (role -> question)."""

    things: tuple[str, ...]
    stated: tuple[str, ...]
    asked: dict[str, str]


KINDS = (
    Kind(
        ("lighthouse", "stone bridge", "windmill", "clock tower", "town hall", "observatory", "theatre"),
        (
            "{person} built the {thing} of {place} in {year}.",
            "In {year} the {thing} of {place} was built by {person}.",
        ),
        {
            "person": "Who built the {thing} of {place}?",
            "year": "When was the {thing} of {place} built?",
            "place": "In which town did {person} build the {thing}?",
        },
    ),
    Kind(
        ("silver bell", "bronze statue", "pocket watch", "glass globe", "golden compass", "marble fountain"),
        (
            "A {thing} was given to {place} by {person} in {year}.",
            "In {year}, {person} gave a {thing} to the people of {place}.",
        ),
        {
            "person": "Who gave a {thing} to {place}?",
            "year": "In what year did {place} receive a {thing}?",
            "thing": "What did {person} give to {place}?",
        },
    ),
    Kind(
        (
            "school of music",
            "printing house",
            "sailing club",
            "botanical garden",
            "museum of maps",
            "chess society",
        ),
        (
            "The {thing} in {place} was founded in {year} by {person}.",
            "{person} moved to {place} and founded the {thing} there in {year}.",
        ),
        {
            "person": "Who was the founder of the {thing} in {place}?",
            "year": "When was the {thing} in {place} founded?",
            "thing": "What did {person} found in {place}?",
            "place": "Where is the {thing} that {person} founded?",
        },
    ),
)
FILLERS = (
    "The winters there are long, and the roads are often closed.",
    "Older people still tell the story in different ways.",
    "A small fair is held every summer.",
    "Few of the letters from that time have survived.",
    "Visitors usually arrive by the coastal railway.",
)


def write_demo(folder: Path, *, contexts: int = 600, seed: int = 7) -> tuple[Path, Path]:
    """Write train.json and dev.json (a quarter of the contexts); return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, number in (("train", contexts), ("dev", contexts // 4)):
        path = folder / f"{part}.json"
        path.write_text(json.dumps(make_part(part, number, seed), indent=1), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


def make_part(part: str, contexts: int, seed: int) -> dict[str, Any]:
    """SQuAD 2.0 content: each context has three facts and three questions; a third are unanswerable."""
    source = random.Random(f"{seed}-{part}")
    people, places = _names(part)
    paragraphs = []
    for number in range(contexts):
        facts = [_fact(kind, source, people, places) for kind in source.sample(KINDS, 3)]
        stated = [source.choice(fact["kind"].stated).format(**fact) for fact in facts]
        sentences = list(stated)
        sentences.insert(source.randrange(4), source.choice(FILLERS))
        context = " ".join(sentences)
        qas = []
        for i, fact in enumerate(facts):
            role = source.choice(sorted(fact["kind"].asked))
            qa: dict[str, Any] = {
                "id": f"{part}-{number}-{i}",
                "is_impossible": source.random() < 1 / 3,
                "answers": [],
            }
            if qa["is_impossible"]:
                fact = _other(fact, role, source, people, places)
            else:
                # Search from the fact's own sentence: a year may occur in two sentences.
                start = context.index(fact[role], context.index(stated[i]))
                qa["answers"] = [{"text": fact[role], "answer_start": start}]
            qas.append({**qa, "question": fact["kind"].asked[role].format(**fact)})
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "plainloop demo (synthetic)", "data": [{"title": part, "paragraphs": paragraphs}]}


def _names(part: str) -> tuple[list[str], list[str]]:
    """People and places of a part. Each part takes every other combination, so the parts share none."""
    people = [
        f"{first} {a}{b}" for first in FIRST.split() for a in LAST_START.split() for b in LAST_END.split()
    ]
    places = [a + b for a in PLACE_START.split() for b in PLACE_END.split()]
    return people[PART[part] :: 2], places[PART[part] :: 2]


def _fact(kind: Kind, source: random.Random, people: list[str], places: list[str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "thing": source.choice(kind.things),
        "person": source.choice(people),
        "place": source.choice(places),
        "year": str(source.randrange(1650, 1990)),
    }


def _other(
    fact: dict[str, Any], role: str, source: random.Random, people: list[str], places: list[str]
) -> dict[str, Any]:
    """A fact that is not in the context: one of the things that the question names is replaced."""
    named = [r for r in ("person", "place", "thing") if "{" + r + "}" in fact["kind"].asked[role]]
    changed = source.choice(named)
    pool = {"person": people, "place": places, "thing": fact["kind"].things}[changed]
    return {**fact, changed: source.choice([value for value in pool if value != fact[changed]])}


SUBJECTS = (
    "bridge mill harbour library market tower theatre school railway canal garden museum factory bakery ferry"
    " road chapel palace station tunnel"
).split()
EVENTS = (
    "was closed", "was moved", "was rebuilt", "was abandoned", "opened late", "lost its roof",
    "became famous", "was painted",
)  # fmt: skip
THINGS = (
    "ice fog fire floods thieves storms noise rust smoke debts rats drought strikes rumours frost mud"
    " lightning taxes termites pirates"
).split()
CAUSES = (
    "the {subject} {event} because of {thing} .",
    "because of {thing} , the {subject} {event} .",
    "{thing} caused that the {subject} {event} .",
)
OTHERS = (
    "the {subject} {event} in spite of {thing} .",
    "long before {thing} , the {subject} {event} .",
    "the {subject} {event} , and {thing} came later .",
)
ASKED = ("why is it that the {subject} {event} ?", "what caused that the {subject} {event} ?")
COLUMNS = "id question question_processed context context_processed answer answer_processed".split()


def write_text_demo(
    folder: Path, *, rows: int = 10_000, dev_rows: int = 500, seed: int = 7
) -> tuple[Path, Path]:
    """Write demo_train_original_split.csv and demo_valid_original_split.csv; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, count in (("train", rows), ("valid", dev_rows)):
        path = folder / f"demo_{part}_original_split.csv"
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            source = random.Random(f"{seed}-{part}")
            writer.writerows(_text_row(part, number, source) for number in range(count))
        paths.append(path)
    return paths[0], paths[1]


def _text_row(part: str, number: int, source: random.Random) -> list[str]:
    """One cause, two distractors, and the question that asks for the cause."""
    facts = [
        {"subject": subject, "event": source.choice(EVENTS), "thing": thing}
        for subject, thing in zip(source.sample(SUBJECTS, 3), source.sample(THINGS, 3), strict=True)
    ]
    stated = [source.choice(OTHERS if i else CAUSES).format(**fact) for i, fact in enumerate(facts)]
    source.shuffle(stated)
    question, answer, context = source.choice(ASKED).format(**facts[0]), facts[0]["thing"], " ".join(stated)
    return [f"{part}-{number}", question, question, context, context, answer, answer]
