"""The English-French lexicon of the translation task: words with their forms, and which words go together.

Knows no syntax: articles, agreement and word order are in `translations`.
"""

from dataclasses import dataclass

_NOUNS = """
animal m: cat cats chat chats, dog dogs chien chiens, horse horses cheval chevaux, bird birds oiseau oiseaux,
    fox foxes renard renards, rabbit rabbits lapin lapins, duck ducks canard canards, bear bears ours ours,
    lion lions lion lions
animal f: cow cows vache vaches, mouse mice souris souris, hen hens poule poules, turtle turtles tortue tortues,
    bee bees abeille abeilles, goat goats chèvre chèvres
person m: boy boys garçon garçons, man men homme hommes, king kings roi rois, brother brothers frère frères,
    father fathers père pères, uncle uncles oncle oncles, child children enfant enfants,
    doctor doctors médecin médecins
person f: girl girls fille filles, woman women femme femmes, queen queens reine reines, sister sisters sœur sœurs,
    mother mothers mère mères, aunt aunts tante tantes
thing m: book books livre livres, hat hats chapeau chapeaux, coat coats manteau manteaux, boat boats bateau bateaux,
    bag bags sac sacs, basket baskets panier paniers, umbrella umbrellas parapluie parapluies,
    pencil pencils crayon crayons, tree trees arbre arbres, glass glasses verre verres, knife knives couteau couteaux,
    painting paintings tableau tableaux
thing f: table tables table tables, chair chairs chaise chaises, key keys clé clés, car cars voiture voitures,
    flower flowers fleur fleurs, letter letters lettre lettres, box boxes boîte boîtes, lamp lamps lampe lampes,
    dress dresses robe robes, shirt shirts chemise chemises, ring rings bague bagues, clock clocks horloge horloges,
    plate plates assiette assiettes, scarf scarves écharpe écharpes, door doors porte portes,
    window windows fenêtre fenêtres
food m: cake cakes gâteau gâteaux, egg eggs œuf œufs, cheese cheeses fromage fromages,
    sandwich sandwiches sandwich sandwichs
food f: apple apples pomme pommes, pear pears poire poires, soup soups soupe soupes, orange oranges orange oranges,
    carrot carrots carotte carottes, tomato tomatoes tomate tomates, strawberry strawberries fraise fraises
inside m: garden gardens jardin jardins, castle castles château châteaux, shop shops magasin magasins,
    village villages village villages, field fields champ champs, hotel hotels hôtel hôtels
inside f: house houses maison maisons, school schools école écoles, church churches église églises,
    forest forests forêt forêts, kitchen kitchens cuisine cuisines, tower towers tour tours, farm farms ferme fermes,
    station stations gare gares, library libraries bibliothèque bibliothèques, street streets rue rues
place m: bridge bridges pont ponts, market markets marché marchés, lake lakes lac lacs
place f: river rivers rivière rivières, mountain mountains montagne montagnes, island islands île îles
"""

# English, then masculine and feminine, singular and plural.
_ADJECTIVES = """
before any: small petit petite petits petites, big grand grande grands grandes, beautiful beau belle beaux belles,
    old vieux vieille vieux vieilles, pretty joli jolie jolis jolies
before thing inside place: new nouveau nouvelle nouveaux nouvelles
before animal person: young jeune jeune jeunes jeunes
before food: good bon bonne bons bonnes, bad mauvais mauvaise mauvais mauvaises
before animal: fat gros grosse gros grosses
after animal thing inside: black noir noire noirs noires, white blanc blanche blancs blanches,
    brown brun brune bruns brunes, grey gris grise gris grises
after thing food inside: red rouge rouge rouges rouges, green vert verte verts vertes,
    yellow jaune jaune jaunes jaunes
after thing food: round rond ronde ronds rondes
after thing inside: blue bleu bleue bleus bleues
after thing: heavy lourd lourde lourds lourdes, broken cassé cassée cassés cassées
after thing inside: clean propre propre propres propres, empty vide vide vides vides,
    modern moderne moderne modernes modernes
after thing food inside: expensive cher chère chers chères
after inside place: dark sombre sombre sombres sombres, quiet calme calme calmes calmes,
    noisy bruyant bruyante bruyants bruyantes, famous célèbre célèbre célèbres célèbres
after animal person: happy heureux heureuse heureux heureuses, sad triste triste tristes tristes,
    tired fatigué fatiguée fatigués fatiguées, lazy paresseux paresseuse paresseux paresseuses,
    clever intelligent intelligente intelligents intelligentes, brave courageux courageuse courageux courageuses,
    shy timide timide timides timides
after person: rich riche riche riches riches
after food: fresh frais fraîche frais fraîches, hot chaud chaude chauds chaudes, cold froid froide froids froides,
    sweet sucré sucrée sucrés sucrées
"""

