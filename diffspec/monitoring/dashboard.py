"""A Grafana dashboard of the exported metrics: plain data, to be imported as JSON."""

from typing import Any

_HEIGHT, _WIDTH = 8, 24
_SELECT = '{deployment=~"$deployment"'


def _named(name: str, **labels: str) -> str:
    inside = "".join(f',{key}="{value}"' for key, value in labels.items())
    return f"{name}{_SELECT}{inside}}}"


def _latency(metric: str, title: str) -> dict[str, Any]:
    predicted = {
        bound: _named("diffspec_predicted_latency_seconds", metric=metric, bound=bound)
        for bound in ("value", "low", "high")
    }
    queries = {
        "measured": _named("diffspec_measured_latency_seconds", metric=metric),
        "predicted": predicted["value"],
        "low (90 %)": predicted["low"],
        "high (90 %)": predicted["high"],
    }
    return {"title": title, "unit": "s", "queries": queries}


PANELS: tuple[dict[str, Any], ...] = (
    {"title": "Server answers", "unit": "short", "kind": "stat", "queries": {"up": _named("diffspec_up")}},
    {"title": "Headroom", "unit": "percentunit", "kind": "gauge", "queries": {"": _named("diffspec_headroom")}},
    {
        "title": "Draft length",
        "unit": "short",
        "kind": "stat",
        "queries": {"{{which}}": _named("diffspec_draft_length")},
    },
    {
        "title": "Gain of the best draft length",
        "unit": "percentunit",
        "kind": "stat",
        "queries": {"": _named("diffspec_draft_length_gain")},
    },
    _latency("ttft", "Time to first token"),
    _latency("itl", "Inter-token latency"),
    _latency("e2e_latency", "End-to-end latency"),
    {
        "title": "Where the time goes (predicted)",
        "unit": "percentunit",
        "stacked": True,
        "queries": {"{{stage}}": _named("diffspec_stage_share")},
    },
    {
        "title": "Load",
        "unit": "reqps",
        "queries": {"arrival rate": _named("diffspec_arrival_rate"), "capacity": _named("diffspec_capacity")},
    },
    {
        "title": "Effective batch size",
        "unit": "short",
        "queries": {"{{source}}": _named("diffspec_effective_batch_size")},
    },
    {
        "title": "Tokens per step",
        "unit": "short",
        "queries": {"{{source}}": _named("diffspec_tokens_per_step")},
    },
    {
        "title": "Residuals, in standard deviations",
        "unit": "short",
        "queries": {"{{metric}}": _named("diffspec_residual_score")},
    },
    {
        "title": "Changes that last, against the model",
        "unit": "percentunit",
        "queries": {"{{what}}": _named("diffspec_standing_change")},
    },
    {
        "title": "Changes told",
        "unit": "short",
        "queries": {"{{what}}": f"increase({_named('diffspec_anomalies_total')}[1h])"},
    },
)
"""Panels of the dashboard: title, Grafana unit, kind (time series unless told), and queries by legend."""


def dashboard(title: str = "diffspec monitor") -> dict[str, Any]:
    """The dashboard as Grafana's JSON model (schema 39): import it, choose a Prometheus data source."""
    panels, x, y = [], 0, 0
    for number, panel in enumerate(PANELS, start=1):
        small = panel.get("kind") in ("stat", "gauge")
        width, height = (_WIDTH // 4, _HEIGHT // 2) if small else (_WIDTH // 2, _HEIGHT)
        panels.append(_panel(number, panel, {"x": x, "y": y, "w": width, "h": height}))
        x += width
        if x >= _WIDTH:
            x, y = 0, y + height
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    query = "label_values(diffspec_up, deployment)"
    chosen = {
        "name": "deployment",
        "label": "Deployment",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "deployments"},
        "definition": query,
        "refresh": 2,
        "multi": False,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "id": None,
        "uid": "diffspec-monitor",
        "title": title,
        "tags": ["diffspec", "speculative decoding"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, chosen]},
        "annotations": {"list": [_annotation()]},
        "panels": panels,
    }


def expressions(made: dict[str, Any]) -> list[str]:
    """Every PromQL expression of a dashboard."""
    asked = [target["expr"] for panel in made["panels"] for target in panel["targets"]]
    return [*asked, *(entry["expr"] for entry in made["annotations"]["list"])]


def _panel(number: int, panel: dict[str, Any], place: dict[str, int]) -> dict[str, Any]:
    kind = panel.get("kind", "timeseries")
    custom = {"fillOpacity": 30, "stacking": {"mode": "normal"}} if panel.get("stacked") else {}
    made = {
        "id": number,
        "type": kind,
        "title": panel["title"],
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": panel["unit"], "custom": custom}, "overrides": []},
        "options": {},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": text, "legendFormat": legend or "{{deployment}}", "range": True}
            for index, (legend, text) in enumerate(panel["queries"].items())
        ],
    }
    if kind == "gauge":
        made["fieldConfig"]["defaults"] |= {"min": 0, "max": 1}
    return made


def _annotation() -> dict[str, Any]:
    return {
        "name": "Changes",
        "enable": True,
        "iconColor": "red",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "expr": f"changes({_named('diffspec_anomalies_total')}[1m]) > 0",
        "titleFormat": "{{what}} changed",
        "step": "30s",
    }
