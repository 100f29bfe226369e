"""The summary task: a paragraph about an errand, and the one sentence that says how it ended.

The summary has to be put together: who is named at the beginning only, what is described at the beginning only, and
where (or by whom) it ended is said near the end, after failed attempts and other people's doings.
"""

from random import Random

from sample_model.names import Person, draw_people

_LOOKS = "silver golden red blue green yellow wooden old new small round heavy little striped painted".split()
_THINGS = (
    "key ring watch hat scarf lamp basket kettle book map drum kite bicycle clock bowl bottle coat chair mirror whistle"
).split()
_SPOTS = (
    "behind the {p},in front of the {p},near the {p},next to the {p},on the way to the {p},on the steps of the {p}"
).split(",")
_LANDMARKS = (
    "school church mill station market harbour library bridge "
    "farm castle museum bakery hospital theatre lighthouse windmill"
).split()
_INDOORS = (
    "in the garden,in the kitchen,in the attic,in the cellar,in the barn,on the roof,by the lake,"
    "in the forest,at the beach,in the park,at the bus stop,by the river,in the garage,under the apple tree"
).split(",")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_WEATHER = (
    "It was raining and the streets were empty.",
    "The sun was shining and the birds were singing.",
    "It was a cold and windy day.",
    "Snow was falling on the roofs.",
    "There was a thick fog that day.",
    "It was the hottest day of the summer.",
)
_DOINGS = (
    "was baking bread",
    "was reading the paper",
    "was washing the windows",
    "was feeding the ducks",
    "was playing the piano",
    "was waiting for the doctor",
    "was sleeping in a chair",
    "was writing a letter",
)
_CONNECTIVES = (
    "In the end,",
    "At last,",
    "Finally,",
    "After many hours,",
    "Late in the evening,",
    "When it was almost dark,",
)
_TAILS = (
    "Then it was time for supper.",
    "After that, everyone went home.",
    "The next day was quiet.",
    "Dinner was late that evening.",
    "Soon the whole street had heard of it.",
)

# {n} the protagonist, {she} and {her} their pronouns, {r} the other person, {o} the thing, {a} its article, {p} where
# it ended. Beginning, failed attempt (with a place of its own, {f}), end, summary.
_ERRANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str]] = {
    "find": (
        ("{n} lost {her} {o} on {day}.", "On {day}, {n} could not find {her} {o}."),
        ("{She} looked {f}, but it was not there.", "First {she} searched {f}, without success."),
        ("{she} found it {p}.", "{she} discovered it {p}."),
        "{n} found {her} {o} {p}.",
    ),
    "buy": (
        ("{n} wanted to buy {a} {o}.", "{n} needed {a} {o} for {day}."),
        ("{She} asked {f}, but there was none.", "{She} tried a shop {f}, but it was closed."),
        ("{she} bought one {p}.", "{she} got one from a seller {p}."),
        "{n} bought {a} {o} {p}.",
    ),
    "hide": (
        ("{n} had to hide {a} {o} before {day}.", "{n} wanted nobody to see {her} present, {a} {o}."),
        ("{She} tried to put it {f}, but there was no room.", "First {she} left it {f}, but that was not safe."),
        ("{she} hid it {p}.", "{she} put it {p}, where nobody would look."),
        "{n} hid {a} {o} {p}.",
    ),
    "repair": (
        ("{n} broke {her} {o} on {day}.", "On {day}, {n} fell and damaged {her} {o}."),
        ("{She} took it to a workshop {f}, but it was closed.", "A man {f} could not help {object}."),
        ("{she} had it repaired {p}.", "a woman {p} repaired it for {object}."),
        "{n} had {her} {o} repaired {p}.",
    ),
}
_IN_TOWN = ("buy", "repair")
_BY_OTHER: dict[str, tuple[tuple[str, ...], str]] = {
    "find": (("{her} {rel} found it {p}.", "it was {her} {rel} who found it {p}."), "{r} found {n}'s {o} {p}."),
    "buy": (
        ("{her} {rel} bought one for {object} {p}.", "{her} {rel} surprised {object} with one from a shop {p}."),
        "{r} bought {n} {a} {o} {p}.",
    ),
    "hide": (("{her} {rel} hid it for {object} {p}.", "{her} {rel} took it and put it {p}."), "{r} hid {n}'s {o} {p}."),
    "repair": (
        ("{her} {rel} repaired it {p}.", "{her} {rel} had the right tools and mended it {p}."),
        "{r} repaired {n}'s {o} {p}.",
    ),
}
_FAILED: dict[str, tuple[tuple[str, ...], str]] = {
    "find": (("{she} gave up and went home without it.",), "{n} never found {her} {o}."),
    "buy": (("{she} gave up and went home with empty hands.",), "{n} did not buy {a} {o}."),
    "hide": (("{she} gave up and showed it to everyone.",), "{n} could not hide {a} {o}."),
    "repair": (("{she} gave up and threw it away.",), "{n} could not have {her} {o} repaired."),
}


