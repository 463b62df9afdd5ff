"""The answers of HTTP as types: what a worker encodes and a client decodes, and the schemas of the OpenAPI document.

No room is imported here, so that a program that asks a worker loads none of what a worker is made of. A field that does
not apply is left out of the JSON and UNSET in the type; fields that a later version adds are ignored. What an answer
has by the thousand holds no cycle, and is nothing for the garbage collector.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

# -- events and lists


class Accepted(msgspec.Struct):
    """Events that the log has acknowledged, and where: "topic:partition:offset" each, in the request's order."""

    accepted: int
    positions: list[str]


class Heads(msgspec.Struct, gc=False):
    """What makes the value of a behaviour: what was learnt of its item, how often the two items went together, how
    alike their texts are. Of a comment's words the text alone."""

    learnt: float
    cooccurrence: float
    text: float


class Contribution(msgspec.Struct, gc=False):
    """What one past event adds to a logit. A comment about an item adds twice: as what was done with the item (its
    action is "comment"), and by its words (no action). text: the item's; words: what the user wrote, where it was
    asked for and the log still has it."""

    type: str
    ts: float
    topic: str
    partition: int
    offset: int
    value: float
    action: str | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    words: str | UnsetType = UNSET
    parts: Heads | UnsetType = UNSET


class BiasParts(msgspec.Struct, gc=False):
    """What makes the bias. constant: the item's learnt b_j; popularity, age, recency: of the item as of now; context:
    how well the item goes with so long a history and so long a pause, whatever was in it; calibration: minus the
    logarithm of what the user's other candidates sum up to."""

    constant: float
    popularity: float
    age: float
    recency: float
    context: float
    calibration: float


class Explanation(msgspec.Struct, gc=False):
    """bias + the contributions' values + rest = logit, within 1e-4. bias: the item's own part and the calibration;
    rest: texts older than those kept one by one."""

    bias: float
    contributions: list[Contribution]
    rest: float
    bias_parts: BiasParts | UnsetType = UNSET


class RankedItem(msgspec.Struct, gc=False):
    """An item of a list. score: probability, among the user's candidates, of being the next positive."""

    item_id: str
    score: float
    logit: float
    explanation: Explanation | UnsetType = UNSET
    text: str | UnsetType = UNSET


class Recommendations(msgspec.Struct):
    """A list, best first, and the state that it was made of: applied is topic -> [partition, last offset]. arm: the
    user's, in the trial of an adapter that is on."""

    user_id: str
    token: str
    model_version: str
    applied: dict[str, tuple[int, int]]
    items: list[RankedItem]
    arm: Literal["champion", "challenger"] | UnsetType = UNSET


class WhatIf(Recommendations, kw_only=True):
    """The list that it would be, from the item state as it is. exact: to the byte that of a stream with these events
    alone; false where the user's row does not hold every event, so that a repeat or an older event might have taken
    a removed one's place. An event of `with` has the offset that would come next."""

    exact: bool


# -- users and items


class Vectors(msgspec.Struct):
    """z_i: against phi_j (behaviour), against the item's text vector (text), and against its co-occurrences, a
    coefficient an item of the history."""

    behaviour: list[float]
    text: list[float]
    cooccurrence: dict[str, float]


class Share(msgspec.Struct):
    """What part of a vector an event made: its projection on it, so that the shares and the rest make 1."""

    topic: str
    partition: int
    offset: int
    share: float


class Part(msgspec.Struct):
    """A part of z_i, with the events that made it, the largest shares first."""

    name: str
    norm: float
    events: list[Share]


class PastEvent(msgspec.Struct):
    """An event of the user's row; of a comment's words only the vector is kept, and it is not shown."""

    type: str
    ts: float
    topic: str
    partition: int
    offset: int
    weight: float
    action: str | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    text: str | UnsetType = UNSET


class UserState(msgspec.Struct):
    """What is known of a user, as of `at` (Unix s). consumed: items that are no candidates any more."""

    user_id: str
    events: int
    positives: int
    consumed: int
    last_ts: float | None
    at: float
    z: Vectors
    parts: list[Part]
    last_events: list[PastEvent]
    encoder: str
    model_version: str
    applied: dict[str, tuple[int, int]]


class ItemView(msgspec.Struct):
    """An item. bias: b_j as of now; norm: of phi_j; evidence: positives + .5 a low rating; candidate: may be listed."""

    item_id: str
    text: str
    bias: float
    norm: float
    candidate: bool
    positives: int
    evidence: float
    entered_ts: float | None
    last_ts: float | None


