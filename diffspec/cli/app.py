"""The typer application: one command a file. Nothing heavy is imported here, so that --help is quick."""

from typing import Annotated

import typer

from diffspec.cli import (
    acceptance,
    boundary,
    check,
    collect,
    demo,
    design,
    evaluate,
    fit,
    import_,
    monitor,
    optimize,
    policy,
    predict,
    report,
    sensitivity,
    simulate,
    size,
)

app = typer.Typer(
    name="diffspec",
    help="Why speculative decoding slows down under load, and what to do.\n\n"
    "Measurements (collect, import, acceptance) become a trace; a trace becomes a fitted latency model (fit), which is "
    "scored (evaluate), asked (predict, simulate, sensitivity), mapped (boundary) and used to choose the draft length "
    "for each load (optimize), the schedule that an engine follows (policy), how many replicas serve a target rate "
    "(size), what to measure next (design), an interactive page of it all (report), or set beside a live server "
    "(monitor). Start with: diffspec demo",
    epilog="Exit codes: 0 done; 1 no answer exists (saturated, infeasible); 2 wrong usage or input. Works on the CPU "
    "unless JAX_PLATFORMS is set. Compiled programs are kept in the user's cache folder, or in DIFFSPEC_CACHE_DIR "
    "(empty: nowhere).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"diffspec {version('diffspec')}")
        except PackageNotFoundError:
            print("diffspec (not installed)")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


for module in (
    demo,
    collect,
    import_,
    check,
    acceptance,
    fit,
    evaluate,
    predict,
    simulate,
    size,
    optimize,
    policy,
    sensitivity,
    boundary,
    design,
    report,
    monitor,
):
    app.command(module.__name__.rsplit(".", 1)[-1].rstrip("_"))(module.command)
