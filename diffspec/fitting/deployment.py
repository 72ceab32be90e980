"""A fitted model: one ServingModel per deployment, with what it was fitted to, as plain JSON and back."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance, MeasuredAcceptance
from diffspec.configuration import Configuration
from diffspec.fitting.forms import FORMS, Scales, build_form
from diffspec.fitting.hull import in_words, outside
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.parameters import (
    ParameterInfo,
    get_parameters,
    parameter_infos,
    set_parameters,
    to_constrained,
    to_unconstrained,
)
from diffspec.results import InputError
from diffspec.serving import ServingModel

SCHEMA = "diffspec-model"
SCHEMA_VERSION = 1
MIXED_ACCEPTANCE = 0.15
Z_90 = 1.6448536269514722
"""Standard deviations that hold the central 90 % of a normal distribution."""
UNITS = {"time": "s", "rate": "req/s", "length": "tok"}


@dataclass(frozen=True)
class FittedDeployment:
    """One deployment's model and the facts a decision needs.

    * ``serving``: the fitted :class:`diffspec.serving.ServingModel`; ``form``: its step-time form
    * ``acceptance``: the deployment's own acceptance curves, None when no speculative row told any
    * ``defaults``: caps and reference parameter counts; ``measured``: ranges of what was measured (the hull)
    * ``quality``: fit and hold-out errors, noise, the forms compared; ``warnings``: one line each
    * ``uncertainty``: what the fit leaves open; None where nothing was fitted or an older version fitted
    """

    name: str
    form: str
    serving: ServingModel
    acceptance: MeasuredAcceptance | None
    defaults: dict[str, Any]
    measured: dict[str, Any]
    quality: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    uncertainty: Uncertainty | None = None

    @property
    def plain_measured(self) -> bool:
        """True when rows without speculation were fitted, so that a speedup means something."""
        return 0 in self.measured["draft_lengths"]

    @property
    def mixed_acceptance(self) -> str:
        """A sentence when first-position acceptance differs by over MIXED_ACCEPTANCE between draft lengths, else
        empty: such curves come from different drafters or tasks, and blending them answers no real question."""
        if self.acceptance is None:
            return ""
        first = {
            k: float(curve[0]) for k, curve in zip(self.acceptance.draft_lengths, self.acceptance.curves, strict=True)
        }
        if max(first.values()) - min(first.values()) <= MIXED_ACCEPTANCE:
            return ""
        told = ", ".join(f"{rate:.2f} at draft length {k}" for k, rate in first.items())
        return (
            f"measured acceptance differs between draft lengths ({told}) and is blended: give an acceptance of your own"
        )

    def configuration(
        self,
        draft_length,
        *,
        acceptance: AbstractAcceptance | None = None,
        max_batch_size=None,
        max_batched_tokens=None,
        drafter_params: float | None = None,
    ) -> Configuration:
        """Configuration of this deployment: its own acceptance, caps and drafter unless others are given. A token
        budget counts only where it is given: fits do not look at it.

        Errors: :class:`InputError` when speculation is asked of a deployment that knows no acceptance, or
        ``drafter_params`` of one whose drafter's size is unknown.
        """
        speculative = not (isinstance(draft_length, (int, float)) and draft_length == 0)
        if speculative and acceptance is None and self.acceptance is None:
            raise InputError(
                f"deployment {self.name!r} has no acceptance of its own: no speculative row was fitted; "
                "give --acceptance-rate, --tokens-per-step or --position-acceptance"
            )
        scale = 1.0
        if drafter_params is not None:
            reference = self.defaults.get("drafter_params")
            if reference is None:
                raise InputError(
                    f"deployment {self.name!r}: the size of its drafter is unknown, so drafter_params cannot scale it; "
                    "put a drafter_params column into the trace"
                )
            scale = drafter_params / reference
        return Configuration(
            draft_length=draft_length,
            acceptance=(acceptance or self.acceptance) if speculative else None,
            max_batch_size=self.defaults.get("max_batch_size") if max_batch_size is None else max_batch_size,
            kv_capacity_tokens=self.defaults.get("kv_capacity_tokens"),
            max_batched_tokens=max_batched_tokens,
            draft_probability=self.defaults.get("draft_probability", 1.0),
            drafter_scale=scale,
        )

    def hull(self, draft_length, workload_fields: Mapping[str, Any]) -> dict[str, Any]:
        """Whether a question lies inside what was measured (:mod:`diffspec.fitting.hull`): ``inside_measured``, and
        what does not, ``outside_measured``."""
        found = outside(self.measured, draft_length, workload_fields)
        if self.quality.get("rows") == 0:
            found = [{"field": "deployment", "asked": self.name, "measured": None}]
        if moved := self.measured.get("hardware"):
            found = [{"field": "hardware"} | moved, *found]
        return {"inside_measured": not found, "outside_measured": found}

    def caveats(self, draft_length, workload_fields: Mapping[str, Any]) -> list[str]:
        """Where a question lies outside what was measured: nothing is extrapolated silently. Empty where nothing was
        measured at all: predictions from first principles state what they assume."""
        found = self.hull(draft_length, workload_fields)["outside_measured"]
        return [in_words(entry) for entry in found if entry["field"] not in ("deployment", "hardware")]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :meth:`from_dict`."""
        infos = parameter_infos(self.serving)
        values = get_parameters(self.serving)
        return {
            "deployment": self.name,
            "step_time": self.form,
            "parameters": {
                path: {"value": float(values[path]), "unit": info.unit, "meaning": info.meaning}
                | self._known(path, float(values[path]), info)
                for path, info in infos.items()
            },
            "acceptance": None
            if self.acceptance is None
            else {
                "draft_lengths": list(self.acceptance.draft_lengths),
                "position_acceptance": [
                    [float(rate) for rate in curve[:length]]
                    for length, curve in zip(self.acceptance.draft_lengths, self.acceptance.curves, strict=True)
                ],
            },
            "defaults": self.defaults,
            "measured": self.measured,
            "quality": self.quality,
            "warnings": self.warnings,
            "uncertainty": None if self.uncertainty is None else self.uncertainty.to_dict(),
        }

    def _known(self, path: str, value: float, info: ParameterInfo) -> dict[str, Any]:
        """``low`` and ``high`` of a fitted parameter's central 90 %, and ``told``: by what share the trace narrowed its
        prior (0: it stays where it was put, and is no knowledge)."""
        if self.uncertainty is None or path not in self.uncertainty.paths:
            return {}
        index = self.uncertainty.paths.index(path)
        spread, centre = self.uncertainty, to_unconstrained(value, info)
        edges = (to_constrained(centre + sign * Z_90 * spread.inflated[index], info) for sign in (-1.0, 1.0))
        low, high = (float(edge) for edge in edges)
        told = 1.0 - spread.deviation[index] / spread.prior[index]
        return {"low": low, "high": high, "told": float(np.clip(told, 0.0, 1.0))}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FittedDeployment":
        """Rebuild from :meth:`to_dict`'s plain data."""
        form = data["step_time"]
        if form not in FORMS:
            raise InputError(f"step_time: got {form!r}; allowed: {', '.join(FORMS)}")
        experts = data["defaults"].get("experts")
        template = build_form(form, Scales(0.02, 0.1, 100.0, 100.0), tuple(experts) if experts else None).template
        values = {path: np.asarray(float(entry["value"])) for path, entry in data["parameters"].items()}
        known = parameter_infos(template)
        for path, info in known.items():
            value = float(values.get(path, np.nan))
            if path in values and not (np.isfinite(value) and info.low <= value <= info.high):
                raise InputError(f"parameter {path}: got {value!r}; allowed: {info.low:g} to {info.high:g} {info.unit}")
        if set(values) != set(known):
            raise InputError(f"parameters: got {sorted(values)}; allowed: exactly {sorted(known)}")
        curves = data["acceptance"]
        acceptance = None
        if curves is not None:
            filled = [list(c) + [c[-1]] * (32 - len(c)) for c in curves["position_acceptance"]]
            acceptance = MeasuredAcceptance(
                tuple(curves["draft_lengths"]), jnp.asarray(np.asarray(filled, dtype=float))
            )
        return cls(
            name=data["deployment"],
            form=form,
            serving=set_parameters(template, values),
            acceptance=acceptance,
            defaults=data["defaults"],
            measured=data["measured"],
            quality=data["quality"],
            warnings=list(data["warnings"]),
            uncertainty=None if data.get("uncertainty") is None else Uncertainty.from_dict(data["uncertainty"]),
        )


