"""Tokens: each list names the state that it was made of, so that `headwater explain` can make it again from the logs.

    "v2." + base64url, without padding, of a MessagePack array (`Token`) and 8 bytes of its blake2b digest

A token is a function of offsets and times; it holds no word and no id of the user, only a digest of the id by which the
log's own records tell whose list it was.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, Final

import msgspec
import numpy as np

from model.learner import LearnerConfig
from streams.pipeline import EvidenceConfig

TOKEN_PREFIX: Final = "v2."
DIGEST_BYTES: Final = 8
LIST, RANK, WHAT_IF = range(3)  # how a list came about
KINDS: Final = ("recommendations", "rank", "what-if")


class TokenError(ValueError):
    """No token, of another version, or not whole."""


class Token(msgspec.Struct, array_like=True, frozen=True):
    """What a list was made of. Digests: of `digest_of`, `settings_digest`, `list_digest`."""

    kind: int  # LIST, RANK, WHAT_IF
    user: bytes  # digest of the user_id
    partition: int
    applied: dict[str, int]  # source topic -> last offset that the user's row held; -1: none
    epoch: int  # of the partition's owner
    examples: int  # last offset of the examples log that the items' state held
    settings: bytes  # digest of all that changes a score and is in no log
    at: float  # the moment the list is for, Unix s
    bias_at: float  # the moment the items' biases are of, Unix s
    limit: int
    exclude_seen: bool
    list: bytes  # digest of the answer


_decode = msgspec.msgpack.Decoder(Token).decode


def write(token: Token) -> str:
    """The token as text. `read(write(token)) == token`."""
    packed = msgspec.msgpack.encode(token)
    return TOKEN_PREFIX + base64.urlsafe_b64encode(packed + digest_of(packed)).decode().rstrip("=")


def read(text: str) -> Token:
    """The token of these characters. Raises TokenError."""
    if not text.startswith(TOKEN_PREFIX):
        raise TokenError(f"{text[:20]!r} does not start with {TOKEN_PREFIX!r}: no token, or of another version")
    body = text[len(TOKEN_PREFIX) :]
    try:
        whole = base64.b64decode(body + "=" * (-len(body) % 4), b"-_", validate=True)
        packed, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
        if digest_of(packed) == digest:
            return _decode(packed)
    except (ValueError, msgspec.MsgspecError):
        pass
    raise TokenError("the token is not whole: copy all of it, as the answer has it")


def digest_of(content: bytes) -> bytes:
    """DIGEST_BYTES of blake2b."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def list_digest(items: Iterable[tuple[str, float]]) -> bytes:
    """Of (item_id, logit) in their order, to the last bit."""
    return digest_of(b"".join(msgspec.msgpack.encode(pair) for pair in items))


def settings_digest(encoder: str, learner: LearnerConfig, evidence: EvidenceConfig) -> bytes:
    """Of what changes a score and is in no log: the encoder, and the settings of learner and evidence."""
    told = [encoder, asdict(learner), asdict(replace(evidence, rank_sample=0.0))]  # the sample is in the log
    return digest_of(json.dumps(told, sort_keys=True, default=_plain).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a configuration")
