"""Many at once: `diffspec fit --fleet`, with a record of what is finished, and `diffspec optimize` of a folder."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffspec.cli.output import progress_bar
from diffspec.cli.prepare import prepare_jax

if TYPE_CHECKING:
    from diffspec.cli.options import WorkloadOptions
    from diffspec.traces import Trace

RECORD = "fleet.jsonl"
"""The record in the folder of models: one line of JSON for each trace that was done."""


def fit_folder(source: Path, out: Path, processes: int, asked: Mapping[str, Any], reading: Mapping[str, Any]) -> dict:
    """Fit the traces of ``source`` (a folder: each file or folder in it is one; a file: each deployment in it) into the
    folder ``out``, and tell what became of each. Those that its record has as fitted, from the same bytes and with the
    same options, are not fitted again.

    Errors: :class:`InputError` for no traces, or a folder that cannot be written; :class:`NoResultError` where a
    process dies; the record then has what was finished.
    """
    from diffspec.fitting.fleet import fit_fleet
    from diffspec.report.files import json_text, write_files
    from diffspec.results import InputError

    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{out}: lies in {source}, whose files are traces; allowed: a folder elsewhere")
    question = hashlib.sha256(json.dumps([asked, reading], sort_keys=True, default=str).encode()).hexdigest()
    found = {name: (read, sha256 + question) for name, read, sha256 in _traces(source, reading)}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a folder: {error.strerror or error}") from None
    known = {line["name"]: line for line in _record(out / RECORD) if line["outcome"] == "fitted"}
    told = {}
    for name, (_, fingerprint) in found.items():
        before = known.get(name)
        if before is not None and before["fingerprint"] == fingerprint and Path(before["model"]).is_file():
            told[name] = before | {"resumed": True}
    left = {name: read for name, (read, _) in found.items() if name not in told}
    names = _file_names(found, {name: Path(line["model"]).name for name, line in known.items()})
    _end_line(out / RECORD)
    with progress_bar("fleet") as progress, (out / RECORD).open("a", encoding="utf-8") as record:
        fits = fit_fleet(left, processes=processes, prepare=prepare_jax, **asked) if left else ()
        for done in fits:
            target = out / names[done.name]
            line: dict[str, Any] = {"name": done.name, "fingerprint": found[done.name][1], "seconds": done.seconds}
            line |= {"outcome": "failed" if done.model is None else "fitted", "error": done.error, "model": None}
            if done.model is None:
                target.unlink(missing_ok=True)  # a model of what the trace was before
            if done.model is not None:
                write_files({target: done.model.to_json()})
                fitted = done.model.deployments.values()
                line |= {"model": str(target), "deployments": len(fitted)}
                line |= {"rows": sum(one.quality["rows"] for one in fitted)}
                line |= {"warnings": [text for one in fitted for text in one.warnings]}
            record.write(" ".join(json_text(line).split("\n")) + "\n")
            record.flush()
            told[done.name] = line | {"resumed": False}
            progress(f"fleet: {len(told)} of {len(found)}", len(told) / len(found))
    entries = [told[name] for name in found]
    return {
        "out": str(out),
        "fitted": sum(entry["outcome"] == "fitted" for entry in entries),
        "failed": sum(entry["outcome"] == "failed" for entry in entries),
        "resumed": sum(entry["resumed"] for entry in entries),
        "processes": processes,
        "traces": [{key: value for key, value in entry.items() if key != "fingerprint"} for entry in entries],
        "warnings": [f"{entry['name']}: {entry['error']}" for entry in entries if entry["outcome"] == "failed"],
    }


def optimize_folder(
    folder: Path, asked: "WorkloadOptions", given: Mapping[str, Any], question: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The best draft length of every model in a folder at each load, and the models' files; ``given``: options that
    this cannot take.

    Errors: :class:`InputError` for a folder without models, or such an option.
    """
    from diffspec.cli.options import read_model
    from diffspec.optimizing.fleet import optimize_fleet
    from diffspec.results import InputError

    refused = [option for option, value in given.items() if value is not None]
    if refused:
        raise InputError(f"{folder}: a folder of models; got {', '.join(refused)}; allowed: with one model alone")
    deployments, broken, read = {}, [], []
    for path in sorted(folder.glob("*.json")):
        try:
            model = read_model(path)
        except InputError as error:
            broken.append(str(error))
            continue
        for name, deployment in model.deployments.items():
            deployments[path.stem if len(model.deployments) == 1 else f"{path.stem}: {name}"] = deployment
        read.append(path)
    if not deployments:
        raise InputError(f"{folder}: no model in it; allowed: a folder that 'diffspec fit --fleet' wrote {broken[:1]}")
    if asked.prompt_length is None or asked.output_length is None:
        raise InputError("--prompt-length and --output-length are needed: models of a fleet were measured at their own")
    loop, loads = asked.loads()
    if asked.prefix_hit_rate is not None or asked.max_batched_tokens is not None:
        raise InputError("--prefix-hit-rate, --max-batched-tokens: allowed with one model alone")
    shape = {"prompt_length": asked.prompt_length, "output_length": asked.output_length}
    shape |= asked.details() | {"acceptance": asked.acceptance_model(None)}
    with progress_bar("optimize") as progress:
        answer = optimize_fleet(deployments, loads=loads, loop=loop, **shape, **question, progress=progress)
    some = any(entry["feasible"] for one in answer["deployments"] for entry in one["table"])
    broken += [f"{one['deployment']}: {one['error']}" for one in answer["deployments"] if one["error"]]
    return {"outcome": "successful" if some else "infeasible"} | answer | {"warnings": broken}, tuple(read)


def _traces(source: Path, reading: Mapping[str, Any]) -> Iterator[tuple[str, "Callable[[], Trace]", str]]:
    """(name, how it is read, digest of its bytes) of each trace."""
    from diffspec.results import InputError
    from diffspec.traces import read_trace

    if source.is_dir():
        children = [path for path in sorted(source.iterdir()) if not path.name.startswith((".", "_"))]
        if not children:
            raise InputError(f"{source}: an empty folder; allowed: a file or a folder for each trace")
        for child in children:
            yield child.name, partial(read_trace, [child], **reading), _digest(child)
        return
    for name, part in read_trace([source], **reading).by_deployment().items():
        yield name, partial(_itself, part), part.digest()


def _itself(trace: "Trace") -> "Trace":
    return trace


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files below a folder."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path.parent)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _record(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record; what a crash cut short, or what is none of ours, is left out."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        texts = ["name", "fingerprint", "outcome"]
        if isinstance(line, dict):
            texts += ["model"] if line.get("outcome") == "fitted" else []
            if all(isinstance(line.get(key), str) for key in texts):
                yield line


def _end_line(path: Path) -> None:
    """End a line that a crash cut short, so that the next one stands alone."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as record:
            record.write(b"\n")


def _file_names(names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """A file name for the model of each trace, different for all; those that are ``known`` keep theirs."""
    taken = dict(known)
    used = {RECORD, *known.values()}
    for name in names:
        if name in taken:
            continue
        stem = re.sub(r"[^\w.-]+", "-", re.sub(r"\.(csv|parquet|json|jsonl)$", "", name)).strip("-.") or "trace"
        file, number = f"{stem}.json", 1
        while file in used:
            number += 1
            file = f"{stem}-{number}.json"
        used.add(file)
        taken[name] = file
    return taken
