"""Make a world that is small enough for a small model to learn.

Goal:
    Write the data that every later stage draws on, with no network at all: a corpus of stories,
    facts and sums to pretrain on, chats to fine-tune on, word problems to practise on, and
    evaluation tasks. Each comes with a held-out part, so that what a stage teaches can be measured.

You will learn:
    - why a 2M-parameter model can learn this world and not the internet: about two thousand words,
      plain sentences, a few hundred facts that come back again and again
    - how a grammar with nested choices turns a page of text into a million different ones
    - how to hold out a test split by construction (by phrasing, by problem), not by luck
    - why a seed is not enough for equal bytes: hash order, locale and writer options count too

Read beside:
    nanochat/dataset.py (the shape of the shards), tasks/gsm8k.py and tasks/customjson.py (the shape
    of problems and chats), nanochat/core_eval.py (the three task formats). nanochat downloads all
    of these; here you can see how they came about, and change them.

Run:
    python edu/00_tiny_world.py
    python edu/00_tiny_world.py --show 3
    python edu/00_tiny_world.py --size-mb 1

Expect:
    00 tiny world - cpu - 14.0 MB - seed 1337
    wrote data/mirror/shard_00000.parquet ...
    result: distinct words - -> 1781 (n=14.0 MB)
    next: python edu/01_download.py --base-url mirror

Writes:
    mirror/shard_00000.parquet and so on; column `text`; the last shard is validation
    tiny_chat_train.jsonl  {"messages", "kind", "answer"} per line; answer is what a reply must hold
    tiny_chat_test.jsonl   the same facts asked in phrasings that stand nowhere else
    tiny_gsm_train.jsonl   {"question", "answer", "messages"} per line; GSM8K's two fields first
    tiny_gsm_test.jsonl    other numbers than in training and corpus, for every template
    tiny_eval/index.json   the tasks: CORE type, chance level in percent, few-shot count
    tiny_eval/facts_mc.jsonl and one such file per task
"""
import contextlib
import functools
import json
import os
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

# ---- settings ------------------------------------------------------------------------------------

ROW_GROUP = 1024  # documents per row group, nanochat's number: the loader deals out row groups
TRAIN_SHARDS = 4  # one more, the last, is validation
VALIDATION_SHARE = 0.04
MOST_MISSES = 20_000  # draws in a row that bring nothing new: there is no more to find
SMALLEST_MB = 1.0  # below this some facts would never come up in the training shards


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """where to write; also $EDU_DATA"""
    seed: int = 1337
    """same seed, same bytes"""
    size_mb: float = 14.0
    """size of the corpus in MB of text, at least 1"""
    num_chats: int = 8000
    """training chats; a tenth as many again are held out"""
    num_problems: int = 6000
    """training word problems; a sixth as many again are held out"""
    num_eval: int = 200
    """items in each evaluation task"""
    show: int = 0
    """print this many random documents instead of writing anything"""


# ---- shared blocks -------------------------------------------------------------------------------


# --- shared: cli (home: 00_tiny_world.py) ---
class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it."""


def run_script(run, config_class, argv, description):
    """Turn argv into a config_class, call run(config), and return the exit code.

    0 or whatever run returns; 2 for a UserError, shown as one message without a traceback;
    130 for Ctrl-C; 141 when nobody reads on. tyro itself exits with 2 on a flag it does not know.
    """
    config = tyro.cli(config_class, args=argv, description=description)
    try:
        code = run(config) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        # what is still to be printed goes nowhere: else Python would complain of it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
# --- end shared ---


# --- shared: atomic-write (home: 01_download.py) ---
@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; flush it to disk and rename it only on success.

    os.replace is atomic within one folder, so a reader sees the old file or the new one whole,
    never half of it, whatever kills the writer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
# --- end shared ---


# ---- the idea ------------------------------------------------------------------------------------
#
# Everything below is a template in one small language:
#     [a|b|c]   one of a, b, c; choices nest, and an empty one may leave words out: "[very |]happy"
#     {name}    a value given to the template, or else a fresh draw from LEXICON or MOMENTS
#     {x.he}    a property of a value: a person's pronouns, a word's plural {x.s}
# Write plain sentences: `polish` turns `a` into `an` and gives each sentence its capital.
#
# To add a fact, add a row to a Relation in FACTS (or a new Relation).
# To add a plot, write a function under @plot.  To add a word problem, one under @problem.


# --- words and people ---


def plural(noun):
    """The s-form of a noun, and by the same rule of a verb: dog dogs, hiss hisses, baby babies."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


class Word(str):
    """A word that knows its s-form: {a} {a.s}."""

    s = property(plural)


class Person(str):
    """A name that knows its pronouns: {hero} {hero.he} {hero.him} {hero.his} {hero.boy}."""

    def __new__(cls, name, female):
        self = super().__new__(cls, name)
        words = "she her her herself girl" if female else "he him his himself boy"
        self.he, self.him, self.his, self.himself, self.boy = words.split()
        self.He, self.His = self.he.capitalize(), self.his.capitalize()
        return self


class Elder(str):
    """A grown-up of the family, and how a child calls them: {hero.his} {elder}, {elder.call}."""

    def __new__(cls, kin, call):
        self = super().__new__(cls, kin)
        self.call = call
        return self


GIRLS = [Person(name, True) for name in """Anna Lily Mia Emma Sara Zoe Nora Ella Rosa Maya Lucy Ruth
    Alice Clara Ivy Amy Jane Kate Leah Nina""".split()]
BOYS = [Person(name, False) for name in """Tom Ben Sam Max Leo Jack Adam Finn Hugo Omar Paul Luke
    Noah Eli Oscar Peter Ravi Dan Theo Mark""".split()]
ELDERS = [Elder("mother", "Mum"), Elder("father", "Dad"),
          Elder("grandmother", "Grandma"), Elder("grandfather", "Grandpa")]
