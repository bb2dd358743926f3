"""Writes the documents of the bundled tasks; a test compares them with what is committed.

python -m tests.golden.make_tasks
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

TEXTS = Path(__file__).parent.parent.parent / "workers" / "texts"
DOCUMENTS = 200
CONTEXT_WORDS, CHOICE_WORDS, CHOICES = 18, 8, 4
DISTRACTING = 0.25  # share of sentences whose second noun has the other number

NOUNS = [
    ("key", "keys"), ("letter", "letters"), ("ship", "ships"), ("song", "songs"), ("road", "roads"),
    ("bridge", "bridges"), ("house", "houses"), ("river", "rivers"), ("player", "players"),
    ("teacher", "teachers"), ("soldier", "soldiers"), ("picture", "pictures"), ("station", "stations"),
    ("village", "villages"), ("machine", "machines"), ("garden", "gardens"), ("tower", "towers"),
    ("book", "books"), ("horse", "horses"), ("street", "streets"),
]  # fmt: skip
BETWEEN = [
    "near the", "behind the", "from the", "next to the", "of the", "with the", "above the", "beside the",
]  # fmt: skip
VERBS = [
    ("is known to many people", "are known to many people"),
    ("was built by the king", "were built by the king"),
    ("has become very old", "have become very old"),
    ("does not look new", "do not look new"),
    ("was lost in the war", "were lost in the war"),
    ("is still used today", "are still used today"),
]  # fmt: skip


def passages() -> list[tuple[str, str]]:
    """The first words of each paragraph that has no unknown ones, and the words that follow."""
    pairs = []
    for line in (TEXTS / "builtin" / "wikitext2" / "test.txt").read_text("utf-8").splitlines():
        words = line.split()[: CONTEXT_WORDS + CHOICE_WORDS]
        if len(words) == CONTEXT_WORDS + CHOICE_WORDS and not {"<unk>", "="} & set(words):
            pairs.append((" ".join(words[:CONTEXT_WORDS]), " ".join(words[CONTEXT_WORDS:])))
    return pairs


def continuation() -> Iterator[dict[str, object]]:
    """Which of four ends is the real one; the others are of other paragraphs."""
    dice, pairs = random.Random(0), passages()
    for index in sorted(dice.sample(range(len(pairs)), DOCUMENTS)):
        context, real = pairs[index]
        others = [end for number, (_, end) in enumerate(pairs) if abs(number - index) > 20]
        choices = [real, *dice.sample(others, CHOICES - 1)]
        dice.shuffle(choices)
        yield {"context": context, "choices": choices, "answer": choices.index(real)}


def agreement() -> Iterator[dict[str, object]]:
    """Which verb agrees with the subject; the noun between them may have the other number."""
    dice, seen = random.Random(1), set[str]()
    while len(seen) < DOCUMENTS:
        subject, other = dice.sample(NOUNS, 2)
        number, choices = dice.randrange(2), list(dice.choice(VERBS))
        nearer = 1 - number if dice.random() < DISTRACTING else number
        context = f"The {subject[number]} {dice.choice(BETWEEN)} {other[nearer]}"
        if context in seen:
            continue
        seen.add(context)
        answer = number
        if dice.random() < 0.5:
            choices.reverse()
            answer = 1 - number
        yield {"context": context, "choices": choices, "answer": answer}


def lines_of(documents: Iterator[dict[str, object]]) -> str:
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


TASKS = {"continuation": continuation, "agreement": agreement}


if __name__ == "__main__":
    for name, documents in TASKS.items():
        (TEXTS / "tasks" / f"{name}.jsonl").write_text(lines_of(documents()), "utf-8")
