"""The one writer: brings the kernel of this network namespace to what a node desires, and reads it back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from time import perf_counter, sleep

from agent.core.addresses import FAMILIES, V4, Address
from agent.core.node import Node
from agent.dataplane import conntrack, grace
from agent.dataplane.applied import Applied, parse_ipset_save
from agent.dataplane.errors import KernelError, refused
from agent.dataplane.ipset import Ipset
from agent.dataplane.iptables import BACKENDS, Backend, parse_tables
from agent.dataplane.notices import Notices
from agent.dataplane.plan import (
    AddMembers,
    AwaitPackets,
    CreateSet,
    DeleteMembers,
    DestroySet,
    ForgetConnections,
    Operation,
    SwapSets,
    Transaction,
    plan,
    record,
    removal,
)
from agent.dataplane.render import OPTIONS, Options
from agent.dataplane.report import Report

PATIENCE = 2.0
"""Seconds that `clean` waits for sets which the kernel still counts as used."""
ATTEMPTS = 3
"""A sync that the kernel refuses is planned anew, from what the kernel holds then, so many times in all."""


class Dataplane:
    """Sets and rules of one network namespace. Make it inside the namespace.

    Not for several threads, nor for one that runs an asyncio loop: pyroute2 runs its own.

    Invariant: the mirror is what the kernel holds, or None when that is not known; then it is read before the next
    plan. Nothing is ever flushed.

    A set outlives its last rule by `linger` seconds, and goes with the next sync: a program that lists rules asks for
    the names of their sets afterwards, and fails when one is gone ("Set with index 2 in kernel doesn't exist")."""

    def __init__(
        self,
        backend: Backend,
        *,
        options: Options = OPTIONS,
        families: Iterable[int] | None = None,
        linger: float = 0.0,
    ) -> None:
        backend.check()
        self.backend = backend
        self.options = options
        self.families = tuple(families if families is not None else present_families())
        self._ipset = Ipset()
        self._notices: Notices | None = None
        self._mirror: Applied | None = None
        self._released: set[Address] = set()  # by a sync that the kernel refused: still to be forgotten
        self._known: frozenset[Address] | None = None  # addresses of the node's pods at the last sync
        self._unused: dict[str, float] = {}  # sets to destroy, and from when on it is tried
        self._linger = linger
        self._seen = b""  # a hash of what was read last
        self._right: bytes | None = None  # the same of what was as desired, if nothing was written since
        self._transactions = 0  # of ours that nf_tables has told of, or will

    def close(self) -> None:
        self._ipset.close()
        if self._notices is not None:
            self._notices.close()

    @property
    def applied(self) -> Applied | None:
        """The mirror: what the kernel holds of ours, None when that is not known."""
        return self._mirror

    @property
    def lingers(self) -> bool:
        """Whether sets without a use are still to be destroyed, by a sync after their time."""
        return bool(self._unused)

    def listen(self) -> int | None:
        """Listen to notices of nf_tables; a file that becomes readable with them, None where there are none."""
        if self.backend.name == "nft" and self._notices is None:
            with suppress(OSError):
                self._notices = Notices()
        return self._notices.fileno() if self._notices is not None else None

    def disturbed(self) -> bool:
        """Whether somebody else wrote to our chains or to FORWARD since we asked last, as far as the kernel tells."""
        if self._notices is None:
            return False
        told, made = self._notices.transactions(), self._transactions
        self._transactions = 0
        return told is None or told > made

    def read(self) -> Applied:
        """What the kernel holds of ours now. Raises KernelError."""
        sets, tables = self._save()
        return Applied(parse_ipset_save(sets), parse_tables(tables))

    def sync(self, node: Node) -> Report:
        """Bring the kernel to what the node desires; the first time, and after a refusal, from what it holds.

        Raises KernelError when the kernel keeps refusing; what was enforced before stays whole."""
        report = Report()
        journal = node.journal()
        self._released |= journal.released
        self._unused = {name: due for name, due in self._unused.items() if name not in node.sets.active}
        journal = journal._replace(sets=dict.fromkeys(self._unused) | journal.sets, released=self._released)
        for attempt in range(ATTEMPTS):
            report.attempts = attempt + 1
            everything = self._mirror is None
            try:
                with report.stage("read"):
                    mirror = self._mirror or self.read()
                self._mirror = None
                with report.stage("plan"):
                    operations = plan(node, journal, mirror, self.options, everything=everything, known=self._known)
                if operations:
                    self._right = None
                elif everything:
                    self._right = self._seen
                self._execute(operations, mirror, report)
            except KernelError as error:
                if attempt + 1 == ATTEMPTS:
                    self._released |= journal.inherited
                    raise
                report.refused[error.stage] = report.refused.get(error.stage, 0) + 1
                continue
            self._mirror = mirror
            self._released, self._known = set(), frozenset(node.cluster.judged)
            break
        return report

    def resync(self, node: Node) -> Report:
        """As `sync`, from what the kernel really holds: drift is found and repaired.

        Text that is the same as when it was last right, with no write of ours since, is not even parsed."""
        if not self._as_it_was():
            self._mirror = None
        return self.sync(node)

    def _save(self) -> tuple[list[str], dict[int, list[str]]]:
        """What the tools print of ours. Raises KernelError."""
        saved = self._ipset.save(), self.backend.save(self.families)
        self._seen = sha256(repr(saved).encode()).digest()
        return saved

    def _as_it_was(self) -> bool:
        """Whether the kernel holds what it held when it was last right."""
        if self._right is None:
            return False
        try:
            self._save()
        except KernelError:
            return False
        return self._seen == self._right

    def clean(self) -> Report:
        """Take away all that is ours in this namespace, on both backends, from whatever state. Raises KernelError."""
        report = Report()
        self._mirror = None
        for name in (self.backend.name, *(n for n in BACKENDS if n != self.backend.name)):
            backend = Backend(name)
            applied = self._rules_of(backend)
            self._refuse_strays(applied)
            self._execute(list(removal(applied)), applied, report, backend)
        applied = Applied(self._ipset.read(), {})
        deadline = perf_counter() + self._linger + PATIENCE
        while applied.sets:  # nf_tables lets go of the sets of a removed rule a moment later
            self._execute(list(removal(applied)), applied, report)
            if not applied.sets:
                break
            if perf_counter() > deadline:
                raise refused(f"set {min(applied.sets)}", "is in use by a rule that is not ours")
            sleep(0.05)
        return report

    def leave_other_backend(self) -> Report:
        """Take our rules off the backend that is not in use: the host changed it since we last ran."""
        report = Report()
        for name in BACKENDS:
            if name != self.backend.name:
                backend = Backend(name)
                applied = self._rules_of(backend)
                self._execute(list(removal(applied)), applied, report, backend)
        if report.transactions and self._mirror is not None:  # its rules held sets that have no other use
            held = [DestroySet(set_name) for set_name in self._unused]
            deadline = perf_counter() + PATIENCE
            while held and perf_counter() < deadline:
                self._destroy(list(held), self._mirror, report)
                held = [operation for operation in held if operation.name in self._unused]
                sleep(0.05 if held else 0)
        return report

    def _rules_of(self, backend: Backend) -> Applied:
        """Our rules on a backend that need not be the one in use; none where it has no table, or one without us."""
        versions = backend.readable(self.families)
        try:
            return Applied({}, backend.read(versions))
        except KernelError:
            if all(backend.is_clear(version) for version in versions):
                return Applied()
            raise

    @staticmethod
    def _refuse_strays(applied: Applied) -> None:
        for table in applied.tables.values():
            if table.strays:
                raise KernelError(
                    f"rule {table.strays[0]}",
                    "leads into a chain of ours, and is not ours to remove",
                    "Delete that rule, then clean again.",
                )

    def _execute(
        self, operations: Sequence[Operation], mirror: Applied, report: Report, backend: Backend | None = None
    ) -> None:
        for kind, group in groupby(operations, key=_stage):
            with report.stage(kind):
                self._batch(list(group), mirror, report, backend or self.backend)

    def _batch(self, batch: list[Operation], mirror: Applied, report: Report, backend: Backend) -> None:
        """Operations that may go to the kernel together, in order."""
        first = batch[0]
        if isinstance(first, Transaction):
            transactions = [operation for operation in batch if isinstance(operation, Transaction)]
            answers = backend.write(transactions)
            for transaction, answer in zip(transactions, answers):
                if answer is None:
                    self._transactions += backend.name == "nft"
                    _count(report, transaction)
                    record(mirror, transaction)
            for answer in answers:
                if answer is not None:
                    raise answer
            return
        if isinstance(first, ForgetConnections):
            for operation in batch:
                assert isinstance(operation, ForgetConnections)
                report.connections_forgotten += conntrack.forget(operation.addresses, unanswered=operation.unanswered)
            return
        if isinstance(first, AwaitPackets):
            grace.wait()
            return
        if isinstance(first, DestroySet):
            self._destroy(batch, mirror, report)
            return
        others = Transaction | ForgetConnections | AwaitPackets
        self._ipset.write([operation for operation in batch if not isinstance(operation, others)])
        for operation in batch:
            _count(report, operation)
            record(mirror, operation)

    def _destroy(self, batch: list[Operation], mirror: Applied, report: Report) -> None:
        """A set that lingers, or that the kernel still counts as used, stays in the mirror for the next sync to try."""
        now = perf_counter()
        for operation in batch:
            assert isinstance(operation, DestroySet)
            if self._unused.setdefault(operation.name, now + self._linger) > now and not operation.makes_way:
                continue
            try:
                self._ipset.write([operation])
            except KernelError as error:
                if "in use" not in error.reason or operation.makes_way:
                    raise
                continue
            del self._unused[operation.name]
            _count(report, operation)
            record(mirror, operation)


def _stage(operation: Operation) -> str:
    """Which batch an operation belongs to: adds and deletes never share one."""
    match operation:
        case CreateSet() | AddMembers() | SwapSets():
            return "sets"
        case ForgetConnections():
            return "conntrack"
        case Transaction():
            return "rules"
        case AwaitPackets():
            return "grace"
        case DeleteMembers():
            return "deletes"
        case DestroySet():
            return "destroys"


def _count(report: Report, operation: Operation) -> None:
    match operation:
        case CreateSet():
            report.sets_created += 1
        case AddMembers():
            report.members_added += len(operation.members)
        case DeleteMembers():
            report.members_deleted += len(operation.members)
        case DestroySet():
            report.sets_destroyed += 1
        case Transaction():
            report.transactions += 1
            report.chains_written += len(operation.chains)
            report.chains_removed += len(operation.remove)
            report.jumps_set += len(operation.jumps_to_delete) + int(operation.insert_jump)
        case _:
            pass


def present_families() -> tuple[int, ...]:
    """IPv4, and IPv6 unless the kernel was started without it."""
    return FAMILIES if Path("/proc/sys/net/ipv6").exists() else (V4,)