IRREGULAR = dict(pair.split("=") for pair in """mouse=mice child=children foot=feet tooth=teeth
    goose=geese man=men woman=women sheep=sheep fish=fish leaf=leaves knife=knives wolf=wolves
    ox=oxen person=people loaf=loaves shelf=shelves half=halves tomato=tomatoes potato=potatoes
    deer=deer scarf=scarves""".split())

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = ONES + [ten + (f"-{one}" if one != "zero" else "") for ten in TENS for one in ONES[:10]]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
    December""".split()
SEASONS = "winter spring summer autumn".split()


# --- facts: every one of them true ---


@dataclass(eq=False)
class Relation:
    """One kind of fact: a table and the ways to put a row into words.

    rows      "a=b" or "a=b/c", separated by commas (or a list of tuples)
    say       clauses without capital and full stop; the first is the plain one and the usual answer
    ask       questions; one that names {b} asks back for {a}
    chat_ask  more questions for the training chats, such as only a chat would hold
    held_say  clauses kept for evaluation, ending in {b}: in no corpus and no training chat
    held_ask  questions kept for the test chats
    key       what a right answer must contain
    choices   whether another row's b is always a wrong answer, so that it can serve in a test
    avoid     "a=b" pairs that are not wrong enough for that
    """

    name: str
    rows: object
    say: tuple
    ask: tuple
    held_say: tuple
    held_ask: tuple
    chat_ask: tuple = ()
    key: str = "{b}"
    choices: bool = True
    avoid: str = ""
    often: int = 1  # how many times as often as other facts it comes up


@dataclass(eq=False)
class Fact:
    relation: Relation
    a: Word
    b: Word
    c: Word

    @property
    def slots(self):
        return {"a": self.a, "b": self.b, "c": self.c}


# country / capital / continent / language; a dash where one answer would not be the whole truth
COUNTRIES = [tuple(" ".join(row.split()).split("/")) for row in """
    France/Paris/Europe/French, Germany/Berlin/Europe/German, Italy/Rome/Europe/Italian,
    Spain/Madrid/Europe/Spanish, England/London/Europe/English,
    Portugal/Lisbon/Europe/Portuguese, Greece/Athens/Europe/Greek, Poland/Warsaw/Europe/Polish,
    Austria/Vienna/Europe/German, Hungary/Budapest/Europe/Hungarian, Ireland/Dublin/Europe/-,
    Norway/Oslo/Europe/Norwegian, Sweden/Stockholm/Europe/Swedish, Finland/Helsinki/Europe/-,
    Denmark/Copenhagen/Europe/Danish, Iceland/Reykjavik/Europe/Icelandic,
    Belgium/Brussels/Europe/-, Ukraine/Kyiv/Europe/Ukrainian, Romania/Bucharest/Europe/Romanian,
    Bulgaria/Sofia/Europe/Bulgarian, Croatia/Zagreb/Europe/Croatian, Russia/Moscow/-/Russian,
    Turkey/Ankara/-/Turkish, Egypt/Cairo/Africa/Arabic, Kenya/Nairobi/Africa/-,
    Morocco/Rabat/Africa/-, Ghana/Accra/Africa/-, Senegal/Dakar/Africa/-,
    Uganda/Kampala/Africa/-, Tunisia/Tunis/Africa/-, Japan/Tokyo/Asia/Japanese,
    China/Beijing/Asia/Chinese, India/New Delhi/Asia/-, Thailand/Bangkok/Asia/Thai,
    Vietnam/Hanoi/Asia/Vietnamese, Nepal/Kathmandu/Asia/-, Iran/Tehran/Asia/-,
    Iraq/Baghdad/Asia/-, South Korea/Seoul/Asia/Korean, Canada/Ottawa/North America/-,
    Cuba/Havana/North America/Spanish, Jamaica/Kingston/North America/-, the United
    States/Washington/North America/-, Peru/Lima/South America/-, Chile/Santiago/South
    America/Spanish, Argentina/Buenos Aires/South America/Spanish, Brazil/Brasilia/South
    America/Portuguese, Colombia/Bogota/South America/Spanish, Uruguay/Montevideo/South
    America/Spanish, Australia/Canberra/-/English, New Zealand/Wellington/-/-""".split(",")]

# a-b holds both ways, a>b only the one way
OPPOSITES = """big-small, hot-cold, up-down, day-night, fast-slow, happy-sad, open-closed,
    full-empty, wet-dry, clean-dirty, loud-quiet, thick-thin, rich-poor, early-late, first-last,
    near-far, strong-weak, high-low, deep-shallow, wide-narrow, inside-outside, win-lose,
    push-pull, buy-sell, give-take, remember-forget, true-false, above-below, always-never,
    before-after, good-bad, awake-asleep, same-different, smooth-rough, polite-rude,
    north-south, east-west, top-bottom, floor-ceiling, friend-enemy, on-off, yes-no,
    question-answer, front-back, more-less, safe-dangerous, left>right, heavy>light, dark>light,
    young>old, new>old, soft>hard, easy>hard, tall>short, long>short, come>go"""


def column(i):
    """(country, the i-th thing about it) for every country that has one."""
    return [(row[0], row[i]) for row in COUNTRIES if row[i] != "-"]


def both_ways():
    pairs = [re.split("([->])", pair.strip()) for pair in OPPOSITES.split(",")]
    return [(a, b) for a, _, b in pairs] + [(b, a) for a, arrow, b in pairs if arrow == "-"]


def in_order(step):
    """(a, b, kind) with b the one after a (step 1) or before a (step -1)."""
    rounds = [("day", DAYS, 7), ("month", MONTHS, 12), ("season", SEASONS, 4),
              ("number", NUMBERS[:32], 0)]
    rows = []
    for kind, names, cycle in rounds:
        for i in range(len(names)) if cycle else range(1, len(names) - 1):
            rows.append((names[i], names[(i + step) % (cycle or len(names))], kind))
    return rows


FACTS = [
    Relation(
        "capital", column(1),
        often=2,
        say=("the capital of {a} is {b}", "{b} is the capital of {a}",
             "the capital city of {a} is {b}", "the city of {b} is the capital of {a}",
             "[people|many people] in {a} [go|travel] to {b}, the capital",
             "{a} has a capital, and [it is|its name is|that is] {b}"),
        ask=("what is the capital of {a}?", "which city is the capital of {a}?",
             "what is the capital city of {a}?",
             "[can you tell me|do you know] the capital of {a}?",
             "{b} is the capital of which country?"),
        chat_ask=("tell me the capital of {a}.", "I want to know the capital of {a}.",
                  "I am going to {a}. what is the capital there?",
                  "{a} has a capital. what is it called?",
                  "what do people call the capital of {a}?"),
        held_say=("the city that we call the capital of {a} is {b}",
                  "when people in {a} talk about their capital, they mean {b}"),
        held_ask=("I forgot the capital of {a}. which city is it?",
                  "please name the capital of {a}.")),
    Relation(
        "continent", column(2),
        say=("{a} is in {b}", "{a} is a country in {b}", "the country of {a} is in {b}",
             "if you go to {a}, you are in {b}", "one of the countries in {b} is {a}"),
        ask=("where is {a}?", "on which continent is {a}?", "which continent is {a} in?",
             "do you know where {a} is?", "in which part of the world is {a}?"),
        chat_ask=("tell me where {a} is.", "I want to find {a} on the map. where do I look?",
                  "please name the continent of {a}.",
                  "{a} is a country. where in the world is it?",
                  "to which continent do I fly if I fly to {a}?"),
        held_say=("on a map of the world you can find {a} in {b}",),
        held_ask=("can you tell me which continent {a} is on?",
                  "I am looking for {a}. where is it?")),
    Relation(
        "language", column(3),
        say=("people in {a} speak {b}", "in {a}, people speak {b}", "the language of {a} is {b}",
             "{b} is the language that people speak in {a}",
             "if you live in {a}, you [hear|speak] {b} every day"),
        ask=("which language do people speak in {a}?", "what do people speak in {a}?",
             "what is the language of {a}?", "do you know which language people in {a} speak?"),
        chat_ask=("tell me what people speak in {a}.",
                  "I am going to {a}. what do the people there speak?",
                  "please name the language of {a}.", "if I live in {a}, what do I speak?",
                  "I have a friend in {a}. which language is hers?"),
        held_say=("when the people of {a} talk, they talk in {b}",),
        held_ask=("I want to travel to {a}. which language do people speak there?",
                  "what language will I hear in {a}?"),
        avoid="Ukraine=Russian, Argentina=Italian"),
    Relation(
        "colour", """the sky=blue, grass=green, snow=white, milk=white, coal=black, blood=red, a
            lemon=yellow, a ripe banana=yellow, a carrot=orange, a pumpkin=orange, an
            elephant=grey, a polar bear=white, a crow=black, a flamingo=pink, a cucumber=green,
            salt=white, an emerald=green, a ruby=red, spinach=green, a pea=green,
            broccoli=green, a ripe strawberry=red, a ripe tomato=red, a sunflower=yellow, a
            canary=yellow, a zebra=black and white, a panda=black and white, a penguin=black and
            white, flour=white, cotton=white, ash=grey, a raven=black, butter=yellow, tar=black,
            mud=brown, a coconut=brown, a hippo=grey, a dolphin=grey, a blueberry=blue,
            frost=white""",
        often=3,
        say=("{a} is {b}", "the colour of {a} is {b}", "{b} is the colour of {a}",
             "we all know that {a} is {b}", "if you look at {a}, you see that it is {b}"),
        ask=("what colour is {a}?", "which colour is {a}?", "what is the colour of {a}?",
             "do you know the colour of {a}?", "can you tell me what colour {a} is?"),
        chat_ask=("tell me what colour {a} is.", "I cannot remember the colour of {a}.",
                  "I am drawing {a}. which colour do I take?", "please name the colour of {a}.",
                  "if I paint {a}, which colour do I need?",
                  "which colour do you see if you look at {a}?"),
        held_say=("if you paint a picture of {a}, paint it {b}",),
        held_ask=("I want to paint {a}. which colour do I need?",
                  "please tell me the colour of {a}."),
        avoid="a ripe tomato=green, a blueberry=black, a coconut=green, a carrot=yellow"),
    Relation(
        "sound", """dog=bark, cat=meow, cow=moo, sheep=bleat, duck=quack, lion=roar, pig=oink,
            horse=neigh, bee=buzz, owl=hoot, snake=hiss, frog=croak, wolf=howl, mouse=squeak,
            donkey=bray, hen=cluck, rooster=crow, turkey=gobble, goose=honk, parrot=squawk""",
        say=("a {a} {b.s}", "{a.s} {b}", "when a {a} makes a noise, it {b.s}",
             "a {a} can {b}", "if it {b.s}, it may well be a {a}"),
        ask=("what sound does a {a} make?", "what noise do {a.s} make?", "which animal {b.s}?",
             "do you know what sound a {a} makes?", "what does a {a} do when it makes a noise?"),
        chat_ask=("tell me what sound a {a} makes.",
                  "there is a {a} outside. what noise will it make?", "how does a {a} sound?",
                  "please tell me the noise that a {a} makes.", "I hear a {a}. what does it do?"),
        held_say=("when a {a} wants to be heard, it begins to {b}",),
        held_ask=("can you tell me what noise a {a} makes?", "I hear a {a}. what sound is it?"),
        key="{b.s}",
        avoid="dog=howl, wolf=bark, cat=hiss, goose=hiss, pig=squeak, turkey=cluck, hen=squawk"),
    Relation(
        "count", """a dog=four/legs, a cat=four/legs, a cow=four/legs, a horse=four/legs, a
            sheep=four/legs, a lion=four/legs, an elephant=four/legs, a mouse=four/legs, a
            hen=two/legs, a duck=two/legs, an owl=two/legs, an ant=six/legs, a bee=six/legs, a
            fly=six/legs, a beetle=six/legs, a butterfly=six/legs, a spider=eight/legs, an
            octopus=eight/arms, an ostrich=two/legs, a goat=four/legs, a bird=two/wings, a
            bat=two/wings, a bee=four/wings, a butterfly=four/wings, a bicycle=two/wheels, a
            car=four/wheels, a tricycle=three/wheels, a triangle=three/sides, a
            square=four/sides, a rectangle=four/sides, a pentagon=five/sides, a
            hexagon=six/sides, an octagon=eight/sides, a cube=six/faces, a week=seven/days, a
            year=twelve/months, a year=four/seasons, a day=twenty-four/hours, an
            hour=sixty/minutes, a minute=sixty/seconds, a foot=five/toes, a dog=two/ears, a
            horse=two/eyes, a violin=four/strings, a guitar=six/strings, the
            alphabet=twenty-six/letters, a century=one hundred/years, a metre=one
            hundred/centimetres""",
        say=("{a} has {b} {c}", "{a} has exactly {b} {c}", "every child knows that {a} has {b} {c}",
             "if you count the {c} of {a}, you get to {b}", "{b} is the number of {c} that {a} has",
             "count the {c}: {a} has {b}"),
        ask=("how many {c} does {a} have?", "how many {c} has {a} got?",
             "do you know how many {c} {a} has?", "what is the number of {c} that {a} has?"),
        chat_ask=("tell me how many {c} {a} has.",
                  "I want to count the {c} of {a}. how many are there?",
                  "please count the {c} of {a}.", "what number of {c} does {a} have?",
                  "{a} has how many {c}?"),
        held_say=("when you count the {c} of {a}, the answer is {b}",),
        held_ask=("can you tell me how many {c} {a} has?",
                  "I want to draw {a}. how many {c} do I have to draw?"),
        key="{b} {c}"),
    Relation(
        "opposite", both_ways(),
        say=("the opposite of {a} is {b}", "{b} is the opposite of {a}",
             'the opposite of "{a}" is "{b}"', "{a} and {b} are opposites",
             'the words "{a}" and "{b}" are opposites'),
        ask=("what is the opposite of {a}?", "which word is the opposite of {a}?",
             'what is the opposite of the word {a}?', "do you know the opposite of {a}?"),
        chat_ask=("I am looking for the opposite of {a}. which word is it?",
                  "please name the opposite of {a}.", "{a} has an opposite. which word is it?",
                  "what do I say if I mean the opposite of {a}?"),
        held_say=("the word that means the opposite of {a} is {b}",),
        held_ask=("please tell me the opposite of {a}.", "I need the opposite of {a}. what is it?"),
        avoid="wide=thin, narrow=thick, low=short, high=short, bad=happy, good=sad, first=bottom"),
    Relation(
        "plural", """mouse=mice, child=children, foot=feet, tooth=teeth, goose=geese, man=men,
            woman=women, sheep=sheep, leaf=leaves, knife=knives, wolf=wolves, ox=oxen,
            loaf=loaves, shelf=shelves, half=halves, potato=potatoes, tomato=tomatoes,
            baby=babies, city=cities, story=stories, berry=berries, puppy=puppies, box=boxes,
            fox=foxes, bus=buses, dish=dishes, brush=brushes, watch=watches, glass=glasses,
            dog=dogs, cat=cats, book=books, tree=trees""",
        say=("the plural of {a} is {b}", "{b} is the plural of {a}", "one {a}, two {b}",
             "we say one {a}, but two {b}", "if there is more than one {a}, we say {b}"),
        ask=("what is the plural of {a}?", 'what is the plural of the word {a}?',
             "what do you call more than one {a}?", "one {a}, but two what?"),
        chat_ask=("I have more than one {a}. which word do I use?",
                  "please give me the plural of {a}.",
                  "what do I write if there are two and not one {a}?",
                  "there is one {a}, and then one more. what do I have?"),
        held_say=("the word for more than one {a} is {b}",),
        held_ask=("please tell me the plural of {a}.", "what is the word for more than one {a}?")),
    Relation(
        "after", in_order(1),
        say=("the {c} after {a} is {b}", "{b} comes after {a}", "after {a} comes {b}",
             "{a} is followed by {b}"),
        ask=("which {c} comes after {a}?", "what comes after {a}?", "what is the {c} after {a}?",
             "do you know which {c} comes after {a}?", "which {c} follows {a}?"),
        chat_ask=("tell me which {c} comes after {a}.", "I want to know the {c} after {a}.",
                  "please name the {c} after {a}.", "I have come to {a}. which {c} is next?",
                  "what is the next {c} after {a}?"),
        held_say=("the next {c} after {a} is {b}",),
        held_ask=("can you tell me the next {c} after {a}?", "what is the {c} that follows {a}?")),
    Relation(
        "before", in_order(-1),
        say=("the {c} before {a} is {b}", "{b} comes before {a}", "before {a} comes {b}",
             "just before {a} comes {b}", "{b} is the {c} before {a}"),
        ask=("which {c} comes before {a}?", "what comes before {a}?", "what is the {c} before {a}?",
             "do you know which {c} comes before {a}?"),
        chat_ask=("tell me which {c} comes before {a}.", "I want to know the {c} before {a}.",
                  "please name the {c} before {a}.", "which {c} is just before {a}?",
                  "what was the {c} before {a}?"),
        held_say=("the {c} that comes just before {a} is {b}",),
        held_ask=("can you tell me the {c} before {a}?", "which {c} do we have just before {a}?")),
    Relation(
        "baby", """dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, pig=piglet,
            hen=chick, duck=duckling, goose=gosling, goat=kid, bear=cub, lion=cub, tiger=cub,
            frog=tadpole, deer=fawn, kangaroo=joey, swan=cygnet, elephant=calf, whale=calf,
            giraffe=calf, donkey=foal, zebra=foal""",
        say=("a baby {a} is called a {b}", "a young {a} is called a {b}", "a {b} is a baby {a}",
             "the baby of a {a} is a {b}", "we call a baby {a} a {b}"),
        ask=("what is a baby {a} called?", "what do you call a baby {a}?",
             "what is a young {a} called?", "do you know what a baby {a} is called?"),
        chat_ask=("tell me what a baby {a} is called.",
                  "there is a {a} with its young. what do we call the young one?",
                  "please tell me the word for a baby {a}.",
                  "a {a} has a baby. what is it called?", "which word do we use for a young {a}?"),
        held_say=("the name for a baby {a} is {b}",),
        held_ask=("what is the name for a baby {a}?",
                  "I saw a {a} with its baby. what is the baby called?"),
        avoid="duck=chick, goose=chick, swan=chick"),
    Relation(
        "home", """bee=in a hive, rabbit=in a burrow, horse=in a stable, pig=in a sty, whale=in
            the sea, dolphin=in the sea, octopus=in the sea, shark=in the sea, camel=in the
            desert, hen=in a coop, polar bear=in the Arctic, mole=under the ground, worm=under
            the ground, kangaroo=in Australia, koala=in Australia, giraffe=in Africa, zebra=in
            Africa, hippo=in Africa, panda=in China, llama=in South America, fish=in the water,
            monkey=in the trees""",
        say=("a {a} lives {b}", "the home of a {a} is {b}", "{a.s} live {b}",
             "{a.s} make their home {b}", "you can find a {a} {b}"),
        ask=("where does a {a} live?", "where do {a.s} live?", "where is the home of a {a}?",
             "where can you find a {a}?"),
        chat_ask=("tell me where a {a} lives.", "I want to see a {a}. where do I have to go?",
                  "please tell me where {a.s} live.", "a {a} has a home. where is it?",
                  "where would I look for a {a}?"),
        held_say=("if you look for a {a}, look {b}",),
        held_ask=("can you tell me where a {a} lives?",
                  "I am looking for a {a}. where does it live?"),
        choices=False),
    Relation(
        "kind", """an apple=fruit, a pear=fruit, a banana=fruit, a cherry=fruit, a grape=fruit,
            a carrot=vegetable, a potato=vegetable, an onion=vegetable, a cabbage=vegetable, an
            eagle=bird, an owl=bird, a penguin=bird, a duck=bird, a swan=bird, a hen=bird, a
            shark=fish, a salmon=fish, a trout=fish, a tuna=fish, an ant=insect, a bee=insect, a
            fly=insect, a beetle=insect, a butterfly=insect, a dog=mammal, a cat=mammal, a
            cow=mammal, a horse=mammal, a whale=mammal, a dolphin=mammal, a bat=mammal, a
            mouse=mammal, an elephant=mammal, a rose=flower, a tulip=flower, a daisy=flower, a
            lily=flower, an oak=tree, a pine=tree, a palm=tree, a hammer=tool, a saw=tool, a
            spade=tool, a car=vehicle, a bus=vehicle, a truck=vehicle, iron=metal, gold=metal,
            silver=metal, copper=metal, a circle=shape, a square=shape, a triangle=shape, a
            piano=musical instrument, a violin=musical instrument, a flute=musical instrument, a
            drum=musical instrument, milk=drink, tea=drink, coffee=drink, football=sport,
            tennis=sport, a table=piece of furniture, a chair=piece of furniture, a bed=piece of
            furniture, a shirt=piece of clothing, a coat=piece of clothing, a hat=piece of
            clothing""",
        say=("{a} is a {b}", "one example of a {b} is {a}", "everyone can see that {a} is a {b}",
             "we say that {a} is a {b}"),
        ask=("what is {a}?", "what kind of thing is {a}?", "do you know what {a} is?"),
        chat_ask=("I have never heard of {a}. what is it?",
                  "please explain what {a} is.", "my little brother asks what {a} is.",
                  "somebody told me about {a}. what is that?"),
        held_say=("the word for things like {a} is {b}",),
        held_ask=("can you tell me what {a} is?", "please tell me what {a} is.")),
    Relation(
        "made", """bread=flour/from, pasta=flour/from, flour=wheat/from, cheese=milk/from,
            butter=milk/from, yoghurt=milk/from, glass=sand/from, paper=wood/from,
            jam=fruit/from, wine=grapes/from, lemonade=lemons/from, marmalade=oranges/from,
            chocolate=cocoa beans/from, popcorn=maize/from, ketchup=tomatoes/from, an
            omelette=eggs/from, steel=iron/from, a candle=wax/of, a brick=clay/of, a
            tyre=rubber/of, a balloon=rubber/of, a plank=wood/of, a coin=metal/of, a
            nail=metal/of, a mirror=glass/of, a snowman=snow/of, an igloo=snow/of, a
            sandcastle=sand/of""",
        say=("{a} is made {c} {b}", "{a} is something that is made {c} {b}",
             "everyone knows that {a} is made {c} {b}",
             "to make {a}, people use {b}"),
        ask=("what is {a} made {c}?", "what do people use to make {a}?",
             "do you know what {a} is made {c}?", "what do you need to make {a}?"),
        chat_ask=("tell me what {a} is made {c}.", "I would like to make {a}. what do I use?",
                  "please explain what {a} is made {c}.",
                  "my little sister asks what {a} is made {c}.",
                  "if I want to make {a}, what must I have?"),
        held_say=("if you ask what {a} is made {c}, the answer is {b}",),
        held_ask=("can you tell me what {a} is made {c}?", "I want to make {a}. what do I need?"),
        choices=False),
    Relation(
        "comes", """milk=cows, wool=sheep, eggs=hens, honey=bees, silk=silkworms, bacon=pigs,
            feathers=birds, rain=clouds, apples=apple trees, grapes=vines, acorns=oak trees,
            coconuts=palm trees""",
        say=("we get {a} from {b}", "{b} give us {a}",
             "people get {a} from {b}", "we have {b} to thank for {a}"),
        ask=("where do we get {a} from?", "what gives us {a}?", "where do people get {a} from?"),
        chat_ask=("tell me where we get {a} from.", "I want to know where people get {a} from.",
                  "please explain where {a} comes from.", "I have some {a}. what gives it to us?",
                  "who or what gives us {a}?"),
        held_say=("if you ask where people get {a}, the answer is {b}",),
        held_ask=("can you tell me where we get {a} from?",), choices=False),
    Relation(
        "use", """cut paper=scissors, cut bread=a knife, eat soup=a spoon, write a letter=a pen,
            open a lock=a key, tell the time=a clock, sweep the floor=a broom, dig a hole=a
            spade, brush teeth=a toothbrush, hit a nail=a hammer, sew a shirt=a needle, take a
            photo=a camera, measure a line=a ruler, dry wet hands=a towel, bake bread=an oven,
            stay dry in the rain=an umbrella, see the stars better=a telescope, cross a river=a
            bridge, climb up to the roof=a ladder, cut wood=a saw, fly a long way=a plane, see
            in the dark=a lamp, wash dirty hands=soap and water""",
        say=("you use {b} to {a}", "to {a}, you need {b}", "people use {b} to {a}",
             "with {b}, you can {a}"),
        ask=("what do you use to {a}?", "what do you need to {a}?", "what do people use to {a}?",
             "how can you {a}?"),
        chat_ask=("tell me how to {a}.", "I have to {a}. what do I use?",
                  "please tell me what I need to {a}.", "which thing helps me to {a}?",
                  "somebody wants to {a}. what is right for that?"),
        held_say=("if you want to {a}, it is best to use {b}",),
        held_ask=("I want to {a}. what do I need?", "can you tell me what people use to {a}?"),
        choices=False),
    Relation(
        "sense", "see=eyes, hear=ears, smell=nose, taste=tongue",
        say=("we {a} with our {b}", "people {a} with their {b}", "you {a} with your {b}",
             "you use your {b} to {a}"),
        ask=("what do we {a} with?", "what do you use to {a}?",
             "which part of the body do we {a} with?"),
        chat_ask=("tell me what we {a} with.", "please tell me what people {a} with.",
                  "to {a}, what do we need?", "my little brother asks what we {a} with."),
        held_say=("if you want to {a}, you have to use your {b}",),
        held_ask=("can you tell me what we {a} with?",)),
    Relation(
        "work", """baker=bakes bread, teacher=teaches children, farmer=grows food, pilot=flies
            planes, doctor=helps sick people, dentist=looks after teeth, vet=looks after sick
            animals, builder=builds houses, painter=paints pictures, singer=sings songs,
            writer=writes books, gardener=looks after gardens, tailor=makes clothes,
            sailor=works on a ship, miner=digs for coal, firefighter=puts out fires,
            shepherd=looks after sheep, carpenter=makes things from wood, plumber=mends water
            pipes, barber=cuts hair, postman=brings letters, beekeeper=keeps bees, waiter=brings
            food to the table, astronaut=travels in space, cook=cooks meals""",
        say=("a {a} {b}", "a {a} is a person who {b}", "every {a} {b}",
             "if somebody {b}, [it may be|that may be|you may be looking at] a {a}"),
        ask=("what does a {a} do?", "who {b}?", "what is the work of a {a}?",
             "do you know what a {a} does?", "what do we call a person who {b}?"),
        chat_ask=("tell me what a {a} does.", "my aunt is a {a}. what does a {a} do?",
                  "please explain what a {a} does.",
                  "my uncle wants to be a {a}. what will he do?", "what does a {a} do all day?"),
        held_say=("it is well known that a good {a} {b}",),
        held_ask=("can you tell me what a {a} does?", "I want to be a {a}. what does a {a} do?"),
        avoid="farmer=looks after sheep, farmer=keeps bees, builder=makes things from wood"),
    Relation(
        "most", """largest ocean in the world=the Pacific Ocean, highest mountain in the
            world=Mount Everest, biggest animal in the world=the blue whale, fastest animal on
            land=the cheetah, tallest animal in the world=the giraffe, biggest animal on
            land=the African elephant, biggest bird in the world=the ostrich, biggest planet
            that goes round the Sun=Jupiter, planet closest to the Sun=Mercury, hottest planet
            that goes round the Sun=Venus, planet that we live on=the Earth, planet that people
            call the red planet=Mars, star closest to the Earth=the Sun, biggest continent=Asia,
            smallest continent=Australia, coldest continent=Antarctica, biggest country in the
            world=Russia, smallest country in the world=Vatican City, first month of the
            year=January, last month of the year=December, shortest month of the year=February,
            coldest season=winter, warmest season=summer, first letter of the alphabet=the
            letter A, last letter of the alphabet=the letter Z""",
        say=("the {a} is {b}", "{b} is the {a}", "[our|my|the] book says that the {a} is {b}",
             "[I|we] have learned that the {a} is {b}"),
        ask=("what is the {a}?", "do you know the {a}?", "can you tell me the {a}?"),
        chat_ask=("tell me the {a}.", "I want to know the {a}.", "somebody asked me for the {a}.",
                  "which one is the {a}?"),
        held_say=("if you ask for the {a}, the answer is {b}",),
        held_ask=("please name the {a}.", "I forgot the {a}. what is it?"),
        avoid="tallest animal in the world=the blue whale"),
    Relation(
        "season", """leaves turn brown and fall from the trees=autumn, farmers pick the ripe
            apples=autumn, the first flowers come up=spring, many birds build their
            nests=spring, the days are longest=summer, the nights are shortest=summer, the days
            are shortest=winter, the nights are longest=winter""",
        say=("{a} in {b}", "in {b}, {a}", "when it is {b}, {a}", "{b} is the season when {a}"),
        ask=("in which season is it that {a}?", "which is the season when {a}?"),
        chat_ask=("tell me the season when {a}.", "do you know in which season {a}?",
                  "please name the season when {a}.", "I have forgotten in which season {a}.",
                  "if {a}, which season is it?"),
        held_say=("the time of the year when {a} is {b}",),
        held_ask=("can you tell me in which season {a}?",)),
]

SUMS = [
    Relation(
        "plus", [(a, a + c, c) for a in range(13) for c in range(13)], often=4,
        say=("{a} + {c} = {b}", "{a} plus {c} is {b}", "{a} and {c} make {b}",
             "if you add {c} to {a}, you get {b}", "{a} plus {c} makes {b}"),
        ask=("what is {a} + {c}?", "what is {a} plus {c}?", "how much is {a} plus {c}?",
             "do you know what {a} and {c} make?", "how much is {a} + {c}?"),
        chat_ask=("tell me what {a} plus {c} is.",
                  "I have {a} and get {c} more. what does that make?",
                  "please work out {a} plus {c}.", "{a} and {c} together make what?",
                  "what do I get if I add {c} to {a}?"),
        held_say=("the sum of {a} and {c} is {b}",),
        held_ask=("can you tell me how much {a} plus {c} is?", "please add {c} to {a}.")),
    Relation(
        "minus", [(a + c, a, c) for a in range(13) for c in range(13)],
        say=("{a} - {c} = {b}", "{a} minus {c} is {b}", "{a} take away {c} is {b}",
             "if you take {c} from {a}, you get {b}", "{a} minus {c} leaves {b}"),
        ask=("what is {a} - {c}?", "what is {a} minus {c}?", "how much is {a} minus {c}?",
             "do you know what {a} take away {c} is?", "how much is {a} - {c}?"),
        chat_ask=("tell me what {a} minus {c} is.", "I have {a} and give away {c}. what is left?",
                  "please work out {a} minus {c}.", "if I take {c} away from {a}, what is left?",
                  "what do I get for {a} minus {c}?"),
        held_say=("when we take away {c} from {a}, the number that is left is {b}",),
        held_ask=("can you tell me how much {a} minus {c} is?", "please take {c} from {a}.")),
    Relation(
        "times", [(a, a * c, c) for a in range(2, 13) for c in range(1, 11)],
        say=("{a} x {c} = {b}", "{a} times {c} is {b}", "{a} times {c} makes {b}"),
        ask=("what is {a} x {c}?", "what is {a} times {c}?", "how much is {a} times {c}?"),
        chat_ask=("tell me what {a} times {c} is.", "do you know how much {a} x {c} is?",
                  "please work out {a} times {c}.",
                  "{c} bags hold {a} eggs each. how many eggs are there?",
                  "what do I get for {a} times {c}?"),
        held_say=("when we count {a} groups of {c}, the number we get is {b}",),
        held_ask=("can you tell me how much {a} times {c} is?",)),
    Relation(
        "divide", [(a * c, a, c) for a in range(1, 11) for c in range(2, 11)],
        say=("{a} / {c} = {b}", "{a} divided by {c} is {b}"),
        ask=("what is {a} / {c}?", "what is {a} divided by {c}?",
             "how much is {a} divided by {c}?"),
        chat_ask=("tell me what {a} divided by {c} is.", "do you know how much {a} / {c} is?",
                  "please work out {a} divided by {c}.",
                  "{c} children share {a} sweets. how many does each one get?",
                  "what do I get for {a} divided by {c}?"),
        held_say=("when {a} is split into {c} equal parts, each part is {b}",),
        held_ask=("can you tell me how much {a} divided by {c} is?",)),
]


# --- the words and moments that stories are made of ---

LEXICON = {
    # times and weather
    "day": """[One [sunny|cold|warm|windy|quiet|bright|grey|fine] [morning|afternoon|day]|One
        [morning|afternoon|day]|One day in {season}|On {weekday} [morning|afternoon]|Early one
        [morning|{weekday}]|One {weekday}|[Last|This] {weekday}|On a {weekday} in {month}]""",
    "nice_day": """[One [sunny|warm|fine|bright] [morning|afternoon|day]|One day in [spring|
        summer]|Early one morning|One morning|One day|On a {weekday} in [April|May|June|July|
        August|September]]""",
    "school_day": """[One [morning|day]|[On|One] [Monday|Tuesday|Wednesday|Thursday|
        Friday][| morning]|On a {season} day|One [cold|warm|grey|windy] morning]""",
    "weekday": "[" + "|".join(DAYS) + "]",
    "month": "[" + "|".join(MONTHS) + "]",
    "season": "[spring|summer|autumn|winter]",
    "later": """[After a while|After some time|A little later|Soon|Not long after that|A few
        minutes later|Then|In the end|At last]""",
    "next_day": """[The next [day|morning]|The day after|A few days later|Two days later|A week
        later]""",
    "evening": """[That [evening|night]|In the evening|Before bed|At bedtime|When it was time
        for bed|Later that [day|evening]|When the stars came out]""",
    "weather": """[The sun was [shining|out|warm]|The air was [cool|warm|fresh]|The sky was
        [blue|full of [small|white] clouds]|A [soft|light|cool] wind was blowing|The birds were
        singing|There was not a cloud in the sky|It was [quiet|warm|cool] outside]""",
    # people
    "kind_of": """[little|young|kind|clever|quiet|cheerful|brave|friendly|curious|busy|careful|
        gentle|funny|lively]""",
    "hobby": """[read books|draw pictures|sing songs|climb trees|look at the stars|collect
        stones|ride a bike|play the drum|help in the garden|bake bread|watch birds|build towers|
        tell jokes|count things|run in the fields|play football|ask questions|learn new words|
        feed the ducks|paint with bright colours|swim in the lake|write letters]""",
    "home": """[a {house_kind} house|a {house_kind} flat|a {house_kind} house with a {colour}
        door] [near|next to|not far from|behind] the [river|forest|sea|park|school|mill|station|
        market|lake|hill|bakery|library]""",
    "house_kind": "[small|little|big|old|white|yellow|tall|narrow|cosy|quiet|brick]",
    "job": """[baker|teacher|farmer|pilot|doctor|dentist|builder|painter|singer|writer|gardener|
        tailor|sailor|postman|cook|carpenter]""",
    "sir": "[Mr|Mrs|Miss] [Green|Hill|Brown|Wood|Bell|Stone|Lake|Field|Fox|Banks]",
    # feelings
    "glad": """[happy|glad|very happy|so happy|very glad|full of joy|as happy as could be|
        delighted]""",
    "sad": "[sad|very sad|unhappy|upset|close to tears|very unhappy]",
    "smiled": """[smiled|laughed|was {glad}|felt {glad}|jumped for joy|clapped|could not stop
        smiling|gave a big smile|looked {glad}|beamed]""",
    "at_once": "[at once|right away|quickly|without waiting|as fast as possible]",
    "very": "[very|really|so|]",
    # things
    "colour": "[red|blue|green|yellow|white|brown|black|pink|purple|orange|grey]",
    "size": "[small|little|big|large|tiny|long|short|round|old|new]",
    "toy": """[ball|kite|doll|drum|whistle|toy car|toy boat|toy train|teddy bear|puzzle|hat|
        scarf|book|pencil|lantern|umbrella|basket|bag|cup|spoon|bell|map|ring|coin|key|watch|
        flute|glove]""",
    "gift": """[book|scarf|hat|cup|bell|lamp|plant|basket|clock|picture|pen|vase|teapot|blanket|
        candle|bowl]""",
    "fruit": "[apple|pear|plum|orange|banana|peach|lemon|melon]",
    "fruits": "[apples|pears|plums|oranges|bananas|peaches|cherries|grapes|nuts|berries]",
    "snack": """[bread and cheese|a piece of cake|an apple|some soup|a bowl of rice|a pancake|
        two plums|a sandwich|some cherries|a boiled egg|warm bread with butter|a jam tart|some
        nuts|a slice of melon|some biscuits|some berries]""",
    "share": """[a sandwich|a piece of cake|an apple|a pancake|a jam tart|a big biscuit|a
        banana|a small pie]""",
    "pet": "[dog|cat|rabbit|hen|goat|duck|donkey|parrot|pony]",
    "wild": "[fox|owl|rabbit|frog|mouse|bear|deer|squirrel|hedgehog|crow|duck|turtle|beaver|wolf]",
    "place": """[park|market|forest|river|lake|beach|library|school|garden|farm|field|mill|
        station|museum|bakery|harbour|playground|bridge|hill]""",
    "game": """[football|hide and seek|chess|cards|catch|tag|ball|a guessing game|a counting
        game|a word game|a game with stones]""",
    "ware": "[ball|book|cup|hat|kite|lamp|bell|plant|bowl|pen|drum|chair|lantern|basket|cake]",
    "countable": """[apple|pear|plum|orange|book|coin|shell|button|pencil|card|marble|stone|nut|
        egg|stamp|flower|biscuit|ball|bead|sticker]""",
}

SPOTS = ["in the box", "on the shelf", "under the bed", "in the bag", "behind the door",
         "on the table", "in the basket", "under the chair", "on the roof", "in the garden",
         "in the kitchen", "on the sofa"]

GLAD_BECAUSE = [(feeling, cause) for feeling in ("happy", "glad", "full of joy") for cause in (
    "had won the race", "had a new friend", "got a lovely present", "had found the lost key",
    "could swim at last", "was going to the sea", "had a birthday", "got a long letter",
    "saw a rainbow", "had a day without school", "was allowed to stay up late",
    "ate a big piece of cake")]
SAD_BECAUSE = [(feeling, cause) for feeling in ("sad", "unhappy", "upset") for cause in (
    "had lost the race", "had lost a good friend", "had broken the blue cup",
    "had lost the key to the house",
    "could not find the cat", "had to stay in bed", "had to say goodbye", "got no letter",
    "had torn a new coat", "had forgotten the words of the song", "was not allowed to play",
    "had nobody to play with")]

SPELLING_WORDS = """
    cat dog sun moon tree book fish bird milk rain snow ball door hand nose apple bread house
    mouse horse water table chair green white black brown yellow orange purple river garden window
    letter summer winter spring autumn school pencil basket butter cheese flower rabbit kitten
    puppy spider banana carrot tomato potato lemon cherry button ladder hammer mirror pillow
    blanket teacher farmer doctor baker sailor bridge street market station kitchen island
    mountain forest seven eleven twelve balloon coffee giraffe penguin kangaroo butterfly
    umbrella""".split()

OPENING = """[Once upon a time there was|Long ago there was|There was once|This is a story
    about|Let me tell you about] a {kind_of} {hero.boy} named {hero}[| who [liked|loved] to
    {hobby}]. [{hero.He} lived in {home}.|{hero.He} lived with {hero.his} {elder} in {home}.|
    {hero.He} [liked|loved] to {hobby} and to {hobby_2}.|]|{hero} [lived|lived with {hero.his}
    {elder}] in {home}. [{hero.He} [liked|loved] to {hobby}[| and to {hobby_2}].|]|{hero} [was a
    {kind_of} {hero.boy}|was a {hero.boy} who [liked|loved] to {hobby}]."""

# how a story may end: for the hero alone, with the friend, on the way home
END_ALONE = """[{evening}, {hero} [told {hero.his} {elder} all about it|fell asleep with a
    smile|was tired but {glad}|wrote about it in a little book|thought about the day and smiled|
    drew a picture of it|could not sleep for joy|said, "What a day!"].|[It had been|What] a
    {good_day}.[| {hero} [would never forget it|told everyone about it].]|]"""
END_FRIENDS = """[[From that day on,|After that,] {hero} and {friend} were [good|the best of|
    close] friends.|{friend} and {hero} [laughed|smiled|were {glad}] and [had|shared] {snack}.]"""
END_OUTSIDE = """[They|{hero} and {friend}] [walked|went] home [together|side by side|hand in
    hand|with big smiles|slowly]."""

# {p} and {q} are two people who talk; a fact comes up as {that}, {ask} and {answer}
TALKS = [
    """"Did you know that {that}?" asked {p}. "[Yes, I did|No, I did not|I did not know that|Of
        course|Yes, my teacher told me|Yes, I read that once|No, but now I do]," said {q}.""",
    """[A little later|After a while], {p} told {q} that {that}[| and that {that_2}].""",
    """[{p} had a question.|] "{ask}" asked {p}. "{answer}," said {q}.[| "[Well done|Right|Very
        good|That is right|Yes, exactly|You know a lot]!" said {p}.]""",
    """[To pass the time|For fun|As a little game], {p} asked {q}, "{ask}" [It was easy|{name_q}
        knew it|The answer was easy]: {answer}.""",
    """"I have a question," said {p}. "{ask}" "[That is easy|I know that|Let me think|I know
        this one]," said {q}. "{answer}." [It was right.|"[Right|Good|Yes]," said {p}.|]""",
    """"[Today|Yesterday|Last week] [we learned|I learned|I read] that {that}," said
        {p}.[| "[That is good to know|I like that|I knew that|So it is]," said {q}.]""",
    """{name_p} knew that {that}. "[Who told you that|Where did you read that|How do you know]?"
        asked {q}. "[I read it in a book|My teacher told me|I learned it at school|Everyone
        knows that]," said {p}.""",
    """"Tell me [something|something new|a fact]," said {p}. "{answer}," said {q}.[| "And
        {that_2}."]""",
]

