"""The corpus of `plainloop demo --task text`: generated causes and effects, in the form of CausalQA's CSV.

A context tells three effects with their causes; the question names one effect, the answer is its cause.
That is small enough to be learned from scratch: find the effect, copy what stands as its cause. No pair of
subject and cause is in both parts, so a model that had learned pairs by heart would fail on the dev part.
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
CAUSES = (
    "ice fog fire floods thieves storms noise poverty rust smoke debts rats drought strikes rumours frost mud"
    " earthquakes lightning taxes termites avalanches pirates gold"
).split()
TOLD = (
    "the {subject} {event} because of {cause} .",
    "because of {cause} , the {subject} {event} .",
    "{cause} caused that the {subject} {event} .",
)
ASKED = ("why is it that the {subject} {event} ?", "what caused that the {subject} {event} ?")
COLUMNS = "id question question_processed context context_processed answer answer_processed".split()


def write_text_demo(folder: Path, *, rows: int = 20_000, seed: int = 7) -> tuple[Path, Path]:
    """Write demo_train_original_split.csv and ..._valid_... (500 rows); returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, count in (("train", rows), ("valid", 500)):
        path = folder / f"demo_{part}_original_split.csv"
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            source = random.Random(f"{seed}-{part}")
            writer.writerows(make_row(part, number, source) for number in range(count))
        paths.append(path)
    return paths[0], paths[1]


def make_row(part: str, number: int, source: random.Random) -> list[str]:
    """One row: three facts about three subjects, and a question about one of them."""
    facts = [
        {"subject": subject, "event": source.choice(EVENTS), "cause": _cause(part, subject, source)}
        for subject in source.sample(SUBJECTS, 3)
    ]
    context = " ".join(source.choice(TOLD).format(**fact) for fact in facts)
    fact = source.choice(facts)
    question = source.choice(ASKED).format(**fact)
    return [f"{part}-{number}", question, question, context, context, fact["cause"], fact["cause"]]


def _cause(part: str, subject: str, source: random.Random) -> str:
    """A quarter of the pairs of subject and cause is kept for the dev part."""
    mine = [
        cause
        for i, cause in enumerate(CAUSES)
        if ((SUBJECTS.index(subject) + i) % 4 == 0) == (part == "valid")
    ]
    return source.choice(mine)
