"""A small world in plain English: people, what they buy, and what becomes of it.

`document(rng)` draws one text for pretraining: a story, a letter, a shop's list or a chat in which
an assistant answers in one short sentence or a list. The words below are shared with the task in support.py.
"""

from dataclasses import dataclass
from random import Random

WOMEN = "Anna Maria Clara Emma Helen Julia Laura Nora Olga Paula Rosa Sarah Tina Vera Wilma Zoe".split()
MEN = "Adam Boris Carl David Emil Felix Georg Hugo Ivan Jacob Karl Leo Martin Oscar Peter Victor".split()
NAMES = WOMEN + MEN
TOWNS = "Dover Lisbon Bergen Turin Cork Malmo Ghent Porto Basel Lyon Delft Bath York Riga Graz Brno".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red blue green yellow white black grey brown pink orange silver purple".split()
FOODS = "bread cheese soup rice apples plums cake honey fish beans pears nuts".split()
PETS = "dog cat horse rabbit parrot goat duck mouse".split()
WEATHER = "sunny windy cold warm wet foggy stormy dry".split()
ORDER_NUMBERS = range(200, 500, 2)
JOBS = {
    "baker": "bakes bread", "teacher": "teaches children", "driver": "drives a van", "doctor": "helps sick people",
    "painter": "paints houses", "farmer": "grows food", "singer": "sings songs", "writer": "writes books",
    "cook": "makes soup", "nurse": "looks after the sick", "tailor": "sews coats", "sailor": "works on a ship",
}
GOODS = {
    "lamp": "read at night", "chair": "sit at the table", "table": "eat with friends", "kettle": "make tea",
    "coat": "stay warm", "clock": "tell the time", "bag": "carry books", "bicycle": "ride to work",
    "blanket": "sleep well", "cup": "drink coffee", "mirror": "see your face", "pan": "fry an egg",
    "scarf": "keep your neck warm", "shelf": "store books", "radio": "hear the news", "vase": "hold flowers",
    "hat": "keep the sun away", "rug": "keep the floor warm", "tent": "sleep in the woods", "drum": "make music",
    "pen": "write letters", "bowl": "serve soup", "basket": "carry apples", "phone": "call a friend",
}


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


@dataclass(frozen=True)
class Voice:
    """The grammatical person in which a fact is told."""

    s: str  # subject
    my: str  # possessive
    am: str
    do: str
    e: str  # ending of a verb in the present

    def forms(self) -> dict[str, str]:
        capitals = {"S": self.s[0].upper() + self.s[1:], "My": self.my[0].upper() + self.my[1:]}
        return {**vars(self), **capitals}


FIRST = Voice("I", "my", "am", "do", "")
SECOND = Voice("you", "your", "are", "do", "")


def third(name: str) -> Voice:
    return Voice(name, f"{name}'s", "is", "does", "s")


@dataclass(frozen=True)
class Fact:
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    note: str


FACTS = (
    Fact(("{S} {am} from {town}.", "{S} live{e} in {town}.", "{My} home is in {town}."),
         ("Where {do} {s} live?", "Where is {my} home?"), "{S} live{e} in {town}.", "Town: {town}"),
    Fact(("{S} work{e} as {a_job}.", "{S} {am} {a_job}.", "{My} job is to be {a_job}."),
         ("What is {my} job?", "What {do} {s} work as?"), "{S} work{e} as {a_job}.", "Job: {job}"),
    Fact(("{My} pet is {a_pet}.", "{S} keep{e} {a_pet} at home."),
         ("What is {my} pet?", "Which pet {do} {s} keep?"), "{My} pet is {a_pet}.", "Pet: {pet}"),
    Fact(("{S} like{e} {food}.", "{My} favourite food is {food}."),
         ("What {do} {s} like?", "What is {my} favourite food?"), "{S} like{e} {food}.", "Food: {food}"),
    Fact(("{S} bought {a_item} on {day}.", "On {day} {s} bought {a_item}.", "{S} ordered {a_item} on {day}."),
         ("What did {s} buy?", "What did {s} buy on {day}?"), "{S} bought {a_item}.", "Item: {colour} {good}"),
    Fact(("{S} got {a_item} on {day}.", "On {day} {s} paid for {a_item}."),
         ("When did {s} buy the {good}?", "On which day did {s} get the {good}?"), "It was on {day}.", "Day: {day}"),
    Fact(("The {good} cost {price} pounds.", "{S} paid {price} pounds for the {good}."),
         ("How much was the {good}?", "What did the {good} cost?"), "It cost {price} pounds.", "Price: {price} pounds"),
    Fact(("{My} order number is {number}.", "It was order {number}.", "The {good} is order {number}."),
         ("What is {my} order number?", "Which order was it?"), "It is order {number}.", "Order: {number}"),
    Fact(("The {good} is {state}.", "Now the {good} is {state}.", "{My} new {good} is {state}."),
         ("How is the {good}?", "What about the {good}?"), "The {good} is {state}.", "State: {state}"),
    Fact(("The {good} is {colour}.", "{My} {good} is {colour}."),
         ("Which colour is the {good}?",), "The {good} is {colour}.", "Colour: {colour}"),
    Fact(("The {good} is a present for {friend}.", "{S} want{e} to give the {good} to {friend}."),
         ("Who is the {good} for?", "Who will get the {good}?"), "The {good} is for {friend}.", "Present: for {friend}"),
    Fact(("It was {weather} in {town} on {day}.", "On {day} it was {weather} in {town}."),
         ("How was the weather in {town}?", "How was it on {day}?"), "It was {weather}.", "Weather: {weather}"),
)
FACTS_OF_PEOPLE = FACTS[:4]
STATES = ("new", "old", "broken", "in pieces", "torn", "too small", "too large", "too long", "on its way", "in the shop",
          "late", "lost", "very nice", "not here", "back in the box", "dirty", "not new")