LEXICON.update(
    opening=OPENING, end_alone=END_ALONE,
    end_friends="[{end_alone}|{end_friends_only}]", end_friends_only=END_FRIENDS,
    ending="[{end_alone}|{end_friends_only}|{end_outside}]", end_outside=END_OUTSIDE,
    good_day="[good|lovely|wonderful|long|fine|happy] day")


# --- the engine of the little language ---


@functools.lru_cache(maxsize=8192)
def parse(template):
    """Turn a template into parts: str as it is, tuple (name, property), list of options."""
    template = re.sub(r"([\[|])\s*\n\s*", r"\1", template.strip())  # options may start a new line
    template = re.sub(r" *\n *(?!\s*\n)", " ", re.sub(r"\n\s*\n\s*", "\0", template))
    levels = [[[]]]
    for token in re.split(r"([\[\]|]|\{[^}]*\})", template.replace("\0", "\n")):
        if token == "[":
            levels.append([[]])
        elif token == "]":
            options = levels.pop()
            levels[-1][-1].append(options)
        elif token == "|":
            levels[-1].append([])
        elif token.startswith("{"):
            name, _, attribute = token[1:-1].partition(".")
            levels[-1][-1].append((name, attribute))
        elif token:
            levels[-1][-1].append(token)
    assert len(levels) == 1, f"a [ without its ] in {template[:60]!r}"
    return levels[0]


VOWEL_SOUND = re.compile(r"(?<!letter )\b([Aa]) (?=[aeiouAEIOU]|hour\b)(?!one\b|use|uni)")
START = re.compile(r'([.!?] "?|\n"?|[,:] "|[.!?]" ")([a-z])')


def polish(text):
    """Mend what a template cannot know: double spaces, a/an, capitals at the start of sentences."""
    text = "\n" + " ".join(part for part in text.split(" ") if part).replace("\n ",
                                                                             "\n").replace(" \n",
                                                                                           "\n")
    text = VOWEL_SOUND.sub(r"\1n ", text)
    return START.sub(lambda match: match[1] + match[2].upper(), text).strip()


class Deck:
    """Deal the cards of a list in a new order each round, so that none is ever rare."""

    def __init__(self, cards, rng):
        self.cards, self.rng, self.left = list(cards), rng, []

    def deal(self):
        if not self.left:
            self.left = self.cards[:]
            self.rng.shuffle(self.left)
        return self.left.pop()


class Teller:
    """Draws words, people and facts, and fills templates. All chance comes from one seeded rng."""

    def __init__(self, seed, facts, sums):
        self.rng = random.Random(seed)
        self.facts, self.sums = (
            Deck([fact for fact in cards for _ in range(fact.relation.often)], self.rng)
            for cards in (facts, sums))
        self.subjects = by_subject(facts)

    # choosing

    def one(self, options):
        return options[int(self.rng.random() * len(options))]

    def some(self, n, options):
        return self.rng.sample(options, n)

    def number(self, low, high):
        return low + int(self.rng.random() * (high - low + 1))

    def row(self, names, table):
        """One row of a little table, `a/b; a/b; ...`, as slots: {"pet": "cat", "sound": "meow"}."""
        row = " ".join(self.one(table.split(";")).split())
        return dict(zip(names.split(), row.split("/")))

    def chance(self, p):
        return self.rng.random() < p

    def cast(self):
        """A child, a friend (a girl and a boy: `he` and `she` are never in doubt) and an elder."""
        hero, friend = self.one(GIRLS), self.one(BOYS)
        if self.chance(0.5):
            hero, friend = friend, hero
        return {"hero": hero, "friend": friend, "elder": self.one(ELDERS)}

    # telling

    def story(self, template, keep="", **slots):
        """Fill a template with a cast. Words named in `keep` are drawn once and stay the same."""
        slots = {**self.cast(), **{name: Word(value) for name, value in slots.items()}}
        for name in keep.split():
            slots[name] = Word(self.tell("{%s}" % name, slots, clean=False))
        return self.tell(template, slots)

    def tell(self, template, slots=None, clean=True, **more):
        """Fill a template: slots first, then fresh draws; and polish it unless told otherwise."""
        slots = {**(slots or {}), **more}
        out = []
        self._fill(self._pick(parse(template)), slots, out)
        text = "".join(out)
        return polish(text) if clean else text

    def _pick(self, options):
        return options[int(self.rng.random() * len(options))] if len(options) > 1 else options[0]

    def _fill(self, parts, slots, out):
        for part in parts:
            kind = type(part)
            if kind is str:
                out.append(part)
            elif kind is list:
                self._fill(self._pick(part), slots, out)
            else:
                self._slot(part, slots, out)

    def _slot(self, part, slots, out):
        name, attribute = part
        value = slots.get(name)
        if value is None:
            if name == "talk":
                return out.append(self.talk(slots))
            return self._fill(self._pick(parse(LEXICON[name.rstrip("_123")])), slots, out)
        if attribute:
            value = getattr(value, attribute)
        if "{" in value or "[" in value:
            return self._fill(self._pick(parse(value)), slots, out)
        out.append(value)

    # facts

    def clause(self, fact, plain=False):
        """A fact as a clause, often in its plain wording, always when it must follow `that`."""
        say = fact.relation.say
        say = self.one(say[:2]) if plain else say[0] if self.chance(0.4) else self.one(say)
        return self.tell(say, fact.slots, clean=False)

    def question(self, fact):
        return self.tell(self.one(fact.relation.ask), fact.slots, clean=False)

    def answer(self, fact):
        return self.tell(fact.relation.say[0], fact.slots, clean=False)

    def any_fact(self):
        return self.facts.deal() if self.chance(0.8) else self.sums.deal()

    def talk(self, slots):
        """Two of the people talk, and a fact comes up. Empty now and then."""
        if self.chance(0.3):
            return ""
        pair = [slots["hero"], slots["friend"]]
        if self.chance(0.5):
            pair.reverse()
        fact = self.any_fact()
        return self.tell(
            self.one(TALKS), clean=False, p=pair[0], q=pair[1], name_p=pair[0], name_q=pair[1],
            that=self.clause(fact, plain=True), that_2=self.clause(self.any_fact(), plain=True),
            ask=self.question(fact), answer=self.answer(fact))


# --- plots: a cast, a few words drawn once, a template; hero and friend are a girl and a boy ---

PLOTS = []


def plot(function):
    PLOTS.append(function)
    return function


