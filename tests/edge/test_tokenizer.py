"""The runner's tokenizer against the library's own, on what is hard in text."""

from __future__ import annotations

import json
import random
import subprocess
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from diffpress.export.bundle.tokenizer import tokenizer_tables
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.portable.manifest import Tokens
from diffpress.zoo import zoo_folder

LENGTH = 16
PAD = "<|endoftext|>"
HARD = [
    "",
    " ",
    "a photo of a cat",
    "slice of pizza " * 9,
    "It's 1234's we'll I'VE 'd''s",
    "<|startoftext|> x<|endoftext|>!!",
    "<|STARTOFTEXT|>!! !<|startoftext|>",
    "İstanbul ΑΣ Straße ﬁ Ⅷ x²",
    "e\u0301 e\u0323\u0302 q\u0307\u0323 \u0344 \u0958 \u2126 \u212b \ufb1d \U0001d15e",
    "\u1112\u1161\u11ab 한글 각\u11a8 가\u11a8",
    "日本語テスト\u3000x\u00a0y\u0085z\u200b",
    "👩‍👩‍👧 🏳️‍🌈",
]


def tables_of(folder: Path, file: Path) -> Path:
    path = folder / "tables"
    path.write_bytes(tokenizer_tables(file, Tokens(file="", length=LENGTH, pad_token=PAD)))
    return path


def library_of(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_file() -> Path:
    return zoo_folder("emoji") / "tokenizer" / "tokenizer.json"


def random_texts(count: int) -> list[str]:
    """Of any characters, and of letters and marks that compose."""
    chance = random.Random(0)
    low = [chr(point) for point in range(1, 0x3400)]
    composing = [point for point in low if unicodedata.combining(point) or unicodedata.decomposition(point)]
    high = [chr(point) for point in (*range(0x4E00, 0xD800), *range(0xE000, 0x11000), *range(0x1D000, 0x20000))]
    return [
        "".join(chance.choice(chance.choice((low, composing, high))) for _ in range(chance.randrange(1, 9)))
        for _ in range(count)
    ]


def ids_of(printed: bytes) -> list[list[int]]:
    return [list(map(int, line.split())) for line in printed.splitlines()]


def test_ids_are_the_librarys(probe, tokenizer_file, tmp_path):
    texts = HARD + random_texts(3000)
    given = "".join(text + "\0" for text in texts).encode()
    found = ids_of(probe("tokens", tables_of(tmp_path, tokenizer_file), given=given))
    expected = [encoding.ids for encoding in library_of(tokenizer_file).encode_batch(texts)]
    assert len(found) == len(texts)
    assert [texts[i] for i, (left, right) in enumerate(zip(found, expected, strict=True)) if left != right] == []


def test_special_tokens_may_be_normalized(probe, tokenizer_file, tmp_path):
    """As CLIP's own file has them: found after lower case."""
    data = json.loads(tokenizer_file.read_text())
    for token in data["added_tokens"]:
        token["normalized"] = True
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(data))
    found = probe("tokens", tables_of(tmp_path, file), given="".join(text + "\0" for text in HARD).encode())
    expected = [encoding.ids for encoding in library_of(file).encode_batch(HARD)]
    assert ids_of(found) == expected


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "model"])
def test_another_kind_is_refused(tokenizer_file, tmp_path, part):
    data = json.loads(tokenizer_file.read_text())
    if part == "model":
        data["model"]["byte_fallback"] = True
    else:
        data[part] = None
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(data))
    with pytest.raises(UnsupportedModelError, match=f"its {part} is not CLIP's"):
        tables_of(tmp_path, file)


def test_a_text_that_is_no_utf8_ends_in_an_error(probe, tokenizer_file, tmp_path):
    tables = tables_of(tmp_path, tokenizer_file)
    for text in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
        with pytest.raises(subprocess.CalledProcessError) as raised:
            probe("tokens", tables, given=text + b"\0")
        assert b"the prompt is not text in UTF-8" in raised.value.stderr
