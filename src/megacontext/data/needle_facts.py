"""Facts in words, some of which are asked for: what needles say, in the manner of RULER.

After Hsieh et al. 2024 (RULER, arXiv:2404.06654): several keys, several values of a key, several
attributes of a name, variables that hold each other's value. Names, words and wordings are of two
kinds, those of training and those that training never sees; numbers are any.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GROUPS, OF_GROUP = 4, 3  # facts of a sequence: so many subjects, and so many facts of each


@dataclass(frozen=True)
class Attribute:
    """Something that can be said of a name.

    Attributes:
        statement: With ``{who}`` and ``{what}``.
        question: What the answer follows, with ``{who}``.
        values: What it can be, words parted by spaces; none for a number of four digits.
    """

    statement: str
    question: str
    values: str = ""


@dataclass(frozen=True)
class Wording:
    """What facts are made of.

    Attributes:
        names: Of people, parted by spaces.
        attributes: What is said of them once, at least `OF_GROUP`.
        several: What is said of them several times.
        variable: How a variable is said to have a value, with ``{who}`` and ``{what}``.
        variables: What a list of variables follows, with ``{what}``.
        letters: What names of variables are made of.
    """

    names: str
    attributes: tuple[Attribute, ...]
    several: Attribute
    variable: str
    variables: str
    letters: str


@dataclass(frozen=True)
class Needles:
    """The facts of one sequence, and what is asked of them.

    Attributes:
        facts: All of them.
        asked: Which of them the answer takes, in the order in which it takes them.
        question: What the answer follows.
        answers: What is asked for, piece by piece.
    """

    facts: list[str]
    asked: list[int]
    question: str
    answers: list[str]


TRAINING = Wording(
    names=(
        "Alice Robert Charlotte David Emma Frank Grace Henry Isabel James Karen Louis "
        "Maria Nathan Oliver Patricia Rachel Samuel Theresa Victor"
    ),
    attributes=(
        Attribute("The secret number of {who} is {what}.", "The secret number of {who} is"),
        Attribute(
            "{who} lives in the city of {what}.",
            "{who} lives in the city of",
            (
                "Paris London Rome Berlin Madrid Vienna Dublin Oslo Athens Prague Boston "
                "Chicago Moscow Tokyo"
            ),
        ),
        Attribute(
            "The favourite food of {who} is {what}.",
            "The favourite food of {who} is",
            (
                "bread cheese apples rice soup fish chocolate honey grapes potatoes onions "
                "carrots pizza cake"
            ),
        ),
    ),
    several=Attribute(
        "One of the lucky numbers of {who} is {what}.",
        "The lucky numbers of {who}, in the order in which they were named, are",
    ),
    variable="The variable {who} is set to {what}.",
    variables="The variables whose value is {what}, in the order in which they were set, are",
    letters="ABCDEFGHIJKLM",
)
HELD_OUT = Wording(
    names=(
        "George Hannah Peter Laura Martin Sophie Walter Julia Edward Clara Simon Diana "
        "Arthur Helen Philip Irene"
    ),
    attributes=(
        Attribute(
            "The special magic code for {who} was {what}.", "The special magic code for {who} was"
        ),
        Attribute(
            "{who} was born in the town of {what}.",
            "{who} was born in the town of",
            (
                "Lisbon Toronto Cairo Delhi Geneva Naples Munich Seattle Denver Zurich Hamburg "
                "Sydney Lima Kyoto"
            ),
        ),
        Attribute(
            "As a pet {who} keeps a {what}.",
            "As a pet {who} keeps a",
            ("cat dog horse rabbit parrot turtle goat pig cow sheep duck goose snake frog"),
        ),
    ),
    several=Attribute(
        "Among the tickets that {who} bought is number {what}.",
        "All tickets that {who} bought, first to last, are number",
    ),
    variable="VAR {who} = {what}.",
    variables="Find all variables that are assigned the value {what}, first to last: VAR",
    letters="NOPQRSTUVWXYZ",
)


def several_keys(words: Wording, rng: np.random.Generator) -> Needles:
    """Say one attribute of many names, and ask for that of one."""
    names = _some(rng, words.names, GROUPS * OF_GROUP)
    attribute = words.attributes[rng.integers(len(words.attributes))]
    values = _values(rng, attribute, len(names))
    facts = [attribute.statement.format(who=n, what=v) for n, v in zip(names, values, strict=True)]
    return Needles(facts, [0], attribute.question.format(who=names[0]), values[:1])


def several_values(words: Wording, rng: np.random.Generator) -> Needles:
    """Say several values of a few names, and ask for all those of one."""
    names = _some(rng, words.names, GROUPS)
    values = _values(rng, words.several, GROUPS * OF_GROUP)
    facts = [
        words.several.statement.format(who=names[i // OF_GROUP], what=value)
        for i, value in enumerate(values)
    ]
    question = words.several.question.format(who=names[0])
    return Needles(facts, list(range(OF_GROUP)), question, values[:OF_GROUP])


def mixed_attributes(words: Wording, rng: np.random.Generator) -> Needles:
    """Say several attributes of a few names, and ask for one of one."""
    names = _some(rng, words.names, GROUPS)
    attributes = [words.attributes[i] for i in rng.permutation(len(words.attributes))[:OF_GROUP]]
    values = [_values(rng, attribute, GROUPS) for attribute in attributes]
    facts = [
        attribute.statement.format(who=name, what=value)
        for attribute, of_attribute in zip(attributes, values, strict=True)
        for name, value in zip(names, of_attribute, strict=True)
    ]
    return Needles(facts, [0], attributes[0].question.format(who=names[0]), values[0][:1])


def variable_tracking(words: Wording, rng: np.random.Generator) -> Needles:
    """Say of a few chains of variables what each is set to, and ask which have one value."""
    letters = list(words.letters)
    names: list[str] = []
    while len(names) < GROUPS * OF_GROUP:
        name = "".join(rng.choice(letters, 3))
        names += [] if name in names else [name]
    numbers = _values(rng, words.several, GROUPS)
    facts = [
        words.variable.format(
            who=name,
            what=numbers[i // OF_GROUP] if i % OF_GROUP == 0 else names[i - 1],
        )
        for i, name in enumerate(names)
    ]
    question = words.variables.format(what=numbers[0])
    return Needles(facts, list(range(OF_GROUP)), question, names[:OF_GROUP])


Kind = Callable[[Wording, np.random.Generator], Needles]
KINDS: tuple[Kind, ...] = (several_keys, several_values, mixed_attributes, variable_tracking)


def _some(rng: np.random.Generator, words: str, number: int) -> list[str]:
    """Draw words that differ."""
    among = words.split()
    return [among[i] for i in rng.permutation(len(among))[:number]]


def _values(rng: np.random.Generator, attribute: Attribute, number: int) -> list[str]:
    """Draw values that differ."""
    if attribute.values:
        return _some(rng, attribute.values, number)
    return [str(1_000 + value) for value in rng.choice(9_000, number, replace=False)]
