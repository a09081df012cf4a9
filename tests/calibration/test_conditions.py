"""What a pipeline is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from diffpress.calibration.conditions import Condition, check_text, conditions, kind
from diffpress.export.errors import RecipeError, UserError


class Prompted:
    """Called with a prompt."""

    def __call__(self, prompt: str, generator: Any = None) -> None: ...


class Labelled:
    """Called with class numbers."""

    labels: ClassVar[dict[str, int]] = {"two": 2, "seven": 7, "sieben": 7}
    transformer = SimpleNamespace(config=SimpleNamespace(num_embeds_ada_norm=10))

    def __call__(self, class_labels: list[int], generator: Any = None) -> None: ...


class Unasked:
    """Called with a batch size only."""

    def __call__(self, batch_size: int = 1) -> None: ...


def test_kind() -> None:
    assert [kind(pipeline) for pipeline in (Prompted(), Labelled(), Unasked())] == ["prompt", "label", "nothing"]


def test_texts_cycle_and_seeds_count_up() -> None:
    assert conditions(Prompted(), ["a", "b"], 3, seed=40) == [
        Condition("a", 40),
        Condition("b", 41),
        Condition("a", 42),
    ]


def test_builtin_prompts_for_recording_and_comparing_are_kept_apart() -> None:
    sets = [
        {condition.text for condition in conditions(Prompted(), "builtin", 1000, 0, purpose)}
        for purpose in ("record", "compare")
    ]
    assert all(len(texts) >= 16 and all(text.strip() for text in texts) for texts in sets)
    assert not sets[0] & sets[1]


def test_builtin_labels_are_those_the_pipeline_knows() -> None:
    assert [condition.text for condition in conditions(Labelled(), "builtin", 3, 0)] == ["2", "7", "2"]


def test_a_pipeline_that_takes_nothing_gets_nothing() -> None:
    assert conditions(Unasked(), "builtin", 2, 5) == [Condition("", 5), Condition("", 6)]


def test_a_file_gives_one_text_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("grüner Baum\n\n  red apple \n", encoding="utf-8")
    assert [condition.text for condition in conditions(Prompted(), str(file), 2, 0)] == ["grüner Baum", "red apple"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe\x00\x01", "no text file in UTF-8"), (None, "no file")],
)
def test_a_file_that_gives_nothing_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"record\.prompts: .*{message}"):
        conditions(Prompted(), str(file), 2, 0)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(RecipeError, match="the list is empty"):
        conditions(Prompted(), [], 2, 0)


@pytest.mark.parametrize("text", ["cat", "-1", "3.5", "²", "1 2", ""])
def test_labels_are_numbers(text: str) -> None:
    with pytest.raises(RecipeError, match="is no class number"):
        conditions(Labelled(), ["2", text], 2, 0)


def test_labels_are_classes_there_are() -> None:
    assert conditions(Labelled(), ["7"], 1, 0) == [Condition("7", 0)]
    with pytest.raises(RecipeError, match="no class 9: Labelled knows 2 to 7"):
        conditions(Labelled(), ["7", "9"], 2, 0)


def test_classes_without_names_are_all_that_the_model_embeds() -> None:
    class Nameless(Labelled):
        labels: ClassVar[dict[str, int]] = {}

    assert conditions(Nameless(), ["9"], 1, 0) == [Condition("9", 0)]
    with pytest.raises(RecipeError, match="no class 10: Nameless knows 0 to 9"):
        conditions(Nameless(), ["10"], 1, 0)


def test_a_text_for_a_pipeline_that_takes_none_is_refused() -> None:
    check_text(Unasked(), "")
    check_text(Prompted(), "anything")
    with pytest.raises(UserError, match="Unasked draws without prompt or label: leave 'cat' out"):
        check_text(Unasked(), "cat")
