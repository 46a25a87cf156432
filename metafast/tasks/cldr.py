"""Names in about 130 languages, from the CLDR data in Babel. A class is a language. Nothing is downloaded.

A language takes part if Babel knows at least :data:`NAMES_OF_A_KIND` territories, languages, scripts, currencies and
cities (the exemplar cities of time zones) in it. Left out are

- a name that is spelt alike in another of the languages, apart from capitals: "Honolulu" and "bopomofo" do not tell the
  language, and most such names were never translated;
- a name of fewer than :data:`SHORTEST` bytes ("ga", "UK");
- the languages in :data:`TWINS`, which inherit all their names from another.

Whole languages are held out, by a rule and not by choice, see :func:`split`: every language that is alone in its script,
and one in ten of the others for each of the two held-out sets, so that relatives of training languages and scripts that
no training language is written in are among them.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["EXAMPLE", "Split", "english_name", "names", "script", "select", "split", "translations"]

NAMES_OF_A_KIND = 40
SHORTEST = 3

TWINS = frozenset({"ht", "no"})  # Haitian Creole inherits from French; Norwegian is Norwegian Bokmål.

EXAMPLE = ("ka", "hy", "eo", "cy", "br")
"""Georgian, Armenian, Esperanto, Welsh and Breton, which the documentation shows an adaptation to; held out for testing."""


class Split(NamedTuple):
    """Codes of whole languages, sorted: for training, for choosing hyperparameters, for the final evaluation alone."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@functools.cache
def names() -> Mapping[str, tuple[str, ...]]:
    """The names of every language that takes part.

    Returns:
        The names of each language by its code (``"ka"``), each name once, both sorted. The same Babel gives the same
        mapping. It is computed at the first call (about two seconds) and read-only.
    """
    from babel import localedata

    languages = {}
    for code in sorted(localedata.locale_identifiers()):
        if "_" not in code and code not in TWINS:
            kinds = _names_by_kind(code)
            if min(len(kind) for kind in kinds) >= NAMES_OF_A_KIND:
                languages[code] = {name for kind in kinds for name in kind.values() if len(name.encode()) >= SHORTEST}
    languages_of = Counter(name for of_language in languages.values() for name in {n.casefold() for n in of_language})
    return MappingProxyType(
        {code: tuple(sorted(n for n in found if languages_of[n.casefold()] == 1)) for code, found in languages.items()}
    )


@functools.cache
def split() -> Split:
    """The languages for training, for choosing hyperparameters and for testing.

    Languages are sorted by script and code. Of the languages that are alone in their script, the first, third, … are for
    testing, the others for validation. Of the languages that share a script, the third, thirteenth, … are for testing, the
    eighth, eighteenth, … for validation and the rest for training. :data:`EXAMPLE` is for testing. Systematic sampling over
    the sorted list gives every script its share.
    """
    scripts = {code: script(of_language) for code, of_language in names().items()}
    languages_in = Counter(scripts.values())
    order = sorted(scripts, key=lambda code: (scripts[code], code))
    alone = [code for code in order if languages_in[scripts[code]] == 1]
    shared = [code for code in order if languages_in[scripts[code]] > 1]
    test = {*EXAMPLE, *alone[::2], *shared[2::10]}
    validation = {*alone[1::2], *shared[7::10]} - test
    return Split(
        training=tuple(sorted({*scripts} - test - validation)),
        validation=tuple(sorted(validation)),
        test=tuple(sorted(test)),
    )


def select(codes: Sequence[str], argument: str = "codes") -> dict[str, tuple[str, ...]]:
    """The names of some languages, in the order asked for.

    Args:
        codes: codes of languages of :func:`names`, no code twice.
        argument: the name of ``codes`` in error messages.

    Raises:
        ValueError: a code is unknown or comes twice.
    """
    unknown = [code for code in codes if code not in names()]
    if unknown:
        raise ValueError(f"{argument}: expected codes among {', '.join(names())}; got {', '.join(map(repr, unknown))}")
    if len(set(codes)) < len(codes):
        raise ValueError(f"{argument}: expected no language twice, got {', '.join(codes)}")
    return {code: names()[code] for code in codes}


def english_name(code: str) -> str:
    """The English name of the language, such as ``"Georgian"`` for ``"ka"``; the code where Babel has no name for it."""
    from babel import Locale

    return Locale("en").languages.get(code, code)


def script(texts: Iterable[str]) -> str:
    """The script of most letters of ``texts``, as their Unicode names have it, such as ``"LATIN"`` or ``"GEORGIAN"``.

    Raises:
        ValueError: there is no letter.
    """
    counts = Counter(unicodedata.name(char, "?").split()[0] for text in texts for char in text if char.isalpha())
    if not counts:
        raise ValueError("texts: expected at least one letter, got none")
    return counts.most_common(1)[0][0]


def translations(code: str) -> list[tuple[str, str]]:
    """English names and those of a language, which differ from them apart from capitals, sorted; each English name once.

    Args:
        code: the code of a language, such as ``"ka"``.

    Raises:
        ValueError: the code is unknown.
    """
    select([code])
    found: dict[str, str] = {}
    for english, of_language in zip(_names_by_kind("en"), _names_by_kind(code), strict=True):
        for key, name in of_language.items():
            if key in english and name.casefold() != english[key].casefold():
                found.setdefault(english[key], name)
    return sorted(found.items())


def _names_by_kind(code: str) -> list[dict[str, str]]:
    """Names by a key that is the same in all languages, for each kind."""
    from babel import Locale

    locale = Locale.parse(code)
    cities = {key: zone["city"] for key, zone in locale.time_zones.items() if "city" in zone}
    kinds = [locale.territories, locale.languages, locale.scripts, locale.currencies, cities]
    return [{key: name for key, name in kind.items() if isinstance(name, str)} for kind in kinds]
