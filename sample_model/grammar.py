"""The seeded grammar: examples of the four tasks, and which of them training never sees.

Pure Python. Knows neither tokens nor the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

from sample_model.reviews import draw_review
from sample_model.stories import draw_story
from sample_model.summaries import draw_summary
from sample_model.translations import draw_translation

# One example in ten of the whole space is kept from training.
_HELD_OUT_OF = 10

_DRAW: dict[str, Callable[[Random], tuple[str, str]]] = {
    "translation": draw_translation,
    "summary": draw_summary,
    "sentiment": draw_review,
    "story": draw_story,
}
_PROMPT = {
    "translation": "Translate to French: {}\nFrench:",
    "summary": "Summarize: {}\nSummary:",
    "sentiment": "Review: {}\nSentiment:",
    "story": "{}",
}
TASKS = tuple(_DRAW)
SCORED_TASKS = ("summary", "sentiment", "translation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and its answer; the text in between is one space."""

    task: str
    prompt: str
    answer: str
    held_out: bool

    @property
    def text(self) -> str:
        """The prompt and the answer as the model reads them."""
        return f"{self.prompt} {self.answer}"


def is_held_out(task: str, source: str, answer: str) -> bool:
    """Say on which side of the split an example lies, whoever draws it and whenever.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    source : str
        What is to be translated, summarized, judged or continued.
    answer : str
        The expected answer.

    Returns
    -------
    bool
        True for one in ten; training skips those.

    Notes
    -----
    A summary is split by its answer, so that a held-out paragraph's summary was never seen either. A translation is
    split without capitals and full stop, so that a sentence is on the same side as the fragment.
    """
    key = {"summary": answer, "translation": source.lower().rstrip(".")}.get(task, source)
    digest = blake2b(f"{task}:{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) % _HELD_OUT_OF == 0


def draw(task: str, rng: Random) -> Example:
    """Draw one example of a task from the whole space.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    rng : random.Random
        Source of every choice.

    Returns
    -------
    Example
        With its side of the split.

    Raises
    ------
    KeyError
        If there is no such task.
    """
    source, answer = _DRAW[task](rng)
    return Example(
        task=task,
        prompt=_PROMPT[task].format(source),
        answer=answer,
        held_out=is_held_out(task, source, answer),
    )


def training_examples(seed: int, weights: dict[str, float]) -> Iterator[Example]:
    """Yield training examples without end.

    Parameters
    ----------
    seed : int
        The same seed yields the same examples.
    weights : dict of str to float
        How often each task is drawn, relative to the others.

    Yields
    ------
    Example
        Never one that is held out.
    """
    rng, tasks = Random(seed), list(weights)
    while True:
        example = draw(rng.choices(tasks, list(weights.values()))[0], rng)
        if not example.held_out:
            yield example


def held_out_examples(seed: int, counts: dict[str, int]) -> list[Example]:
    """Return held-out examples with prompts that differ from each other.

    Parameters
    ----------
    seed : int
        The same seed returns the same examples.
    counts : dict of str to int
        How many of each task.

    Returns
    -------
    list of Example
        Task by task.
    """
    rng, examples = Random(seed), dict[str, Example]()
    for task, count in counts.items():
        end = len(examples) + count
        while len(examples) < end:
            example = draw(task, rng)
            if example.held_out:
                examples.setdefault(example.prompt, example)
    return list(examples.values())