THINGS_TO_SAY = (
    "The driver will send the box today.", "We are sorry that you had to wait.", "Please write to me again.",
    "The shop is closed on Sunday.", "A part of the box was missing.", "I will pay back the money.",
    "Thank you for the message and the present.", "We will bring a new one next week.", "Can you help me with it?",
    "There was a problem with the delivery.", "The next step is to ask the shop.", "I hope that you are well.",
)
NOTE_REQUESTS = ("Please make a note.", "Please write it in a list.", "Can you note it for me?")


def scene(rng: Random) -> dict[str, str]:
    """One person's circumstances, by the fields that FACTS names."""
    good, colour, (name, friend) = rng.choice(list(GOODS)), rng.choice(COLOURS), rng.sample(NAMES, 2)
    job, pet = rng.choice(list(JOBS)), rng.choice(PETS)
    return {
        "name": name, "friend": friend, "good": good, "colour": colour, "a_item": article(f"{colour} {good}"),
        "town": rng.choice(TOWNS), "day": rng.choice(DAYS), "food": rng.choice(FOODS),
        "job": job, "a_job": article(job), "pet": pet, "a_pet": article(pet),
        "weather": rng.choice(WEATHER), "state": rng.choice(STATES),
        "price": rng.randint(10, 99), "number": rng.choice(ORDER_NUMBERS),
    }


def tell(rng: Random, fact: Fact, fields: dict[str, str], voice: Voice) -> str:
    return rng.choice(fact.statements).format(**fields, **voice.forms())


def story(rng: Random) -> str:
    fields = scene(rng)
    facts = [rng.choice(FACTS_OF_PEOPLE), *rng.sample(FACTS[len(FACTS_OF_PEOPLE):], rng.randint(2, 5))]
    she = Voice("she", "her", "is", "does", "s") if fields["name"] in WOMEN else Voice("he", "his", "is", "does", "s")
    voices = [third(fields["name"])] + [she] * (len(facts) - 1)
    return " ".join(tell(rng, fact, fields, voice) for fact, voice in zip(facts, voices))


def letter(rng: Random) -> str:
    fields = scene(rng)
    told = [tell(rng, fact, fields, FIRST) for fact in rng.sample(FACTS, 2)]
    body = " ".join(told + rng.sample(THINGS_TO_SAY, 2))
    recipient = rng.choice([name for name in NAMES if name not in (fields["name"], fields["friend"])])
    return f"Dear {recipient},\n{body}\nKind regards,\n{fields['name']}"


def shop_list(rng: Random) -> str:
    lines = [f"{rng.choice(COLOURS)} {good}: {rng.randint(10, 99)} pounds" for good in rng.sample(list(GOODS), 4)]
    return f"The shop of {rng.choice(NAMES)} in {rng.choice(TOWNS)} has on {rng.choice(DAYS)}:\n" + "\n".join(lines)


def render_chat(turns: list[tuple[str, str]]) -> str:
    """ChatML, as the checkpoint's chat template writes it."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def chat_about_facts(rng: Random) -> str:
    """The user tells some facts and asks for them again."""
    fields = scene(rng)
    first_person = rng.random() < 0.6
    asking, answering = (FIRST, SECOND) if first_person else (third(fields["name"]),) * 2
    facts = rng.sample(FACTS, rng.randint(1, 4))
    asked = rng.sample(facts, rng.randint(1, len(facts)))
    told = [f"I am {fields['name']}."] if first_person and rng.random() < 0.7 else []
    told += [tell(rng, fact, fields, asking) for fact in facts]
    turns = []
    for fact in asked:
        question = rng.choice(fact.questions).format(**fields, **asking.forms())
        turns += [("user", " ".join([*told, question])), ("assistant", fact.answer.format(**fields, **answering.forms()))]
        told = []
    return render_chat(turns)


def chat_about_notes(rng: Random) -> str:
    """The user tells some facts and has them noted, a line each."""
    fields = scene(rng)
    facts = rng.sample(FACTS, rng.randint(1, 4))
    told = [tell(rng, fact, fields, FIRST) for fact in facts]
    note = "\n".join(fact.note.format(**fields) for fact in facts)
    return render_chat([("user", " ".join([*told, rng.choice(NOTE_REQUESTS)])), ("assistant", note)])


def chat_about_things(rng: Random) -> str:
    """Facts of the world that the weights must hold."""
    good, use = rng.choice(list(GOODS.items()))
    job, does = rng.choice(list(JOBS.items()))
    question, answer = rng.choice((
        (f"What can I do with {article(good)}?", f"With {article(good)} you can {use}."),
        (f"How can I {use}?", f"You can {use} with {article(good)}."),
        (f"What does {article(job)} do?", f"{article(job).capitalize()} {does}."),
        (f"Who {does}?", f"{article(job).capitalize()} {does}."),
    ))
    return render_chat([("user", question), ("assistant", answer)])


KINDS_AND_WEIGHTS = {
    story: 1, letter: 1, shop_list: 1, chat_about_facts: 5, chat_about_notes: 3, chat_about_things: 1,
}


def document(rng: Random) -> str:
    kind = rng.choices(list(KINDS_AND_WEIGHTS), weights=list(KINDS_AND_WEIGHTS.values()))[0]
    return kind(rng)
