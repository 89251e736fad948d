"""Where the hosts of a job meet: torch's elastic rendezvous (c10d) at one address, round after round.

The host with node rank 0 keeps the store. A round is one life of the workers: when they fail, or a host comes back,
every host meets again and a new round begins. Ranks follow `--node-rank`, not the order of arrival or of host names,
so that a host finds its own files again. Each round gets a store of its own for the workers, on a port that is free
then: nothing they left in an earlier round is read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ostro.errors import ConfigError, TrainError

_RUN_ID = "ostro"  # the store at an address belongs to one job
_STORE_SECONDS = 10  # for one exchange with the store; a signal to the launcher waits for it
_EXCHANGE_SECONDS = 30.0  # for all hosts of a round to say who they are
_FAREWELL_SECONDS = 10.0  # the store's host stays until the others have read why it ended, but not longer
_CONNECTION_ERRORS = (RendezvousConnectionError, RendezvousStateError, RuntimeError, OSError)


@dataclasses.dataclass(frozen=True)
class Round:
    """One life of the workers: its number, where they meet, and which ranks this host has."""

    number: int
    address: str
    port: int
    first_rank: int
    world_size: int


class JobEndedError(Exception):
    """Another host ended the job; `exit_code` and `sentence` are what it ended with."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.sentence, self.exit_code = sentence, exit_code


