"""simpy: M/M/4 by one process a customer, and the batch server by one process for the engine."""

import random
from importlib.metadata import version

import queue_question as asked
import simpy


def mm4(seed: int) -> tuple[float, float]:
    """(customers, mean wait [s])."""
    random.seed(seed)
    environment, waits = simpy.Environment(), []
    servers = simpy.Resource(environment, capacity=asked.SERVERS)

    def customer():
        arrived = environment.now
        with servers.request() as turn:
            yield turn
            waits.append(environment.now - arrived)
            yield environment.timeout(random.expovariate(1 / asked.SERVICE))

    def source():
        for _ in range(asked.CUSTOMERS):
            yield environment.timeout(random.expovariate(asked.ARRIVALS))
            environment.process(customer())

    environment.process(source())
    environment.run()
    return asked.CUSTOMERS, sum(waits) / len(waits)


def batch_server(seed: int) -> tuple[float, float]:
    """(sequence-steps, mean latency [s])."""
    random.seed(seed)
    environment, latencies = simpy.Environment(), []
    waiting: list[float] = []
    bell = [environment.event()]
    steps = 0

    def source():
        for _ in range(asked.REQUESTS):
            yield environment.timeout(random.expovariate(asked.RATE))
            waiting.append(environment.now)
            if not bell[0].triggered:
                bell[0].succeed()

    def engine():
        nonlocal steps
        decoding: list[list[float]] = []  # [arrival, cached tokens, tokens left]
        while len(latencies) < asked.REQUESTS:
            if not waiting and not decoding:
                bell[0] = environment.event()
                yield bell[0]
            fresh = [waiting.pop(0) for _ in range(min(len(waiting), asked.PLACES - len(decoding)))]
            cached = sum(sequence[1] for sequence in decoding)
            yield environment.timeout(asked.step_time(len(decoding), cached, asked.PROMPT * len(fresh)))
            steps += len(decoding)
            kept = []
            for sequence in decoding:
                emitted = 1 + asked.accepted()
                sequence[1] += emitted
                sequence[2] -= emitted
                if sequence[2] > 0:
                    kept.append(sequence)
                else:
                    latencies.append(environment.now - sequence[0])
            decoding = kept + [[arrived, asked.PROMPT, asked.OUTPUT - 1] for arrived in fresh]

    environment.process(source())
    environment.process(engine())
    environment.run()
    return steps, sum(latencies) / len(latencies)


if __name__ == "__main__":
    asked.tell(
        version("simpy"),
        mm4=asked.least(mm4, asked.CUSTOMERS),
        batch_server=asked.least(batch_server, asked.REQUESTS),
    )
