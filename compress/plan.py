"""The plan: what became of every module of a component, and what it weighs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from diffpress.export.edits import Edit, store_edits
from diffpress.export.manifest import PlanRow
from diffpress.export.source import Form, forms_of

from .changes import Changes, Note


def plan_rows(component: str, forms: Mapping[str, Form], changes: Changes) -> list[PlanRow]:
    """One row a weighted module, of the source's `forms`: its format, bytes before and after, and the reason for both.

    After them one row for everything else that a stage has said something of, such as attention or a part that it added.
    """
    edits: dict[str, list[Edit]] = {}
    for edit in changes.edits:
        edits.setdefault(edit.module, []).append(edit)
    before = _by_module(forms)
    stored = store_edits(forms, changes.edits, forms_of(changes.tensors))
    after = _by_module(stored, before.keys() | changes.notes.keys())
    rows = [
        _row(component, module, own, after.get(module, {}), edits.get(module, []), changes.notes.get(module, Note()))
        for module, own in before.items()
    ]
    return rows + [
        PlanRow(
            component=component,
            module=module,
            shape=note.shape,
            format=note.format,
            source_bytes=0,
            bytes=_bytes(after.get(module, {})),
            reason=note.reason,
            error=note.error,
        )
        for module, note in changes.notes.items()
        if module not in before and note.format is not None
    ]


def _row(
    component: str,
    module: str,
    before: Mapping[str, Form],
    after: Mapping[str, Form],
    edits: Sequence[Edit],
    note: Note,
) -> PlanRow:
    first = before.get(f"{module}.weight", next(iter(before.values())))
    words = [edit.words() for edit in edits]
    reasons = [*(edit.left(first.shape) for edit in edits), note.reason]
    return PlanRow(
        component=component,
        module=module,
        shape=first.shape,
        format=note.format or ", ".join(filter(None, words)) or str(first.dtype)[6:],
        source_bytes=_bytes(before),
        bytes=_bytes(after),
        reason="; ".join(filter(None, reasons)),
        error=note.error,
    )


def _by_module(forms: Mapping[str, Form], known: Collection[str] = ()) -> dict[str, dict[str, Form]]:
    """The tensors of each module; a parameter of the model itself stands for its own.

    What an edit made of a module, or put into a part of its own, belongs to the nearest that is `known`.
    """
    modules: dict[str, dict[str, Form]] = {}
    for name, form in forms.items():
        module = name.rpartition(".")[0] or name
        outer = module
        while outer and outer not in known:
            outer = outer.rpartition(".")[0]
        modules.setdefault(outer or module, {})[name] = form
    return modules


def _bytes(forms: Mapping[str, Form]) -> int:
    return sum(form.size_bytes for form in forms.values())