class SimilarItem(msgspec.Struct):
    """similarity: cosine of the learnt vectors plus cosine of the text vectors, -2 to 2."""

    item_id: str
    similarity: float
    text: str


class Similar(msgspec.Struct):
    """The nearest candidates, most like first."""

    item_id: str
    items: list[SimilarItem]


# -- a worker


class Alive(msgspec.Struct):
    """The process answers."""

    status: Literal["ok"]


class Ready(msgspec.Struct):
    """Every partition of the worker is open."""

    status: Literal["ready"]


class PartitionDigest(msgspec.Struct):
    """A partition's state: applied (topic -> last offset) and digest are of one moment."""

    kind: Annotated[str, Meta(pattern="^(users|catalogue|learner)$")]
    partition: int
    applied: dict[str, int]
    digest: str


class Digests(msgspec.Struct):
    """The open partitions of the worker at `url`. workers: the addresses of all that share the partitions."""

    url: str
    workers: list[str]
    encoder: str
    partitions: list[PartitionDigest]


Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class TrainingView(msgspec.Struct):
    """What a candidate was trained on, and its loss there in nats beside those of the encoder as it came (frozen) and
    of what was in use (champion). Empty where the trainer did not make it."""

    messages: Count | UnsetType = UNSET
    examples: Count | UnsetType = UNSET
    loss: float | UnsetType = UNSET
    loss_frozen: float | UnsetType = UNSET
    loss_champion: float | UnsetType = UNSET


class DecisionView(msgspec.Struct):
    """What was decided at a position of the examples log: promote or drop (of a candidate), switched, kept or rollback
    (after the watch of a switch), trial and trial ended (on live users, by hand). The evidence, where a duel was
    decided: its tests, and log10 of the e-values that the candidate (of kept and rollback: the predecessor) is better,
    and that it is worse. verdict: better, worse or none. taken_back: of a switch. challenger, share: of a trial, the
    adapter ("" for the encoder as it is), and of the users."""

    kind: str
    position: Count
    tests: Count | UnsetType = UNSET
    mean_difference: float | UnsetType = UNSET
    log10_e_better: float | UnsetType = UNSET
    log10_e_worse: float | UnsetType = UNSET
    alpha: float | UnsetType = UNSET
    verdict: str | UnsetType = UNSET
    taken_back: bool | UnsetType = UNSET
    challenger: str | UnsetType = UNSET
    share: float | UnsetType = UNSET


class CheckpointView(msgspec.Struct):
    """A checkpoint of the encoder's adapter, as last announced. state: shadow, dropped, current, retired or taken back.
    offset: of the examples log, up to where it was trained; created: Unix s. Evidence is told with a decision: a
    candidate whose duel goes on has none. current_since: Unix s, of the first announcement known that it is."""

    name: str
    adapter: str
    parent: str
    offset: Count
    created: float
    state: str
    training: TrainingView = msgspec.field(default_factory=TrainingView)
    decisions: list[DecisionView] = []
    current_since: float | UnsetType = UNSET


class NextEncoderView(msgspec.Struct):
    """An encoder that is announced (`headwater encoder migrate`). number: in the order of the encoders' use; state:
    loading, loaded or failed, for the reason told."""

    name: str
    number: Count
    state: str
    reason: str = ""


class TrialView(msgspec.Struct):
    """An A/B test of an adapter on live users. adapter: the challenger's, null for the encoder as it is; share: of the
    users; offset: of the examples log, by which the trial is known."""

    adapter: str | None
    share: float
    offset: Count


class EncoderView(msgspec.Struct):
    """The text encoder: name and digest, numbers a vector, and the adapter that texts are compared through or null.
    number: of the encoders that the app id has had, from 0; next: the one that it is to move to, or that is waited for
    here, or null. texts: of this worker's partitions, by topic, the number of the encoder that reads what comes next.
    checkpoints: of such adapters, newest first, as far as they are announced on `encoder-checkpoints`, whatever app id
    of the topic prefix they were made for. trial: that is on, or null."""

    name: str
    dim: int
    adapter: str | None
    checkpoints: list[CheckpointView]
    number: Count = 0
    next: NextEncoderView | None = None
    trial: TrialView | None = None
    texts: dict[str, dict[str, Count]] = {}


