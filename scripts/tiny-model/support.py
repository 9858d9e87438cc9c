"""Make the data set that the tiny model is fine-tuned on: a shop's support desk.

    python scripts/tiny-model/support.py

A customer writes in words of the pretraining text; the desk answers in a fixed form that pretraining
never showed. The answer follows from the message alone: item and state are copied, the next step is
looked up in NEXT_STEPS.
"""

import json
from pathlib import Path
from random import Random

from world import COLOURS, DAYS, GOODS, NAMES, TOWNS, article

DATA = Path(__file__).resolve().parents[2] / "examples/data"
SEED = 42
TRAIN_ROWS, TEST_ROWS = 400, 64

# what is the matter -> the next step
NEXT_STEPS = {
    ("late", "on its way", "not here"): "ask the driver",
    ("broken", "in pieces", "torn"): "send a new {good}",
    ("too small", "too large", "too long"): "bring back the {good}",
    ("old", "dirty", "not new"): "pay back the money",
}
SENDERS = ("I am {name}.", "I am {name}. I live in {town}.", "I am {name}. I am from {town}.")
PURCHASES = ("I bought {a_item} on {day}.", "On {day} I bought {a_item}.", "I ordered {a_item} on {day}.")
COMPLAINTS = ("The {good} is {state}.", "Now the {good} is {state}.", "My new {good} is {state}.")
REQUESTS = ("Can you help me with it?", "Please write to me.", "What can I do?")
ANSWER = "Item: {colour} {good}\nState: {state}\nThe next step is to {step}."


def row(rng: Random) -> dict:
    states, step = rng.choice(list(NEXT_STEPS.items()))
    colour, good = rng.choice(COLOURS), rng.choice(list(GOODS))
    fields = {
        "name": rng.choice(NAMES), "town": rng.choice(TOWNS), "day": rng.choice(DAYS), "good": good, "colour": colour,
        "a_item": article(f"{colour} {good}"), "state": rng.choice(states),
    }
    parts = (SENDERS, PURCHASES, COMPLAINTS, REQUESTS)
    message = " ".join(rng.choice(part) for part in parts).format(**fields)
    answer = ANSWER.format(**fields, step=step.format(**fields))
    return {"messages": [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]}


def distinct_rows(rng: Random, count: int) -> list[dict]:
    """`count` rows, no two with the same customer message."""
    distinct = {}
    while len(distinct) < count:
        drawn = row(rng)
        distinct.setdefault(drawn["messages"][0]["content"], drawn)
    return list(distinct.values())


if __name__ == "__main__":
    DATA.mkdir(parents=True, exist_ok=True)
    rows = distinct_rows(Random(SEED), TRAIN_ROWS + TEST_ROWS)
    for name, part in (("train", rows[:TRAIN_ROWS]), ("test", rows[TRAIN_ROWS:])):
        (DATA / f"support-{name}.jsonl").write_text("".join(json.dumps(drawn) + "\n" for drawn in part))