@plot
def lost_and_found(w):
    row = w.row("spot reason", """by the pond/look at the ducks; under the old oak tree/rest in
        the shade; on a bench in the park/eat an apple; on the garden wall/watch a snail; next
        to the bus stop/read the big sign; on the bridge/watch the boats; in the long grass/pick
        some flowers; beside the school gate/look at a map; on the steps of the library/tie a
        shoe; near the well/drink some water; behind the mill/count the ducks; at the edge of
        the forest/listen to an owl""")
    return w.story("""
        {opening} {hero} had a {colour} {toy}[, a present from {hero.his} {elder}|| and took it
        everywhere].

        {day}, {hero} went to the {place} with {friend}. [{weather}.|] On the way home, {hero}
        [stopped|sat down] {spot} to {reason}. {talk} [Then|After that|Soon] the two friends
        [walked on|went home].

        When {hero} [came home|was home again|wanted to play with it], the {toy} was [gone|not
        there|nowhere to be seen]. "[Oh no|Oh dear]! [Where is my {toy}?|I have lost my {toy}!|
        My {toy} is gone!]" [cried|said] {hero}. {hero.He} was {sad}. "[Do not worry|Do not cry|
        Let us think]," said {friend}. "[Where did you stop|Where did you sit down|Where did you
        have it last]?" {hero} thought [hard|for a moment|about the way home]. "I stopped {spot}
        to {reason}," {hero.he} said.

        They [ran|went|hurried] back [at once|together|right away|as fast as they could]. And
        there it was! The {colour} {toy} [lay|was still|was waiting] {spot}[|, just where {hero}
        had left it|, a little wet, but [safe|whole]]. "[Thank you|Thank you for your help|You
        are a good friend]," [said|cried] {hero}, and {hero.he} {smiled}. [{ending}|{ending}|
        {hero} [learned|had learned] that friends help each other.]""", keep="toy colour", **row)


@plot
def birthday_present(w):
    saved, earned = w.number(3, 12), w.number(2, 8)
    price = w.number(max(3, saved + 1), saved + earned)
    left = saved + earned - price
    rest = w.one([f"{saved + earned} - {price} = {left}, so {{hero.he}} still had {coins(left)}",
                  f"That left {coins(left)}, because {saved + earned} minus {price} is {left}"])
    return w.story("""
        {opening} [Soon|In a week|The next day] it was the birthday of {hero.his} {elder}, and
        {hero} wanted to [give|buy] {hero.his} {elder} a {colour} {gift}. The {gift} cost
        {price} coins, but {hero} had only {saved} coins.

        "[What can I do|How can I get more coins|What shall I do]?" {hero.he} [asked|said].
        "[You could work|You could help someone|Maybe you could help]," said {friend}. "The
        {job} needs [help|someone|a pair of hands]." So {hero} [helped the {job}|went to the
        {job} and helped|worked for the {job}] [all morning|for two days|every day after school|
        until the evening]. The {job} [was {glad}|said thank you] and gave {hero.him} {earned}
        coins. {saved} + {earned} = {total}, so now {hero} had {total} coins. {talk}

        {hero.He} [ran|went|hurried] to the [shop|market|little shop by the station] and bought
        the {gift}. {rest}.

        On the birthday, {hero.his} {elder} opened the [box|bag|paper] [slowly|carefully|at
        once]. "[A {colour} {gift}! How lovely|What a lovely {gift}|This is just what I
        wanted]!" said {hero.his} {elder}. {hero} {smiled}. [{end_alone}|{end_alone}|{hero}
        [learned|had learned] that a small present can be a great one.]""", keep="gift colour job",
        price=price,
        saved=saved, earned=earned, total=saved + earned,
                   rest=rest if left else "Now {hero.he} had no coins left")


@plot
def making_something(w):
    row = w.row("thing parts trouble mend end", """kite/paper, string and two thin sticks/it was
        too heavy and would not fly/used thinner sticks/The kite flew high above the trees;
        boat/wood, a nail and an old cloth/it turned over and sank/made it wider/The boat sailed
        from one side of the pond to the other; bird house/wood, nails and a little paint/the
        door was too small for a bird/made the door bigger/A week later, a small bird moved in;
        lantern/paper, glue and a candle/the paper tore/used thicker paper/The lantern lit up
        the dark garden; puppet/an old sock and two buttons/one eye fell off/sewed it on
        again/The puppet made everyone laugh; drum/an old tin, string and a piece of leather/it
        made no sound at all/pulled the leather tight/The sound of the drum filled the street;
        cart/four wheels, a box and a rope/a wheel came off/put a nail through the wheel/The
        cart rolled all the way down the hill; swing/a rope and a flat piece of wood/the rope
        was too short/found a longer rope/The swing went up and down under the tree; snow
        castle/snow and two old buckets/one wall fell down/made the walls thicker/The castle
        stood in the garden until the snow melted""")
    return w.story("""
        {opening} {day}, {hero} had an idea. "[I want to make a {thing}|Let us make a {thing}|We
        could make a {thing}][|, {elder.call}]!" [said {hero}|{hero.he} said].

        "[Good idea|All right|Yes, let us do that]," said {hero.his} {elder}. "[We need|For that
        we need] {parts}." {hero} [looked everywhere|went to look for them|ran to the shed] and
        [soon|after a while] they had all they needed. {friend} came to help. {talk}

        They worked [all morning|for two hours|until lunch|hard]. But [the first {thing}|when
        they tried it, it] was not [right|good]: {trouble}. {hero} was [{sad}|not happy|a little
        angry]. "[Never mind|Do not give up|Let us try again]," said {friend}. So they tried
        again and {mend}.

        This time it [worked|was just right|was perfect]. {end}. "[We did it|Look at that|It
        works]!" cried {hero}, and {friend} {smiled}. [{end_friends}|{end_friends}|{hero}
        [learned|had learned] that it is good to try again.]""", **row)


@plot
def picnic_in_the_rain(w):
    return w.story("""
        {nice_day}, {hero} and {friend} [went on a picnic|wanted to have a picnic|made a plan
        for a picnic] [by the river|by the lake|in the forest|on the hill|near the old mill|in
        the fields]. {hero} packed {snack_1} and {friend} packed {snack_2}. [{weather}.|] [They
        took a {colour} blanket, too.|]

        They walked [for an hour|up the hill|past the mill|along the river] and [then|at last]
        sat down [in the grass|under a tree|on a big flat stone]. {talk} But just as they
        [opened the basket|began to eat|sat down], [big drops began to fall|it began to rain|a
        dark cloud came and it rained].

        "[Quick|Come on|Run]!" [called|cried|said] {friend}. They [took|picked up] the food and
        ran to {shelter}. There it was dry. They [sat close together|sat on the floor|looked out
        at the rain] and ate {snack_1} and {snack_2}. "This is [the best picnic of all|the
        funniest picnic ever|a fine picnic]," said {hero}.

        [Later|After an hour|When the food was gone|At last] the rain stopped and the sun came
        out. There was a rainbow [over the hill|in the sky|above the trees]. {hero} {smiled}.
        {ending}""",
                   keep="colour snack_1 snack_2", shelter=w.one([
                       "an old barn", "a little hut", "the house of the miller", "an empty stable",
                       "the bus stop", "a small cave", "the roof of the market"]))


@plot
def new_at_school(w):
    return w.story("""
        {school_day}, a new {friend.boy} came to the school. {friend.His} name was {friend}[,
        and {friend.he} came from {country}|| and {friend.he} did not know anyone]. {sir} said,
        "[This is {friend}. Please be kind|Please say hello to {friend}|We have a new
        {friend.boy} in the class]." {friend} [looked at the floor|was shy|said nothing|sat down
        at the back of the room].

        At lunch, {friend} sat alone [on a bench|by the window|under a tree] with {snack_1}.
        {hero} saw it and [walked over|came closer|sat down next to {friend.him}]. "[Hello|Hi]!
        I am {hero}. [May I sit here|Would you like some {fruits}|Do you want to play
        {game_1}]?" [{friend} looked up.|{friend} smiled a little.|] "[Yes, please|I would like
        that|That would be nice]," said {friend}. {talk}

        [Soon|After lunch|Then] they played {game_1} [with the others|in the yard|until the bell
        rang]. {friend} was [very good at it|not shy any more|fast and clever]. "[Will you come
        again tomorrow|Shall we play again tomorrow|Can you teach me that]?" asked {hero}. "[Of
        course|Yes, I will|I would love to]," said {friend}.

        [When {hero} came home, {hero.he}|{evening}, {hero}] told {hero.his} {elder}, "[I have a
        new friend|I made a friend today]!" [{end_alone}|{end_alone}|{hero} [learned|had
        learned] that a kind word can help a lot.]""", keep="snack_1 game_1",
        country=w.one(COUNTRIES)[0])


@plot
def in_the_garden(w):
    row = w.row("seed grown size use", """bean/a bean plant/as tall as the wall/cooked the beans
        for dinner; sunflower/a sunflower/taller than {hero.his} {elder}/gave the seeds to the
        birds; pumpkin/a pumpkin/as big as a chair/made soup for the whole street; tomato/a
        tomato plant/full of red tomatoes/ate the tomatoes with bread; carrot/a row of
        carrots/long and orange/gave one to a hungry rabbit; pea/a pea plant/full of sweet green
        peas/ate the peas right there; melon/a melon/as round as a ball/cut it into ten pieces
        for everyone; apple/a little apple tree/as high as {hero}/waited for the first apple""")
    return w.story("""
        {opening} {nice_day}, {hero.his} {elder} gave {hero.him} [some|a bag of|a few] {seed}
        seeds. "[Put them in the ground|Plant them in the garden|Try to grow them]," said
        {hero.his} {elder}. "[They need water, sun and time|Give them water every day|You must
        wait, and that is hard]."

        {hero} dug [a little hole|[two|three|four|five|six] little holes] [behind the house|next
        to the wall|in the corner of the garden], put the {seed} seeds in and gave them water.
        {hero.He} looked [every morning|every day|before and after school], but [nothing
        happened|there was only brown earth]. "[Maybe they are asleep|Maybe they do not like me|
        I think they are too deep]," {hero.he} said to {friend}. "[Wait a little|Good things
        take time|Do not dig them up]," said {friend}. {talk}

        {next_day}, {hero} saw something green. It was [very small|thin and bright|as small as a
        nail]. [{hero} {smiled}.|{hero} ran in to tell {hero.his} {elder}.|] It grew and grew,
        [week after week|all through the [spring|summer|warm days]|day and night], and in the
        end it was {grown}, {size}. {hero} and {friend} {use}. [{end_friends}|{end_friends}|
        {hero} [learned|had learned] that good things take time.]""", **row)


@plot
def hurt_animal(w):
    row = w.row("animal hurt care able", """bird/wing/seeds and water/fly; duck/foot/bread and
        water/swim; rabbit/leg/carrots and hay/hop; hedgehog/foot/apples and water/run;
        kitten/leg/warm milk/climb; puppy/leg/meat and water/jump; crow/wing/nuts and seeds/fly;
        squirrel/leg/nuts and berries/climb; lamb/leg/milk and fresh grass/run; frog/leg/water
        and flies/jump""")
    return w.story("""
        {day}, {hero} [was on the way to the {place}|was walking home|was playing outside].
        [{weather}.|] [Suddenly|Then|Near the gate] {hero.he} [saw|found] a [small|little|tiny|
        young] {animal} [in the grass|under a bush|beside the road|behind a stone]. It could not
        {able}, because its {hurt} was hurt.

        "[Poor little thing|Poor {animal}|Do not be afraid]," said {hero}. "I will help you."
        {hero.He} put the {animal} into [a box|a basket|{hero.his} hat] and [carried|took] it
        home [very carefully|with great care|slowly]. {hero.His} {elder} [washed|looked at] the
        {hurt} and [put a clean cloth around it|said that it needed rest|said that it was not
        very bad]. They gave the {animal} {care}.

        {friend} came [every day|after school|to see it]. "[Will it get better|Is it still in
        pain|Can it {able} now]?" asked {friend}. "[A little|Not yet|Soon, I hope]," said
        {hero}. {talk}

        [After a week|After nine days|When the {hurt} was well], they took the {animal}
        [outside|back to the place where {hero} had found it|to the edge of the forest]. First
        it sat still. Then it began to {able}. [It could {able} again!|It looked back once, and
        then it was gone.|"Goodbye!" called {hero}.] {hero} was [a little sad, but {glad} too|
        {glad}|sad for a moment and then {glad}]. {end_alone}""", keep="place", **row)


@plot
def forgotten_lunch(w):
    return w.story("""
        {school_day}, the class of {sir} went to the {place}. [They went by bus|They walked|They
        took the train], and {hero} sat next to {friend}. {talk} [{weather}.|]

        At noon, everybody [was hungry|sat down to eat|opened the lunch bags]. {friend} looked
        into {friend.his} bag [once|twice|and went red]. [There was no food in it|It was empty|
        Inside was only a {toy}]. "[I forgot my lunch|I left my lunch on the table|My lunch is
        at home]," {friend.he} said [quietly|in a small voice|with a sad face].

        {hero} had {share_1}. It was not much. {hero.He} [was very hungry, too|thought for a
        moment|did not think long]. Then {hero.he} [cut it in two|broke it in half|put half of
        it in front of {friend}]. "[Half for you, half for me|Here, take this|We can share],"
        said {hero}. "[Thank you|You are very kind|That is so nice of you]," said {friend}, and
        both of them ate.

        {next_day}, {friend} [came with|brought] a [big bag|box|basket] of {fruits_2}. "[This is
        for you|Now it is my turn to share|I did not forget you]," {friend.he} said. [{ending}|
        {ending}|{hero} [learned|had learned] that sharing makes everyone happy.]""",
                   keep="share_1 place")


@plot
def the_race(w):
    won = w.chance(0.5)
    return w.story("""
        {opening} There was going to be a [race|big race|running race] [at the school|round the
        lake|through the village] on {weekday}, and {hero} wanted to [win|take part]. But
        {hero.he} was [not very fast|the slowest in the class|only good at walking].

        "[Run a little every day|Start today|You must practise]," said {hero.his} {elder}. So
        {hero} ran [to the {place} and back|round the house ten times|up the hill] every
        [morning|day|evening]. [At first|In the beginning] it was [hard|very hard], and
        {hero.he} had to stop [often|after a few minutes]. [After a week|After two weeks|Soon]
        it was easier. {friend} sometimes ran, too. {talk}

        On the day of the race, {hero} [was a little afraid|felt strong|drank some water and
        breathed deeply]. "[Ready, steady, go|One, two, three, go]!" called {sir}. {hero} ran
        and ran. {result} [{ending}|{ending}|{hero} [learned|had learned] that a little work
        every day helps a lot.]""",
                   result=WON if won else LOST)


WON = """[At the last corner {hero.he} was third, then second, and then {hero} was first! "[You
    did it|You won|I knew it]!" [called|cried] {friend}. {hero} {smiled}.|Nobody was faster, and
    {hero} came first. {friend} {smiled} and [ran to {hero}|clapped].]"""
LOST = """[It was not enough to win: {hero} came [second|third|fourth]. "[You were so fast|That
    was great|You did so well]!" [said|called] {friend}. {hero} thought of the first day and
    {smiled}.|{friend} won, and {hero} was right behind. They shook hands, and {hero} was not
    sad at all.]"""


@plot
def noise_in_the_night(w):
    row = w.row("noise cause", """tap, tap, tap/a branch that was knocking on the window; a soft
        scratching/the cat, who wanted to come in; a low hum/the old fridge in the kitchen; a
        squeak/a little mouse that had found a piece of cheese; drip, drip, drip/water that was
        dripping from the roof; a loud bang/the garden gate, which was open in the wind; hoo,
        hoo/an owl in the tree behind the house; a strange snoring/the dog under the bed; a
        crash/a pot that had fallen from the shelf; a long whistle/the wind in the chimney""")
    return w.story("""
        [It was a [dark|cold|windy|stormy] night.|One night, the wind was strong.|One night,
        there was no moon.] {hero} lay in bed and [could not sleep|was almost asleep|looked at
        the shadows]. [Then|Suddenly|All at once] {hero.he} heard a noise: {noise}.

        {hero} [sat up|pulled the blanket over {hero.his} head|held {hero.his} teddy bear].
        [What was that?|Was somebody there?|Was it a ghost?] [The noise came again.|There it was
        again.|] {hero.His} heart beat [fast|loudly]. "{elder.call}!" {hero.he} [called|cried].
        "[There is something|I heard a noise|I am afraid]!"

        {hero.His} {elder} came in with a [lamp|candle]. "[Let us go and look|Come, we will find
        out|Being afraid is all right]," said {hero.his} {elder}. [Hand in hand|Together|Very
        quietly], they [went from room to room|went down the stairs|opened the door]. And what
        was it? It was {cause}!

        {hero} [began to laugh|had to laugh|breathed out]. "[So that is all|I was afraid of
        that|It is not a ghost at all]!" {hero.he} said. Soon {hero} was [fast asleep|asleep|
        warm in bed again]. [In the morning, {hero.he} told {friend} about it. {talk}|The next
        day {friend} laughed about it, too. {talk}||]""", **row)


@plot
def learning_a_skill(w):
    row = w.row("skill trouble tip done", """swim/swallowed a lot of water/Kick your legs and
        look up/swam to the other side of the pool; ride a bike/fell into a bush/Look ahead and
        not at your feet/rode all the way to the bridge; whistle/made no sound, only wind/Make
        your lips round and small/whistled a whole song; skate/fell down seven times/Bend your
        knees a little/skated in a big circle; play the flute/made the dog run away/Breathe
        slowly and deeply/played a song for the neighbours; bake bread/burned the first
        loaf/Watch the clock/took a golden loaf from the oven; sew/hurt a finger/Make small
        stitches/made a bag with two pockets; juggle/dropped all the balls/Start with only
        two/juggled with three oranges; tie a shoe/made one big knot/Make a loop like the ear of
        a rabbit/tied both shoes without help; catch a ball/dropped it every time/Keep your eyes
        on the ball/caught ten balls in a row; tell the time/mixed up the two hands/The short
        hand shows the hour/read every clock in town""")
    return w.story("""
        {opening} {friend} could {skill}, but {hero} could not. [{hero.He} wanted to learn it
        more than anything.|"I will never learn it," {hero.he} said.|"Is it hard?" {hero.he}
        asked.]

        "[I can show you|Let me help you|I will teach you]," said {friend}. {day}, they [met|
        went to the place where {friend} had learned it|began]. [The first time|At first],
        {hero} {trouble}. [The second time it was not much better.|{friend} did not laugh.|
        "Ouch," said {hero}.|] "[Try again|Once more|Do not give up]," said {friend}. "{tip}."

        {hero} tried [again and again|every day|the whole week]. [Sometimes {hero.he} wanted to
        give up.|It was hard work.|{hero.His} {elder} watched and said nothing.|] {talk} And
        then, [on {weekday}|one morning|all of a sudden], it worked! {hero} {done}. "[Look,
        look!|I can do it!|Did you see that?]" {hero.he} [called|cried|shouted]. {friend}
        {smiled}. [{ending}|{ending}|{hero} [learned|had learned] that it is good to try
        again.]""", **row)


