"""What the worker answers: a user's row, the item matrix and the ranker, composed. No HTTP, no broker.

The answers are the shapes of `streams.answers`, byte for byte after msgspec's JSON encoding.
Everything runs in the worker's loop, in which the replica of the item matrix changes, too: a list costs about a
millisecond at 10,000 items, so that no lock and no copy is needed, and one answer never mixes two states.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Sequence
from functools import cached_property
from typing import Annotated, Any, Final, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, Meta, UnsetType
from prometheus_client import CollectorRegistry, Histogram

from model import kernels, texts
from model.adapter import Adapter
from model.profile import Profile, User, profile_of, text_terms
from model.ranker import Explanation as RankerExplanation
from model.ranker import Ranker, Ranking, Scored
from model.trial import Trial, bucket_of
from state import rows
from state.rows import UserRow
from streams import examples, tokens
from streams.answers import (
    BiasParts,
    Certificate,
    Contribution,
    Digests,
    Explanation,
    Heads,
    ItemView,
    ModelView,
    Part,
    PastEvent,
    RankedItem,
    Recommendations,
    Share,
    Similar,
    SimilarItem,
    UserState,
    Vectors,
    WhatIf,
)
from streams.events import Click, Comment, Id
from streams.pipeline import EvidenceConfig, SourceEvent, learn_users, visible_text
from streams.tokens import Token

USER_TOPICS: Final = ("clicks", "comments")
EVENT_TYPES: Final = ("click", "comment")  # of the topic code
RANK_ITEMS_MAX: Final = 1_000  # a rank request
WITHOUT_MAX: Final = rows.HISTORY_MAX + rows.COMMENTS_MAX  # all that a row keeps one by one
WITH_MAX: Final = 20  # events of a what-if: each comment waits for the encoder
LAST_EVENTS_MAX: Final = 50  # of a state
LIST_MAX: Final = 200  # recommendations or similar items a request
AT_LEAST_MAX: Final = 8  # offsets a read may wait for
AT_LEAST_WAIT_S: Final = 5.0  # a read waits this long for its offsets, then asks the client to come again

assert examples.TOPICS[: len(USER_TOPICS)] == USER_TOPICS and len(EVENT_TYPES) == len(USER_TOPICS)


class NotReady(Exception):
    """The partition's state is not here and not known to be elsewhere: it opens, or moves. Ask again."""

    def __init__(self, detail: str, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class ServingMetrics(Protocol):
    """What HTTP needs of `monitoring.metrics.Metrics`."""

    recommendation_seconds: Histogram
    registry: CollectorRegistry


class Origin(NamedTuple):
    """What lists are made of beside the user's row: the partition's epoch, the last offset of the examples log that
    the items hold, and `tokens.settings_digest`."""

    epoch: int
    examples: int
    settings: bytes


class Read(NamedTuple):
    """What a list of a user is made from beside the items, all of one moment."""

    row: bytes | None  # None: nothing is known of the user
    applied: dict[str, int]  # topic ("clicks", "comments", "erasures") -> last offset in the partition's rows; -1: none
    origin: Origin


class WorkerView(Protocol):
    """The running worker, as HTTP needs it. All of it is called in the worker's loop but `digest`."""

    partitions: int
    metrics: ServingMetrics

    @property
    def ranker(self) -> Ranker:
        """Over the replica of the item matrix."""

    @property
    def model_version(self) -> str:
        """Encoder and learner's progress, as `model_info` tells them: what a list depends on beyond the user."""

    @property
    def encoder(self) -> str:
        """Name and version of the text encoder."""

    def now(self) -> float:
        """The moment for which lists are made and events are checked, Unix s."""

    def partition_of(self, user_id: str) -> int:
        """Partition of clicks and comments that the producer's murmur2 puts the user's events in."""

    def owner_url(self, partition: int) -> str | None:
        """Address of the worker that has the partition; None: this one. Raises NotReady."""

    def learner_url(self) -> str | None:
        """Address of the worker that learns; None: this one, or nobody is known to."""

    def read(self, user_id: str) -> Read:
        """Of a user of an own partition. Raises NotReady while it opens or when it has just left."""

    def applied(self, partition: int) -> dict[str, int]:
        """As `Read` has it. Raises NotReady."""

    async def wait_applied(self, topic: str, partition: int, offset: int, timeout_s: float) -> bool:
        """Whether the offset is applied, at the latest after the timeout. Raises NotReady."""

    def encode(self, text: str, user_id: str) -> Awaitable[npt.NDArray[np.float32]]:
        """The text's unit vector, (T,) float32, by the encoder of the user's next comment, beside the loop. Raises
        NotReady."""

    async def words(self, user_id: str, offsets: Sequence[int]) -> dict[int, str]:
        """The texts of the user's comments at these offsets of their partition, as far as they are found in time."""

    @property
    def evidence(self) -> EvidenceConfig:
        """What behaviours weigh, as the stream's pipeline has it."""

    async def publish(self, topic: str, key: bytes, value: bytes) -> tuple[int, int]:
        """Appends to a source topic: (partition, offset) once acknowledged. Raises on any failure."""

    def certificate(self, name: str) -> Certificate | None:
        """What is told of an erasure, whoever has its partition; None: nothing yet. Raises NotReady."""

    async def waits(self, topic: str, partition: int, offset: int) -> bool:
        """Whether the topic has a record there that is not applied yet, of an own partition. Raises NotReady, and
        anything where the log cannot be asked."""

    def digest(self) -> Digests:
        """Applied offsets and state digests of this worker's partitions. Called in a thread of its own."""

    def model_info(self) -> ModelView:
        """Versions, settings, live prequential metrics."""

    def shown(self, told: Recommendations, trial: Trial, champion: Adapter | None) -> None:
        """The list was made while this trial was on, and answered: it is noted, beside the answer. champion: what the
        other users' texts were compared through then."""

    def ready(self) -> list[str]:
        """What the worker still waits for; empty: ready."""

    def subscribe(self) -> AsyncIterator[dict[str, Any]]:
        """What happens, for one listener, bounded; the slow one misses some. `type` tells the shape:

        {"type": "event", "topic", "user_id", "item_id"?, "action"?, "ts"} as `stream_event` makes it, and each second
        {"type": "status", "events_per_s", "lag_records", "lag_s", "positives", "items",
         "hit_ratio": {"model": number|null, "popularity": number|null, "item_knn": number|null}}.
        """


# -- shapes


class RankRequest(msgspec.Struct):
    """Items to be ordered for a user."""

    user_id: Id
    item_ids: Annotated[list[Id], Meta(min_length=1, max_length=RANK_ITEMS_MAX)]
    explain: bool = False
    texts: bool = False
    parts: bool = False
    words: bool = False


Limit = Annotated[int, Meta(ge=1, le=LIST_MAX, description="How many items.")]
WORDS: Final = "With explain: what the user wrote, as far as the log has it. Needs a key of the scope admin."
AtLeast = Annotated[
    list[Annotated[str, Meta(pattern="^(clicks|comments|erasures):[0-9]{1,9}:[0-9]{1,16}$")]],
    Meta(
        max_length=AT_LEAST_MAX,
        description="Positions topic:partition:offset, as POST /v1/events answers them: the read waits, "
        f"{AT_LEAST_WAIT_S:g} s at most, until they are applied.",
        examples=[["clicks:3:1041"]],
    ),
]
Position = Annotated[
    str,
    Meta(
        pattern="^(clicks|comments):[0-9]{1,9}:[0-9]{1,16}$",
        description="topic:partition:offset",
        examples=["clicks:3:1041"],
    ),
]


class WhatIfRequest(msgspec.Struct, rename={"with_events": "with"}):
    """What is to be different: events of the user's kept history that had not been, events that had come next."""

    without: Annotated[list[Position], Meta(max_length=WITHOUT_MAX)] = []
    with_events: Annotated[list[msgspec.Raw], Meta(max_length=WITH_MAX)] = []


class ListOptions(msgspec.Struct, frozen=True):
    """How a list is wanted."""

    limit: Limit = 10
    explain: Annotated[bool, Meta(description="Each item with the events that speak for and against it.")] = False
    exclude_seen: Annotated[bool, Meta(description="Leave out what the user has consumed.")] = True
    texts: Annotated[bool, Meta(description="Each item with its text.")] = False
    parts: Annotated[bool, Meta(description="With explain: what the bias and each value are made of.")] = False
    words: Annotated[bool, Meta(description=WORDS)] = False


class ListQuery(ListOptions, frozen=True):
    """Parameters of a list."""

    at_least: AtLeast = []


class ReadQuery(msgspec.Struct, frozen=True):
    """Parameters of another read of a user."""

    at_least: AtLeast = []


class SimilarQuery(msgspec.Struct, frozen=True):
    """Parameters of a list of similar items."""

    limit: Limit = 10


class ErasureQuery(msgspec.Struct, frozen=True):
    """Parameters of an erasure."""

    unlearn: Annotated[
        bool, Meta(description="Also learn the item model again without the user's events, exactly.")
    ] = False


# -- a user as the ranker sees them


class Reader:
    """One user's row, taken apart for one answer."""

    def __init__(
        self, view: WorkerView, user_id: str, row: UserRow | None = None, read: Read | None = None
    ) -> None:  # fmt: skip
        """row: instead of the user's own. read: a moment ago, for the same answer. Raises NotReady."""
        self.view = view
        self.bucket = bucket_of(user_id)
        self.partition = view.partition_of(user_id)
        self.read = view.read(user_id) if read is None else read
        self.row = _row_of(self.read) if row is None else row
        # Just after the user's last event: what was written a moment ago counts, whatever the clocks say.
        self.at = max(view.now(), math.nextafter(self.row.last_ts, math.inf))
        self.slots = self.row.slots()
        self.comments = [c for c in self.row.comment_entries() if c.ts < self.at]
        self.user = self._user()

    def _user(self) -> User:
        row, slots = self.row, self.slots
        ts, weights = slots["ts"].astype(np.float64), slots["weight"].astype(np.float32)
        text_weight, mean, _ = visible_text(row, self.at) if row.text_dim else (0.0, None, 0.0)
        if not text_weight:
            return User(slots["key"], ts, weights, bucket=self.bucket)
        kept = [texts.dequantize(c.scale, c.vector) for c in self.comments]
        vectors = np.stack(kept) if kept else np.zeros((0, row.text_dim), np.float32)
        decays = texts.DECAY ** np.arange(len(kept), dtype=np.float32)
        return User(slots["key"], ts, weights, mean, text_weight, vectors, decays, self.bucket)

    def consumed(self) -> npt.NDArray[np.int64]:
        """(n,) int64 keys of the items that the user has consumed."""
        return np.concatenate((self.slots["key"], self.row.seen_keys()))

    def _items(self, keys: npt.NDArray[np.int64]) -> list[tuple[str | UnsetType, str | UnsetType]]:
        """Id and text of each item, and unset for key 0. Of one that no catalogue has named the id alone, and that only
        where this worker has met it lately."""
        matrix = self.view.ranker.matrix
        at = np.where(keys != 0, matrix.indices(np.ascontiguousarray(keys)), -1).tolist()
        return [
            (matrix.names[a], matrix.texts[a] or UNSET)
            if a >= 0 and matrix.names[a]
            else ((examples.id_of(key) if key else None) or UNSET, UNSET)
            for a, key in zip(at, keys.tolist(), strict=True)
        ]

    def applied(self) -> dict[str, tuple[int, int]]:
        """Topic -> (partition, last applied offset)."""
        return {topic: (self.partition, offset) for topic, offset in self.read.applied.items()}

    @cached_property
    def behaviours(self) -> list[tuple[Any, ...]]:
        """Of each history entry, newest first: type, ts, topic, partition, offset, weight, action, item id, text."""
        slots = self.slots
        columns = zip(
            slots["ts"].astype(float).tolist(), slots["weight"].astype(float).tolist(), slots["action"].tolist(),
            self._items(slots["key"]), self.row.history_positions(), strict=True,
        )  # fmt: skip
        return [
            (EVENT_TYPES[topic], ts, USER_TOPICS[topic], self.partition, offset, weight, rows.ACTIONS[action], *item)
            for ts, weight, action, item, (topic, offset) in columns
        ]

    @cached_property
    def words(self) -> list[tuple[Any, ...]]:
        """Of each kept comment, newest first: as `behaviours`, without an action."""
        items = self._items(np.array([c.item for c in self.comments], np.int64))
        return [
            ("comment", c.ts, USER_TOPICS[c.topic], self.partition, c.offset, 1.0, UNSET, *item)
            for c, item in zip(self.comments, items, strict=True)
        ]

    def contributions(
        self, explanations: Sequence[RankerExplanation], with_text: bool, in_parts: bool
    ) -> list[list[Contribution]]:  # fmt: skip
        """Of each item's explanation, all of one ranking: one a history entry and one a kept comment's words, newest
        first within each. By columns: an answer has a thousand of them."""
        if not explanations:
            return []
        entries, comments = explanations[0].entries, explanations[0].comments
        past = [*(self.behaviours[entry] for entry in entries), *self.words[: len(comments)]]
        kind, ts, topic, partition, offset, _, action, item_id, text = zip(*past, strict=True) if past else [()] * 9
        texts = text if with_text else (UNSET,) * len(past)
        found = [
            list(map(Contribution, kind, ts, topic, partition, offset, (*given.totals, *given.comments), action,
                     item_id, texts))
            for given in explanations
        ]  # fmt: skip
        if in_parts:
            for given, contributions in zip(explanations, found, strict=True):
                heads = [Heads(*three) for three in given.heads[:3].T.tolist()]
                heads += [Heads(0.0, 0.0, value) for value in given.comments]
                for contribution, parts in zip(contributions, heads, strict=True):
                    contribution.parts = parts
        return found


def _row_of(read: Read) -> UserRow:
    return rows.unpack(read.row) if read.row is not None else UserRow()


def _ranked(reader: Reader, ranking: Ranking, scored: list[Scored], options: ListOptions) -> list[RankedItem]:
    texts = ranking.matrix.texts
    reasons = _explanations(reader, ranking.explain(scored), options) if options.explain else None
    return [
        RankedItem(
            s.item_id, s.score, s.logit, UNSET if reasons is None else reasons[at],
            texts[s.row] if options.texts else UNSET,
        )
        for at, s in enumerate(scored)
    ]  # fmt: skip


def _explanations(reader: Reader, given: Sequence[RankerExplanation], options: ListOptions) -> list[Explanation]:
    return [
        Explanation(one.bias.total, contributions, one.rest, BiasParts(*one.bias) if options.parts else UNSET)
        for one, contributions in zip(
            given, reader.contributions(given, options.texts, options.parts), strict=True
        )
    ]  # fmt: skip


def _list(
    reader: Reader, user_id: str, items: list[RankedItem], kind: int, options: ListOptions
) -> Recommendations:  # fmt: skip
    view, origin = reader.view, reader.read.origin
    token = Token(
        kind, tokens.digest_of(user_id.encode()), reader.partition, reader.read.applied,
        origin.epoch, origin.examples, origin.settings, reader.at, view.ranker.bias_at, options.limit,
        options.exclude_seen, tokens.list_digest((item.item_id, item.logit) for item in items),
    )  # fmt: skip
    arm = view.ranker.matrix.arm_of(reader.bucket)
    return Recommendations(
        user_id, tokens.write(token), view.model_version, reader.applied(), items, UNSET if arm is None else arm
    )  # fmt: skip


# -- answers


def recommend(view: WorkerView, user_id: str, options: ListOptions, read: Read | None = None) -> Recommendations:
    """The best candidates for the user. read: a moment ago, for the same answer. Raises NotReady."""
    reader = Reader(view, user_id, read=read)
    return _list(reader, user_id, best(reader, options), tokens.LIST, options)


def best(reader: Reader, options: ListOptions) -> list[RankedItem]:
    """The best candidates, best first."""
    exclude = reader.consumed() if options.exclude_seen else np.zeros(0, np.int64)
    ranking = reader.view.ranker.rank(reader.user, reader.at, exclude)
    return _ranked(reader, ranking, ranking.top(options.limit), options)


async def add_words(view: WorkerView, told: Recommendations) -> None:
    """Puts what the user wrote into the comments' contributions, as far as the log still has it, in bounded time."""
    found: dict[int, list[Contribution]] = {}
    for ranked in told.items:
        if ranked.explanation is not UNSET:
            for contribution in ranked.explanation.contributions:
                if contribution.type == "comment" and contribution.action is UNSET:
                    found.setdefault(contribution.offset, []).append(contribution)
    for offset, words in (await view.words(told.user_id, list(found))).items() if found else ():
        for contribution in found[offset]:
            contribution.words = words


class UnknownPosition(ValueError):
    """An event that is to be left out is none of those that the user's row keeps."""


async def vectors(view: WorkerView, events: Sequence[Click | Comment]) -> list[npt.NDArray[np.float32] | None]:
    """The text vector of each comment, None of each click: what `what_if` needs, encoded beside the loop."""
    comments = [event for event in events if isinstance(event, Comment)]
    found = iter(await asyncio.gather(*(view.encode(comment.text, comment.user_id) for comment in comments)))
    return [next(found) if isinstance(event, Comment) else None for event in events]


def what_if(
    view: WorkerView, user_id: str, without: Sequence[str], events: Sequence[Click | Comment],
    encoded: Sequence[npt.NDArray[np.float32] | None], options: ListOptions,
) -> WhatIf:  # fmt: skip
    """The list as it would be without the events at these positions and with those events, in their order, after.

    The model stays as it is: only the user's evidence changes, by the same fold as the stream's. Raises NotReady,
    UnknownPosition.
    """
    partition, read = view.partition_of(user_id), view.read(user_id)
    row, exact = _row_without(_row_of(read), partition, without)
    offsets = dict(read.applied)
    told: list[SourceEvent] = []
    for event, vector in zip(events, encoded, strict=True):
        code = int(isinstance(event, Comment))
        offsets[USER_TOPICS[code]] += 1
        told.append(SourceEvent(code, offsets[USER_TOPICS[code]], event, vector))
    if told:
        folded = learn_users(partition, told, lambda _: [rows.pack(row)], view.evidence)
        row = rows.unpack(folded.rows[user_id.encode()] or b"")
    reader = Reader(view, user_id, row, read)
    found = _list(reader, user_id, best(reader, options), tokens.WHAT_IF, options)
    return WhatIf(*msgspec.structs.astuple(found), exact=exact)


def _row_without(row: UserRow, partition: int, without: Sequence[str]) -> tuple[UserRow, bool]:
    wanted = {}
    for text in without:
        topic, of, offset = text.split(":")
        wanted[rows.position(USER_TOPICS.index(topic), int(offset))] = text
        if int(of) != partition:
            raise UnknownPosition(f"{text}: this user's events are in partition {partition}.")
    try:
        return rows.without(row, wanted.keys())
    except KeyError as missing:
        raise UnknownPosition(
            f"{wanted[missing.args[0]]} is none of the user's kept events: a repeat, one that has left the history, "
            "or somebody else's. The user's state and an explanation name those that are kept."
        ) from None


def rank(view: WorkerView, asked: RankRequest) -> Recommendations:
    """The given items, best first; those that are no candidates are left out. Raises NotReady."""
    reader = Reader(view, asked.user_id)
    options = ListOptions(len(asked.item_ids), asked.explain, False, asked.texts, asked.parts, asked.words)
    return _list(reader, asked.user_id, ordered(reader, asked.item_ids, options), tokens.RANK, options)


def ordered(reader: Reader, item_ids: Sequence[str], options: ListOptions) -> list[RankedItem]:
    """Those of the items that are candidates, best first."""
    keys = [examples.item_key(item_id) for item_id in item_ids]
    ranking = reader.view.ranker.rank(reader.user, reader.at)
    return _ranked(reader, ranking, ranking.of(keys), options)


def state(view: WorkerView, user_id: str) -> UserState:
    """What is known of the user; of an unknown one, nothing. Raises NotReady."""
    reader = Reader(view, user_id)
    row = reader.row
    ranker = view.ranker
    profile = profile_of(ranker.matrix, reader.user, reader.at, ranker.cooccurrence_history)
    return UserState(
        user_id, row.events, row.positives, len(reader.consumed()), row.last_ts if row.events else None, reader.at,
        _vectors(reader, profile), _parts(reader, profile), _last_events(reader), view.encoder, view.model_version,
        reader.applied(),
    )  # fmt: skip


def _vectors(reader: Reader, profile: Profile) -> Vectors:
    names = reader.view.ranker.matrix.names
    coefficients = {names[row]: float(c) for row, c in zip(profile.row, profile.ck, strict=True) if names[row] and c}
    return Vectors(profile.z.tolist(), profile.v.tolist(), coefficients)


def _parts(reader: Reader, profile: Profile) -> list[Part]:
    m = reader.view.ranker.matrix.arrays
    positions = [reader.row.history_positions()[entry] for entry in profile.entry]
    learnt = profile.wt[:, None] * m.y[profile.row]
    matrix = reader.view.ranker.matrix
    texts = m.e[profile.row] - m.mu
    item_texts = np.zeros_like(texts)
    for head, weight in enumerate(profile.text_coefficient):
        item_texts += weight[:, None] * text_terms(matrix, profile, head, texts)
    parts = [
        _part(reader, "behaviour", profile.z - profile.context, learnt, positions),
        Part("context", float(np.linalg.norm(profile.context)), []),
        _part(reader, "item_texts", item_texts.sum(axis=0), item_texts, positions),
    ]
    user = reader.user
    if user.comment is not None:
        root = math.sqrt(min(user.text_weight, kernels.TEXT_WEIGHT_MAX)) / user.text_weight
        own = text_terms(matrix, profile, 2, user.comment - m.mu)
        words = np.float32(root) * user.comment_weight[:, None] * own
        comments = [(c.topic, c.offset) for c in reader.comments]
        parts.append(_part(reader, "own_words", text_terms(matrix, profile, 2, profile.text[2:])[0], words, comments))
    ck = profile.ck
    parts.append(_part(reader, "cooccurrence", ck, np.diag(ck), positions))
    return parts


def _part(
    reader: Reader, name: str, whole: npt.NDArray[np.float32], terms: npt.NDArray[np.float32],
    positions: list[tuple[int, int]],
) -> Part:  # fmt: skip
    square = float(whole @ whole)
    if not square:
        return Part(name, 0.0, [])
    shares = (terms @ whole / square).tolist()
    events = [
        Share(USER_TOPICS[topic], reader.partition, offset, share)
        for (topic, offset), share in zip(positions, shares, strict=True)
    ]
    return Part(name, math.sqrt(square), sorted(events, key=lambda e: -abs(e.share)))


def _last_events(reader: Reader) -> list[PastEvent]:
    events = [PastEvent(*event) for event in (*reader.behaviours[:LAST_EVENTS_MAX], *reader.words)]
    return sorted(events, key=lambda e: -e.ts)[:LAST_EVENTS_MAX]


def item(view: WorkerView, item_id: str) -> ItemView | None:
    """The item as the replica has it; None where the catalogue does not know it."""
    matrix = view.ranker.matrix
    key = examples.item_key(item_id)
    row = matrix.index(key)
    if row < 0 or not matrix.arrays.flags[row] & kernels.KNOWN:
        pending = matrix.pending.get(key)
        return None if pending is None else ItemView(item_id, pending.text, 0, 0, False, 0, 0, pending.ts, None)
    m = matrix.arrays
    record = m.rec[row]
    feature = np.zeros((kernels.FEATURES, 1), np.float32)
    coefficient = profile_of(matrix, User(), view.now()).coefficient
    return ItemView(
        item_id, matrix.texts[row], float(kernels.bias_of(m, np.int32(row), view.now(), coefficient, feature)),
        float(np.linalg.norm(m.phi[row])), matrix.is_active(row), round(float(record["count"])),
        float(record["evidence"]), float(record["entered_ts"]) or None, float(record["last_ts"]) or None,
    )  # fmt: skip


def similar(view: WorkerView, item_id: str, limit: int) -> Similar | None:
    """The candidates most like the item; None where the catalogue does not know it."""
    matrix = view.ranker.matrix
    row = matrix.index(examples.item_key(item_id))
    if row < 0 or not matrix.arrays.flags[row] & kernels.KNOWN:
        return None
    nearest = view.ranker.similar(row, limit)
    return Similar(item_id, [SimilarItem(matrix.names[r], likeness, matrix.texts[r]) for r, likeness in nearest])


def titled(view: WorkerView, message: dict[str, Any]) -> dict[str, Any]:
    """A message of the stream, with the text of the item that it names."""
    matrix = view.ranker.matrix
    row = matrix.index(examples.item_key(message["item_id"])) if "item_id" in message else -1
    return {**message, "text": matrix.texts[row]} if row >= 0 and matrix.texts[row] else message


def stream_event(event: Any, ts: float) -> dict[str, Any]:
    """A Click or Comment as /v1/stream shows it: no words of the user."""
    action = getattr(event, "action", None)
    shown = {
        "type": "event", "topic": "clicks" if action else "comments", "user_id": event.user_id,
        "item_id": event.item_id, "action": action, "ts": ts,
    }  # fmt: skip
    return {name: value for name, value in shown.items() if value is not None}
