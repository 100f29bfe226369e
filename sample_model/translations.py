"""The translation task: English fragments and sentences with the French that the grammar derives for them.

Verbs, negation and object pronouns are here; noun phrases are in `phrases`, the words in `lexicon`.
"""

from random import Random

from sample_model.lexicon import DITRANSITIVE, INTRANSITIVE, TRANSITIVE, Verb
from sample_model.phrases import AFTER, ANY, DEFINITE, NOUNS_OF, Phrase, draw_noun_phrase, draw_place, join

_PRONOUNS = (
    Phrase(english="I", french="je", feminine=False, plural=False, kind="", person=1),
    Phrase(english="we", french="nous", feminine=False, plural=True, kind="", person=1),
    Phrase(english="he", french="il", feminine=False, plural=False, kind="person"),
    Phrase(english="she", french="elle", feminine=True, plural=False, kind="person"),
)
_CLITICS = {"him": "le", "her": "la", "them": "les"}


def _draw_subject(rng: Random) -> Phrase:
    if rng.random() < 0.25:
        return rng.choice(_PRONOUNS)
    return draw_noun_phrase(rng, ("animal", "person"))


def clause(subject: Phrase, verb: Verb, *, negated: bool = False, clitic: str = "") -> tuple[str, str]:
    """Return subject and verb in both languages.

    Parameters
    ----------
    subject : Phrase
        Who.
    verb : Verb
        Does what.
    negated : bool
        Whether they do not.
    clitic : str
        English object pronoun, which French puts before the verb; none if empty.

    Returns
    -------
    tuple of str
        English and French, without objects other than the pronoun.
    """
    third_singular = subject.person == 3 and not subject.plural
    english = f"does not {verb.english[0]}" if third_singular else f"do not {verb.english[0]}"
    english = english if negated else verb.english[third_singular]
    french = verb.french[2 * subject.plural + (subject.person == 3)]
    if clitic:
        english += f" {clitic}"
        french = f"les {french}" if clitic == "them" else join(_CLITICS[clitic], french)
    if negated:
        french = join("ne", french) + " pas"
    return f"{subject.english} {english}", join(subject.french, french)


def _draw_copula(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.15:
        subject = rng.choice(_PRONOUNS[2:])
    else:
        subject = draw_noun_phrase(rng, tuple(NOUNS_OF), DEFINITE)
        if rng.random() < 0.2:
            other = draw_noun_phrase(rng, (subject.kind,), DEFINITE)
            subject = Phrase(
                english=f"{subject.english} and {other.english}",
                french=f"{subject.french} et {other.french}",
                feminine=subject.feminine and other.feminine,
                plural=True,
                kind=subject.kind,
            )
    # "the tired cat is tired" says nothing.
    adjective = rng.choice([a for a in AFTER[subject.kind] if a.english not in subject.english.split()])
    negated, very = rng.random() < 0.2, rng.random() < 0.25
    english, french = ("are", "sont") if subject.plural else ("is", "est")
    english += (" not" if negated else "") + (" very" if very else "")
    french = (join("ne", french) + " pas" if negated else french) + (" très" if very else "")
    form = adjective.french[2 * subject.plural + subject.feminine]
    return f"{subject.english} {english} {adjective.english}", f"{subject.french} {french} {form}"


def _draw_action(rng: Random) -> tuple[str, str]:
    subject, negated = _draw_subject(rng), rng.random() < 0.2
    # French turns an indefinite object into "de" under negation; definite ones need no rule.
    determiners = DEFINITE if negated else ANY
    shape = rng.random()
    if shape < 0.35:
        verb = rng.choice(INTRANSITIVE)
        english, french = clause(subject, verb, negated=negated)
    elif shape < 0.5:
        verb = rng.choice([v for v in TRANSITIVE if "person" in v.kinds])
        english, french = clause(subject, verb, negated=negated, clitic=rng.choice(list(_CLITICS)))
    else:
        verb = rng.choice(DITRANSITIVE if shape > 0.88 else TRANSITIVE)
        english, french = clause(subject, verb, negated=negated)
        thing = draw_noun_phrase(rng, verb.kinds, determiners)
        english, french = f"{english} {thing.english}", f"{french} {thing.french}"
    if verb in DITRANSITIVE:
        receiver = draw_noun_phrase(rng, ("person",), DEFINITE)
        return f"{english} to {receiver.english}", f"{french} {join('à', receiver.french)}"
    if rng.random() < (0.6 if verb in INTRANSITIVE else 0.2):
        place = draw_place(rng)
        return english + place[0], french + place[1]
    return english, french


def draw_translation(rng: Random) -> tuple[str, str]:
    """Draw an English fragment or sentence and its French.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.

    Returns
    -------
    tuple of str
        English and French.
    """
    shape, style = rng.random(), rng.random()
    stop = "." if shape >= 0.4 and style < 0.2 else ""
    if shape < 0.4:
        phrase = draw_noun_phrase(rng, tuple(NOUNS_OF))
        english, french = phrase.english, phrase.french
        if shape < 0.12:
            place = draw_place(rng)
            english, french = english + place[0], french + place[1]
    else:
        english, french = _draw_copula(rng) if shape < 0.6 else _draw_action(rng)
    if style < 0.25:
        english, french = english[0].upper() + english[1:], french[0].upper() + french[1:]
    return english + stop, french + stop