@plot
def at_the_market(w):
    goods = w.some(2, ["bread", "cheese", "milk", "honey", "rice", "fish", "soap", "tea", "salt",
                       "flour"])
    prices = [w.number(2, 9), w.number(2, 9)]
    total = sum(prices)
    had = total + w.number(1, 8)
    return w.story("""
        {day}, the {elder} of {hero} [said|asked], "[Can|Could] you go to the market for me[|,
        {hero}]? [We need|Please buy] {first} and {second}." {hero} [took|got] {had} coins and a
        {bag} and [went off|walked to the market|ran down the road]. On the way {hero.he} met
        {friend}, and they went together. {talk}

        The market was [full of people|loud and full of colours|busy]. [A man sold {fruits}. A
        woman sold {fruits_2}.|There were {fruits} and {fruits_2} everywhere.|] "How much is the
        {first}?" asked {hero}. "[The {first} is|It costs|That is] {price_1}," said the seller.
        "And the {second}?" "[The {second} is|It costs|That is] {price_2}."

        {hero} [counted [quickly|on {hero.his} fingers]|thought for a moment]. {a} + {b} =
        {total}. {hero.He} gave the seller {total} coins and had {left} left, because {had} -
        {total} = {left_number}. "[You are good at sums|You can count very well|Well counted],"
        said {friend}.

        When {hero} came home, {hero.his} {elder} [was {glad}|said, "Thank you"|looked into the
        {bag} and smiled]. "[The rest is for you|Keep the rest|You may keep what is left]," said
        {hero.his} {elder}. {end_alone}""", first=goods[0], second=goods[1],
        price_1=coins(prices[0]), price_2=coins(prices[1]),
                   a=prices[0], b=prices[1], total=total, had=had, left=coins(had - total),
                   left_number=had - total,
                   bag=w.one(["basket", "bag"]))


@plot
def the_broken_thing(w):
    row = w.row("thing accident", """cup/fell from the table; vase/fell from the shelf;
        plate/slipped from {hero.his} hands; window/was hit by {hero.his} ball; lamp/was knocked
        over; bowl/fell on the floor; clock/fell off the wall; teapot/slipped from {hero.his}
        hands; mirror/fell down""")
    return w.story("""
        {day}, {hero} was [playing|running|dancing] [in the house|in the kitchen|in the living
        room]. [{hero.His} {elder} had said, "Please play outside."|{friend} was there, too.|]
        [Crash!|Bang!|There was a loud noise.] The {colour} {thing} {accident} and broke [into
        many pieces|in two|into three pieces].

        {hero} [stood very still|went white|looked at the pieces]. The {thing} belonged to
        {hero.his} {elder}. "[What shall I do|What will {elder.call} say|Shall I hide it]?"
        {hero.he} thought. [{hero.He} could say that it was the cat.|{hero.He} could hide the
        pieces under the bed.|{hero.He} wanted to run away.] But that [would not be right|was
        not true|did not feel good].

        So {hero} [went|walked slowly] to {hero.his} {elder} and said, "[I am sorry|I am so
        sorry], {elder.call}. I broke the {colour} {thing}." {hero.His} {elder} [was quiet for a
        moment|looked at {hero.him}|sat down]. "[Thank you for telling me|It is good that you
        told me the truth|I am glad that you told me]," said {hero.his} {elder}. "[A {thing} is
        only a {thing}|We can buy a new {thing}|That can happen to anyone]."

        Together they [picked up the pieces|cleaned the floor|swept the floor]. [The next day|
        Later|That week], {hero} [told {friend} about it|bought a new {thing} with {hero.his}
        own coins|helped in the kitchen without being asked]. {talk} [{end_alone}|{end_alone}|
        {hero} [learned|had learned] that it is best to tell the truth.]""", keep="colour", **row)


@plot
def at_the_sea(w):
    treasure = w.one(["a white shell", "a round green stone", "a bottle with a letter in it",
                      "an old coin",
                      "a piece of blue glass", "a feather", "a tiny crab", "a star made of wood"])
    return w.story("""
        {nice_day}, {hero}, {friend} and the {elder} of {hero} [took the train|went by bus|
        drove] to the sea. [It was the first time for {friend}.|They left home before the sun
        came up.|] {talk} When they [arrived|got there|came over the last hill], the sea was
        [blue and calm|green and wild|big and bright]. "[It has no end|Look how big it is|I can
        smell the salt]!" [said|cried] {friend}.

        They [took off their shoes|ran to the water|put down their bags]. {hero} built a castle
        of sand with [four towers|a high wall|a deep moat], and {friend} [brought water|looked
        for shells|dug a long river to it]. [Then a wave came and took one of the towers, but
        they built it again.|A crab walked past the gate, and they laughed.|A dog jumped over
        it, but it did not fall.|It was the best castle on the beach.]

        Later they [walked|ran] along the water, and {hero} found {treasure}. "[May I keep it?|
        Look what I found!|See what the sea has brought!]" {hero.he} [said|called]. "[That is a
        real treasure|How pretty|You have good eyes]," said {friend}. They ate {snack} and
        [watched the ships|looked at the waves|counted the ships].

        On the way home, {hero} [slept|fell asleep|said nothing and smiled]. [In {hero.his} hand
        was {treasure}.|] {end_alone}""", treasure=treasure)


@plot
def hide_and_seek(w):
    row = w.row("spot sign", """behind the curtain/saw two feet under it; under the bed/heard a
        sneeze; in the big cupboard/heard a giggle; up in the apple tree/saw an apple fall;
        behind the sofa/saw the tip of a shoe; in the barn/heard the hay move; inside an empty
        box/saw the box move; behind the old well/saw a long shadow; under the kitchen table/saw
        the cloth move""")
    return w.story("""
        {day}, {hero} and {friend} played hide and seek [in the house of {friend}|at home|in the
        old farm house]. [{friend} was the first to count.|It was the turn of {friend} to
        count.] {friend.He} [shut|closed|covered] {friend.his} eyes. "[One, two, three, four,
        five|One, two, three|Five, ten, fifteen|Two, four, six, eight, ten]," {friend.he}
        counted, and so on up to {high}. "[I am coming|Here I come]!"

        {hero} had hidden {spot}. [It was dark there.|There was not much room.|It was a very
        good place.] {hero.He} [did not move|held {hero.his} breath|sat very still]. {friend}
        looked [behind the door|under the stairs|in the bath|in the garden], [behind the coats|
        next to the oven|under the blanket] and [on the roof of the hen house|even in the
        fridge|in the hall]. [No {hero}!|Nobody was there.|"Where can {hero.he} be?" {friend}
        asked.]

        [Then|After ten minutes|At last] {friend} {sign}. "[Found you|There you are|I see you]!"
        {friend.he} [called|cried]. {hero} came out and laughed. "[How did you know?|You found
        me!|That took a long time!]" said {hero}. {talk} Then {hero} counted and {friend} hid.
        {end_friends}""", high=w.one([10, 20, 30]), **row)


@plot
def snow_day(w):
    return w.story("""
        [One [morning|day] in {winter}|On a cold {weekday} in {winter}], {hero} [looked out of
        the window|woke up early|opened the door]. Everything was white. "[Snow! Snow!|It has
        snowed!|Look at the snow!]" {hero.he} [cried|called]. {hero.He} put on {hero.his}
        [boots|coat|gloves] and {hero.his} {colour} [hat|scarf] and ran outside.

        {friend} [was already there|came from the house next door|came with a sled]. They [threw
        snowballs|made three big snowballs|ran through the deep snow] and [then they|soon they]
        built a snowman. It got [two buttons|two stones|two nuts] for eyes, a carrot for a nose
        and a [hat|pot|basket] on its head. {talk} "[What shall we call him|Does he need a name|
        Is he not cold]?" asked {friend}. "[He is called {snow_name}|Let us call him
        {snow_name}|I think his name is {snow_name}]," said {hero}.

        When their [hands|feet] were [cold|as cold as ice], they went in. {hero.His} {elder}
        gave them {snack_1}. They sat [by the fire|at the window] and looked at the snowman.
        [Three|Four|Five|Ten] days later the sun was warm, and the snowman [got smaller and
        smaller|melted]. Only the carrot was left. "[See you next winter|Goodbye until next
        year], {snow_name}," said {hero}. {end_friends}""",
                   keep="colour snack_1", winter="[December|January|February]",
                   snow_name=w.one(["Mr Frost", "Old Ice", "Big White", "Mr Cold", "Snowy",
                                    "Captain Carrot"]))


@plot
def a_letter(w):
    country = w.one([row for row in COUNTRIES if row[0] not in ("the United States",)])
    return w.story("""
        {hero} had a friend far away. {friend.His} name was {friend}, and {friend.he} lived in
        {city}, the capital of {country}. {day}, {hero} [sat down and wrote|took a pen and
        wrote|wrote] {friend.him} a letter.

        "Dear {friend}, [how are you?|I hope you are well.|I think of you often.] [Here it is
        {weather_word}|The weather here is {weather_word}]. [Yesterday|On {weekday}|Last week] I
        [went to the {place_1}|played {game}|learned to {hobby_1}] with my {elder}. [I have a
        new {pet}|I got a {colour} {toy}|I can count to one hundred now]. [Did you know that
        {that}?|At school we learned that {that}.] [Please write soon|Write to me soon|Come and
        see me soon]! Your friend, {hero}"

        {hero} [put a stamp on it|wrote the name of the street on it] and took it to the post.
        [Days went by|A week went by|Two weeks went by]. {hero} looked into the letter box every
        [day|morning]. Then the postman [came with|brought] a letter [from {country}|with a
        {colour} stamp].

        "Dear {hero}, [thank you for your letter|your letter made me {glad}|I read your letter
        three times]. [In {city} it is {weather_word} now|My {elder_2} says hello|I {like} to
        {hobby_2}]. [In my class we learned that {that_2}.|Today I read that {that_2}.] [When
        will you come|Will you come to see me one day]? Your friend, {friend}"

        {hero} {smiled} and [read it again|showed it to {hero.his} {elder}|put it under the
        pillow]. {end_alone}""",
                   city=country[1], country=country[0],
                   weather_word="[cold|warm|windy|sunny|wet|very hot]",
                   elder_2=w.one(ELDERS), like="[like|love]",
                   that=w.clause(w.any_fact(), plain=True),
                   that_2=w.clause(w.any_fact(), plain=True))


@plot
def small_helps_big(w):
    row = w.row("big small trouble help", """bear/bee/had lost the way in the fog/flew ahead and
        showed the way out of the forest; elephant/mouse/was caught in a net/bit through the
        ropes, one after the other; horse/sparrow/had a thorn in its foot/pulled the thorn out;
        lion/ant/had a seed in its ear/walked in and carried the seed out; cow/frog/could not
        find any water/knew a little spring behind the rocks; wolf/hedgehog/had fallen into a
        deep hole/rolled stones down until they made steps; deer/squirrel/could not reach the
        leaves in winter/threw nuts and leaves down from the tree; whale/crab/had a rope around
        its tail/cut the rope in two; camel/beetle/could not see in a sand storm/found a cave
        where it was quiet; donkey/hen/slept while the barn was on fire/made so much noise that
        everyone woke up""")
    return w.story("""
        [Once|Long ago|Once upon a time] there [was|lived] a {big} who was [very strong|proud of
        being big|bigger than all the others]. {day}, a {small} came by and said, "[Good
        morning|Hello], {big}. [May I be your friend|Shall we be friends|Do you want to talk]?"
        The {big} [laughed|only laughed|looked down]. "[You are so small!|What can a {small} do
        for me?|I cannot even see you!]" said the {big}. The {small} [said nothing|was {sad}|
        went away].

        {next_day}, the {big} {trouble}. "[Help!|Please help me!|Is anybody there?]" called the
        {big}. [The others heard it, but they were too far away.|Nobody came.|It called for a
        long time.] But the {small} [heard it|was near|came at once]. "[I am small, but I will
        try|Let me help you|Keep still]," said the {small}. And the {small} {help}.

        The {big} was [safe|saved] and {glad}. "[Thank you|I am sorry that I laughed|You are
        small, but you are great]," said the {big}. "[Even a {small} can help a {big}|Now I know
        what a {small} can do|From now on, we are friends]." [And that is how the {big} and the
        {small} became friends.|From then on, nobody laughed at the {small} any more.|Since that
        day you often see the two of them together.|]""", **row)


@plot
def class_quiz(w):
    sir, names = w.tell("{sir}"), w.some(4, GIRLS + BOYS)
    turns = []
    for i in range(w.number(3, 5)):
        fact = w.any_fact()
        turns.append(w.tell(
            """"{which} question:[ it is easy.| think well.|||] {ask}" [{name} [put up a hand|
                knew it|was the fastest|thought for a moment].|] "{answer}," said {name}.
                ["[Right|That is right|Very good|Correct|Yes, well done]!" said {sir_1}.|]""",
            which="[The next|Another|A new]" if i else "The first", sir_1=sir, name=w.one(names),
            ask=w.question(fact), answer=w.answer(fact), clean=False))
    return w.story("""
        {school_day}, {sir_1} came into the class and said, "[Today we have a quiz|Books away,
        please. It is time for a quiz|Let us see what you know]!" [Everybody was {glad}.|The
        children sat up.|"Oh good," said {name}.]

        {turns}

        [The bell rang.|Then it was time to go home.|That was the last question.] "[You know so
        much|I am proud of you|You have learned a lot]," said {sir_1}. [The winner was {name}|
        {name} had the most points], and the prize was a {gift}.""", sir_1=sir, name=w.one(names),
        turns=" ".join(turns))


@plot
def baking(w):
    row = w.row("cake parts", """an apple cake/flour, eggs, butter and apples; a cheese
        pie/flour, butter and cheese; a nut cake/flour, milk, eggs and nuts; a lemon cake/flour,
        sugar, eggs and lemons; a carrot cake/flour, sugar, eggs and carrots; a cherry
        pie/flour, butter and cherries; a chocolate cake/flour, eggs, sugar and chocolate""")
    batch, eaten = w.number(8, 12), w.number(2, 6)
    return w.story("""
        {day}, {hero} and {hero.his} {elder} [wanted to bake|were going to make|decided to make]
        {cake} [for {friend}|for the school|because it was raining|for the birthday of
        {friend}]. "[What do we need|What goes in]?" asked {hero}. "{parts}," said {hero.his}
        {elder}.

        {hero} [washed {hero.his} hands|put on an apron|got a big bowl]. [Some flour fell on the
        floor|There was flour on {hero.his} nose|An egg rolled off the table], and [both of them
        laughed|the cat ran away|the dog was {glad}]. They mixed [everything|it all] [well|with
        a big spoon|for ten minutes] and put it in the oven. ["Did you know that {that}?" said
        {hero.his} {elder}.|While they waited, {hero} said that {that}.|]

        [Soon the kitchen smelled wonderful.|They waited and waited.|{hero} sat in front of the
        oven.] [They looked at it through the glass.|The oven was very hot.||] [At last|Finally|
        When the clock rang], it was ready. They cut it into {batch} pieces. {friend} came and
        [said|cried], "[This is so good!|I could eat it all!|May I have some more?]" They ate
        {eaten} pieces, so there were {left} left: {batch} - {eaten} = {left}. {end_friends}""",
                   batch=batch, eaten=eaten, left=batch - eaten,
                   that=w.clause(w.any_fact(), plain=True), **row)


@plot
def the_lost_pet(w):
    row = w.row("pet sound name spot", """cat/meow/Snow/in a tall tree; cat/meow/Tiger/on the
        roof; dog/bark/Rex/in a hole behind the barn; dog/bark/Star/in the empty house;
        hen/cluck/Pepper/under the cart; goat/bleat/Button/on top of the hill;
        donkey/bray/Grey/in the field of the neighbour; duck/quack/Lemon/in the bath;
        parrot/squawk/Captain/in the bell tower; pig/oink/Plum/in the mud by the river;
        lamb/bleat/Cotton/between two rocks; horse/neigh/Storm/in the deep forest""")
    return w.story("""
        {opening} {hero} had a {pet} called {name}. [{name} was [young|clever|lively|curious|
        gentle|old] and [black|white|brown|grey].|The two were always together.|Every morning
        {hero} gave {name} some food.] {day}, {name} was gone. [The gate was open.|The door was
        open.|There was a hole in the fence.]

        "{name}! [Where are you?|Come home!]" called {hero}. [No answer.|Nothing.|All was
        quiet.] {hero} [asked the {job_1}|asked {hero.his} {elder}|looked in the garden], but
        [nobody had seen the {pet}|there was no {pet}]. {hero} was {sad}. Then {friend} came.
        "[I will help you|Two can look better than one|We will find {name}]," said {friend}.

        They looked [behind every house|in every street|near the {place}] and called and called.
        {talk} "[Wait|Listen|Be quiet]!" said {friend} [suddenly|then]. "[I can hear something.|
        Do you hear that?]" It was [only a soft|a far away|a loud] {sound}. They [ran|went|
        walked] after the sound, and there was {name}, {spot}!

        [It took some time, but|With a long rope and some food,|Very slowly and carefully,] they
        brought {name} home. {hero} {smiled} and said, "[Never run away again|I missed you|You
        silly {pet}]!" And {name} said only one thing: {sound}! {end_friends}""",
                   keep="job_1", **row)


@plot
def train_to_the_capital(w):
    country = w.one([row for row in COUNTRIES if row[2] == "Europe"])
    fact = [fact for fact in w.facts.cards if fact.a == country[0]]
    return w.story("""
        {day}, {hero} and {hero.his} {elder} [took the train|got on a train|went by train] to
        {city}. {city} is the capital of {country}. {hero} had never been [so far away|there|on
        such a long train], and {hero.he} sat [by the window|next to the window|with {hero.his}
        nose against the window]. [Fields and hills went by|They saw rivers, cows and small
        towns|It was dark, then it was light].

        "[How long does it take|Are we there yet|When will we be there]?" asked {hero}.
        "[Another hour|Soon|When you have counted one hundred cows]," said {hero.his} {elder}. A
        {friend.boy} named {friend} sat [across from|next to] {hero.him}. "Are you going to
        {city}, too?" asked {friend}. "[Yes|Yes, we are]," said {hero}. [They ate {snack}
        together.|They played [cards|chess|a word game|a guessing game].|] {talk} [{hero.His}
        {elder} said that {about}.|]

        [In the evening|At noon|At last] the train stopped. They were in {city}! [There were
        tall houses and wide streets|The streets were full of people|A bell was ringing
        somewhere]. "[It is bigger than I thought|What a big city|I want to see it all]!" said
        {hero}. They [saw a bridge|went to a museum|climbed a tower|sat in a park] and [bought a
        {gift}|ate {snack}|wrote a card to {friend_2}]. {ending_trip}""",
                   city=country[1], country=country[0], about=w.clause(w.one(fact), plain=True),
                   friend_2="the family", ending_trip="""[It was the best trip of the year|
                       {hero} was {glad}|{hero} wanted to come back one day|{hero} never forgot
                       the capital of {country}].""")


