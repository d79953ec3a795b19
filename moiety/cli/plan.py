"""`moiety plan`: what a model takes and how fast it will be, before it runs; and what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, print_json, talk
from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.plan.options import PlanOptions
from moiety.plan.replay import ReplayOptions

__all__ = ["app"]

app = command(
    "moiety plan", "Plan a model's memory, speed and cost from its config alone, or measure this machine."
)


@app.default
def plan(
    name: str = "",
    /,
    *,
    wanted: Annotated[PlanOptions, Parameter(name="*")] = PlanOptions(),
    measure: Annotated[bool, Parameter(negative="", help="measure this machine into its profile")] = False,
    quick: Annotated[bool, Parameter(negative="", help="measure less, in a quarter of a minute")] = False,
    disk: Annotated[str, Parameter(help="folder on the disk to measure; '' is the one you are in")] = "",
    profile: Annotated[str, Parameter(help="file of the profile; '' is that of this machine")] = "",
    replayed: Annotated[ReplayOptions, Parameter(name="*")] = ReplayOptions(),
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
    plot: Annotated[str, Parameter(help="write a page with the plan's curves to this .html")] = "",
) -> int:
    """Nothing is run and no weight is read. `docs/planning.md` says where every figure comes from.

    Parameters
    ----------
    name
        A name that `moiety models` lists, a folder or config.json, a .gguf file, or owner/name on the hub.
    """
    from moiety.plan.profile import default_path

    place = Path(profile) if profile else default_path()
    if measure:
        if name or plot:
            raise UsageError(
                "--measure measures this machine: no model and no plot", hint="moiety plan --measure"
            )
        return _measure(place, Path(disk or "."), quick, json)
    if replayed.trace:
        return _replay(name, replayed, wanted, _known(wanted, profile), json=json, plot=plot)
    if not name or quick or disk:
        raise UsageError(
            "a model to plan for is wanted" if not name else "--quick and --disk go with --measure",
            hint="moiety plan mixtral-8x7b --memory 24GiB, or moiety plan --measure",
        )
    from moiety.cli import planned
    from moiety.cli.named import config_named, stored_named
    from moiety.plan.plan import make_plan

    known = _known(wanted, profile)
    config = config_named(name)
    other = config_named(wanted.against) if wanted.against else None
    stored = None if wanted.format else stored_named(name, config)
    found = make_plan(name, config, wanted, profile=known, stored=stored, other=other)
    if plot:
        from moiety.observe.plan_page import write_plan_page

        write_plan_page(Path(plot), found)
        talk().print(f"{plot} is written")
    if wanted.ranks > 1 and isinstance(config, ModelConfig):
        from moiety.cli import placed

        return placed.after(found, config, stored, wanted, known, json=json)
    if json:
        print_json(found)
    else:
        planned.show(found, wanted)
    return 0


def _known(wanted: PlanOptions, profile: str) -> Any:
    """This machine's figures, if it is what is planned for and was measured."""
    from moiety.plan.profile import default_path, read_profile

    place = Path(profile) if profile else default_path()
    return read_profile(place) if wanted.device == "cpu" and (profile or place.is_file()) else None


def _replay(
    name: str, options: ReplayOptions, wanted: PlanOptions, profile: Any, *, json: bool, plot: str
) -> int:
    """Of a model that is named, the sizes count instead of the trace's; over ranks, its experts are placed."""
    from moiety.cli import placed, replayed
    from moiety.cli.named import config_named, stored_named
    from moiety.plan.weights import stored_as

    if wanted.ranks > 1:
        return placed.run(name, options, wanted, profile, json=json, plot=plot)
    stored = None
    if name:
        config = config_named(name)
        stored = None if wanted.format else stored_named(name, config)
        if stored is None and isinstance(config, ModelConfig):
            stored = stored_as(config, wanted.format or "int4-g32")
    return replayed.run(options, wanted, profile=profile, stored=stored, json=json, plot=plot)


def _measure(place: Path, folder: Path, quick: bool, json: bool) -> int:
    from moiety.cli import planned
    from moiety.fields import to_dict
    from moiety.infer import limits
    from moiety.plan.profile import write_profile
    from moiety.quant.pretend import packed_model

    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", hint="--disk takes a folder on the disk to measure")
    console = talk()
    found = limits.measure(packed_model, folder, console.print, quick=quick)
    write_profile(found, place)
    if json:
        print_json({"path": str(place), **to_dict(found)})
    else:
        planned.show_profile(found)
    console.print(f"{place} is written")
    return 0
