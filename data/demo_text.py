"""The corpus of `plainloop demo --task text`: generated causes and effects, in the form of CausalQA's CSV.

A context has three sentences. One tells why something happened, the others what happened in spite of, or long
before, things of the same kind. The answer is the cause, which the model has to tell from the two others
and to copy. A small model learns that from scratch; who guesses among the three is right in a third of the
cases.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

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
    """Write demo_train_original_split.csv and demo_valid_original_split.csv; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, count in (("train", rows), ("valid", dev_rows)):
        path = folder / f"demo_{part}_original_split.csv"
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            source = random.Random(f"{seed}-{part}")
            writer.writerows(_row(part, number, source) for number in range(count))
        paths.append(path)
    return paths[0], paths[1]


def _row(part: str, number: int, source: random.Random) -> list[str]:
    """One cause among two things that are none, and the question for it."""
    facts = [
        {"subject": subject, "event": source.choice(EVENTS), "thing": thing}
        for subject, thing in zip(source.sample(SUBJECTS, 3), source.sample(THINGS, 3), strict=True)
    ]
    told = [source.choice(OTHERS if i else CAUSES).format(**fact) for i, fact in enumerate(facts)]
    source.shuffle(told)
    question, answer, context = source.choice(ASKED).format(**facts[0]), facts[0]["thing"], " ".join(told)
    return [f"{part}-{number}", question, question, context, context, answer, answer]
