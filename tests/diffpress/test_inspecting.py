"""What `inspect` shows of what is in a manifest."""

import pytest

from diffpress.export.edits import Attach
from diffpress.export.manifest import Manifest, PlanRow, write_manifest
from diffpress.export.runtime import StepPlan, Unit
from diffpress.inspecting import inspect_folder


@pytest.fixture
def planned(tmp_path):
    """A folder with the manifest of an artifact that has a step plan."""
    units = [Unit(modules=(name,), adds_to=("x",), channels=(8,)) for name in ("down", "mid", "up")]
    settings = StepPlan(units=units, patterns=("###", ".-."), steps=(0, 1, 0, 0, 1))
    edit = Attach(component="unet", module="step_plan", settings=settings)
    row = PlanRow(
        component="unet", module="step_plan", shape=(), format=edit.words(), source_bytes=0, bytes=12, reason="because"
    )
    manifest = Manifest(
        fingerprint="f",
        versions={},
        recipe={},
        source={"model": "x"},
        timesteps=[],
        edits=[edit],
        plan=[row],
        metrics={},
        files={},
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def test_a_step_plan_is_shown_by_its_patterns(planned):
    title, header, rows = inspect_folder(planned)["tables"][-1]
    assert title == "step plan, 2 patterns of 3 units"
    assert header == ("units computed", "units inherited", "units not needed", "at steps")
    assert rows == [("3", "0", "0", "1, 3-4"), ("0", "2", "1", "2, 5")]


def test_the_plan_has_a_row_for_what_was_added(planned, diffpress):
    _, _, rows = inspect_folder(planned)["tables"][1]
    assert rows == [("step_plan", "", "step plan, 2 patterns of 3 units", "12", "because")]
    assert "units not needed" in diffpress("inspect", planned).output