def _draw_place(rng: Random, *, shops: bool = False) -> str:
    """Return a place; nothing is bought at home."""
    if rng.random() < 0.4 and not shops:
        return rng.choice(_INDOORS)
    return rng.choice(_SPOTS).format(p=rng.choice(_LANDMARKS))


def _draw_thing(rng: Random) -> str:
    return f"{rng.choice(_LOOKS)} {rng.choice(_THINGS)}"


def _article(thing: str) -> str:
    return "an" if thing[0] in "aeiou" else "a"


def _distraction(rng: Random, hero: Person, other: Person) -> str:
    """Return a sentence that introduces `other` doing something that is not the point."""
    subject = f"{hero.her} {other.relative} {other.name}"
    if rng.random() < 0.5:
        doing = f"{rng.choice(_DOINGS)} {_draw_place(rng)}"
    else:
        thing, deed = _draw_thing(rng), rng.choice(("found", "bought", "hid", "sold", "was carrying"))
        doing = f"{deed} {_article(thing)} {thing} {_draw_place(rng, shops=deed in ('bought', 'sold'))}"
    if rng.random() < 0.5:
        return f"{rng.choice(('Meanwhile,', 'At noon,', 'That morning,'))} {subject} {doing}."
    return f"{subject[0].upper()}{subject[1:]} {doing}."


def draw_summary(rng: Random) -> tuple[str, str]:
    """Draw a paragraph and its one-sentence summary.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.

    Returns
    -------
    tuple of str
        The paragraph and the summary.
    """
    errand = rng.choice(list(_ERRANDS))
    beginnings, attempts, endings, summary = _ERRANDS[errand]
    hero, *others = draw_people(rng, rng.choice((2, 3)))
    thing, other = _draw_thing(rng), rng.choice(others)
    # Now and then the helper's name has to be remembered from further up: the hardest thing asked of a model this small.
    helper = other.relative if rng.random() < 0.1 else f"{other.relative} {other.name}"
    outcome = rng.random()
    if outcome < 0.4:
        endings, summary = _BY_OTHER[errand]
    elif outcome < 0.52:
        endings, summary = _FAILED[errand]
    words = {
        "n": hero.name,
        "she": hero.she,
        "She": hero.she.capitalize(),
        "her": hero.her,
        "object": "her" if hero.female else "him",
        "r": other.name,
        "rel": helper,
        "o": thing,
        "a": _article(thing),
        "p": _draw_place(rng, shops=errand in _IN_TOWN),
        "day": rng.choice(_DAYS),
    }
    middle = [_distraction(rng, hero, person) for person in others]
    middle += [
        rng.choice(attempts).format(f=_draw_place(rng, shops=errand in _IN_TOWN), **words)
        for _ in range(rng.choice((0, 1, 1)))
    ]
    if rng.random() < 0.4:
        middle.append(rng.choice(_WEATHER))
    rng.shuffle(middle)
    end = f"{rng.choice(_CONNECTIVES)} {rng.choice(endings).format(**words)}"
    tail = [rng.choice(_TAILS)] if rng.random() < 0.3 else []
    return " ".join([rng.choice(beginnings).format(**words), *middle, end, *tail]), summary.format(**words)
