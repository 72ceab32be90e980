"""Every replica that could be bought: draft length x batch cap x server, as lanes, and what each costs at a target."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from diffspec.analysis.plain import finite
from diffspec.lengths import Lengths
from diffspec.optimizing.lanes import Lanes, asked_of, evaluate, join, limited_values
from diffspec.optimizing.limits import MEMORY, Limit
from diffspec.optimizing.servers import MILLION, NO_PAIR, Server, batch_caps, hours_per_million, joules_per_token
from diffspec.percentiles import states_for
from diffspec.results import InputError
from diffspec.workload import Workload

MEANS = ("ttft_mean", "itl_mean", "tpot_mean", "e2e_mean", "utilization")
SPEND = {"cost": "cost", "device_hours": "device_hours", "energy": "energy"}


@dataclass(frozen=True)
class Candidates:
    """``lanes`` with the place of each one's server, its draft length and its batch cap [req]; ``memory`` [GB] in use
    on a device of each, where it is asked for."""

    servers: Sequence[Server]
    prices: Sequence[float | None]
    workload: Workload
    lanes: Lanes
    server: list[int]
    draft_length: list[int]
    cap: list[float]
    memory: np.ndarray | None = None

    def told(self, place: int) -> dict[str, Any]:
        """What a candidate is, as plain data."""
        chosen = {"draft_length": self.draft_length[place], "max_batch_size": self.cap[place]}
        return self.servers[self.server[place]].told() | chosen

    def joules(self, batches: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """Joules per output token of each lane; not a number where they are not known."""
        found = np.full(len(self.server), np.nan)
        for number, server in enumerate(self.servers):
            places = np.flatnonzero(np.asarray(self.server) == number)
            configs = self.lanes.take(places).configs
            joules = joules_per_token(server, configs, batches[places], rates[places], self.workload)
            if joules is not None:
                found[places] = joules
        return found

    def sized(
        self,
        largest: np.ndarray,
        target: float,
        headroom: float,
        limits: Sequence[Limit],
        binding: np.ndarray,
        energy: bool = True,
    ) -> list[dict[str, Any]]:
        """Each candidate with the replicas that a target rate needs; ``replicas`` None where its rate is 0. Without
        ``energy`` that is not looked at."""
        serves = largest > 0
        wanted = np.where(serves, target / np.where(serves, (1.0 - headroom) * largest, 1.0), 0.0)
        replicas = np.maximum(np.ceil(wanted * (1.0 - 1e-9)), 1.0)
        rates = np.where(serves, target / replicas, 1e-9)
        values, _ = evaluate(self.lanes, rates)
        joules = self.joules(values["batch"], rates) if energy else np.full(len(rates), np.nan)
        output = float(self.workload.output_length)
        entries = []
        for place, rate in enumerate(largest):
            number = self.server[place]
            devices = self.servers[number].devices
            limit = "capacity" if binding[place] < 0 else limits[binding[place]].text
            entry = self.told(place) | {
                "rate_per_replica": float(rate),
                "rate_per_device": float(rate) / devices,
                "binding": limit,
            }
            names = ("replicas", "devices", "arrival_rate", "headroom", "device_hours", "cost", "energy")
            if not serves[place]:
                entries.append(entry | dict.fromkeys((*names, "metrics", "effective_batch_size")))
                continue
            count, price = int(replicas[place]), self.prices[number]
            entries.append(
                entry
                | {
                    "replicas": count,
                    "devices": count * devices,
                    "arrival_rate": float(rates[place]),
                    "headroom": 1.0 - float(rates[place] / rate),
                    "device_hours": hours_per_million(count * devices, target, output),
                    "cost": None if price is None else hours_per_million(count * price, target, output),
                    "energy": finite(joules[place] * MILLION),
                    "metrics": {name: finite(values[name][place]) for name in MEANS},
                    "effective_batch_size": finite(values["batch"][place]),
                }
            )
        return entries

    def ranked(self, sized: Sequence[Mapping[str, Any]], aim: str) -> list[int]:
        """Places of the candidates that serve, the one that spends least first; of those that spend alike the one whose
        devices serve most."""
        serve = [place for place, entry in enumerate(sized) if entry["replicas"] is not None]
        if any(sized[place][SPEND[aim]] is None for place in serve):
            raise InputError(f"minimise: got {aim!r}, which is not known of every candidate: {NO_PAIR}")
        return sorted(serve, key=lambda place: (sized[place][SPEND[aim]], -sized[place]["rate_per_device"]))

    def at_limits(self, place: int, metrics: Sequence[str], rate: float) -> dict[str, float | None]:
        """The limited metrics of one candidate at an arrival rate."""
        names = [name for name in dict.fromkeys(metrics) if name != MEMORY]
        found = limited_values(self.lanes.take([place]), names, np.asarray([rate]))
        told = {name: finite(value[0]) for name, value in found.items()}
        return told if self.memory is None else told | {MEMORY: float(self.memory[place])}


def candidates(
    servers: Sequence[Server],
    priced: Sequence[float | None],
    workload: Workload,
    longest: int,
    max_batch_size: float | None,
    metrics: Sequence[str],
    ask: Mapping[str, Any],
) -> Candidates:
    """Draft lengths 0..``longest`` at every batch cap of every server. Without rows at draft length 0 a fit cannot tell
    what a plain server does: it is none of them. Errors: :class:`InputError` for servers of several kinds."""
    longest = min(server.longest_draft(longest, ask["acceptance"]) for server in servers)
    models, configs, at = [], [], []
    for number, server in enumerate(servers):
        plain = 0 if server.deployment.plain_measured or longest == 0 else 1
        for cap in batch_caps(server, workload, max_batch_size):
            for length in filter(server.fits, range(plain, longest + 1)):
                models.append(server.deployment.serving)
                configs.append(server.configuration(length, cap, longest=longest, **ask))
                at.append((number, length, cap))
    kinds = {
        (jax.tree.structure(model), jax.tree.structure(config)) for model, config in zip(models, configs, strict=True)
    }
    if len(kinds) > 1:
        raise InputError(
            "subjects: got deployments of several kinds; allowed: one pair, or one fit, on several devices"
        )
    memory = None
    if MEMORY in metrics:
        budget = ask["max_batched_tokens"]
        each = zip(at, configs, strict=True)
        memory = np.asarray([servers[number].gigabytes(workload, config, budget) for (number, *_), config in each])
    lengths = Lengths.lognormal(float(workload.output_scv))
    states = states_for(max(cap for _, _, cap in at), 0.0)
    lanes = join(
        models, [workload] * len(at), configs, lengths, states, asked_of([name for name in metrics if name != MEMORY])
    )
    number, length, cap = (list(column) for column in zip(*at, strict=True))
    return Candidates(servers, priced, workload, lanes, number, length, cap, memory)


def replicas_of(rate: float, target: float, headroom: float) -> float:
    """Replicas for a target [req/s] where each sustains ``rate`` [req/s]; infinite for none.

    >>> replicas_of(7.0, 40.0, 0.0), replicas_of(7.0, 40.0, 0.2), replicas_of(0.0, 40.0, 0.0)
    (6.0, 8.0, inf)
    """
    return math.inf if rate <= 0 else max(float(math.ceil(target / ((1.0 - headroom) * rate) * (1.0 - 1e-9))), 1.0)
