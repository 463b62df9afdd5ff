"""The audit log: who read or changed which user, when, by which key, and with what outcome; a topic, hash-chained.

Each worker process writes one chain: record n holds the blake2b digest of record n - 1's digest and its own bytes, so
that a record which is edited, taken out or put in breaks the chain (`verify`). Users are named by pseudonyms only.

Records wait in a bounded queue and are sent in batches beside the requests. While the broker is away they wait; when
`QUEUE_MAX` of them do, requests about users are refused (503) rather than answered unaudited. A process that is
killed loses what it has not sent, half a second's at most: its chain has no closing record then, and `verify` says so.
"""

import asyncio
import contextlib
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import structlog

from state.sealing import Sealer
from streams import kafka
from streams.problems import Problem
from streams.settings import Settings

log = structlog.get_logger(__name__)

AUDIT_VERSION: Final = 1
PARTITION: Final = 0  # the topic has one
QUEUE_MAX: Final = 20_000  # records that wait for the broker
REFUSALS_MAX: Final = QUEUE_MAX // 2  # with so many waiting, refusals are only counted: a flood locks nobody out
BATCH_RECORDS_MAX: Final = 500
LINGER_S: Final = 0.25
RETRY_S: Final = 1.0
CLOSE_MAX_S: Final = 1.0  # at the end, for what still waits
USERS_MAX: Final = 500  # of one record: as many as a request may name
CHAIN_BYTES: Final = 8
DIGEST_BYTES: Final = 32
PSEUDONYM_BYTES: Final = 16
EVERYBODY: Final = "*"  # in the place of a user: the stream of all of them
OPENED: Final = "opened"  # operations of the first and the last record of a chain
CLOSED: Final = "closed"
OMITTED: Final = "omitted"  # count: refusals that are in no record of their own
REFUSALS: Final = (401, 403, 429)

Send = Callable[[list[tuple[bytes | None, bytes | None]]], Awaitable[Any]]


class Record(msgspec.Struct, omit_defaults=True):
    """What happened. count: how many requests alike came at once (refusals alone are counted together)."""

    v: int
    chain: str
    n: int
    ts: float
    operation: str
    status: int = 0
    key: str = ""  # its name; "": none, or a wrong one
    key_id: str = ""
    address: str = ""
    users: list[str] = []
    request_id: str = ""
    forwarded: bool = False
    count: int = 1


class Entry(msgspec.Struct):
    """A record of the topic: the chain's digest with it, and its own bytes."""

    hash: str
    record: msgspec.Raw


class Note:
    """What is known of a request before its outcome."""

    def __init__(self, operation: str, address: str, forwarded: bool) -> None:
        self.operation = operation
        self.address = address
        self.forwarded = forwarded
        self.key = self.key_id = ""
        self.users: list[str] = []
        self.is_change = False


def pseudonym(user_id: str, key: bytes = b"") -> str:
    """A user's name in the log: hex blake2b of the id, keyed where there is a key."""
    return hashlib.blake2b(user_id.encode(), key=key, digest_size=PSEUDONYM_BYTES, person=b"headwater-user").hexdigest()


def audit_key(sealer: Sealer | None) -> bytes:
    """What keys pseudonyms and chains, where data keys are set."""
    return b"" if sealer is None else sealer.audit_key


