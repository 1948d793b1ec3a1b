"""Which SQL is a plain read, with the same effect and result by itself as inside a transaction."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_EFFECTS: Final = re.compile(
    r"""/\* | --  # a comment may hide a call from the pattern below
    | \b(?:
        for  # UPDATE, SHARE, ...
        | into | insert | update | delete | merge
        | current_\w+ | localtime\w*  # the time at which the transaction began
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_BEFORE_PARENTHESIS: Final = re.compile(r'(?:(?<![\w.$"])([\w.$"]++)\s*+)?\(')  # in linear time

# Whatever else stands before a parenthesis may be a function with effects: of PostgreSQL (nextval, pg_advisory_lock,
# set_config, now), of an extension or of the user.
_KEYWORDS: Final = """
    all and any array as between by case cast distinct else except exists filter from having in intersect is join
    lateral like ilike limit not of offset on or over over row select some then union using values when where with
"""
_TYPES: Final = "bit char character varchar decimal numeric time timestamp interval varying"
_FUNCTIONS: Final = """
    count sum avg min max bool_and bool_or every array_agg string_agg json_agg jsonb_agg
    json_object_agg jsonb_object_agg
    row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value nth_value
    coalesce nullif greatest least abs ceil ceiling floor round trunc mod power sqrt sign
    lower upper initcap length char_length character_length octet_length substring substr left right position strpos
    trim btrim ltrim rtrim lpad rpad replace reverse concat concat_ws split_part md5
    extract date_part date_trunc make_date to_char to_date to_number
    array_length array_position cardinality unnest array_to_string string_to_array
    json_build_object jsonb_build_object json_build_array jsonb_build_array jsonb_array_length json_array_length
    jsonb_extract_path jsonb_extract_path_text to_json to_jsonb row_to_json
    to_tsvector to_tsquery plainto_tsquery phraseto_tsquery websearch_to_tsquery ts_rank ts_rank_cd
"""
_HARMLESS: Final = frozenset(f"{_KEYWORDS} {_TYPES} {_FUNCTIONS}".split()) | {""}


_LONGEST_CACHED: Final = 65_536
"""Characters up to which the answer for a SELECT is cached: longer ones have lists of values, and seldom recur."""


def is_plain_read(select: str) -> bool:
    """Whether a SELECT takes no locks, has no effects, and does not show when the transaction began.

    False when in doubt.

    Parameters:
        select: The text of a SELECT as SQLAlchemy compiled it.
    """
    return _is_harmless_cached(select) if len(select) <= _LONGEST_CACHED else _is_harmless(select)


def _is_harmless(select: str) -> bool:
    if _EFFECTS.search(select):
        return False
    return all(name.lower() in _HARMLESS for name in _BEFORE_PARENTHESIS.findall(select))


_is_harmless_cached = lru_cache(maxsize=1024)(_is_harmless)
