"""Who may ask a worker what: API keys, their scopes, and how often.

A key is `hw_<id>_<secret>`. The file of API_KEYS_FILE holds one JSON object a line: the id, a name, a scope and the
scrypt hash of the secret (RFC 7914), never the key. The id is public and selects the line, so that a check hashes
once, for an unknown id too. A key that was verified is remembered by a keyed digest, compared in constant time, until
its line changes. The file is read again when it changes on disk: revoking needs no restart.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog

from streams.problems import Problem
from streams.settings import LOOPBACK_HOSTS, Fault, Settings

log = structlog.get_logger(__name__)

SCOPES: Final = ("read", "write", "admin")  # each holds those before it

ID_BYTES: Final = 6
SECRET_BYTES: Final = 32
KEY: Final = re.compile(r"hw_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
KEYS_MAX: Final = 1_000  # of a file
SCRYPT_N: Final = 1 << 14  # 16 MiB and some 50 ms a check
SCRYPT_R: Final = 8
SCRYPT_P: Final = 1
SCRYPT_MEMORY_MAX: Final = 64 << 20  # of a line's own n: a check never takes more
SALT_BYTES: Final = 16
HASH_BYTES: Final = 32

CHECKS_MAX: Final = 8  # different unknown keys that wait for their hash; more are told to come again
BURST_S: Final = 2.0  # a key that was silent may ask for so many seconds' worth at once
FAILURES_BURST: Final = 10  # wrong keys of an address before it is limited
FAILURES_PER_S: Final = 0.2
ADDRESSES_MAX: Final = 10_000  # remembered; the least recently seen leave first
IPV6_PREFIX: Final = 64  # one customer's network is one address

assert 128 * SCRYPT_R * SCRYPT_N <= SCRYPT_MEMORY_MAX


class KeysError(Fault):
    """The keys file cannot be used, or not as asked."""


class Key(msgspec.Struct, frozen=True):
    """A line of the file. salt, hash: hex; n: scrypt's cost; created: RFC 3339."""

    id: str
    name: str
    scope: str
    salt: str
    hash: str
    n: int
    created: str


class Caller(NamedTuple):
    """Who asks. key_id "": nobody's key is needed here."""

    key_id: str
    name: str
    scope: str


ANYBODY: Final = Caller("", "", "admin")


# -- the file


def read(path: Path) -> dict[str, Key]:
    """{id: line}. Raises KeysError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise KeysError(f"{path}: there is no such file; make a key: headwater keys add NAME --scope read") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise KeysError(
            f"{path} cannot be read ({type(failure).__name__}): it has to be this user's own file"
        ) from None
    found: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            key = _line(path, number, line)
            found[key.id] = key
    if len(found) > KEYS_MAX:
        raise KeysError(f"{path} has {len(found)} keys, {KEYS_MAX} at most: revoke some")
    return found


def _line(path: Path, number: int, line: str) -> Key:
    try:
        key = msgspec.json.decode(line, type=Key)
        salted = bytes.fromhex(key.salt) and bytes.fromhex(key.hash)
    except (msgspec.MsgspecError, ValueError):
        salted = b""
    if (
        not salted
        or key.scope not in SCOPES
        or key.n < 2
        or key.n & (key.n - 1)
        or 128 * SCRYPT_R * key.n > SCRYPT_MEMORY_MAX
    ):
        raise KeysError(f"{path}:{number}: not a key's line; remove it, and make a new key: headwater keys add")
    return key


def add(path: Path, name: str, scope: str, now_s: float) -> str:
    """A new key, its hash in the file (0600, replaced atomically); the key itself is nowhere else. Raises KeysError."""
    if not NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name for a key: letters, digits and . _ @ -, 64 at most")
    if scope not in SCOPES:
        raise KeysError(f"{scope!r} is not one of {', '.join(SCOPES)}")
    with _exclusive(path) as keys:
        if any(key.name == name for key in keys.values()):
            raise KeysError(f"there is a key of the name {name!r}: choose another, or revoke it first")
        if len(keys) >= KEYS_MAX:
            raise KeysError(f"{path} has {KEYS_MAX} keys already: revoke some")
        key_id, secret, salt = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES), os.urandom(SALT_BYTES)
        hashed = _scrypt(secret, salt, SCRYPT_N)
        created = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        keys[key_id] = Key(key_id, name, scope, salt.hex(), hashed.hex(), SCRYPT_N, created)
        _write(path, keys)
    return f"hw_{key_id}_{secret}"


def revoke(path: Path, name: str) -> None:
    """Takes the key of this name out of the file. Raises KeysError where there is none."""
    with _exclusive(path) as keys:
        left = {key_id: key for key_id, key in keys.items() if key.name != name}
        if len(left) == len(keys):
            raise KeysError(f"there is no key of the name {name!r}; `headwater keys list` names them")
        _write(path, left)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[dict[str, Key]]:
    """The file's keys, or none; nobody else changes it meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as failure:
        raise KeysError(f"{path.parent} cannot be used ({failure.strerror}): give a folder of this user") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield read(path) if path.exists() else {}
    finally:
        os.close(folder)