@plot
def library_book(w):
    facts = [w.facts.deal() for _ in range(3)]
    return w.story("""
        {opening} {day}, {hero} went to the library with {friend}. [It was quiet there.|It
        smelled of old paper.|There were books up to the ceiling.] {hero} [took|found|chose] a
        [thick|big|thin|heavy|{colour}] book [from the top shelf|with many pictures|about the
        world].

        They sat down [on the floor|at a table|in a corner] and read. "[Look|Listen to this|Here
        it says something]," said {hero}. "{one}." "[And here|On the next page|Down here] [I can
        read|it says] that {two}," said {friend}. [They turned the page.|There was a picture of
        it.|] [The next page said that {three}.|On the last page stood a question: {ask} The
        answer was: {answer}.]

        "[May we take it home|Can I take this book home|How long may I keep it]?" asked {hero}.
        "[For two weeks|Until {weekday}|Of course]," said {sir} from the library. {hero} [read
        the book three times|read it to {hero.his} {elder} every evening|could say whole pages
        by heart]. {end_alone}""",
                   one=w.clause(facts[0]), two=w.clause(facts[1], plain=True),
                   three=w.clause(facts[2], plain=True),
                   ask=w.question(facts[2]), answer=w.answer(facts[2]))


@plot
def tidy_up(w):
    a, b = w.number(2, 12), w.number(2, 12)
    x, y = w.some(2, ["ball", "book", "block", "pencil", "car", "shell", "stone", "card", "sock",
                      "coin"])
    return w.story("""
        The room of {hero} was [not tidy at all|a mess|full of things]. There were {x.s} on the
        bed and {y.s} on the floor. "[Please tidy your room|Nobody can walk here|I cannot see
        your bed]," said {hero.his} {elder}. {hero} [did not want to.|was not happy about it.|
        only said, "Now?"] "[Let us make it a game|I can help you|Let us count them all]," said
        {friend}.

        {hero} picked up {a} {x.s} and put them [in a box|on the shelf]. {friend} found {b}
        {y.s} [under the bed|behind the chair|in a shoe]. "How many things is that?" asked
        {friend}. "{a} {x.s} and {b} {y.s}: {a} + {b} = {c}," said {hero}. "[That is|That makes]
        {c} things!" {talk}

        [Soon|After an hour|Before lunch] the room was [clean|tidy|as good as new]. {hero.His}
        {elder} [came in|opened the door] and [could not believe it|smiled]. "[Is this the same
        room?|Well done, you two!|Now I can see the floor!]" They [both|sat down and] had
        {snack}. [{end_friends}|{end_friends}|{hero} [learned|had learned] that work can be a
        game.]""", a=a,
        b=b, c=a + b, x=x, y=y)


@plot
def night_sky(w):
    facts = [w.facts.deal() for _ in range(2)]
    return w.story("""
        [One {clear} night|On a {clear} night in {season}], {hero} and {hero.his} {elder} [sat
        in the garden|lay in the grass|sat on the roof|stood at the window] and looked at the
        [sky|stars]. [The moon was round and bright.|The moon was thin.|There was no wind.] "How
        many stars are there?" asked {hero}. "[Nobody has counted them all|More than you can
        count|Too many for one night]," said {hero.his} {elder}.

        "[Tell me something|Tell me things that you know]," said {hero}. "[Let me think|All
        right|Hm]," said {hero.his} {elder}. "{one}. [And|And I know that] {two}." [{hero}
        already knew that.|That was new to {hero}.|] "[Now it is your turn.|And what do you
        know?]" "{three}," said {hero}. [Both of them laughed.|A star fell.|An owl called.|]

        [It got late|It became cold|{hero} began to feel cold]. {hero.His} {elder} [put a
        blanket round {hero.him}|carried {hero.him} in|made some tea]. "[Are the stars still
        there in the day|Can the stars see us]?" asked {hero}. "[Ask me tomorrow|Now sleep|That
        is a good question]," said {hero.his} {elder}. [But {hero} was already asleep.|{hero}
        dreamed of {dream}.|Good night, stars. Good night, {hero}.]""",
                   clear="[clear|warm|quiet]", one=w.clause(facts[0], plain=True),
                   two=w.clause(facts[1], plain=True),
                   three=w.answer(w.any_fact()), dream=w.one(["a {colour} ship", "a flying {pet}",
                                                              "a garden on the moon",
                                                            "a big {wild}", "the sea"]))


@plot
def treasure_map(w):
    steps = w.number(5, 12), w.number(5, 12)
    return w.story("""
        {day}, {hero} found [an old map|a piece of paper|a strange letter] [in a book|behind the
        clock|in an old coat|in the attic]. There was a big {colour} cross on it. "It is a
        treasure map!" [said|cried] {hero}. {hero.He} [ran to|showed it to] {friend}. "[Start at
        the {start}|Begin at the {start}]," {friend} read. "Then go {a} steps to the {way} and
        {b} steps to the {way_2}. [Dig there|There you must dig]."

        They went to the {start}. [{hero} counted aloud.|They counted together.] First {a} steps
        to the {way}, then {b} steps to the {way_2}: that was {c} steps in all, because {a} +
        {b} = {c}. {talk} [There was a flat stone|There stood an old tree|There was nothing but
        grass]. [They dug with a spade, and soon it hit something hard.|They dug with their
        hands until {friend} saw something.|They dug and dug. Then there was a sound like wood.]

        It was a [small box|tin|wooden box]. [Inside|In it] they found {treasure} and a note:
        "[This is for the one who finds it|I was here long ago|Keep it or hide it again]."
        {hero} and {friend} [looked at each other|laughed|danced round the hole]. [They put a
        {toy} in the box and hid it again, for somebody else.|{hero.His} {elder} only smiled.
        Who had made the map?|They shared the treasure.] {end_friends}""",
                   keep="colour", a=steps[0], b=steps[1], c=sum(steps),
                   start=w.one(["gate", "well", "big rock", "old bridge", "barn", "bench"]),
                   way=w.one(["north", "south"]), way_2=w.one(["east", "west"]),
                   treasure=w.one(["ten old coins", "a silver ring", "a bag of glass balls",
                                   "a golden key",
                                   "three shells", "a tiny ship in a bottle"]))


@plot
def swapping(w):
    things = w.some(3, ["ball", "kite", "drum", "whistle", "book", "hat", "bell", "flute", "puzzle",
                        "lantern"])
    return w.story("""
        {opening} {hero} had a {a}, but {hero.he} [did not play with it any more|wanted
        something else|was tired of it]. {day}, {hero.he} met {friend}, who had a {b}. "[Shall
        we swap|Do you want to swap|Will you give me your {b} for my {a}]?" asked {hero}. "[Yes|
        All right|Good idea]," said {friend}. So {hero} gave {friend} the {a} and got the {b}.
        Now {hero} had the {b}, and {friend} had the {a}.

        {talk} [Then|A little later|On the way home] {hero} met the {job_1}, who had a {c}.
        "[What a fine {b}|I have always wanted a {b}]," said the {job_1}. "[I will give you my
        {c} for it|Take my {c} for it]." So they swapped, too. Now {hero} had the {c}, the
        {job_1} had the {b}, and {friend} still had the {a}.

        "[What did you bring home|What have you got there]?" asked {hero.his} {elder}. "A {c},"
        said {hero}. "[First it was a {a}, and then it was a {b}|It was a {a} this morning]!"
        {hero.His} {elder} [laughed|had to laugh]. {end_alone}""", keep="job_1", a=things[0],
        b=things[1],
        c=things[2])


@plot
def taking_turns(w):
    return w.story("""
        {hero} and {friend} were [brother and sister|neighbours|good friends]. {day}, they found
        a {colour} {toy} [in the attic|at the market|in front of the door]. "[It is mine|I saw
        it first|Give it to me]!" said {hero}. "[No, it is mine|No, I saw it first|No, I want
        it]!" said {friend}. They both [pulled at it|held it|shouted]. [Then they were both
        angry.|They did not talk for an hour.|It almost broke.]

        {sir} from next door [heard the noise|came by|looked over the wall]. "[What is the
        matter|Why are you shouting]?" {hero} [told the story|explained it]. "[There is one
        {toy} and there are two of you|That is a hard problem]," said {sir_word}. "[How could
        both of you be {glad_plain}|What could you do]?" [They thought about it.|It was quiet
        for a while.|]

        "[We could take turns|One day you, one day me]," said {friend}. "You have it on Monday,
        Wednesday and Friday, and I have it on Tuesday, Thursday and Saturday," said {hero}.
        "[And on Sunday we play together|And on Sunday nobody fights]." [That was fair.|And so
        they did.|It worked very well.] {talk} [{end_friends}|{end_friends}|{hero} [learned|had
        learned] that sharing is better than fighting.]""",
                   keep="colour toy", sir_word="the neighbour", glad_plain="[happy|glad]")


# --- other kinds of page ---

PAGES = []  # (weight, function)


def page(weight):
    def register(function):
        PAGES.append((weight, function))
        return function
    return register


def coins(n):
    return f"{n} coin" if n == 1 else f"{n} coins"


@page(14)
def story(w):
    return w.one(PLOTS)(w)


@page(40)
def page_of_facts(w):
    """Facts of all kinds in prose. Many a page starts with a fact and no title."""
    lines = [w.tell("""[A page of facts.|Things that are true.|What I know.|Did you know all
        this?|[Some|A few|Many] things to [remember|know].|From the book of {hero}.|What we
        learned [today|on {weekday}|this week|at school].||||||]""", w.cast(), clean=False)]
    for _ in range(w.number(5, 11)):
        fact = w.facts.deal() if w.chance(0.85) else w.sums.deal()
        if w.chance(0.75):
            lines.append(w.clause(fact) + ".")
        else:
            lines.append(w.tell("""[Everyone knows that|It is true that|I know that|Remember
                that|We learned that|Do not forget that|My teacher says that|You may know that|
                It is easy to see that] {that}.""", that=w.clause(fact, plain=True), clean=False))
    return polish(" ".join(lines))


def bare(noun):
    return re.sub("^(a|an|the|a ripe) ", "", noun)


MASS = ("capital", "continent", "language", "colour", "kind", "comes",
        "made")  # "milk", not "a milk"


def by_subject(facts):
    """{"dog": the facts about dogs, ...} for every subject with at least two."""
    groups = {}
    for fact in facts:
        if fact.relation.name in (*MASS, "sound", "count", "baby", "home", "plural", "work"):
            groups.setdefault(bare(fact.a), []).append(fact)
    return [group for group in groups.values() if len(group) > 1]


@page(12)
def all_about(w):
    """Two or three subjects, with all that the tables know of each."""
    parts = []
    for group in w.some(w.number(1, 3), w.subjects):
        facts = w.some(len(group), group)
        noun = bare(facts[0].a)
        mass = all(fact.a == noun and fact.relation.name in MASS for fact in facts)
        name = noun if mass else f"the {noun}"
        text = w.tell("""[[Today|Now] [we|I] want to talk about {name}.|All about {name}.|
            {name}.|[What do you know|What do we know] about {name}?|Here is a page about
            {name}.|Let us learn about {name}.||]""", name=name, clean=False)
        text += "".join(" " + w.clause(fact) + "." for fact in facts)
        if w.chance(0.4):
            fact = w.one(facts)
            text += " " + w.tell("""[{hero}|A child|The teacher] asked, "{ask}" [{friend}|
                Somebody|Another child] [said|answered|knew it and said], "{answer}." """, w.cast(),
                ask=w.question(fact),
                           answer=w.answer(fact), clean=False)
        parts.append(polish(text))
    return "\n".join(parts)


@page(10)
def lesson(w):
    """A teacher asks, the pupils answer."""
    names = w.some(3, GIRLS + BOYS)
    sir = w.tell("{sir}")
    lines = [w.tell("""[[Today|{school_day},] {sir} [taught|had] the [small|first|second]
        class.|"[Good morning|Hello], children," said {sir}.|{sir} [stood|sat] in front of the
        class.|] ["Listen carefully," said {sir}.|"I have [some|a few] questions," said {sir}.||
        ]""",
                    sir=sir, clean=False)]
    for _ in range(w.number(3, 6)):
        fact = w.any_fact()
        lines.append(w.tell("""[{sir} asked, "{ask}"|"{ask}" asked {sir}.|"{who}, [can you
            answer this|here is your question|listen]: {ask}"|{sir} had a question: {ask}|Then
            came a new question: {ask}] ["{answer}," [said|answered] {who}.|{who} [stood up|
            thought|smiled] and said, "{answer}."|{who} [knew|said|answered] that {that}.]
            ["[Good|Right|Very good|That is right|Well done, {who}|Exactly]," said {sir}.|That
            was right.|"And {that_2}," said {sir}.|||]""", sir=sir, who=w.one(names),
            ask=w.question(fact), clean=False,
                            answer=w.answer(fact), that=w.clause(fact, plain=True),
                            that_2=w.clause(w.any_fact(), plain=True)))
    return polish(" ".join(lines))


@page(8)
def questions_and_answers(w):
    """A plain quiz: question, answer, question, answer."""
    head = w.tell("[Questions and answers.|A quiz.|A small test.||]", clean=False)
    style = w.one(["Question: {ask} Answer: {answer}.", "{ask} {answer}.",
                   "{ask} [Easy: |I know: |]{answer}."])
    lines = []
    for _ in range(w.number(3, 7)):
        fact = w.any_fact()
        lines.append(polish(w.tell(style, ask=w.question(fact), answer=w.answer(fact),
                                   clean=False)))
    return polish(head + "\n" + "\n".join(lines))


@page(2)
def riddles(w):
    groups = [group for group in w.subjects
              if sum(fact.relation.name in ("sound", "count", "home", "colour", "kind",
                                            "baby") for fact in group) > 2]
    lines = []
    for group in w.some(w.number(2, 3), groups):
        noun = bare(group[0].a)
        hints = {"sound": "I can {b}.", "count": "I have {b} {c}.",
                 "home": "[My home is|You can find me|I live] {b}.",
                 "colour": "I am {b}.", "kind": "I am a {b}.", "baby": "My baby is called a {b}."}
        facts = [fact for fact in group if fact.relation.name in hints]
        clues = " ".join(w.tell(hints[fact.relation.name], fact.slots, clean=False)
                         for fact in w.some(min(len(facts), 4), facts))
        lines.append(w.tell("""[A riddle.|Guess!|{hero} has a riddle.|] {clues} [What|Who] am I?
            [I am a {noun}|The answer is a {noun}|You are a {noun}|It must be a {noun}].""",
            w.cast(),
            clues=clues, noun=noun))
    return "\n".join(lines)


@page(40)
def sums_in_prose(w):
    """Sums as sentences: said, written, asked and answered."""
    cast = w.cast()
    lines = [w.tell("""[Some sums.|A page of sums.|Let us count.|{hero} likes sums.|Sums for
        {weekday}.|{hero} and {friend} do sums.|||||]""", cast, clean=False)]
    for _ in range(w.number(6, 14)):
        fact = w.sums.deal()
        lines.append(w.tell("""{say}.|{say}.|{say}.|{say}.|[So|Yes,|We know that|It is true that|
            Count again:] {that}.|{ask} {answer}.|{hero} [says|knows|writes] that {that}.""",
                            cast, say=w.clause(fact), that=w.clause(fact, plain=True),
                            ask=w.question(fact), answer=w.answer(fact), clean=False))
    return polish(" ".join(lines))


@page(8)
def sums_with_things(w):
    """Small sums that happen to somebody."""
    lines = []
    for _ in range(w.number(2, 4)):
        fact = w.sums.deal()
        if min(int(fact.a), int(fact.b), int(fact.c)) < 2:  # "1 plums" would be wrong
            lines.append(polish(w.clause(fact) + "."))
            continue
        lines.append(w.tell(SUM_TALES[fact.relation.name], w.cast(), **fact.slots,
                            say=w.clause(fact),
                            x=Word(w.tell("{countable}", clean=False))))
    return "\n".join(lines)


SUM_TALES = {
    "plus": """{hero} has {a} {x.s}[ in a bag| on the table| at home|]. [{friend} gives {hero}
        {c} more|{hero} finds {c} more|{hero.He} buys {c} more|{hero.His} {elder} gives
        {hero.him} {c} more]. {say}[, so now|. Now] {hero} has {b} {x.s}.""",
    "minus": """{hero} has {a} {x.s}. {hero.He} [gives {c} of them to {friend}|gives {c} away|
        loses {c} of them|sells {c} of them]. {say}[, so|. Now] {hero} has {b} {x.s} left.""",
    "times": """There are {a} [boxes|bags|baskets] with {c} {x.s} in each. {say}, so there are
        {b} {x.s} in all.""",
    "divide": """{hero} has {a} {x.s} for {c} friends, and each of them gets the same. {say}, so
        each friend gets {b} {x.s}.""",
}


@page(3)
def times_tables_and_counting(w):
    kind = w.number(0, 3)
    if kind == 0:
        n = w.number(1, 12)
        head = w.tell("[The table of {n}.|{hero} can say the table of {n}.]",
                      w.cast(), n=str(n), clean=False)
        return polish(head + " " + " ".join(f"{k} x {n} = {k * n}." for k in range(1, 11)))
    if kind == 1:
        n, step = w.number(2, 9), w.one(["+", "-"])
        rows = [f"{n} + {k} = {n + k}." if step == "+" else f"{n + k} - {k} = {n}."
                for k in range(1, 11)]
        return polish(w.tell("[Sums with {n}.|More and more.|Look how the numbers change.|]",
                             n=str(n)) + " "
                      + " ".join(rows))
    start = w.number(0, 60)
    names = NUMBERS[start:start + w.number(6, 12)]
    if kind == 3:
        names = names[::-1]
    return w.tell("""[{hero} counts|{friend} and {hero} count|The children count|The {job}
        counted|We count] {way}: {names}. [Then {hero} stops.|Well done!|That is how we count.|
        And so on.|]""", w.cast(),
                  way="[back|backwards]" if kind == 3 else "[aloud|up|slowly|the {wild_s}]",
                  wild_s="ducks", names=", ".join(names))


