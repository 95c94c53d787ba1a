"""A made-up world to ask questions about, where SQuAD and HotpotQA are not at hand.

People with unusual names, each with a document; every fact's answer occurs in its document only. It has the form of question
answering and none of its difficulty, so whatever is measured with it is ``synthetic``.
"""

from __future__ import annotations

from functools import lru_cache

from mtrain_eval.ruler.qa_data import Question, Questions
from mtrain_eval.ruler.words import word_list
from mtrain_eval.seeds import sample_random

PEOPLE = 1500

_OPENINGS = (
    "{name} was born in {town} and is remembered there to this day.",
    "Few people in {town}, where {name} was born, would have guessed how this life would go on.",
    "{name}, who was born in {town}, left home at an early age.",
)
_MIDDLES = (
    "For many years {name} worked as {craft} and kept a careful diary of every journey.",
    "The diaries of {name} describe the work of {craft} in great detail.",
    "Trained as {craft}, {name} never gave up that trade.",
)
_TEACHERS = (
    "The trade was learnt from {teacher}, who asked for no money.",
    "Everything that mattered, {name} used to say, came from the lessons of {teacher}.",
)
_ENDINGS = (
    "In the old house of {name} stands {thing}, though it has been repaired more than once.",
    "Late in life {name} gave away a large collection and kept only {thing}.",
    "Visitors are shown {thing}, the only belonging of {name} that was not sold.",
)
_FILLERS = (
    "The winters of those years were long, and letters took weeks to arrive.",
    "Not all that has been written about this can be true.",
    "Several of the papers were lost when the archive moved to another building.",
    "Neighbours spoke of a patient and rather silent person.",
    "A street was named after the family, and later named after somebody else.",
    "Historians do not agree about the reasons.",
    "The weather played its part, as it so often does.",
)
_ENDS = ("ford", "ton", "mouth", "stead", "wick", "bury", "field", "haven")


@lru_cache(maxsize=2)
def synthetic_questions(hops: int) -> Questions:
    """As many questions as people. One hop: where was NAME born; two: where was the teacher of NAME born.

    Args:
        hops: 1, like SQuAD: one document answers; 2, like HotpotQA: two documents, which name each other, answer.
    """
    rng = sample_random(0, f"synthetic_qa_{hops}", 0, 0)
    adjectives = [word for word in word_list("adjective") if word.isalpha()]
    nouns = [word for word in word_list("noun") if word.isalpha() and word.islower()]
    first, last = rng.sample(adjectives, len(adjectives)), rng.sample(nouns, PEOPLE)
    names = [f"{first[i % len(first)].capitalize()} {name.capitalize()}" for i, name in enumerate(last)]
    towns = [noun.capitalize() + rng.choice(_ENDS) for noun in rng.sample(nouns, PEOPLE)]
    docs = []
    for i, name in enumerate(names):
        facts = {
            "name": name,
            "town": towns[i],
            "teacher": names[_teacher(i)],
            "craft": f"a maker of {rng.choice(nouns)} and {rng.choice(nouns)}",
            "thing": f"the {rng.choice(adjectives)} {rng.choice(nouns)}",
        }
        forms = [rng.choice(_OPENINGS), rng.choice(_MIDDLES), rng.choice(_ENDINGS)]
        forms[2:2] = [rng.choice(_TEACHERS)] if hops == 2 else []
        forms[1:1] = rng.sample(_FILLERS, 2)
        docs.append(f"{name}\n{' '.join(form.format(**facts) for form in forms)}")
    return Questions(tuple(_question(i, hops, names, towns) for i in range(PEOPLE)), tuple(docs), "synthetic")


def _question(i: int, hops: int, names: list[str], towns: list[str]) -> Question:
    if hops == 1:
        return Question(f"In which town was {names[i]} born?", (towns[i],), (i,))
    return Question(f"In which town was the teacher of {names[i]} born?", (towns[_teacher(i)],), (i, _teacher(i)))


def _teacher(i: int) -> int:
    return (i + PEOPLE // 3) % PEOPLE