class Meeting:
    """This host's seat in the job: meets the others, hears whether one waits or ended, tells them of failures."""

    def __init__(
        self, *, node_rank: int, num_nodes: int, num_local: int, address: str, port: int, timeout_seconds: float
    ) -> None:
        self.node_rank, self.num_nodes, self.num_local = node_rank, num_nodes, num_local
        self.address, self.port, self.timeout_seconds = address, port, timeout_seconds
        self._handler: RendezvousHandler | None = None
        self._store: dist.Store | None = None  # of the present round, shared by the launchers
        self._workers_store: dist.TCPStore | None = None  # kept alive here, on the host of node rank 0
        self._silent_until = 0.0
        self._num_rounds = 0
        # The handler would offer a store of its own and, in a later round, not tell a host that is new where (torch
        # 2.13): that host would wait for its timeout.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        logging.getLogger("torch.distributed.elastic.rendezvous").setLevel(logging.ERROR)

    def next_round(self) -> Round:
        """Wait for all hosts and return the round they begin.

        Raises TrainError where they do not come within `timeout_seconds`, JobEndedError where one has ended the job,
        ConfigError where two hosts contradict each other.
        """
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            try:
                if self._handler is None:
                    self._handler = self._connect(deadline)
                info = self._handler.next_rendezvous()
                return self._exchange(info.store)
            except RendezvousClosedError:
                self.raise_if_ended()
                raise JobEndedError("another host ended the job.", 1) from None
            except RendezvousTimeoutError:
                raise self._nobody_came() from None
            except _CONNECTION_ERRORS:  # the store's host, or the network to it, went away: it may come back
                self._disconnect()
                if time.monotonic() > deadline:
                    raise self._nobody_came() from None
                time.sleep(0.5)

    def others_wait(self) -> bool:
        """Whether a host waits for a new round: one that came back, or one whose workers failed."""
        if self.num_nodes == 1:
            return False
        return bool(self._ask(lambda: self._handler is not None and self._handler.num_nodes_waiting() > 0, False))

    def say_done(self) -> None:
        """Tell the others that this host's workers have all ended well."""
        self._ask(lambda: self._store and self._store.set(f"done/{self.node_rank}", "1"), None)

    def all_done(self) -> bool:
        """Whether every host's workers have ended well; a store that is gone has nobody left who could fail."""
        if self.num_nodes == 1:
            return True
        names = [f"done/{node}" for node in range(self.num_nodes)]
        return bool(self._ask(lambda: self._store is None or self._store.check(names), True))

    def tell_failure(self, failure: dict[str, Any]) -> None:
        """Tell the others why this host's workers failed."""
        self._ask(lambda: self._store and self._store.set(f"failed/{self.node_rank}", json.dumps(failure)), None)

    def failures_of_others(self) -> list[dict[str, Any]]:
        """Return what other hosts have told of this round's failures so far."""
        others = [f"failed/{node}" for node in range(self.num_nodes) if node != self.node_rank]
        store = self._store
        if store is None:
            return []
        return self._ask(lambda: [json.loads(store.get(name)) for name in others if store.check([name])], [])

    def raise_if_ended(self) -> None:
        """Raise JobEndedError where another host has ended the job."""
        store = self._store
        if self.num_nodes == 1 or store is None:
            return
        text = self._ask(lambda: store.get("ended").decode() if store.check(["ended"]) else "", "")
        if text:
            told = json.loads(text)
            raise JobEndedError(told["sentence"], told["exit_code"])

    def end(self, sentence: str, exit_code: int) -> None:
        """End the job on every host, with the same sentence and exit code."""
        store = self._store
        if self.num_nodes == 1 or store is None:
            return
        told = json.dumps({"sentence": sentence, "exit_code": exit_code})
        self._ask(lambda: store.set("ended", told), None)
        self._ask(lambda: self._handler and self._handler.set_closed(), None)

    def leave(self) -> None:
        """Say goodbye; the store's host waits until the others have, for at most 10 s."""
        store = self._store
        if self.num_nodes > 1 and store is not None:
            self._ask(lambda: store.set(f"left/{self.node_rank}", "1"), None)
            names = [f"left/{node}" for node in range(self.num_nodes)]
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while self.node_rank == 0 and time.monotonic() < deadline and not self._ask(lambda: store.check(names), 1):
                time.sleep(0.1)
        self._disconnect()

    def _ask(self, question: Any, otherwise: Any) -> Any:
        """Return the answer of the store, or `otherwise` where it cannot be reached; then it is left alone for 5 s.

        The workers' own connections decide whether they live; the launcher must not end them because of its own.
        """
        if time.monotonic() < self._silent_until:
            return otherwise
        try:
            return question()
        except (RendezvousError, RuntimeError, OSError, ValueError):
            self._silent_until = time.monotonic() + 5.0
            return otherwise

    def _connect(self, deadline: float) -> RendezvousHandler:
        is_host = self.node_rank == 0
        if not is_host:
            self._wait_for_port(deadline)
        port = 0 if self.num_nodes == 1 else self.port
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=f"[{self.address}]:{port}" if ":" in self.address else f"{self.address}:{port}",
            run_id=_RUN_ID,
            min_nodes=self.num_nodes,
            max_nodes=self.num_nodes,
            local_addr=self.address if is_host else None,
            is_host=is_host,
            read_timeout=_STORE_SECONDS,
            join_timeout=max(1, int(self.timeout_seconds)),
            last_call_timeout=1,
        )
        try:
            return get_rendezvous_handler(parameters)
        except RendezvousConnectionError as error:
            if is_host:
                raise ConfigError(
                    f"the store cannot be kept at {self.address}:{port}: {_innermost(error)}; --master-addr must be an "
                    "address of the host with --node-rank 0 and --master-port free there."
                ) from None
            raise

    def _wait_for_port(self, deadline: float) -> None:
        """Wait until someone listens at the address; torch's client would not hear signals meanwhile."""
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=1.0).close()
                return
            except socket.gaierror as error:
                if time.monotonic() > deadline:
                    raise ConfigError(f"--master-addr {self.address} is not known here: {error.strerror}.") from None
            except OSError:
                if time.monotonic() > deadline:
                    raise self._nobody_came() from None
            time.sleep(0.5)

    def _exchange(self, store: dist.Store) -> Round:
        """Learn who all are, in the order of node ranks; node rank 0 opens the workers' store."""
        self._store, self._silent_until = store, 0.0
        if store.add(f"seat/{self.node_rank}", 1) > 1:
            raise self._disagreement(
                f"two hosts say --node-rank {self.node_rank}: give each its own, 0 to {self.num_nodes - 1}."
            )
        own: dict[str, Any] = {"num_nodes": self.num_nodes, "num_local": self.num_local}
        if self.node_rank == 0:
            self._workers_store = dist.TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
            own |= {"port": self._workers_store.port, "number": self._num_rounds}
            self._num_rounds += 1
        store.set(f"host/{self.node_rank}", json.dumps(own))
        names = [f"host/{node}" for node in range(self.num_nodes)]
        deadline = time.monotonic() + _EXCHANGE_SECONDS
        while not store.check(names):
            self.raise_if_ended()
            if time.monotonic() > deadline:
                raise RendezvousConnectionError("a host left before the round began")
            time.sleep(0.05)
        hosts = [json.loads(store.get(name)) for name in names]
        if any(host["num_nodes"] != self.num_nodes for host in hosts):
            raise self._disagreement(f"the hosts do not agree on --nnodes: {[host['num_nodes'] for host in hosts]}.")
        counts = [host["num_local"] for host in hosts]
        first = sum(counts[: self.node_rank])
        return Round(hosts[0]["number"], self.address, hosts[0]["port"], first, sum(counts))

    def _disconnect(self) -> None:
        # Not by `shutdown`: that closes the job for those who would meet again. The heartbeat ends with the handler.
        self._handler = None

    def _disagreement(self, sentence: str) -> ConfigError:
        self.end(sentence, ConfigError.exit_code)
        return ConfigError(sentence)

    def _nobody_came(self) -> TrainError:
        where = f"{self.address}:{self.port}"
        return TrainError(
            f"not all {self.num_nodes} hosts met at {where} within --rdzv-timeout {self.timeout_seconds:g} s: start "
            "the same command on each, with its own --node-rank, and see that they reach that address and port."
        )


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
