"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
import warnings
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffpress.export.bundle.manifest import Target as BundleTarget
from diffpress.export.errors import UserError

from .cli_options import (
    ControlFile,
    Engine,
    Folder,
    Frames,
    Height,
    ImageFile,
    Json,
    MaskFile,
    Model,
    SamplingSet,
    Seed,
    Steps,
    Target,
    Width,
)
from .cli_zoo import zoo_app
from .console import (
    ERRORS,
    OUTPUT,
    print_comparison,
    print_estimate,
    print_json,
    print_poor,
    print_speed,
    print_table,
    say,
    stages,
)
from .explain import as_typed, explained
from .stopping import Stopped, stoppable

if TYPE_CHECKING:
    from PIL.Image import Image

    from .calling import Options

app = typer.Typer(
    help="Make a diffusers pipeline smaller and faster, prove it, and export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(zoo_app, name="zoo")


@app.command()
def compress(
    model: Model,
    recipe: Annotated[str, typer.Option(help="a YAML file or a preset, see `diffpress recipes`")],
    out: Annotated[Path, typer.Option(help="folder for the artifact")],
    seed: Annotated[int | None, typer.Option(min=0, help="overrides the recipe's seed")] = None,
    device: Annotated[str, typer.Option(help="torch device to work on")] = "cpu",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value over the recipe")] = None,
    only_estimate: Annotated[bool, typer.Option("--estimate", help="say what it would take, and stop")] = False,
    fresh: Annotated[bool, typer.Option(help="forget what an earlier, killed run has done")] = False,
    force: Annotated[bool, typer.Option(help="replace an --out that diffpress did not write")] = False,
    as_json: Json = False,
) -> None:
    """Make MODEL smaller by a recipe, measure the result, and save it with the proof beside it."""
    from diffpress.export.devices import check_device

    from .defaults import check_recipe_fits
    from .models import resolve
    from .recipe import load_recipe

    resolved = load_recipe(recipe, overrides or (), seed)
    source = resolve(model)
    check_device(device, "--device ")
    if only_estimate:
        from .estimate import estimate

        check_recipe_fits(source, resolved)
        values = estimate(source, resolved, device)
        if as_json:
            print_json(values)
        else:
            print_estimate(values)
        return
    from .flow import compress as run_flow
    from .pairs import COSTS
    from .poor import poor_of
    from .report.plan import summary

    with stages() as notify:
        artifact = run_flow(source, resolved, out, device=device, fresh=fresh, force=force, notify=notify)
    metrics = artifact.manifest.metrics
    poor = poor_of(artifact.manifest, metrics)
    if as_json:
        speed = {"speed": artifact.speed.data()} if artifact.speed else {}
        words = {"poor": poor and poor.data()}
        print_json({"out": str(out), **metrics, **words, **dict.fromkeys(COSTS), **artifact.cost, **speed})
    else:
        print_poor(poor)
        print_comparison(metrics, artifact.cost)
        say(summary(artifact.manifest.plan))
        print_speed(artifact.speed)
        say(f"{out} is ready; the proof is in {out / 'report.html'}")
    for sentence in artifact.missed:
        ERRORS.print(f"gate missed: {sentence}")
    if artifact.missed:
        raise typer.Exit(3)


@app.command()
def export(
    artifact: Annotated[str, typer.Argument(help="an artifact of `compress`, or any pipeline for a float export")],
    to: Annotated[Target, typer.Option(help="format")],
    out: Annotated[Path, typer.Option(help="folder for the export")],
    target: Annotated[str, typer.Option(help="GPUs to build engines for with --to tensorrt-rtx: sm_86,sm_89")] = "",
    force: Annotated[bool, typer.Option(help="replace an --out that diffpress did not write")] = False,
    as_json: Json = False,
) -> None:
    """Turn a whole pipeline into graphs that run without torch, checked against torch."""
    from .exporting import export_to
    from .models import resolve

    with stages() as notify:
        targets = [name for name in target.split(",") if name]
        summary = export_to(resolve(artifact), to.value, targets, out, notify, force)
    if as_json:
        print_json(summary)
    else:
        error = f"{summary['largest_error']:.2g}"
        say(f"{out} is ready ({summary['format']}): no graph differs from torch by more than {error}")
        for name, engine in summary.get("engines", {}).items():
            share = f"{engine['low_bits_share']:.0%}"
            say(f"{name}: {', '.join(engine['targets'])}; {share} of its computing layers in 8 bits or fewer")


@app.command()
def package(
    export: Annotated[Path, typer.Argument(help="a folder that `export --to onnx` wrote")],
    target: Annotated[BundleTarget, typer.Option(help="what it is to run on")],
    out: Annotated[Path, typer.Option(help="zip file to write")],
) -> None:
    """Put an export, a program that runs it without Python, and onnxruntime into one zip."""
    from .packaging import package_export

    say(package_export(export, target, out))


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="a pipeline, an artifact, an export or a bundle")],
    out: Annotated[Path, typer.Option(help="file to write: .png; .gif or .webp of a video, .wav of a sound")],
    prompt: Annotated[str | None, typer.Option(help="what to draw")] = None,
    label: Annotated[int | None, typer.Option(min=0, help="number of the class to draw")] = None,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="guidance scale; left out: the default")] = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    image: ImageFile = None,
    mask: MaskFile = None,
    control: ControlFile = None,
    overrides: SamplingSet = None,
    engine: Engine = None,
) -> None:
    """Make one image, video or sound."""
    from diffpress.export.outputs import check_output_file
    from diffpress.export.publishing import replacing

    from .hub import at_hand
    from .running import TORCH, Wanted, run_export, run_torch, wanted_engine
    from .writing import Made, check_ending, write_made

    if prompt is not None and label is not None:
        raise UserError("give --prompt or --label, not both.")
    if guidance is not None and not isfinite(guidance):
        raise UserError(f"--guidance {guidance} must be a finite number, such as 7.5.")
    options = _options(overrides, height=height, width=width, frames=frames, image=image, mask=mask, control=control)
    wanted = Wanted(None if prompt is None else as_typed(prompt), label, seed, steps, guidance, options)
    model = at_hand(model)
    chosen = wanted_engine(model, engine)
    if chosen != TORCH:
        check_output_file(out, [Path(model)])
        check_ending(out, "image")
        made: Made | Image = run_export(Path(model), chosen, wanted)
    else:
        from .models import resolve

        folder = resolve(model)
        check_output_file(out, [folder.path])
        made = run_torch(folder, wanted, out)
    with replacing(out) as file:
        write_made(file, made) if isinstance(made, Made) else made.save(file)
    size = made.words() if isinstance(made, Made) else f"{made.width}x{made.height}"
    say(f"{out}: {size}, seed {seed}, {chosen}")


