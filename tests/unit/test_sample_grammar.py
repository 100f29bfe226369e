"""The sample model's grammar: determinism, the held-out split, and French that agrees."""

from itertools import islice
from random import Random

import pytest

from sample_model.grammar import (
    SCORED_TASKS,
    TASKS,
    draw,
    held_out_examples,
    is_held_out,
    training_examples,
)
from sample_model.lexicon import ADJECTIVES, INTRANSITIVE, NOUNS, TRANSITIVE
from sample_model.phrases import Phrase, join, noun_phrase
from sample_model.translations import clause

_EVEN = dict.fromkeys(TASKS, 1.0)


def _phrase(determiner: str, *words: str, plural: bool = False) -> Phrase:
    adjectives = tuple(next(a for a in ADJECTIVES if a.english == word) for word in words[:-1])
    noun = next(n for n in NOUNS if n.english[0] == words[-1])
    return noun_phrase(determiner, adjectives, noun, plural=plural)


def test_the_same_seed_yields_the_same_examples() -> None:
    assert list(islice(training_examples(7, _EVEN), 50)) == list(islice(training_examples(7, _EVEN), 50))
    assert list(islice(training_examples(7, _EVEN), 50)) != list(islice(training_examples(8, _EVEN), 50))
    assert held_out_examples(7, {"summary": 5}) == held_out_examples(7, {"summary": 5})


def test_training_never_draws_what_is_held_out() -> None:
    held_out = {example.prompt for example in held_out_examples(7, dict.fromkeys(TASKS, 20))}
    drawn = list(islice(training_examples(7, _EVEN), 1000))
    assert len(held_out) == 20 * len(TASKS)
    assert not any(example.held_out for example in drawn)
    assert held_out.isdisjoint(example.prompt for example in drawn)


def test_a_sentence_is_on_the_same_side_of_the_split_as_its_fragment() -> None:
    fragments = [f"the cat sees {n} birds" for n in range(40)]
    sides = [is_held_out("translation", fragment, "") for fragment in fragments]
    assert sides == [is_held_out("translation", fragment.capitalize() + ".", "") for fragment in fragments]
    assert len(set(sides)) == 2


@pytest.mark.parametrize("task", SCORED_TASKS)
def test_a_prompt_has_one_answer(task: str) -> None:
    rng, answers = Random(7), dict[str, str]()
    for _ in range(1000):
        example = draw(task, rng)
        assert answers.setdefault(example.prompt, example.answer) == example.answer


def test_every_template_is_filled() -> None:
    examples = list(islice(training_examples(7, _EVEN), 1000))
    assert not any(set("{}_") & set(example.text) or "  " in example.text for example in examples)
    assert {example.answer for example in examples if example.task == "sentiment"} == {"positive", "negative"}


@pytest.mark.parametrize(
    ("phrase", "english", "french"),
    [
        (_phrase("the", "small", "red", "house"), "the small red house", "la petite maison rouge"),
        (_phrase("the", "small", "red", "house", plural=True), "the small red houses", "les petites maisons rouges"),
        (_phrase("a", "old", "tree"), "an old tree", "un vieil arbre"),
        (_phrase("a", "orange"), "an orange", "une orange"),
        (_phrase("the", "bird"), "the bird", "l'oiseau"),
        (_phrase("the", "beautiful", "bird", plural=True), "the beautiful birds", "les beaux oiseaux"),
        (_phrase("my", "school"), "my school", "mon école"),
        (_phrase("my", "old", "school"), "my old school", "ma vieille école"),
        (_phrase("this", "man"), "this man", "cet homme"),
        (_phrase("this", "happy", "queen"), "this happy queen", "cette reine heureuse"),
        (_phrase("some", "horse", plural=True), "some horses", "des chevaux"),
        (_phrase("some", "white", "horse", plural=True), "some white horses", "des chevaux blancs"),
        (_phrase("some", "big", "horse", plural=True), "some big horses", "de grands chevaux"),
        (_phrase("their", "new", "car", plural=True), "their new cars", "leurs nouvelles voitures"),
    ],
)
def test_articles_and_adjectives_agree(phrase: Phrase, english: str, french: str) -> None:
    assert (phrase.english, phrase.french) == (english, french)


def test_prepositions_contract_and_elide() -> None:
    assert join("près de", "le pont") == "près du pont"
    assert join("près de", "les ponts") == "près des ponts"
    assert join("près de", "l'île") == "près de l'île"
    assert join("loin de", "une île") == "loin d'une île"
    assert join("à", "le roi") == "au roi"
    assert join("à", "la reine") == "à la reine"


def test_verbs_agree_and_pronouns_move() -> None:
    love = next(verb for verb in TRANSITIVE if verb.english[0] == "love")
    wait = next(verb for verb in INTRANSITIVE if verb.english[0] == "wait")
    i = Phrase(english="I", french="je", feminine=False, plural=False, kind="", person=1)
    assert clause(i, love) == ("I love", "j'aime")
    assert clause(i, wait, negated=True) == ("I do not wait", "je n'attends pas")
    assert clause(_phrase("the", "cat"), love, clitic="her") == ("the cat loves her", "le chat l'aime")
    assert clause(_phrase("the", "cat", plural=True), love, negated=True, clitic="them") == (
        "the cats do not love them",
        "les chats ne les aiment pas",
    )


def test_the_grammar_is_the_same_in_every_process() -> None:
    # Literal, because an order that hangs on string hashes differs between processes only.
    drawn = [draw("translation", Random(seed)).answer for seed in range(4)]
    assert drawn == [
        "quatre filles les suivent sous sa lampe",
        "mon renard",
        "je nage",
        "quatre lampes noires",
    ]
