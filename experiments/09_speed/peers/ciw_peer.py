"""ciw (Palmer et al., 2019): M/M/4. It has no batch server."""

from importlib.metadata import version

import ciw
import queue_question as asked


def mm4(seed: int) -> tuple[float, float]:
    """(customers, mean wait [s])."""
    network = ciw.create_network(
        arrival_distributions=[ciw.dists.Exponential(asked.ARRIVALS)],
        service_distributions=[ciw.dists.Exponential(1 / asked.SERVICE)],
        number_of_servers=[asked.SERVERS],
    )
    ciw.seed(seed)
    simulation = ciw.Simulation(network)
    simulation.simulate_until_max_customers(asked.CUSTOMERS, method="Finish")
    waits = [record.waiting_time for record in simulation.get_all_records()]
    return asked.CUSTOMERS, sum(waits) / len(waits)


if __name__ == "__main__":
    asked.tell(version("ciw"), mm4=asked.least(mm4, asked.CUSTOMERS))