def _options(overrides: list[str] | None, **flags: int | Path | None) -> Options:
    from .calling import Options
    from .recipe import sampling_overrides

    given = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return Options(given, sampling_overrides(overrides or ()))


@app.command()
def compare(
    reference: Annotated[str, typer.Argument(help="the original: a pipeline, an artifact or an export")],
    candidate: Annotated[str, typer.Argument(help="what is compared with it")],
    engine: Annotated[str, typer.Option(help="of exports: onnx, openvino or openvino:DEVICE")] = "onnx",
    count: Annotated[int, typer.Option(min=1, help="pairs of images")] = 16,
    steps: Steps = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    image: ImageFile = None,
    mask: MaskFile = None,
    control: ControlFile = None,
    overrides: SamplingSet = None,
    report: Annotated[Path | None, typer.Option(help="also write the images and figures to this HTML file")] = None,
    as_json: Json = False,
) -> None:
    """Sample two pipelines or exports with the same prompts and noise, and measure how they differ and what they cost."""
    from .compare import compare_by_name
    from .hub import at_hand
    from .pairs import COSTS

    options = _options(overrides, height=height, width=width, frames=frames, image=image, mask=mask, control=control)
    with stages() as notify:
        pair = at_hand(reference), at_hand(candidate)
        found = compare_by_name(*pair, engine, count, steps, seed, report, notify, options)
    if as_json:
        print_json({**found.metrics, **dict.fromkeys(COSTS), **found.cost, "speed": found.speed.data()})
    else:
        print_comparison(found.metrics, found.cost)
        print_speed(found.speed)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="a pipeline, an artifact or an export")],
    engine: Annotated[
        list[str] | None, typer.Option(help="of an export, may be given again; left out: all that are installed")
    ] = None,
    steps: Steps = None,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(min=1, help="images timed in each way")] = 5,
    device: Annotated[str | None, typer.Option(help="where torch runs it, such as cuda")] = None,
    as_json: Json = False,
) -> None:
    """Time an image here in each way that it can be made: packed or as loaded, in each engine."""
    from .benching import bench as bench_by_name
    from .hub import at_hand

    found = bench_by_name(at_hand(model), engine or (), steps, seed, repeats, device)
    if as_json:
        print_json({**found, "ways": [vars(own) for own in found["ways"]]})
    else:
        title = f"{model} on {found['machine']}, {found['steps'] or 'its own'} steps"
        print_table(title, ("way", "ms an image", "ratio"), [own.row() for own in found["ways"]], numbers=True)


