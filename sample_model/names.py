"""Names, pronouns and relatives that the stories and the summaries share.

Knows nothing of what anyone does.
"""

from dataclasses import dataclass
from random import Random

_FEMALE = (
    "Mia Anna Rosa Lucy Nora Emma Clara Ida Lena Ruth Ella Jane "
    "Sara Vera Alice Mary Eva Helen Julia Olga Grace Dora Amy Irene"
).split()
_MALE = (
    "Tom Paul Max Leo Peter Jack Oscar Hugo Felix Simon Adam Victor "
    "Ben Carl David Henry Martin Oliver Frank George Ivan Noah Sam Theo"
).split()
_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s st t tr v w z".split()
_MIDDLES = "b bb d l ll lm m mm n nd nk p pp r rk s sk t tt v x zz".split()
_RELATIVES = {
    True: ("sister", "aunt", "cousin", "friend", "neighbour"),
    False: ("brother", "uncle", "cousin", "friend", "neighbour"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Someone with a name, the pronouns for them, and what they are to the protagonist."""

    name: str
    female: bool
    relative: str

    @property
    def she(self) -> str:
        """``"she"`` or ``"he"``."""
        return "she" if self.female else "he"

    @property
    def her(self) -> str:
        """``"her"`` or ``"his"``, the possessive."""
        return "her" if self.female else "his"


def invent_name(rng: Random) -> str:
    """Return a name that is on no list, such as Pip or Tavo, so that names are copied and not only chosen.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.

    Returns
    -------
    str
        One or two syllables.
    """
    name = rng.choice(_ONSETS) + rng.choice("aeiou") + rng.choice(_MIDDLES)
    return (name + rng.choice("aeiouy") if rng.random() < 0.6 else name).capitalize()


def draw_people(rng: Random, count: int) -> list[Person]:
    """Draw people with different names and different relations.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.
    count : int
        How many, at most 4.

    Returns
    -------
    list of Person
        The first of them is the protagonist, whose own `relative` means nothing.
    """
    people: list[Person] = []
    while len(people) < count:
        female = rng.random() < 0.5
        person = Person(
            name=rng.choice(_FEMALE if female else _MALE), female=female, relative=rng.choice(_RELATIVES[female])
        )
        if all(person.name != other.name and person.relative != other.relative for other in people):
            people.append(person)
    return people