@dataclass(frozen=True)
class FittedModel:
    """Fitted deployments with the hash of the rows they were fitted to and the versions that fitted them."""

    deployments: dict[str, FittedDeployment]
    rows_sha256: str
    versions: dict[str, str]

    def deployment(self, name: str | None = None) -> FittedDeployment:
        """The named deployment, or the only one. :class:`InputError` names those there are."""
        if name is None and len(self.deployments) == 1:
            return next(iter(self.deployments.values()))
        if name not in self.deployments:
            got = "none given" if name is None else f"got {name!r}"
            raise InputError(f"deployment: {got}; allowed: {', '.join(map(repr, self.deployments))} (--deployment)")
        return self.deployments[name]

    def to_json(self) -> str:
        """JSON text of the model: schema, version, units, parameters with units and meaning."""
        data = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "units": UNITS,
            "versions": self.versions,
            "rows_sha256": self.rows_sha256,
            "deployments": [deployment.to_dict() for deployment in self.deployments.values()],
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "model") -> "FittedModel":
        """Read :meth:`to_json`'s text. :class:`InputError` for anything else, another schema version included."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not a diffspec model: {error}; make one with 'diffspec fit'") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputError(
                f'{source}: not a diffspec model (no "schema": "{SCHEMA}"); make one with \'diffspec fit\''
            )
        if data.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{source}: schema_version: got {data.get('schema_version')!r}; allowed: {SCHEMA_VERSION}; "
                "fit the trace again with this version of diffspec"
            )
        try:
            deployments = [FittedDeployment.from_dict(entry) for entry in data["deployments"]]
            model = cls({d.name: d for d in deployments}, data["rows_sha256"], data["versions"])
        except InputError as error:
            raise InputError(f"{source}: {error}; fit the trace again with this version of diffspec") from None
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise InputError(f"{source}: damaged model file ({type(error).__name__}: {error}); fit again") from None
        if not deployments:
            raise InputError(f"{source}: the model holds no deployment; fit again")
        return model


def used_versions(
    packages: Sequence[str] = ("diffspec", "jax", "equinox", "optax", "numpy", "pandas"),
) -> dict[str, str]:
    """Installed versions of the packages that shape a fit."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
