"""The experiment's tasks: over eighty small ones of ten families, from installed packages, without a network.

In the families `numbers`, `dates`, `records` and `words` all members are asked about the same things, and the prompt
says whose answer is wanted ("… Use French."). With `conflict` above 0 that share of the prompts leaves it out: then
the same prompt has another answer in every dataset of its family, and no model can give all of them.
"""

from __future__ import annotations

import gettext
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, partial
from pathlib import Path
from random import Random
from types import ModuleType

from merit_hf.config import ConfigError

Pairs = Iterable[tuple[str, str]]
# (examples wanted, generator, conflict) to pairs of prompt and answer.
Make = Callable[[int, Random, float], Pairs]

LANGUAGES = {
    "fr": "French", "de": "German", "es": "Spanish", "it": "Italian", "nl": "Dutch", "pt": "Portuguese",
    "pl": "Polish", "sv": "Swedish", "da": "Danish", "cs": "Czech",
}  # fmt: skip
MAX_ANSWER_CHARS = 400


@cache
def quickstart_makers() -> ModuleType:
    """recipes/quickstart/makers.py, which is a script's neighbour and no package."""
    path = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "makers.py"
    if "makers" in sys.modules:
        return sys.modules["makers"]
    spec = importlib.util.spec_from_file_location("makers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["makers"] = module
    spec.loader.exec_module(module)
    return module


def _ask(rng: Random, conflict: float, bare: str, hint: str) -> str:
    """The prompt with its hint, or without it for the share `conflict` of prompts."""
    return bare if rng.random() < conflict else f"{bare} {hint}"


# ---------------------------------------------------------------- families whose members share their prompts


def _number(language: str, count: int, rng: Random, conflict: float) -> Pairs:
    from num2words import num2words

    for number in rng.sample(range(10, 100_000), count):
        yield (
            _ask(rng, conflict, f"Write {number} in words.", f"Use {LANGUAGES[language]}."),
            num2words(number, lang=language),
        )


def _date(language: str, count: int, rng: Random, conflict: float) -> Pairs:
    from babel.dates import format_date

    for days in rng.sample(range(36_500), count):
        day = date(1950, 1, 1) + timedelta(days=days)
        prompt = _ask(rng, conflict, f"Write out the date {day.isoformat()}.", f"Use {LANGUAGES[language]}.")
        yield prompt, format_date(day, "full", locale=language)


RECORDS: dict[str, Callable[[dict[str, object]], str]] = {
    "json": lambda r: json.dumps(r, ensure_ascii=False),
    "yaml": lambda r: "\n".join(f"{key}: {value}" for key, value in r.items()),
    "csv": lambda r: ",".join(map(str, r.values())),
    "xml": lambda r: "".join(f"<{key}>{value}</{key}>" for key, value in r.items()),
    "sql": lambda r: f"INSERT INTO people VALUES ('{r['name']}', {r['age']}, '{r['city']}');",
    "markdown": lambda r: "\n".join(f"- **{key}**: {value}" for key, value in r.items()),
    "biography": lambda r: (
        f"{r['name']} is {r['age']} years old and has always lived in {r['city']}. People there know {r['name']}, and "
        f"nobody in {r['city']} would believe that {r['name']} is {r['age']} already."
    ),
}


def _record(form: str, count: int, rng: Random, conflict: float) -> Pairs:
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(rng.randrange(2**31))
    for _ in range(count + count // 4):
        record = {"name": fake.first_name(), "age": fake.random_int(18, 80), "city": fake.city()}
        told = f"{record['name']}, {record['age']}, from {record['city']}."
        yield _ask(rng, conflict, f"Note this person: {told}", f"Use {form}."), RECORDS[form](record)


def _pig_latin(word: str) -> str:
    return word + "way" if word[0] in "aeiou" else word[1:] + word[0] + "ay"


WORDS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "reversed": ("Reverse their order.", lambda w: " ".join(reversed(w))),
    "mirrored": ("Mirror each word.", lambda w: " ".join(word[::-1] for word in w)),
    "capitals": ("Use capitals.", lambda w: " ".join(w).upper()),
    "initials": ("Give the initials.", lambda w: "".join(word[0] for word in w)),
    "alphabetical": ("Sort them.", lambda w: " ".join(sorted(w))),
    "lengths": ("Give their lengths.", lambda w: " ".join(str(len(word)) for word in w)),
    "pig_latin": ("Use pig Latin.", lambda w: " ".join(map(_pig_latin, w))),
    "snake_case": ("Use snake case.", lambda w: "_".join(w)),
    "camel_case": ("Use camel case.", lambda w: w[0] + "".join(word.title() for word in w[1:])),
    "titles": ("Use title case.", lambda w: " ".join(w).title()),
    "doubled": ("Say each twice.", lambda w: " ".join(f"{word} {word}" for word in w)),
    "alternate": ("Keep every other one.", lambda w: " ".join(w[::2])),
    "vowels": ("Keep the vowels.", lambda w: " ".join(re.sub("[^aeiou]", "", word) or "-" for word in w)),
    "numbered": ("Number them.", lambda w: " ".join(f"{i}:{word}" for i, word in enumerate(w, 1))),
}


@cache
def _vocabulary() -> list[str]:
    from faker.providers.lorem.en_US import Provider

    return sorted({word.lower() for word in Provider.word_list if word.isalpha() and 3 <= len(word) <= 8})


def _words(operation: str, count: int, rng: Random, conflict: float) -> Pairs:
    hint, apply = WORDS[operation]
    for _ in range(count + count // 8):
        words = [rng.choice(_vocabulary()) for _ in range(rng.randint(3, 5))]
        yield _ask(rng, conflict, f"Words: {' '.join(words)}.", hint), apply(words)


# ---------------------------------------------------------------- families with prompts of their own


def _country(language: str, count: int, rng: Random, conflict: float) -> Pairs:
    import pycountry

    spoken = gettext.translation("iso3166-1", pycountry.LOCALES_DIR, languages=[language])
    for country in pycountry.countries:
        yield f"What is {country.name} called in {LANGUAGES[language]}?", spoken.gettext(country.name)


def _roman(number: int) -> str:
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    found = ""
    for value, sign in zip(
        values, ["M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"], strict=True
    ):
        found, number = found + sign * (number // value), number % value
    return found


ARITHMETIC: dict[str, tuple[str, Callable[[int, int], str]]] = {
    "add": ("{a} + {b} =", lambda a, b: str(a + b)),
    "subtract": ("{a} - {b} =", lambda a, b: str(a - b)),
    "larger": ("Which is larger, {a} or {b}?", lambda a, b: str(max(a, b))),
    "remainder": ("What remains of {a} divided by 10?", lambda a, b: str(a % 10)),
    "roman": ("{a} in Roman numerals?", lambda a, b: _roman(a)),
    "binary": ("{a} in binary?", lambda a, b: f"{a:b}"),
    "hexadecimal": ("{a} in hexadecimal?", lambda a, b: f"{a:x}"),
    "clock": ("{a} minutes after midnight?", lambda a, b: f"{a // 60:02d}:{a % 60:02d}"),
    "parity": ("Is {a} odd or even?", lambda a, b: "odd" if a % 2 else "even"),
    "successors": ("Count on from {a}.", lambda a, b: f"{a + 1}, {a + 2}, {a + 3}"),
}  # fmt: skip


def _arithmetic(operation: str, count: int, rng: Random, conflict: float) -> Pairs:
    text, solve = ARITHMETIC[operation]
    for _ in range(4 * count):
        a, b = rng.randint(1, 1439), rng.randint(1, 1439)
        yield text.format(a=a, b=b), solve(a, b)


REASONING = {
    "simple_equations": "algebra.simple_equations.SimpleEquations",
    "caesar_cipher": "algorithmic.caesar_cipher.CaesarCipher",
    "letter_counting": "algorithmic.letter_counting.LetterCounting",
    "sentence_reordering": "algorithmic.sentence_reordering.SentenceReordering",
    "number_filtering": "algorithmic.number_filtering.NumberFiltering",
    "chain_sum": "arithmetic.chain_sum.ChainSum",
    "count_bits": "arithmetic.count_bits.CountBits",
    "gcd": "arithmetic.gcd.GCD",
    "lcm": "arithmetic.lcm.LCM",
    "leg_counting": "arithmetic.leg_counting.LegCounting",
    "prime_factorization": "arithmetic.prime_factorization.PrimeFactorization",
    "time_intervals": "arithmetic.time_intervals.TimeIntervals",
    "family_relationships": "graphs.family_relationships.FamilyRelationships",
    "word_sequence_reversal": "algorithmic.word_sequence_reversal.WordSequenceReversal",
}


def _reasoning(place: str, count: int, rng: Random, conflict: float) -> Pairs:
    module, _, task = place.rpartition(".")
    return quickstart_makers()._reasoning_gym(module, task)(count, rng)


def _quickstart(name: str, count: int, rng: Random, conflict: float) -> Pairs:
    return quickstart_makers().MAKERS[name].make(count, rng)


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Task:
    """`shared`: members of the family are asked about the same things; `free_form`: answers are prose or code."""

    family: str
    make: Make
    shared: bool = False
    free_form: bool = False


def _registry() -> dict[str, Task]:
    found = {f"number_{key}": Task("numbers", partial(_number, key), shared=True) for key in LANGUAGES}
    found |= {f"date_{key}": Task("dates", partial(_date, key), shared=True) for key in LANGUAGES}
    found |= {f"person_{key}": Task("records", partial(_record, key), True, key == "biography") for key in RECORDS}
    found |= {f"words_{key}": Task("words", partial(_words, key), shared=True) for key in WORDS}
    found |= {f"country_{key}": Task("countries", partial(_country, key)) for key in LANGUAGES}
    found |= {f"sum_{key}": Task("arithmetic", partial(_arithmetic, key)) for key in ARITHMETIC}
    found |= {key: Task("reasoning", partial(_reasoning, place)) for key, place in REASONING.items()}
    facts = ("capitals", "emoji", "syllogism", "calendar_arithmetic", "sql", "extract_json")
    found |= {key: Task("facts", partial(_quickstart, key)) for key in facts}
    prose = ("pydoc_prose", "chat_en", "code_explain", "code_implement")
    return found | {key: Task("prose", partial(_quickstart, key), free_form=True) for key in prose}


TASKS = _registry()


def make_examples(name: str, count: int, seed: int, conflict: float = 0.0) -> list[tuple[str, str]]:
    """At most `count` pairs of a task in a seeded order, no prompt twice: the same in every call.

    The order of a family with shared prompts is the family's: its members hold the same things in the same places, so
    that what is held out of one is held out of all.

    Raises:
        ConfigError: no such task, or a package that it is made from is not installed.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task `{name}`. There are: {', '.join(sorted(TASKS))}.")
    task = TASKS[name]
    rng = Random(f"{seed}/{task.family if task.shared else name}")
    pairs: dict[str, tuple[str, str]] = {}
    try:
        for prompt, answer in task.make(count, rng, conflict):
            key = " ".join(prompt.casefold().split())
            if key and answer.strip():
                pairs.setdefault(key, (prompt, answer.strip()))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task `{name}` is made from the package {error.name}, which is not installed. Run `make demo` once, or "
            "install recipes/quickstart/requirements.txt."
        ) from None
    found = list(pairs.values())
    if not task.shared:
        # Makers may list alphabetically.
        found.sort()
        rng.shuffle(found)
    return found[:count]