@app.command()
def inspect(artifact: Folder, as_json: Json = False) -> None:
    """Show what an artifact, export or bundle holds: recipe, metrics, and the format of every module."""
    from .hub import at_hand
    from .inspecting import inspect_folder

    data = inspect_folder(Path(at_hand(artifact)))
    tables = data.pop("tables")
    if as_json:
        print_json(data)
        return
    for title, header, rows in tables:
        print_table(title, header, rows)


@app.command()
def verify(artifact: Folder) -> None:
    """Check every digest, read every tensor, apply every edit; for an export or bundle, run its self test."""
    from .hub import at_hand
    from .inspecting import verify_folder

    say(verify_folder(Path(at_hand(artifact))))


@app.command()
def push(
    artifact: Annotated[Path, typer.Argument(help="an artifact of `compress`, or an export")],
    name: Annotated[str, typer.Argument(help="the repository on the hub: ORG/NAME")],
    private: Annotated[bool, typer.Option(help="make the repository private, where it is made")] = False,
    as_json: Json = False,
) -> None:
    """Check an artifact or export, and put it on the hub with a model card; the login is huggingface_hub's."""
    from .pushing import push as push_folder

    where = push_folder(artifact, name, private)
    if as_json:
        print_json({"url": where})
    else:
        say(f"{artifact} is at {where}")


@app.command()
def recipes() -> None:
    """List the built-in recipes, and every key a recipe may have."""
    from .recipe import preset_text, presets, reference_rows

    for name in presets():
        OUTPUT.print(f"[bold]{name}[/bold]")
        OUTPUT.print(preset_text(name), markup=False)
    print_table("keys of a recipe", ("key", "default", "meaning"), reference_rows())


@app.command()
def methods() -> None:
    """List the methods that recipes can name."""
    from diffpress.compress.methods import METHODS

    rows = [(entry.stage, entry.name, " ".join((entry.options.__doc__ or "").split())) for entry in METHODS]
    print_table("methods", ("stage", "method", "what it does"), rows)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Run every kernel once on every backend of this machine and say what works here."""
    from .doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
    else:
        print_table("this machine", ("", "finding"), list(findings.items()))
    if any(str(value).startswith("fails") for value in findings.values()):
        raise typer.Exit(1)


QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "KINETO_LOG_LEVEL": "6",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What keeps the libraries underneath from talking over our own progress; a setting of the user's wins."""


def main() -> None:
    """Run the command line; a wrong input ends in one message and status 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Where the locale is ASCII, what it cannot write is a question mark and no error.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with stoppable(), explained():
            app()
    except UserError as error:
        ERRORS.print(f"diffpress: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except Stopped as stopped:
        ERRORS.print(f"diffpress: {stopped.words()}", markup=False, soft_wrap=True)
        sys.exit(stopped.status)


if __name__ == "__main__":
    main()