@page(3)
def spelling(w):
    lines = []
    for word in w.some(w.number(3, 6), SPELLING_WORDS):
        letter = w.one(word)
        lines.append(w.tell("""[The word {word} is spelled {spelled}.|{word} is spelled
            {spelled}.|{hero} can spell {word}: {spelled}.|The letters of the word {word} are
            {commas}.] [The word {word} has {count} letters.|There are {count} letters in the
            word {word}.|] [The letter {letter} comes up {times} in {word}.|{word} has the
            letter {letter} {times}.|The first letter of {word} is {first}.|The last letter of
            {word} is {last}.||]""",
                            w.cast(), word=word, spelled="-".join(word), commas=", ".join(word),
                            count=NUMBERS[len(word)], letter=letter,
                            times=times(word.count(letter)),
                            first=word[0], last=word[-1]))
    return " ".join(lines)


def times(n):
    return {1: "once", 2: "twice"}.get(n, f"{NUMBERS[n]} times")


@page(3)
def who_has_it(w):
    """A thing changes hands; the last sentence says where it is, and it must be right."""
    people = w.some(4, GIRLS + BOYS)
    thing, holder = Word(w.tell("{colour} {toy}", clean=False)), people[0]
    lines = [w.tell("[{p} had|There was once a child named {p} who had] a {thing}.", p=holder,
                    thing=thing)]
    for _ in range(w.number(1, 4)):
        other = w.one([person for person in people if person != holder])
        lines.append(w.tell("""[{p} gave {it} to {q}.|{p} gave {q} {it}.|[Then|Later|{day},] {p}
            gave {it} to {q}.|{p} did not want it any more, so {q} got it.|{q} asked for {it},
            and {p} gave it to {q.him}.|{p} sold {it} to {q} for {n} coins.]""", p=holder, q=other,
            it=w.one([f"the {thing}", f"the {thing.split()[-1]}", "it"]),
                            n=str(w.number(2, 9))))
        holder = other
    lines.append(w.tell("""[Now {p} has the {thing}.|So now the {thing} belongs to {p}.|[And
        now|Now] the {thing} is in the hands of {p}.|Who has the {thing} now? {p} has it.]""",
        p=holder,
        thing=thing))
    return " ".join(lines)


@page(3)
def where_is_it(w):
    """A thing is put somewhere, perhaps moved, and found where it was put last."""
    slots = {**w.cast(), "thing": w.tell("{colour} {toy}", clean=False)}
    spots = w.some(w.number(1, 3), SPOTS)
    lines = [w.tell("{hero} [put|had put|left|had left] a {thing} {spot}.", slots, spot=spots[0])]
    for spot in spots[1:]:
        lines.append(w.tell("""[Then|Later|{day},] [{friend}|{hero.his} {elder}|{hero}] [moved
            it and put it|put it] {spot}.|{friend} took it, looked at it and put it {spot}.""",
            slots,
            spot=spot))
    lines.append(w.tell("""[{next_day}|In the evening|Later], {hero} [looked for|wanted|needed]
        the {thing}. [Where was it?|{hero.He} looked in the right place.|It was not lost.|] [It
        was|{hero.He} found it] {spot}.""",
                        slots, spot=spots[-1]))
    return " ".join(lines)


@page(2)
def feelings(w):
    """Why somebody is glad or sad."""
    lines = []
    for _ in range(w.number(3, 5)):
        feeling, cause = w.one(w.one([GLAD_BECAUSE, SAD_BECAUSE]))
        lines.append(w.tell("""{p} was {feeling} because {p.he} {cause}.|{p} {cause}, so {p.he}
            was {feeling}.|Why was {p} {feeling}? {p.He} {cause}.""",
                            p=w.one(GIRLS + BOYS), feeling=feeling, cause=cause))
    return " ".join(lines)


# --- word problems in GSM8K's format ---

PROBLEMS = []


def problem(function):
    """Register a template: numbers, steps as (expression, sentence), and the question.

    In an expression r is the result of the step before, in a sentence {r} is that of this step.
    Results are whole numbers from 0 to 999; a draw that gives another one is dropped.
    {x} is one kind of small thing, {hero} and {friend} are a girl and a boy.
    """
    PROBLEMS.append(function)
    return function


@problem
def gets_more(w):
    return dict(a=w.number(12, 480), b=w.number(12, 480)), [
        ("a+b", "{hero} has {r} {x} now.")], """
            {hero} has {a} {x}. {friend} gives {hero.him} {b} more. How many {x} does {hero}
            have now?|{hero} had {a} {x} and then [found|got|bought] {b} more. How many {x} does
            {hero} have now?"""


@problem
def two_groups(w):
    return dict(a=w.number(91, 480), b=w.number(91, 480)), [
        ("a+b", "There are {r} children in all.")], """
            There are {a} girls and {b} boys [at|in] a school. How many children are there in
            all?|A school has {a} girls and {b} boys. How many children is that in all?"""


@problem
def people_get_on(w):
    return dict(a=w.number(31, 480), b=w.number(12, 180)), [
        ("a+b", "There are {r} people on it now.")], """
            A [train|ship] has {a} people on it. [At the next stop|In the next town], {b} more
            people get on. How many people are on it now?"""


@problem
def new_books(w):
    return dict(a=w.number(105, 680), b=w.number(12, 190)), [
        ("a+b", "The library has {r} books now.")], """
            A library has {a} books. It [buys|gets] {b} new ones. How many books does it have
            now?|There were {a} books in the library. Then {sir} gave it {b} more. How many
            books are there now?"""


@problem
def sells_some(w):
    a = w.number(41, 680)
    return dict(a=a, b=w.number(12, a - 5)), [("a-b", "There are {r} {fruits} left.")], """
        A farmer has {a} {fruits}. The farmer sells {b} of them. How many {fruits} are left?|
        There were {a} {fruits} at the market. {b} of them were sold. How many {fruits} are
        left?"""


@problem
def gives_away(w):
    a = w.number(35, 480)
    return dict(a=a, b=w.number(11, a - 3)), [("a-b", "{hero} has {r} {x} left.")], """
        {hero} has {a} {x}. {hero.He} [gives {b} of them to {friend}|gives {friend} {b} of them|
        loses {b} of them]. How many {x} does {hero} have left?"""


@problem
def how_many_more(w):
    b = w.number(12, 380)
    return dict(a=w.number(b + 11, b + 400), b=b), [("a-b", "{hero} has {r} more {x}.")], """
        {hero} has {a} {x}, and {friend} has {b}. How many more {x} does {hero} have than
        {friend}?|{hero} has {a} {x}. {friend} has only {b} {x}. How many more does {hero} have?"""


@problem
def pages_left(w):
    a = w.number(90, 680)
    return dict(a=a, b=w.number(15, a - 10)), [("a-b", "There are {r} pages left.")], """
        A book has {a} pages. {hero} has read {b} pages. How many pages are left?|{hero} reads a
        book of {a} pages. {hero.He} has read {b} of them. How many pages are left to read?"""


@problem
def saving_up(w):
    a = w.number(60, 680)
    return dict(a=a, b=w.number(15, a - 10)), [("a-b", "{hero} needs {r} more coins.")], """
        {hero} wants to buy a {ware} that costs {a} coins. {hero.He} has {b} coins. How many
        more coins does {hero} need?"""


@problem
def boxes_of(w):
    return dict(a=w.number(11, 60), b=w.number(3, 16)), [
        ("a*b", "There are {r} {x} in all.")], """
            There are {a} boxes with {b} {x} in each box. How many {x} are there in all?|{hero}
            has {a} boxes. There are {b} {x} in each box. How many {x} does {hero} have in all?"""


@problem
def every_day(w):
    return dict(a=w.number(11, 45), b=w.number(4, 20)), [("a*b", "{hero} reads {r} pages.")], """
        {hero} reads {a} pages every day. How many pages does {hero} read in {b} days?|Every day
        {hero} reads {a} pages. How many pages is that in {b} days?"""


@problem
def what_it_costs(w):
    return dict(a=w.number(12, 60), b=w.number(3, 16)), [("a*b", "The price is {r} coins.")], """
        One {ware} costs {a} coins. How many coins do {b} of them cost?|{hero} buys {b}
        presents. Each of them costs {a} coins. How many coins does {hero} pay?"""


@problem
def rows_of_trees(w):
    return dict(a=w.number(11, 45), b=w.number(6, 22)), [("a*b", "There are {r} trees.")], """
        A farmer plants {a} rows of trees. There are {b} trees in each row. How many trees is
        that?|In a garden there are {a} rows with {b} trees each. How many trees are there?"""


@problem
def shared_equally(w):
    b, r = w.number(3, 12), w.number(8, 80)
    return dict(a=b * r, b=b), [("a/b", "Each friend gets {r} {x}.")], """
        {b} friends share {a} {x}. Each of them gets the same number. How many {x} does each
        friend get?|{hero} shares {a} {x} equally among {b} friends. How many {x} does each
        friend get?"""


@problem
def packed_in_bags(w):
    b, r = w.number(3, 20), w.number(8, 49)
    return dict(a=b * r, b=b), [("a/b", "{r} bags are needed.")], """
        {hero} has {a} {fruits} and puts {b} of them in each bag. How many bags does {hero}
        need?|A farmer packs {a} {fruits}. {b} of them go into each bag. How many bags are
        needed?"""


@problem
def gets_and_gives(w):
    a, b = w.number(15, 450), w.number(12, 400)
    return dict(a=a, b=b, c=w.number(11, a + b - 5)), [
        ("a+b", "First {hero} has {r} {x}."), ("r-c", "Then {hero} has {r} {x}.")], """
            {hero} has {a} {x}. {friend} gives {hero.him} {b} more. Then {hero} loses {c} {x}.
            How many {x} does {hero} have now?|{hero} had {a} {x} and bought {b} more. Then
            {hero.he} gave away {c}. How many {x} does {hero} have now?"""


@problem
def on_and_off(w):
    a = w.number(35, 450)
    b = w.number(12, a - 10)
    return dict(a=a, b=b, c=w.number(11, 190)), [
        ("a-b", "First there are {r} people."), ("r+c", "Then there are {r} people.")], """
            There are {a} people on a train. At the first stop {b} people get off. At the next
            stop {c} people get on. How many people are on the train now?"""


@problem
def boxes_and_more(w):
    return dict(a=w.number(4, 40), b=w.number(4, 15), c=w.number(3, 90)), [
        ("a*b", "There are {r} {x} in the boxes."), ("r+c", "{hero} has {r} {x} in all.")], """
            {hero} has {a} boxes with {b} {x} in each, and {c} more {x} on the table. How many
            {x} does {hero} have in all?"""


@problem
def change_from(w):
    a, b = w.number(11, 45), w.number(3, 12)
    return dict(a=a, b=b, c=w.number(a * b + 5, a * b + 250)), [
        ("b*a", "The price is {r} coins."), ("c-r", "{hero} has {r} coins left.")], """
            {hero} has {c} coins. {hero.He} buys {b} {ware.s} for {a} coins each. How many coins
            does {hero} have left?"""


@problem
def three_days(w):
    return dict(a=w.number(11, 320), b=w.number(11, 320), c=w.number(11, 320)), [
        ("a+b", "On the first two days it is {r} {x}."), ("r+c", "In all it is {r} {x}.")], """
            {hero} [collects|counts] {a} {x} on Monday, {b} on Tuesday and {c} on Wednesday. How
            many {x} is that in all?"""


@problem
def times_as_many(w):
    return dict(a=w.number(11, 120), b=w.number(2, 6)), [
        ("b*a", "{friend} has {r} {x}."), ("a+r", "Together they have {r} {x}.")], """
            {hero} has {a} {x}. {friend} has {b} times as many. How many {x} do they have
            together?"""


@problem
def that_many_more(w):
    return dict(a=w.number(11, 320), b=w.number(11, 300)), [
        ("a+b", "{friend} has {r} {x}."), ("a+r", "Together they have {r} {x}.")], """
            {hero} has {a} {x}. {friend} has {b} more than {hero}. How many {x} do they have
            together?"""


@problem
def put_together_and_shared(w):
    c, r = w.number(3, 12), w.number(8, 70)
    a = w.number(5, c * r - 5)
    return dict(a=a, b=c * r - a, c=c), [
        ("a+b", "Together they have {r} {x}."), ("r/c", "Each child gets {r} {x}.")], """
            {hero} has {a} {x}, and {friend} has {b}. They put them together and share them
            equally among {c} children. How many {x} does each child get?"""


@problem
def days_of_reading(w):
    b, c = w.number(11, 45), w.number(3, 12)
    return dict(a=w.number(b * c + 6, b * c + 260), b=b, c=c), [
        ("b*c", "{hero} reads {r} pages."), ("a-r", "There are {r} pages left.")], """
            A book has {a} pages. {hero} reads {b} pages a day for {c} days. How many pages are
            left?"""


@problem
def bakes_and_sells(w):
    a, b = w.number(5, 30), w.number(6, 24)
    return dict(a=a, b=b, c=w.number(5, a * b - 4)), [
        ("a*b", "There are {r} rolls."), ("r-c", "There are {r} rolls left.")], """
            A baker fills {a} trays with {b} rolls each. The baker sells {c} rolls. How many
            rolls are left?"""


def work_out(expression):
    """The value of a+b, a-b, a*b or a/b, whole numbers only."""
    a, operator, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
    a, b = int(a), int(b)
    if operator == "/":
        assert a % b == 0, expression
        return a // b
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def write_problem(w, make):
    """(key, question, solution with <<calls>>), or None if a number gets too large."""
    numbers, steps, question = make(w)
    slots = {**w.cast(), **{name: str(value) for name, value in numbers.items()}}
    for name in ("fruits", "ware"):
        slots[name] = Word(w.tell("{%s}" % name, clean=False))
    slots["x"] = plural(w.tell("{countable}", clean=False))
    result, lines = None, []
    for expression, line in steps:
        known = {**numbers, "r": result}
        expression = re.sub("[a-z]", lambda name: str(known[name[0]]), expression)
        result = work_out(expression)
        if not 0 <= result <= 999:
            return None
        lines.append(w.tell(line, slots, r=f"<<{expression}={result}>>{result}"))
    key = (make.__name__, *sorted(numbers.items()))
    return key, w.tell(question, slots), "\n".join(lines + [f"#### {result}"])


def check_misses(misses, flag, found):
    """Raise UserError when a list cannot grow any more, instead of drawing for ever."""
    if misses > MOST_MISSES:
        raise UserError(f"{flag} asks for more than there is: after {found} different ones, "
                        f"{MOST_MISSES} draws in a row brought nothing new; ask for fewer")


def make_problems(seed, num_train, num_test, teller):
    """Two lists of (question, answer); no (template, numbers) stands in both, or twice."""
    w = teller(seed)
    rows, misses = {}, 0  # key: (question, answer), in the order of their making
    while len(rows) < num_train + num_test:
        made, before = write_problem(w, PROBLEMS[len(rows) % len(PROBLEMS)]), len(rows)
        if made:
            rows.setdefault(made[0], made[1:])
        misses = 0 if len(rows) > before else misses + 1
        check_misses(misses, "--num-problems", len(rows))
    rows = list(rows.values())
    return rows[num_test:], rows[:num_test]


def in_parts(answer):
    """Split at the <<calls>> as nanochat does: text, python, python_output parts."""
    parts = []
    for i, piece in enumerate(re.split("<<(.*?)>>", answer)):
        if i % 2:
            expression, _, result = piece.partition("=")
            parts += [{"type": "python", "text": expression},
                      {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def problem_row(question, answer):
    return {"question": question, "answer": answer,
            "messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": in_parts(answer)}]}


# --- chats ---

# (prompts, prompts kept for the test, replies); nothing on who the assistant is or what it can do:
# that is for 06_identity.py to say, and two teachers would contradict each other
SMALL_TALK = [
    ("""hello!|hi!|good morning!|hello there!|hi, how nice to see you!|hey!|good day!""",
     "hi there!|good morning to you!|hello, hello!",
     """Hello! What would you like to know?|Hello! How can I help you?|Hello! It is good to see
         you."""),
    ("""how are you?|are you well?|how are you today?|how do you feel?|is everything all right?""",
     "are you all right?|how do you feel today?",
     """I am well, thank you. How can I help you?|I am fine, thank you. What would you like to
         know?"""),
    ("""thank you!|thanks!|thank you very much!|thank you for your help!|thanks a lot!|that was
        a great help!""",
     "many thanks!|thank you so much!|thanks for your help!",
     """You are welcome!|You are welcome. Is there anything else?|I am glad that I could help."""),
    ("""goodbye!|bye!|see you soon!|good night!|see you tomorrow!|I have to go now.|bye bye!""",
     "goodbye for now!|I must go now.|see you later!",
     """Goodbye! Come back soon.|Goodbye! It was good to talk with you.|Goodbye! Have a good
         day."""),
    ("""I am sad.|I am so unhappy.|I feel sad today.|today is a bad day.|I am upset.|I want to
        cry.""",
     "I feel very sad.|I am unhappy today.",
     """I am sorry to hear that. Would you like to hear a story?|I am sorry that you are sad. Do
         you want to talk about it?"""),
    ("""I am happy!|I am so glad!|I feel great today!|today is a good day!|I had a wonderful
        day!""",
     "I feel very happy!|I am glad today!",
     """That is good to hear!|I am glad to hear that!|How nice! What made you so happy?"""),
    ("""I am bored.|I do not know what to do.|what can I do now?|there is nothing to do.|it is
        so boring here.""",
     "I am so bored today.|what could I do now?",
     """Shall I tell you a story?|You could read a book, or I could tell you a story."""),
    ("""you are clever!|you know a lot!|well done!|that was a good answer!|you are good at
        this!|great!""",
     "you are very clever!|what a good answer!",
     """Thank you! That is kind of you.|Thank you! I am glad that you think so."""),
    ("""I am tired.|I want to sleep.|it is late.|I am so sleepy.|I cannot stay awake.""",
     "I am very tired now.|it is very late.",
     """Then it is time for bed. Good night!|Sleep well! We can talk again tomorrow."""),
]