class LearnerView(msgspec.Struct):
    """What the learner has taken since it opened here: examples, entries of items, messages of the examples log.
    encoder: number of the one whose vectors the items have."""

    applied: dict[str, int]
    examples: int
    items: int
    messages: int
    encoder: Count = 0


class ReplicaView(msgspec.Struct):
    """The items that lists are made of: all, the candidates among them, the positives that they were learnt from."""

    items: int
    active: int
    positives: int
    applied: dict[str, int]


class Figures(msgspec.Struct, rename={"hr": "hr@10", "ndcg": "ndcg@10", "recall": "recall@20"}):
    """How high the target of a test was ranked: means over tests; null where there were none."""

    hr: float | None
    ndcg: float | None
    mrr: float | None
    recall: float | None


class Metrics(Figures):
    """The newest tests, each ranked before it was learnt. log_loss: in nats, of what gives probabilities."""

    second_half: Figures
    new_user: Figures
    new_item: Figures
    auc: float | None
    log_loss: float | None


class Prequential(msgspec.Struct):
    """The model beside running popularity (by its half-life in positives; popularity: without one) and item-kNN; empty
    before the first test. drift: signal -> how often its mean has changed."""

    model: Metrics | UnsetType = UNSET
    popularity_10: Metrics | UnsetType = UNSET
    popularity_100: Metrics | UnsetType = UNSET
    popularity_1000: Metrics | UnsetType = UNSET
    popularity: Metrics | UnsetType = UNSET
    item_knn: Metrics | UnsetType = UNSET
    drift: dict[str, int] | UnsetType = UNSET


class ModelView(msgspec.Struct):
    """Encoder, learner and replica. config: the learner's settings, by name. events_ and items_applied: records of this
    worker's partitions whose examples are in their log. workers: all that have partitions. learner, examples_applied
    and prequential are the learning worker's, whichever is asked; learner is null while that one does not answer.
    """

    version: str
    model_version: str
    encoder: EncoderView
    learner: LearnerView | None
    config: dict[str, int | float]
    replica: ReplicaView
    events_applied: int
    items_applied: int
    examples_applied: int | None
    prequential: Prequential
    workers: list[str] = []


# -- erasures


class StateErased(msgspec.Struct):
    """What the user's row held. place: the offsets of the partition's sources that were applied when it was deleted;
    digest: of the partition's state afterwards, at the offsets `applied`."""

    events: int
    behaviours: int
    seen: int
    comments: int
    place: dict[str, int]
    applied: dict[str, int] | None = None
    digest: str | None = None


class StoreErased(msgspec.Struct):
    """The owner's disk: `purged_at` (Unix s), all traces of the row were taken off it."""

    purged_at: float


class ChangelogErased(msgspec.Struct):
    """The changelog of the partition: its records before `deleted_before` were deleted, and of those that are left
    `naming` name the user (more than 0 where the user has come back). `kept`: why records could not be deleted."""

    topic: str
    partition: int
    deleted_before: int
    naming: int
    kept: str | None = None


class LogRemains(msgspec.Struct):
    """Records of a log that name the user and leave with its retention, the last at `until` (Unix s)."""

    topic: str
    partition: int
    records: int
    first: int
    last: int
    until: float


class ModelUnlearnt(msgspec.Struct):
    """What the learner did: `exact` where its state is that of an examples log without the user's examples.

    digest: of the item state at `applied` (a position of the examples log).
    """

    exact: bool
    applied: int
    removed: int = 0  # examples that were left out
    messages: int = 0  # of the examples log, learnt again
    seconds: float = 0.0
    digest: str | None = None
    reason: str | None = None  # why it is not exact
    done: bool = True
    progress: float = 1.0


class Certificate(msgspec.Struct):
    """An erasure. status: "pending" (its record is not applied yet), "running", "complete"."""

    erasure_id: str
    status: str
    unlearn: bool = False
    requested_at: float | None = None  # Unix s: when its record was published
    completed_at: float | None = None
    state: StateErased | None = None
    store: StoreErased | None = None
    changelog: ChangelogErased | None = None
    remains: list[LogRemains] | None = None
    unlearn_at: int | None = None  # place in the examples log from which on the learner leaves the user out
    unlearn_from: dict[str, int] | None = None  # source topic -> where its log began: earlier events are not known
    model: ModelUnlearnt | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.status == "complete"
