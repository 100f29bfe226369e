"""The story task: short tales with a hero, a wish, an obstacle, a helper and an end.

A tale keeps to its own facts: the same names, the same wish, the same place from beginning to end.
"""

from dataclasses import dataclass, replace
from random import Random

from sample_model.names import draw_people, invent_name

_ANIMALS = "fox rabbit hedgehog squirrel mouse owl bear otter badger duck frog goat kitten puppy pony turtle".split()
_NATURES = "small young brave shy curious clever gentle lonely cheerful lazy proud kind".split()
_HOMES = (
    "in a hollow tree",
    "in a little house by the river",
    "under an old bridge",
    "at the edge of a dark forest",
    "on a green hill",
    "in a quiet village",
    "near a deep blue lake",
    "in a garden full of roses",
    "behind an old mill",
    "on a small island",
)
_OPENINGS = (
    "Once upon a time, there was a {nature} {animal} named {n} who lived {home}.",
    "Once upon a time, a {nature} {animal} named {n} lived {home}.",
    "Once upon a time, there lived a {nature} {animal} {home}. {His} name was {n}.",
    "Once upon a time, {home}, there was a {nature} {animal} named {n}.",
)
_HABITS = (
    "{He} liked to count the clouds.",
    "Every evening, {he} looked at the stars.",
    "{He} could sing better than anyone.",
    "{He} had a garden with seven apple trees.",
    "{His} door was always open.",
    "{He} knew every stone of the place.",
    "In winter, {he} told stories to the snow.",
    "{He} was afraid of thunder.",
    "Nobody made better tea.",
    "{He} wore a yellow hat, even in bed.",
)
_MEETINGS = (
    "On the way, {he} met a {nature2} {animal2} named {m}.",
    "Then a {nature2} {animal2} named {m} came along.",
    "Behind a big stone sat a {nature2} {animal2} named {m}.",
    "Just then, {he} heard the voice of {m}, a {nature2} {animal2}.",
)
_QUESTIONS = ('"Why are you so sad?" asked {m}.', '"Where are you going?" asked {m}.', '"Can I help you?" asked {m}.')
_ENDINGS = (
    "From that day on, {n} and {m} were the best of friends.",
    "And they lived happily ever after.",
    "{n} never forgot that day, and {m} did not forget it either.",
    "That night, {n} slept deeply and dreamed of {m}.",
    "And {n} learned that two can do what one cannot.",
)
_WEATHERS = (
    "a storm came up",
    "it began to snow",
    "thick fog rose from the ground",
    "it grew dark",
    "heavy rain began to fall",
)
_SHELTERS = ("in a cave", "under a big tree", "in an empty barn", "between two rocks")
_TREASURES = (
    "a golden key",
    "a silver bell",
    "a red kite",
    "a glass marble",
    "a little drum",
    "a blue feather",
    "a shiny coin",
)
_DISHES = ("an apple pie", "a honey cake", "a pot of soup", "a berry tart", "a carrot cake")
_PLACES = (
    "the sea",
    "the high mountain",
    "the old castle",
    "the great waterfall",
    "the lighthouse",
    "the end of the rainbow",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One kind of tale: what is wished for, and the sentences of its middle, each with its variants."""

    wishes: tuple[str, ...]
    before: tuple[tuple[str, ...], ...]
    after: tuple[tuple[str, ...], ...]


# {n} and {m} are hero and helper, {w} the wish, {t} the wish as "the ...", {weather} and {shelter} the obstacle.
_PLOTS = (
    Plot(
        wishes=_TREASURES,
        before=(
            (
                "One morning, {n} noticed that {his} dearest thing, {w}, was gone.",
                "One day, {n} lost {w} in the forest.",
            ),
            (
                "{He} looked in every corner, but {t} was not there.",
                "{He} searched the whole day and did not find {t}.",
            ),
        ),
        after=(
            ('"I have lost {w}," said {n}.', '"I am looking for {w}," said {n}.'),
            ("Together they looked under every leaf.", "They searched until {weather}, and hid {shelter}."),
            ("At last, {m} saw something in the grass: it was {t}!", "And there, {shelter}, they found {t}."),
            ("{n} danced with joy and thanked {m}.", "{n} was so happy that {he} began to sing."),
        ),
    ),
    Plot(
        wishes=_PLACES,
        before=(
            ("All {his} life, {n} had wanted to see {w}.", "Every night, {n} dreamed of {w}."),
            ("One morning, {he} packed a small bag and left.", "So one day {he} closed the door and began to walk."),
        ),
        after=(
            ('"I want to see {w}," said {n}.', '"I am on my way to {w}," said {n}.'),
            ('"I know the way," said {m}, and they walked on together.', '"Then let us go together," said {m}.'),
            (
                "Soon {weather}, and they had to wait {shelter}.",
                "After three days, {weather}, and they slept {shelter}.",
            ),
            ("But the next day, they stood in front of {w}.", "When the sun came out again, they saw {w} at last."),
            ('"It is even more beautiful than in my dreams," said {n}.', "{n} was so happy that {he} could not speak."),
        ),
    ),
    Plot(
        wishes=_DISHES,
        before=(
            ("One day, {n} wanted to bake {w} for a feast.", "It was {his} birthday, and {n} wished for {w}."),
            ("But the cupboard was empty, and {he} had no money.", "But {he} did not know how to make it."),
        ),
        after=(
            ('"I want {w}, but I cannot make it alone," said {n}.', '"I would love to have {w}," said {n}.'),
            ("{m} thought for a while and ran home.", '"Wait here," said {m}, and ran away.'),
            ("Soon {m} came back with a full basket.", "An hour later, {m} came back with everything they needed."),
            (
                "They worked until {weather}, and then {t} was ready.",
                "They cooked and laughed, and in the evening {t} was ready.",
            ),
            ("It was the best meal of {his} life.", "They shared it with everyone who came by."),
        ),
    ),
)


def _definite(wish: str) -> str:
    """Return "the golden key" for "a golden key"."""
    return "the " + wish.split(" ", 1)[1]


def draw_story(rng: Random) -> tuple[str, str]:
    """Draw a tale, cut after its opening.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.

    Returns
    -------
    tuple of str
        The opening and how it goes on, without the space between them.
    """
    hero, helper = draw_people(rng, 2)
    if rng.random() < 0.3:
        hero = replace(hero, name=invent_name(rng))
    animal, animal2 = rng.sample(_ANIMALS, 2)
    nature, nature2 = rng.sample(_NATURES, 2)
    plot = rng.choice(_PLOTS)
    wish = rng.choice(plot.wishes)
    words = {
        "n": hero.name,
        "m": helper.name,
        "he": hero.she,
        "He": hero.she.capitalize(),
        "his": hero.her,
        "His": hero.her.capitalize(),
        "animal": animal,
        "animal2": animal2,
        "nature": nature,
        "nature2": nature2,
        "home": rng.choice(_HOMES),
        "w": wish,
        "t": _definite(wish),
        "weather": rng.choice(_WEATHERS),
        "shelter": rng.choice(_SHELTERS),
    }
    opening = rng.choice(_OPENINGS).format(**words)
    # Either kind of sentence can be left out without a gap; leaving one out keeps tales short.
    habit, question = rng.choice(((_HABITS, ()), ((), _QUESTIONS), (_HABITS, _QUESTIONS), ((), ())))
    slots = [s for s in (habit, *plot.before, _MEETINGS, question, *plot.after, _ENDINGS) if s]
    rest = " ".join(rng.choice(variants).format(**words) for variants in slots)
    return opening, rest