def _link(previous: bytes, record: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(previous + record, key=key, digest_size=DIGEST_BYTES, person=b"headwater-audit").digest()


class Audit:
    """One worker's chain. `note` is called in the loop; `run` sends.

    key: of pseudonyms and chain digests; without one anybody can compute both.
    """

    def __init__(self, send: Send, now: Callable[[], float], key: bytes = b"") -> None:
        self.chain = secrets.token_hex(CHAIN_BYTES)
        self._send = send
        self._now = now
        self._key = key
        self._waiting: list[Record] = []
        self._refusals: dict[tuple[str, ...], Record] = {}  # those that wait, to be counted together
        self._arrived = asyncio.Event()
        self._n = 0
        self._last = b""
        self._omitted = 0
        self._is_closing = False
        self._append(OPENED)

    def check(self) -> None:
        """Raises Problem when no more records can wait."""
        if len(self._waiting) >= QUEUE_MAX:
            raise Problem("not-audited", "The audit log cannot be written.", retry_after_s=RETRY_S)

    def note(self, note: Note, status: int, request_id: str) -> None:
        """A request's outcome, where it belongs into the log: about a user, a change, or refused."""
        is_refusal = status in REFUSALS
        if not (note.users or note.is_change or is_refusal):
            return
        named = [] if status in (401, 429) else note.users[:USERS_MAX]  # nobody in particular asked
        users = [u if u == EVERYBODY else pseudonym(u, self._key) for u in named]
        alike = (note.operation, str(status), note.key_id, note.address, *users)
        known = self._refusals.get(alike) if is_refusal else None
        if known is not None:
            known.count += 1
            return
        if is_refusal and len(self._waiting) >= REFUSALS_MAX:
            self._omitted += 1
            return
        record = self._append(
            note.operation, status=status, key=note.key, key_id=note.key_id, address=note.address, users=users,
            request_id=request_id, forwarded=note.forwarded,
        )  # fmt: skip
        if is_refusal:
            self._refusals[alike] = record

    def _append(self, operation: str, **more: Any) -> Record:
        record = Record(AUDIT_VERSION, self.chain, -1, round(self._now(), 3), operation, **more)
        self._waiting.append(record)
        self._arrived.set()
        return record

    async def run(self) -> None:
        """Sends what waits, until cancelled or closed. A failed batch is sent again: records may repeat."""
        while not (self._is_closing and not self._waiting):
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                if not self._is_closing:
                    await asyncio.sleep(LINGER_S)
                await self._send_batch()

    async def _send_batch(self) -> None:
        if self._omitted:
            self._append(OMITTED, count=self._omitted)
            self._omitted = 0
        batch = self._waiting[:BATCH_RECORDS_MAX]
        self._refusals.clear()  # what is numbered does not change any more
        entries = []
        for record in batch:
            record.n = self._n
            body = msgspec.json.encode(record)
            self._last = _link(self._last, body, self._key)
            self._n += 1
            entries.append((self.chain.encode(), msgspec.json.encode(Entry(self._last.hex(), msgspec.Raw(body)))))
        is_failing = False
        while True:
            try:
                await self._send(list(entries))
                break
            except Exception as failure:
                if not is_failing:
                    log.error("audit records wait: the audit topic cannot be written; `headwater topics` makes it",
                              failure=type(failure).__name__)  # fmt: skip
                is_failing = True
                await asyncio.sleep(RETRY_S)
        del self._waiting[: len(batch)]

    async def close(self, running: "asyncio.Task[None]") -> None:
        """The closing record, and what waits, sent within CLOSE_MAX_S; then `running` ends."""
        if not self._is_closing:
            self._append(CLOSED)
            self._is_closing = True
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(running, CLOSE_MAX_S)
        if self._waiting:
            log.error("audit records are lost: the broker took none of them", records=len(self._waiting))


# -- checking it


@dataclass
class Chain:
    """One worker process's records, as far as the topic has them. faults: sentences.

    last: the newest record's digest. Kept elsewhere, it proves later that the end was not cut off.
    """

    name: str
    first: int
    last_n: int
    last: str
    is_closed: bool = False
    faults: list[str] = field(default_factory=list)
    recent: dict[int, str] = field(default_factory=dict)  # n -> digest, of a batch's length: a batch may come twice


class Verifier:
    """Reads a topic's records in order and finds what was edited, taken out or put in.

    Where the topic's own beginning is gone (retention), a chain may begin behind its record 0.
    """

    def __init__(self, key: bytes = b"") -> None:
        self.chains: dict[str, Chain] = {}
        self.faults: list[str] = []  # of records that belong to no chain
        self._key = key
        self._begins_late = False
        self._offset = -1

    @property
    def all_faults(self) -> list[str]:
        """Every fault, with its chain."""
        return [*self.faults, *(f"chain {c.name}, {fault}" for c in self.chains.values() for fault in c.faults)]

    def feed(self, offset: int, value: bytes | None) -> Record | None:
        """The record, if it is one, and not one that was sent again."""
        if self._offset < 0:
            self._begins_late = offset > 0
        self._offset = offset
        try:
            entry = msgspec.json.decode(value or b"", type=Entry)
            record = msgspec.json.decode(entry.record, type=Record)
        except (msgspec.MsgspecError, ValueError):
            self.faults.append(f"offset {offset}: not an audit record")
            return None
        chain = self.chains.get(record.chain)
        is_repeated = chain is not None and record.n <= chain.last_n
        if chain is None:
            chain = self.chains[record.chain] = Chain(record.chain, record.n, record.n - 1, "")
            if record.n and not self._begins_late:
                chain.faults.append(f"offset {offset}: it begins with record {record.n}: those before are missing")
        elif record.n > chain.last_n + 1:
            chain.faults.append(f"offset {offset}: record {record.n} follows {chain.last_n}: those between are missing")
        if not self._fits(chain, record.n, entry) or (is_repeated and chain.recent.get(record.n) != entry.hash):
            chain.faults.append(f"offset {offset}: record {record.n} does not fit: it, or the one before, was changed")
        if is_repeated:
            return None
        chain.last_n, chain.last, chain.is_closed = record.n, entry.hash, record.operation == CLOSED
        chain.recent[record.n] = entry.hash
        chain.recent.pop(record.n - 2 * BATCH_RECORDS_MAX, None)
        return record

    def _fits(self, chain: Chain, n: int, entry: Entry) -> bool:
        """Whether the digest is that of the one before and the record; true where the one before is not there."""
        before = "" if n == 0 else chain.recent.get(n - 1)
        if before is None:
            return True
        try:
            previous, given = bytes.fromhex(before), bytes.fromhex(entry.hash)
        except ValueError:
            return False
        return hmac.compare_digest(_link(previous, bytes(entry.record), self._key), given)


async def read(settings: Settings, verifier: Verifier) -> list[Record]:
    """The records of the audit topic up to its end now, each checked by the verifier. Raises KafkaError."""
    topic, options = settings.internal_topic("audit"), settings.kafka_options()
    end = await kafka.log_end(options, topic, PARTITION)
    if end == 0:
        return []
    batches = kafka.read_log(options, topic, PARTITION, 0, end - 1)
    fed = [verifier.feed(r.offset, r.value) async for batch in batches for r in batch]
    return [record for record in fed if record is not None]