# Base and third person in English; first and third person singular, then plural, in French; the kinds of object.
_TRANSITIVE = """
see sees vois voit voyons voient any, eat eats mange mange mangeons mangent food,
love loves aime aime aimons aiment any, find finds trouve trouve trouvons trouvent any,
buy buys achète achète achetons achètent thing/food/animal, sell sells vends vend vendons vendent thing/food/animal,
carry carries porte porte portons portent thing/food, take takes prends prend prenons prennent thing/food,
follow follows suis suit suivons suivent animal/person, hear hears entends entend entendons entendent animal/person,
wash washes lave lave lavons lavent animal/thing/food, paint paints peins peint peignons peignent thing/inside/place,
want wants veux veut voulons veulent thing/food/animal, watch watches regarde regarde regardons regardent any,
draw draws dessine dessine dessinons dessinent any, hide hides cache cache cachons cachent thing/food/animal,
keep keeps garde garde gardons gardent thing/animal,
choose chooses choisis choisit choisissons choisissent thing/food,
know knows connais connaît connaissons connaissent person/inside
"""
_INTRANSITIVE = """
sleep sleeps dors dort dormons dorment, sing sings chante chante chantons chantent,
dance dances danse danse dansons dansent, work works travaille travaille travaillons travaillent,
run runs cours court courons courent, walk walks marche marche marchons marchent, play plays joue joue jouons jouent,
cry cries pleure pleure pleurons pleurent, wait waits attends attend attendons attendent,
laugh laughs ris rit rions rient, swim swims nage nage nageons nagent
"""
_DITRANSITIVE = """
give gives donne donne donnons donnent thing/food/animal,
show shows montre montre montrons montrent thing/food/animal/inside, lend lends prête prête prêtons prêtent thing
"""

KINDS = ("animal", "person", "thing", "food", "inside", "place")
NUMBERS = {"two": "deux", "three": "trois", "four": "quatre", "five": "cinq"}
# Masculine forms that change before a vowel.
PREVOCALIC = {"beau": "bel", "vieux": "vieil", "nouveau": "nouvel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Noun:
    """A noun: its kind, its French gender, and (singular, plural) in both languages."""

    kind: str
    feminine: bool
    english: tuple[str, str]
    french: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjective:
    """An adjective: its French forms (m. sg., f. sg., m. pl., f. pl.), its place, and the kinds it describes."""

    english: str
    french: tuple[str, ...]
    before: bool
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A verb in the present: English (base, third person), French (je, il, nous, ils), and its kinds of object."""

    english: tuple[str, str]
    french: tuple[str, ...]
    kinds: tuple[str, ...]


def _rows(table: str) -> list[tuple[list[str], list[list[str]]]]:
    """Return (heading words, entries) per "heading: entry, entry" row of a table; a row may span lines."""
    rows = []
    for row in table.replace("\n    ", " ").strip().splitlines():
        heading, _, entries = row.partition(":")
        rows.append((heading.split(), [entry.split() for entry in entries.split(",")]))
    return rows


def _kinds(names: list[str]) -> tuple[str, ...]:
    return KINDS if names == ["any"] else tuple(names)


def _verbs(table: str) -> tuple[Verb, ...]:
    words = [entry.split() for entry in table.replace("\n", " ").split(",")]
    return tuple(
        Verb(english=(w[0], w[1]), french=tuple(w[2:6]), kinds=_kinds(w[6].split("/")) if w[6:] else ()) for w in words
    )


NOUNS = tuple(
    Noun(kind=heading[0], feminine=heading[1] == "f", english=(w[0], w[1]), french=(w[2], w[3]))
    for heading, entries in _rows(_NOUNS)
    for w in entries
)
ADJECTIVES = tuple(
    Adjective(english=w[0], french=tuple(w[1:5]), before=heading[0] == "before", kinds=_kinds(heading[1:]))
    for heading, entries in _rows(_ADJECTIVES)
    for w in entries
)
TRANSITIVE, INTRANSITIVE, DITRANSITIVE = _verbs(_TRANSITIVE), _verbs(_INTRANSITIVE), _verbs(_DITRANSITIVE)
