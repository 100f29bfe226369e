"""The sentiment task: reviews whose verdict lies in what they assert, not in which words they use.

Each review mixes neutral sentences, opinions stated or denied ("not bad at all", "anything but good"), concessions
("although the food was awful, ..."), other people's mistaken views and other, unreviewed things. The rules: what is
denied counts as its opposite; what is conceded, expected, or said of something else does not count; when opinions
conflict, the verdict at the end decides.
"""

from random import Random

_TOPICS = {
    "film": ("story", "acting", "music", "ending", "beginning"),
    "book": ("story", "ending", "style", "beginning", "cover"),
    "hotel": ("room", "breakfast", "bed", "service", "view"),
    "restaurant": ("soup", "service", "dessert", "bread", "wine"),
    "phone": ("screen", "battery", "camera", "sound", "price"),
    "concert": ("music", "sound", "singer", "hall", "ending"),
    "museum": ("tour", "garden", "view", "service", "shop"),
    "game": ("story", "music", "sound", "beginning", "price"),
    "course": ("teacher", "room", "book", "beginning", "price"),
    "cruise": ("food", "cabin", "view", "service", "music"),
}
_GOOD = ("good", "great", "wonderful", "lovely", "excellent", "pleasant", "perfect", "impressive", "delightful", "nice")
_BAD = ("bad", "awful", "terrible", "mediocre", "poor", "disappointing", "dreadful", "horrible", "unpleasant", "weak")

_PEOPLE = ("my sister", "my brother", "a friend", "my neighbour", "my aunt", "a colleague", "everyone", "my teacher")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# {x} is what the opinion is about, {w} a word of the opinion's own polarity, {o} one of the opposite polarity.
_OPINIONS = (
    "{x} was {w}",
    "{x} was {w}",
    "{x} was really {w}",
    "I found {x} {w}",
    "{x} was not {o} at all",
    "{x} was not {o}",
    "{x} was anything but {o}",
    "{x} was far from {o}",
    "nobody could call {x} {o}",
    "I found nothing {o} about {x}",
    "I would not say that {x} was {o}",
    "{x} was never {o}, not even for a moment",
)
_COMPARED = {
    True: ("{x} was not as {o} as I had feared", "{x} was much better than I had feared"),
    False: ("{x} was not as {o} as I had hoped", "{x} was much worse than I had hoped"),
}
_VERDICTS = {
    True: (
        "I would do it again at once.",
        "I can recommend it to everyone.",
        "In the end, I was very happy with it.",
        "All in all, it was worth every penny.",
        "I was not disappointed.",
        "Nothing could keep me from coming back.",
        "I have no complaints.",
        "I do not regret a single minute.",
    ),
    False: (
        "I would not do it again.",
        "I cannot recommend it to anyone.",
        "In the end, I was not happy with it.",
        "All in all, it was not worth a penny.",
        "I was disappointed.",
        "Nothing could make me come back.",
        "I have nothing but complaints.",
        "I regret every single minute.",
    ),
}
_FILLERS = (
    "I chose it on {day}.",
    "It was my first {topic} this year.",
    "We were there on {day} evening.",
    "{Person} came with me.",
    "I read about it in the paper.",
    "It was raining on that day.",
    "I paid for it myself.",
    "It took me two hours to get there.",
    "I had waited for it since {day}.",
    "We were a group of five.",
)
# What does not count, whatever its polarity.
_ASIDES = (
    "{Person} had told me that it would be {o}, but that was wrong.",
    "I expected something {o}.",
    "The last {topic} I tried was {o}.",
    "{Person} thinks that it was {o}, and I do not agree.",
    "A {topic} that I know from last year was {o}.",
)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


class _Writer:
    """One review in the making: its topic, its polarity, and what has been used."""

    def __init__(self, rng: Random, *, positive: bool) -> None:
        self.rng, self.positive = rng, positive
        self.topic = rng.choice(list(_TOPICS))
        self.aspects = [f"the {a}" for a in rng.sample(_TOPICS[self.topic], 4)] + [f"the {self.topic}"]
        rng.shuffle(self.aspects)
        self.words = {True: rng.sample(_GOOD, len(_GOOD)), False: rng.sample(_BAD, len(_BAD))}

    def opinion(self, *, positive: bool) -> str:
        forms = _COMPARED[positive] if self.rng.random() < 0.12 else _OPINIONS
        return self.rng.choice(forms).format(
            x=self.aspects.pop(), w=self.words[positive].pop(), o=self.words[not positive].pop()
        )

    def opinions(self) -> str:
        """Return a sentence that says what the review says, perhaps after conceding something."""
        mine, shape = self.opinion(positive=self.positive), self.rng.random()
        if shape < 0.6 or len(self.aspects) < 2:
            return f"{_capital(mine)}."
        conceded = self.opinion(positive=not self.positive)
        if shape < 0.8:
            return f"Although {conceded}, {mine}."
        return f"{_capital(conceded)}, but {mine}."

    def filled(self, templates: tuple[str, ...]) -> str:
        person = _capital(self.rng.choice(_PEOPLE))
        opposite = self.words[not self.positive].pop()
        return self.rng.choice(templates).format(
            topic=self.topic, day=self.rng.choice(_DAYS), Person=person, o=opposite
        )


def draw_review(rng: Random) -> tuple[str, str]:
    """Draw a review and its sentiment.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.

    Returns
    -------
    tuple of str
        The review, and ``"positive"`` or ``"negative"``.
    """
    positive = rng.random() < 0.5
    writer = _Writer(rng, positive=positive)
    sentences = [writer.filled(_FILLERS) for _ in range(rng.choice((0, 1, 1, 2)))]
    conflicting = rng.random() < 0.25
    sentences += [writer.opinions() for _ in range(rng.choice((1, 2)) if sentences else 2)]
    if conflicting:
        sentences.append(f"{_capital(writer.opinion(positive=not positive))}.")
    if rng.random() < 0.3:
        sentences.append(writer.filled(_ASIDES))
    rng.shuffle(sentences)
    if conflicting or rng.random() < 0.25:
        sentences.append(rng.choice(_VERDICTS[positive]))
    return " ".join(sentences), "positive" if positive else "negative"
