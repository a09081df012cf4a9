"""CLIP's tokenizer as tables for the runner, which knows neither JSON of this size nor Unicode."""

from __future__ import annotations

import json
import re
import struct
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UnsupportedModelError
from ..extras import import_extra
from ..portable.manifest import Tokens

MARK = b"DPTOKEN1"
NONE = 0xFFFFFFFF
POINTS = [chr(point) for point in (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))]
"""The planes that have characters; all others are private or empty."""
HANGUL = range(0xAC00, 0xAC00 + 11172)
"""Syllables, which the runner composes by arithmetic."""
CLASSES = (r"\p{L}", r"\p{N}", r"\s")
"""1, 2 and 3 in the tables; all else is 0."""
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP's pattern ends in; special tokens may stand before it."""
NORMALIZERS = [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
]


def tokenizer_tables(file: Path, tokens: Tokens) -> bytes:
    """The tables of `tokenizer.json`, in the order in which edge/tokenizer.cpp reads them.

    Raises UnsupportedModelError where it is not of CLIP's form.
    """
    data = json.loads(file.read_text(encoding="utf-8"))
    literals = _literals(file, data)
    library = import_extra("tokenizers")
    tokenizer = library.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = data["model"]["vocab"]
    before, after = _around(tokenizer)
    unknown = data["model"]["unk_token"]
    added = [token for token in data["added_tokens"] if token["content"]]
    return b"".join(
        [
            MARK,
            _words(
                [
                    tokens.length,
                    tokenizer.token_to_id(tokens.pad_token),
                    NONE if unknown is None else vocabulary[unknown],
                ]
            ),
            _list(before),
            _list(after),
            *(_words([vocabulary.get(symbol + end, NONE) for symbol in _byte_symbols()]) for end in ("", "</w>")),
            _literal_tables((token["content"], [token["id"]]) for token in added if not token["normalized"]),
            _literal_tables(
                (tokenizer.normalizer.normalize_str(token["content"]), [token["id"]])
                for token in added
                if token["normalized"]
            ),
            _literal_tables((literal, _ids_of_piece(tokenizer, literal)) for literal in literals),
            _table(_merges(data["model"])),
            _unicode_tables(),
        ]
    )


def _literals(file: Path, data: dict[str, Any]) -> list[str]:
    """The special tokens in the pattern of pieces. Raises UnsupportedModelError where anything is not CLIP's."""
    model, pieces = data["model"], (data["pre_tokenizer"] or {}).get("pretokenizers", [{}, {}])
    pattern = pieces[0].get("pattern", {}).get("Regex", "")
    first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    second = {"type": "ByteLevel", "add_prefix_space": False}
    said = {"type": "BPE", "end_of_word_suffix": "</w>", "fuse_unk": False}
    unsaid = ("dropout", "continuing_subword_prefix", "byte_fallback", "ignore_merges")
    literals = [re.sub(r"\\(.)", r"\1", literal) for literal in pattern.removesuffix(PIECES).split(r"\|>|") if literal]
    literals = [literal + "|>" for literal in literals]
    checks = {
        "normalizer": (data["normalizer"] or {}).get("normalizers") == NORMALIZERS,
        "pre_tokenizer": pattern.endswith(PIECES)
        and "|".join(map(re.escape, literals)) + "|" * bool(literals) + PIECES == pattern
        and len(pieces) == 2
        and pieces[0] == first
        and second.items() <= pieces[1].items(),
        "model": said.items() <= model.items() and not any(model.get(name) for name in unsaid),
        "added_tokens": not any(
            token[name] for token in data["added_tokens"] for name in ("lstrip", "rstrip", "single_word")
        ),
    }
    for name, known in checks.items():
        if not known:
            raise UnsupportedModelError(
                f"{file}: its {name} is not CLIP's, the only kind of tokenizer that bundles know. Run the export itself: "
                "diffpress run EXPORT."
            )
    return literals


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that stand before and after those of every text."""
    ids = tokenizer.encode("a").ids
    (own,) = tokenizer.encode("a", add_special_tokens=False).ids[:1] or [None]
    place = ids.index(own) if own in ids else len(ids) // 2
    return ids[:place], ids[place + len(tokenizer.encode("a", add_special_tokens=False).ids) :]


def _byte_symbols() -> list[str]:
    """The character that stands for each byte, as byte level tokenizers write them (A. Radford et al., GPT-2, 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def _ids_of_piece(tokenizer: Any, piece: str) -> list[int]:
    """Of a piece that the pattern keeps whole."""
    found = tokenizer.pre_tokenizer.pre_tokenize_str(piece)
    return [token.id for part, _ in found for token in tokenizer.model.tokenize(part)]


def _merges(model: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Pairs of ids and what they become, the lowest rank first."""
    vocabulary = model["vocab"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return [(vocabulary[first], vocabulary[second], vocabulary[first + second]) for first, second in pairs]


def _ranges(library: Any) -> list[tuple[int, int, int]]:
    """First and last code point of every run of one class, by the library's own patterns."""
    text, found = "".join(POINTS), []
    for number, pattern in enumerate(CLASSES, 1):
        split = library.pre_tokenizers.Split(library.Regex(f"{pattern}+"), "removed", invert=True)
        found += [(ord(run[0]), ord(run[-1]), number) for run, _ in split.pre_tokenize_str(text)]
    return sorted(found)


@cache
def _unicode_tables() -> bytes:
    """Classes, lower case, decompositions, the order of marks, and pairs that compose, by the library's own normalizers."""
    library = import_extra("tokenizers")
    lower, apart, whole = (getattr(library.normalizers, name)().normalize_str for name in ("Lowercase", "NFD", "NFC"))
    lowered = [(point, lower(point)) for point in _changed_by(lower)]
    decomposed = [(point, apart(point)) for point in _changed_by(apart) if ord(point) not in HANGUL]
    marks = [(ord(point), unicodedata.combining(point)) for point in POINTS if unicodedata.combining(point)]
    composed = [(whole(parts[:-1]), parts[-1], point) for point, parts in decomposed if whole(point) == point]
    pairs = [(ord(first), ord(second), ord(point)) for first, second, point in composed if len(first) == 1]
    return b"".join([_table(_ranges(library)), _strings(lowered), _strings(decomposed), _table(marks), _table(pairs)])


def _changed_by(normalize: Any) -> list[str]:
    """Code points that it changes: those in whose block it changes anything are asked one by one."""
    blocks = [POINTS[start : start + 256] for start in range(0, len(POINTS), 256)]
    changed = [block for block in blocks if normalize("\n".join(block)) != "\n".join(block)]
    return [point for block in changed for point in block if normalize(point) != point]


def _words(values: Iterable[int]) -> bytes:
    values = list(values)
    return struct.pack(f"<{len(values)}I", *values)


def _list(values: Sequence[int]) -> bytes:
    return _words([len(values), *values])


def _table(rows: Sequence[tuple[int, ...]]) -> bytes:
    return _words([len(rows), *(value for row in rows for value in row)])


def _points(text: str) -> bytes:
    return _list([ord(point) for point in text])


def _strings(rows: Sequence[tuple[str, str]]) -> bytes:
    return _words([len(rows)]) + b"".join(_words([ord(point)]) + _points(text) for point, text in rows)


def _literal_tables(literals: Iterable[tuple[str, list[int]]]) -> bytes:
    rows = list(literals)
    return _words([len(rows)]) + b"".join(_points(text) + _list(ids) for text, ids in rows)