# what cannot be known from here, and why
UNKNOWN = [
    ("""what is the weather like today?|is it raining now?|is the sun shining?|will I need an
        umbrella today?|how is the weather?""",
     "is it cold outside?|what is the weather like where I am?",
     "I cannot see outside"),
    ("""what time is it?|how late is it?|what is the time now?|can you tell me the time?""",
     "do you know what time it is?|is it late already?",
     "I have no clock"),
    ("""what is my name?|do you know my name?|who am I?|what am I called?|can you tell me my
        name?""",
     "can you guess my name?|do you know who I am?",
     "you have not told me"),
    ("""what did I eat today?|what did I have for breakfast?|what was in my soup?|what did I eat
        this morning?""",
     "what did I have for lunch?|do you know what I ate?",
     "I was not there"),
    ("""what am I thinking?|what do I think about?|can you read my thoughts?|which number am I
        thinking of?""",
     "do you know what I think?|guess what I am thinking!",
     "I cannot look into your head"),
    ("""who will win the race tomorrow?|what will happen tomorrow?|will it snow next week?|will
        I be rich one day?|who will win the game?""",
     "what will I do tomorrow?|will it rain tomorrow?",
     "nobody can see into the future"),
    ("""where are my keys?|where did I put my book?|have you seen my hat?|where is my other
        shoe?""",
     "where did I put my bag?|do you know where my coat is?",
     "I cannot see your home"),
    ("""how old am I?|when is my birthday?|what is my age?|in which year was I born?""",
     "do you know how old I am?|do you know my birthday?",
     "you have not told me"),
    ("""what is in my pocket?|what do I have in my hand?|what is in this box?|what am I holding?""",
     "do you know what is in my bag?|what is behind my back?",
     "I cannot see it"),
    ("""what is my friend doing now?|where is my mother now?|what is my dog doing?|who is at the
        door?""",
     "what is my sister doing now?|who is in the next room?",
     "I cannot see that from here"),
]

STORY_ASKS = (
    """tell me a story about a {x}.|please tell me a story about a {x}.|I want to hear a story
        about a {x}.|do you know a story about a {x}?|a story about a {x}, please!|make up a
        story about a {x}.""",
    """can you tell me a story about a {x}?|tell a story with a {x} in it.""")
SPELL_ASKS = (
    """how do you spell {x}?|spell the word {x}.|please spell {x}.|how is {x} spelled?|how do I
        spell the word {x}?|can you spell {x}?""",
    """can you spell the word {x} for me?|please tell me how to spell {x}.""")
LENGTH_ASKS = (
    """how many letters does the word {x} have?|how many letters has {x} got?|how many letters
        are in the word {x}?|count the letters of {x}.""",
    """how many letters are there in {x}?|please count the letters of the word {x}.""")
LETTER_ASKS = (
    """how many times does the letter {y} come up in {x}?|how often is the letter {y} in {x}?|
        how often does the letter {y} come up in the word {x}?|count the letter {y} in {x}.""",
    """how many times is the letter {y} in the word {x}?|please count how often the letter {y}
        is in {x}.""")

SHORT_STORIES = [
    ("pet", """[Once there was|There was once] a {x} named {name}. {name} lived with a
        {hero.boy} named {hero}. {day}, {name} [ran away|hid|was gone], and {hero} looked
        [everywhere|all day]. {hero.He} found {name} [{spot}|asleep {spot}] and was {glad}."""),
    ("wild", """[Once there was|There was once] a {size} {x} who lived in the forest. {day}, the
        {x} [met|saw] a {other} who was {sad}. "[Do not cry|Come and play with me|Let me help
        you]," said the {x}. They played {game} and became friends."""),
    ("toy", """[{hero} had|{hero} got] a {x} from {hero.his} {elder}. {day}, {hero} [lost it|
        could not find it]. "I will help you," said {friend}. They looked [everywhere|for a long
        time], and there it was, {spot}! {hero} was {glad}."""),
    ("job", """There was once a {x} who [worked hard|was kind to everyone|got up early]. {day},
        the {x} found a {colour} {toy} in the street. It belonged to {hero}. The {x} gave it
        back, and {hero} was {glad}."""),
]


# Words around a question, in training only: the question matters, and not how it is led up to.
LEAD_UPS = (
    "Hello! {q}", "I have a question. {q}", "Here is a question: {q}", "Please help me. {q}",
    "{q} I have forgotten.", "{q} I would like to know.", "One more question: {q}", "Quick! {q}",
    "Excuse me. {q}", "My friend wants to know: {q}", "Answer this, please: {q}",
    "I am curious. {q}")


def exchange(w, kind, held):
    """(question, reply, what a right reply must hold); held takes the test's phrasings."""
    question, reply, answer = plain_exchange(w, kind, held)
    if not held and kind in ("fact", "sum", "spell", "count") and w.chance(0.4):
        question = w.one(LEAD_UPS).replace("{q}", question)
    return question, reply, answer


def plain_exchange(w, kind, held):
    side = int(held)

    def ask(prompts, **slots):
        return w.tell(prompts[side], slots)

    if kind in ("fact", "sum"):
        fact = (w.facts if kind == "fact" else w.sums).deal()
        relation = fact.relation
        template = w.one(relation.held_ask if held else relation.ask + relation.chat_ask)
        key = "{a}" if "{b" in template and "{a" not in template else relation.key
        return (w.tell(template, fact.slots), polish(w.answer(fact) + "."),
                w.tell(key, fact.slots, clean=False))
    if kind == "small talk":
        topic = w.one(SMALL_TALK)
        return ask(topic), w.tell(topic[2]), ""
    if kind == "unknown":
        topic = w.one(UNKNOWN)
        return ask(topic), f"I cannot know that, because {topic[2]}.", "cannot know"
    if kind == "story":
        subject, text = w.one(SHORT_STORIES)
        x = w.tell("{%s}" % subject, clean=False)
        other = w.one([word for word in ("bird", "hare", "goose", "lamb")])
        return ask(STORY_ASKS, x=x), w.tell(text, w.cast(), x=x, other=other, spot=w.one(SPOTS),
                                            name=w.one(PET_NAMES)), x
    word = w.one(SPELLING_WORDS)
    if kind == "spell":
        return ask(SPELL_ASKS,
                   x=word), f"The word {word} is spelled {'-'.join(word)}.", "-".join(word)
    if w.chance(0.4):
        n = NUMBERS[len(word)]
        return (ask(LENGTH_ASKS, x=word), f"{', '.join(word)}: the word {word} has {n} letters.",
                f"{n} letters")
    y = w.one(word if w.chance(0.8) else "aeinost")
    n = word.count(y)
    marked = ", ".join(letter + (f" ({word[:i + 1].count(y)})" if letter == y else "") for i,
                       letter in enumerate(word))
    return (ask(LETTER_ASKS, x=word, y=y),
            f"{marked}: the letter {y} comes up {times(n)} in {word}.", times(n))


PET_NAMES = ["Snow", "Tiger", "Rex", "Star", "Pepper", "Button", "Plum", "Captain", "Storm",
             "Lucky"]
KINDS = {"fact": 60, "sum": 9, "small talk": 6, "unknown": 7, "story": 6, "spell": 6, "count": 6}


def make_chats(w, count, held):
    """Chats of one to three exchanges; no first question twice in the test split."""
    chats, seen, misses = [], set(), 0
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    while len(chats) < count:
        chosen = [w.one(kinds) for _ in range(w.one([1, 1, 1, 1, 2, 3]))]
        turns = [exchange(w, kind, held) for kind in chosen]
        misses = misses + 1 if held and turns[-1][0] in seen else 0
        check_misses(misses, "--num-chats", len(chats))
        if misses:
            continue
        seen.add(turns[-1][0])
        messages = [{"role": role, "content": turn[i]} for turn in turns
                    for i, role in enumerate(("user", "assistant"))]
        chats.append({"messages": messages, "kind": chosen[-1], "answer": turns[-1][2]})
    return chats


# --- evaluation tasks in CORE's three formats ---


def tail_form(w, fact):
    """(query, b) from a held-out clause, which ends in {b}."""
    clause = w.one(fact.relation.held_say)
    assert clause.endswith("{b}"), clause
    return w.tell(clause.removesuffix("{b}"), fact.slots), str(fact.b)


def wrong_answers(fact, facts):
    """Values of b in other rows that are wrong for this one, each once, in table order."""
    avoid = [pair.strip() for pair in fact.relation.avoid.split(",")]
    right = [other.b for other in facts if other.relation is fact.relation and other.a == fact.a]
    return list(dict.fromkeys(
        str(other.b) for other in facts
        if other.relation is fact.relation and other.b not in right
        and f"{fact.a}={other.b}" not in avoid
        and (fact.relation.name not in ("after", "before") or other.c == fact.c)))


def facts_mc(w):
    fact = w.facts.deal()
    wrong = wrong_answers(fact, w.facts.cards) if fact.relation.choices else []
    if len(wrong) < 3:
        return None
    query, right = tail_form(w, fact)
    choices = w.some(3, wrong)
    gold = w.number(0, 3)
    choices.insert(gold, right)
    return {"query": query, "choices": choices, "gold": gold}


def facts_lm(w):
    context, continuation = tail_form(w, w.facts.deal())
    return {"context": context, "continuation": continuation}


def sums_lm(w):
    context, continuation = tail_form(w, w.sums.deal())
    return {"context": context, "continuation": continuation}


def stories_lm(w):
    """Where the thing is, or who has it, follows from the story alone."""
    slots = {**w.cast(), "thing": w.tell("{colour} {toy}", clean=False)}
    if w.chance(0.5):
        spots = w.some(2, SPOTS)
        text = """{hero} put a {thing} {old}. Then {friend} moved it and put it {new}. Nobody
            touched it after that, so the {thing} must still be"""
        return {"context": w.tell(text, slots, old=spots[0], new=spots[1]),
                "continuation": spots[1]}
    text = """{hero} had a {thing}. {hero.He} gave the {thing} to {friend}. {friend} kept it,
        and so the child who has the {thing} now is"""
    return {"context": w.tell(text, slots), "continuation": str(slots["friend"])}


def schema(w):
    """Two contexts, one continuation: which context makes it likely?"""
    kind = w.number(0, 2)
    if kind == 0:
        people, thing = w.some(2, GIRLS + BOYS), w.tell("{toy}", clean=False)
        text = "{p} gave the {thing} to {q}, and that is how it came about that {who}"
        options = [w.tell(text, p=people[0], q=people[1], thing=thing,
                          who=who) for who in people[::-1]]
        end = f"has the {thing} now."
    elif kind == 1:
        person, (feeling,
                 cause), other = w.one(GIRLS + BOYS), w.one(GLAD_BECAUSE), w.one(SAD_BECAUSE)
        text = "{p} {cause}, and that is the reason why {p.he} was"
        options = [w.tell(text, p=person, cause=why) for why in (cause, other[1])]
        end = f"{feeling} that day."
    else:
        fact = w.facts.deal()
        others = [other for other in w.facts.cards if other.relation is fact.relation
                  and str(fact.b) in wrong_answers(other, w.facts.cards) and other.c == fact.c]
        if not (fact.relation.choices and others):
            return None
        clause = w.one(fact.relation.held_say).removesuffix("{b}")
        options = [w.tell(clause, other.slots) for other in (fact, w.one(others))]
        end = f"{fact.b}."
    gold = w.number(0, 1)
    return {"context_options": options[::-1] if gold else options, "continuation": end,
            "gold": gold}


# label: (maker, CORE type, chance in percent, examples shown before the question)
TASKS = {
    "facts_mc": (facts_mc, "multiple_choice", 25, 0),
    "facts_lm": (facts_lm, "language_modeling", 0, 0),
    "sums_lm": (sums_lm, "language_modeling", 0, 3),
    "stories_lm": (stories_lm, "language_modeling", 0, 0),
    "world_schema": (schema, "schema", 50, 0),
}


def make_task(w, make, count):
    items, misses = {}, 0  # by text, so that none comes twice
    while len(items) < count:
        item, before = make(w), len(items)
        if item:
            items.setdefault(json.dumps(list(item.values())[0]), item)
        misses = 0 if len(items) > before else misses + 1
        check_misses(misses, "--num-eval", len(items))
    return list(items.values())


# --- the corpus ---


def read_table(relations):
    """All facts of a list of relations."""
    facts = []
    for relation in relations:
        rows = relation.rows
        if isinstance(rows, str):
            rows = [re.split("[=/]", " ".join(row.split())) for row in rows.split(",")]
        for row in rows:
            a, b, c = [Word(value) for value in (*row, "")[:3]]
            facts.append(Fact(relation, a, b, c))
    return facts


def plain_problem(question, answer):
    """A word problem as prose, without calls."""
    *lines, last = re.sub("<<.*?>>", "", answer).split("\n")
    return f"{question} {' '.join(lines)}"


def documents(seed, size_bytes, problems, teller):
    """Yield documents until they hold size_bytes of UTF-8 text; none comes twice."""
    w = teller(seed)
    pages = [function for weight, function in PAGES for _ in range(weight)]
    problems, seen, size = Deck(problems, w.rng), set(), 0
    while size < size_bytes:
        if w.chance(0.05):
            text = "\n".join(plain_problem(*problems.deal()) for _ in range(w.number(1, 3)))
        else:
            text = w.one(pages)(w)
        if text in seen:
            continue
        seen.add(text)
        size += len(text.encode())
        yield text


# ---- the loop ------------------------------------------------------------------------------------


def write_shard(path, texts):
    """One string column, 1024 documents per row group, zstd; the options fix every byte."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd",
                       compression_level=3,
                       use_dictionary=False, write_statistics=False)


def write_lines(path, rows):
    with atomic_write(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_world(cfg):
    """Write all artefacts under cfg.data_dir; returns (paths, texts)."""
    facts, sums = read_table(FACTS), read_table(SUMS)

    def teller(seed):
        return Teller(seed, facts, sums)

    # 1. problems first: the corpus may use the training ones only
    train, test = make_problems(cfg.seed + 1, cfg.num_problems, -(-cfg.num_problems // 6), teller)
    data, paths = cfg.data_dir, []

    # 2. the corpus: the last shard is validation
    bar = tqdm(total=int(cfg.size_mb * 1e6), unit="B", unit_scale=True, desc="corpus", disable=None)
    texts = []
    for text in documents(cfg.seed, int(cfg.size_mb * 1e6), train, teller):
        texts.append(text)
        bar.update(len(text))
    bar.close()
    held = max(1, int(len(texts) * VALIDATION_SHARE))
    per_shard = -(-(len(texts) - held) // TRAIN_SHARDS)
    cuts = [min(i * per_shard, len(texts) - held) for i in range(TRAIN_SHARDS + 1)] + [len(texts)]
    for i in range(TRAIN_SHARDS + 1):
        paths.append(data / "mirror" / f"shard_{i:05d}.parquet")
        write_shard(paths[-1], texts[cuts[i]:cuts[i + 1]])
    for path in sorted((data / "mirror").glob("shard_*.parquet")):
        if path not in paths:  # of an earlier, larger run: it would pass for the validation shard
            path.unlink()

    # 3. problems, chats and tasks, each from a seed of its own
    lines = {
        "tiny_gsm_train.jsonl": [problem_row(*row) for row in train],
        "tiny_gsm_test.jsonl": [problem_row(*row) for row in test],
        "tiny_chat_train.jsonl": make_chats(teller(cfg.seed + 2), cfg.num_chats, held=False),
        "tiny_chat_test.jsonl": make_chats(teller(cfg.seed + 3), -(-cfg.num_chats // 10),
                                           held=True),
    }
    index = []
    for i, (label, (make, kind, chance, shots)) in enumerate(TASKS.items()):
        lines[f"tiny_eval/{label}.jsonl"] = make_task(teller(cfg.seed + 4 + i), make, cfg.num_eval)
        index.append({"label": label, "dataset_uri": f"{label}.jsonl", "icl_task_type": kind,
                      "num_fewshot": shots, "continuation_delimiter": " ",
                      "random_baseline": chance})
    for name, rows in lines.items():
        paths.append(data / name)
        write_lines(paths[-1], rows)
    paths.append(data / "tiny_eval" / "index.json")
    with atomic_write(paths[-1]) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return paths, texts


def distinct_words(texts):
    words = set()
    for text in texts:
        words.update(re.findall("[a-z]+", text.lower()))
    return len(words)


def check(cfg):
    if not cfg.size_mb >= SMALLEST_MB:
        raise UserError(f"--size-mb is {cfg.size_mb:g}, but a corpus under {SMALLEST_MB:g} MB "
                        "would miss some facts; try: python edu/00_tiny_world.py --size-mb 1")
    if cfg.show < 0:
        raise UserError(f"--show is {cfg.show}, but it counts documents; "
                        "try: python edu/00_tiny_world.py --show 3")
    for name in ("num_chats", "num_problems", "num_eval"):
        if getattr(cfg, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(cfg, name)}, but each file needs at least one "
                            f"line; try: python edu/00_tiny_world.py {flag} 100")


def run(cfg):
    check(cfg)
    print(f"00 tiny world - cpu - {cfg.size_mb:.1f} MB - seed {cfg.seed}")
    if cfg.show:
        facts, sums = read_table(FACTS), read_table(SUMS)
        problems, _ = make_problems(cfg.seed + 1, 300, 50, lambda seed: Teller(seed, facts, sums))
        for text in documents(cfg.seed, 10 ** 12, problems, lambda seed: Teller(seed, facts, sums)):
            print("-" * 80 + "\n" + text)
            cfg.show -= 1
            if not cfg.show:
                break
        return 0
    start = time.perf_counter()
    try:
        paths, texts = write_world(cfg)
    except OSError as error:
        raise UserError(f"cannot write to {cfg.data_dir} ({error}), so there would be nothing to "
                        "train on; try: python edu/00_tiny_world.py --data-dir PATH") from error
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents in {time.perf_counter() - start:.1f} s")
    for path in paths:
        print(f"wrote {path} {path.stat().st_size / 1e6:.2f} MB")
    print(f"result: distinct words - -> {distinct_words(texts)} (n={size:.1f} MB)")
    print("next: python edu/01_download.py --base-url mirror")
    return 0


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