def _write(path: Path, keys: dict[str, Key]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(b"".join(msgspec.json.encode(key) + b"\n" for key in keys.values()))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _scrypt(secret: str, salt: bytes, n: int) -> bytes:
    return hashlib.scrypt(
        secret.encode(), salt=salt, n=n, r=SCRYPT_R, p=SCRYPT_P, maxmem=2 * SCRYPT_MEMORY_MAX, dklen=HASH_BYTES
    )


# -- rates


class Buckets:
    """A token bucket an owner: `burst` at once, then `per_s`. Memory: `owners_max` of them."""

    def __init__(self, per_s: float, burst: float, owners_max: int, clock: Callable[[], float]) -> None:
        self._per_s, self._burst, self._owners_max = per_s, burst, owners_max
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # owner -> tokens, when

    def take(self, owner: str) -> float:
        """Seconds until there is a token; 0: one was taken."""
        now_s = self._clock()
        level, since_s = self._levels.pop(owner, (self._burst, now_s))
        level = min(self._burst, level + (now_s - since_s) * self._per_s)
        wait_s = 0.0 if level >= 1 else (1 - level) / self._per_s
        self._levels[owner] = (level if wait_s else level - 1, now_s)
        if len(self._levels) > self._owners_max:
            self._levels.popitem(last=False)
        return wait_s

    def give_back(self, owner: str) -> None:
        """A token that was taken was not used."""
        level, since_s = self._levels.get(owner, (self._burst, 0.0))
        if owner in self._levels:
            self._levels[owner] = (min(self._burst, level + 1), since_s)

    def __len__(self) -> int:
        return len(self._levels)


# -- the gate


class Gate:
    """Lets callers in by their keys. path None: no keys, everybody is in (on a loopback address)."""

    def __init__(self, path: Path | None, rate_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._verified: dict[str, tuple[Key, bytes]] = {}  # id -> the line and the digest of the key it was shown for
        self._digest_key = secrets.token_bytes(32)
        self._dummy_salt = secrets.token_bytes(SALT_BYTES)
        self._rates = Buckets(rate_per_s, max(1.0, BURST_S * rate_per_s), KEYS_MAX, clock)
        self._failures = Buckets(FAILURES_PER_S, FAILURES_BURST, ADDRESSES_MAX, clock)
        self._checks: dict[bytes, asyncio.Future[Key | None]] = {}
        self._hasher = ThreadPoolExecutor(1, "keys")  # one hash at a time: a flood of wrong keys takes one core at most

    @classmethod
    def of(cls, settings: Settings) -> "Gate":
        """The gate of a worker. Raises KeysError when it would be open to the network, or its file is no good."""
        path = settings.api_keys_file
        if path is not None:
            read(path)
        elif settings.http_host not in LOOPBACK_HOSTS:
            raise KeysError(
                f"HTTP on {settings.http_host} needs keys: set HEADWATER_API_KEYS_FILE to a file of them, made by "
                "`headwater keys add NAME --scope read|write|admin`, or set HEADWATER_HTTP_HOST=127.0.0.1"
            )
        return cls(path, settings.api_rate_per_s)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self.path is None

    async def identify(self, credential: str | None, address: str) -> Caller:
        """Whose key this is. Raises Problem: unauthenticated, too-many-failures, not-ready (the file is unreadable)."""
        if self.path is None:
            return ANYBODY
        keys = self._current()
        if credential is None:
            raise _refused("Send a key: Authorization: Bearer KEY, or X-API-Key: KEY.")
        parts = KEY.fullmatch(credential)
        if parts is not None:
            seen = hashlib.blake2b(credential.encode(), key=self._digest_key).digest()
            line, digest = self._verified.get(parts[1], (None, b""))
            if hmac.compare_digest(digest, seen) and line is not None and keys.get(parts[1]) == line:
                return Caller(line.id, line.name, line.scope)
        found = None
        if parts is not None and seen in self._checks:
            found = await asyncio.shield(self._checks[seen])
        else:
            owner = _network(address)
            wait_s = self._failures.take(owner)
            if wait_s:
                raise Problem("too-many-failures", "Too many wrong keys came from this address.", retry_after_s=wait_s)
            if parts is not None:
                found = await self._check(seen, keys.get(parts[1]), parts[2], owner)
        if found is None:
            raise _refused("The key is not known here, or it was revoked.")
        self._verified[found.id] = (found, seen)
        return Caller(found.id, found.name, found.scope)

    def permit(self, caller: Caller, scope: str) -> None:
        """Raises Problem: too-many-requests, forbidden."""
        if self.path is None:
            return
        wait_s = self._rates.take(caller.key_id)
        if wait_s:
            raise Problem("too-many-requests", f"The key {caller.name} asks too often.", retry_after_s=wait_s)
        require(caller, scope)

    def knows(self, caller: Caller) -> bool:
        """Whether the caller's key is in the file still: what goes on after its request asks again and again."""
        if self.path is None:
            return True
        try:
            line = self._current().get(caller.key_id)
        except Problem:
            return False
        return line is not None and line.scope == caller.scope

    def close(self) -> None:
        """Ends the hashing thread."""
        self._hasher.shutdown(wait=False, cancel_futures=True)

    def _current(self) -> dict[str, Key]:
        """The file's keys as of now."""
        assert self.path is not None
        try:
            told = self.path.stat()
            stamp = (told.st_mtime_ns, told.st_ino, told.st_size)
            if stamp != self._stamp:
                self._keys = read(self.path)
                self._stamp = stamp
                self._verified = {i: v for i, v in self._verified.items() if self._keys.get(i) == v[0]}
        except (OSError, KeysError) as failure:
            if self._stamp is not None:
                log.error("the keys file cannot be read: nobody is let in", file=str(self.path), failure=str(failure))
            self._stamp, self._keys = None, {}
            raise Problem("not-ready", "The keys file cannot be read.", retry_after_s=1.0) from failure
        return self._keys

    async def _check(self, seen: bytes, line: Key | None, secret: str, owner: str) -> Key | None:
        """The line, if the secret is its own; the same work for a line that is not there."""
        if len(self._checks) >= CHECKS_MAX:
            self._failures.give_back(owner)
            raise Problem("too-many-requests", "Many new keys are being checked.", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        checking = loop.run_in_executor(self._hasher, _matches, line, secret, self._dummy_salt)
        self._checks[seen] = checking
        checking.add_done_callback(lambda _: self._checks.pop(seen, None))
        found = await asyncio.shield(checking)
        if found is not None:
            self._failures.give_back(owner)
        return found


def require(caller: Caller, scope: str) -> None:
    """Raises Problem (forbidden) unless the caller's scope holds this one."""
    if SCOPES.index(caller.scope) < SCOPES.index(scope):
        raise Problem("forbidden", f"The key {caller.name} has the scope {caller.scope}; this needs {scope}.")


def _matches(line: Key | None, secret: str, dummy_salt: bytes) -> Key | None:
    salt = bytes.fromhex(line.salt) if line is not None else dummy_salt
    wanted = bytes.fromhex(line.hash) if line is not None else bytes(HASH_BYTES)
    given = _scrypt(secret, salt, line.n if line is not None else SCRYPT_N)
    return line if hmac.compare_digest(given, wanted) and line is not None else None


def _refused(detail: str) -> Problem:
    return Problem("unauthenticated", detail, headers={"WWW-Authenticate": 'Bearer realm="headwater"'})


def _network(address: str) -> str:
    """What failures are counted by: an IPv4 address, an IPv6 network."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), IPV6_PREFIX), strict=False))


def credential_of(authorization: str | None, api_key: str | None) -> str | None:
    """The key of a request's headers; Authorization goes first."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return api_key or None
