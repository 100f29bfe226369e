"""Noun phrases in English and French: determiners, agreement, elision, contraction and the place of adjectives.

Knows no verbs: whole sentences are in `translations`, the words in `lexicon`.
"""

from dataclasses import dataclass
from random import Random

from sample_model.lexicon import ADJECTIVES, KINDS, NOUNS, NUMBERS, PREVOCALIC, Adjective, Noun

NOUNS_OF = {kind: [n for n in NOUNS if n.kind == kind] for kind in KINDS}
_BEFORE = {kind: [a for a in ADJECTIVES if a.before and kind in a.kinds] for kind in NOUNS_OF}
AFTER = {kind: [a for a in ADJECTIVES if not a.before and kind in a.kinds] for kind in NOUNS_OF}

# "some" is left out where French would need a partitive rule of its own: after "de" and under negation.
DEFINITE = ("the", "the", "the", "my", "his", "her", "our", "their", "this", "these")
ANY = (*DEFINITE, "a", "a", "some", *NUMBERS)
_ALWAYS_PLURAL = {"some", "these", *NUMBERS}
_ALWAYS_SINGULAR = {"a", "this"}
_POSSESSIVES = {"my": ("mon", "ma", "mes"), "his": ("son", "sa", "ses"), "her": ("son", "sa", "ses")}
_SHARED = {"our": ("notre", "nos"), "their": ("leur", "leurs")}

_PLACES = {
    "in": ("dans", ("inside",)),
    "under": ("sous", ("thing",)),
    "behind": ("derrière", ("inside", "place", "thing")),
    "in front of": ("devant", ("inside", "place")),
    "near": ("près de", ("inside", "place", "thing")),
    "far from": ("loin de", ("inside", "place")),
    "with": ("avec", ("person", "animal")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrase:
    """A noun phrase in both languages with what agreement needs; `person` is 1 or 3."""

    english: str
    french: str
    feminine: bool
    plural: bool
    kind: str
    person: int = 3


def _vowel(word: str) -> bool:
    """Say whether French elides before `word`; every h of the lexicon is mute."""
    return word[0] in "aeiouhâàéèêîïôœ"


def join(word: str, rest: str) -> str:
    """Put a French word before others, with elision and contraction.

    Parameters
    ----------
    word : str
        The first word or words, such as ``"le"`` or ``"près de"``.
    rest : str
        What follows.

    Returns
    -------
    str
        Such as ``"l'oiseau"``, ``"près du pont"``, ``"aux enfants"``.
    """
    head, space, last = word.rpartition(" ")
    first, _, others = rest.partition(" ")
    contracted = {("de", "le"): "du", ("de", "les"): "des", ("à", "le"): "au", ("à", "les"): "aux"}.get((last, first))
    if contracted:
        return f"{head}{space}{contracted} {others}"
    if last in ("le", "la", "de", "ne", "je") and _vowel(rest):
        return f"{head}{space}{last[0]}'{rest}"
    return f"{word} {rest}"


def _determine(determiner: str, rest: str, *, feminine: bool, plural: bool, adjective_first: bool) -> str:
    """Put the French determiner before the rest of its noun phrase."""
    gender = 2 if plural else int(feminine)
    if determiner in _POSSESSIVES:
        # Feminine "ma" becomes "mon" before a vowel.
        return f"{_POSSESSIVES[determiner][0 if gender == 1 and _vowel(rest) else gender]} {rest}"
    if determiner in _SHARED:
        return f"{_SHARED[determiner][plural]} {rest}"
    if determiner == "these":
        return f"ces {rest}"
    if determiner == "this":
        return f"{'cette' if feminine else 'cet' if _vowel(rest) else 'ce'} {rest}"
    if determiner == "a":
        return f"{'une' if feminine else 'un'} {rest}"
    if determiner == "some":
        return join("de" if adjective_first else "des", rest)
    if determiner in NUMBERS:
        return f"{NUMBERS[determiner]} {rest}"
    assert determiner == "the"
    return join(("le", "la", "les")[gender], rest)


def noun_phrase(determiner: str, adjectives: tuple[Adjective, ...], noun: Noun, *, plural: bool) -> Phrase:
    """Return the noun phrase in both languages.

    Parameters
    ----------
    determiner : str
        English determiner, ``"a"`` for either form of it.
    adjectives : tuple of Adjective
        In English order: at most one that French puts before the noun, then at most one that it puts after.
    noun : Noun
        The head.
    plural : bool
        Its number.

    Returns
    -------
    Phrase
        English, French, gender and number.
    """
    english = " ".join([*(a.english for a in adjectives), noun.english[plural]])
    french = noun.french[plural]
    for adjective in adjectives:
        form = adjective.french[2 * plural + noun.feminine]
        if adjective.before:
            french = f"{PREVOCALIC.get(form, form) if _vowel(french) and not plural else form} {french}"
        else:
            french = f"{french} {form}"
    article = "an" if determiner == "a" and english[0] in "aeiou" else determiner
    return Phrase(
        english=f"{article} {english}",
        french=_determine(
            determiner,
            french,
            feminine=noun.feminine,
            plural=plural,
            adjective_first=any(a.before for a in adjectives),
        ),
        feminine=noun.feminine,
        plural=plural,
        kind=noun.kind,
    )


def draw_noun_phrase(rng: Random, kinds: tuple[str, ...], determiners: tuple[str, ...] = ANY) -> Phrase:
    """Draw a noun phrase.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.
    kinds : tuple of str
        Kinds of noun to choose from.
    determiners : tuple of str
        Determiners to choose from.

    Returns
    -------
    Phrase
        With at most one adjective on each side of the French noun.
    """
    noun = rng.choice(NOUNS_OF[rng.choice(kinds)])
    determiner = rng.choice(determiners)
    plural = determiner in _ALWAYS_PLURAL or (determiner not in _ALWAYS_SINGULAR and rng.random() < 0.35)
    adjectives = []
    if rng.random() < 0.4 and _BEFORE[noun.kind]:
        adjectives.append(rng.choice(_BEFORE[noun.kind]))
    if rng.random() < 0.4:
        adjectives.append(rng.choice(AFTER[noun.kind]))
    return noun_phrase(determiner, tuple(adjectives), noun, plural=plural)


def draw_place(rng: Random) -> tuple[str, str]:
    """Draw a prepositional phrase.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.

    Returns
    -------
    tuple of str
        English and French, each with a space before it.
    """
    preposition = rng.choice(list(_PLACES))
    french, kinds = _PLACES[preposition]
    place = draw_noun_phrase(rng, kinds, (*DEFINITE, "a"))
    return f" {preposition} {place.english}", f" {join(french, place.french)}"
