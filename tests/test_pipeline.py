"""The fold of events into user rows and examples, and the way of a message into the learner."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.examples import new_examples
from model.learner import LearnerConfig
from state import rows
from streams import examples, pipeline
from streams.events import Click, Comment, Erasure, Item, Withdrawn
from streams.examples import CLICKS, COMMENTS, ERASURES, item_key
from streams.kafka import BATCH_BYTES_MAX
from streams.pipeline import EvidenceConfig, ItemLearner, SourceEvent

DIM = 24
CONFIG = LearnerConfig(text_dim=DIM, dim=8, negatives=16, neighbours_max=16)
EVIDENCE = EvidenceConfig(weights={"purchase": 3.0})


class Users:
    """Rows in a dict, as a store would hold them."""

    def __init__(self, config: EvidenceConfig = EVIDENCE) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.config = config
        self.messages: list[bytes] = []

    def learn(self, events: list[SourceEvent], partition: int = 0) -> pipeline.UserBatch:
        batch = pipeline.learn_users(partition, events, lambda keys: [self.rows.get(k) for k in keys], self.config)
        for key, row in batch.rows.items():
            if row is None:
                del self.rows[key]
            else:
                self.rows[key] = row
        self.messages += batch.messages
        return batch

    def row(self, user: str) -> rows.UserRow:
        return rows.unpack(self.rows[user.encode()])


def click(offset: int, user: str, item: str, ts: float = 0.0, action: str = "click", value: float = 1.0) -> SourceEvent:
    return SourceEvent(CLICKS, offset, Click(user, item, action, value, ts))


def comment(offset: int, user: str, item: str | None, ts: float, seed: int = 0) -> SourceEvent:
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return SourceEvent(COMMENTS, offset, Comment(user, "words", item, ts), vector / np.linalg.norm(vector))


def erasure(offset: int, user: str, ts: float = 0.0) -> SourceEvent:
    return SourceEvent(ERASURES, offset, Erasure(user, ts))


def decode(messages: list[bytes], topics: int = 3) -> list[dict[str, Any]]:
    """What the learner would see of these messages, example by example."""
    buffer = new_examples(CONFIG, seen_max=10_000)
    out = []
    applied: dict[int, np.ndarray] = {}
    for message in messages:
        partition = examples.read_header(message)[1]
        batch = examples.unpack_examples(message, buffer, applied.setdefault(partition, np.full(topics, -1, np.int64)))
        for b in range(batch.count):
            n = int(batch.history_count[b])
            seen = batch.seen[batch.seen_start[b] : batch.seen_start[b + 1]]
            out.append({
                "item": int(batch.item[b]), "label": int(batch.label[b]), "ts": float(batch.ts[b]),
                "source": int(batch.source[b]), "history": batch.history_item[b, :n].tolist(),
                "weights": batch.history_weight[b, :n].tolist(), "times": batch.history_ts[b, :n].tolist(),
                "text": batch.text[b].copy() if batch.text_on[b] else None, "text_weight": float(batch.text_weight[b]),
                "ranked": bool(batch.ranked[b]), "seen": seen.tolist(),
            })  # fmt: skip
    return out


def test_an_example_carries_the_history_before_its_event() -> None:
    users = Users()
    users.learn([click(0, "u", "a", 10), click(1, "u", "b", 20.7), click(2, "v", "a", 21)])
    users.learn([click(3, "u", "c", 30)])
    seen = decode(users.messages)
    assert [e["item"] for e in seen] == [item_key(i) for i in "abac"]
    assert [e["history"] for e in seen] == [[], [item_key("a")], [], [item_key("b"), item_key("a")]]
    assert seen[3]["times"] == [20, 10]
    assert seen[3]["source"] & 0xFFFF == 3


def test_a_repeat_is_counted_and_not_learnt() -> None:
    users = Users()
    users.learn([click(0, "u", "a"), click(1, "u", "a"), click(2, "u", "a", action="purchase")])
    assert len(decode(users.messages)) == 1
    assert users.row("u").events == 3
    assert users.row("u").positives == 1


def test_a_low_rating_is_evidence_and_consumes_the_item() -> None:
    users = Users()
    users.learn([
        click(0, "u", "a", action="rating", value=3.5), click(1, "u", "a", action="rating", value=5),
        click(2, "u", "b", action="rating", value=4), click(3, "u", "c", action="skip"),
    ])  # fmt: skip
    seen = decode(users.messages)
    assert [e["label"] for e in seen] == [0, 1, 0]
    assert seen[1]["weights"] == pytest.approx([0.7], abs=1e-3)
    assert users.row("u").positives == 1


def test_weights_are_per_action_and_unknown_actions_are_counted() -> None:
    users = Users()
    batch = users.learn(
        [click(0, "u", "a", action="purchase"), click(1, "u", "b", action="teleport"), click(2, "u", "c")]
    )
    assert batch.unknown_actions == 1
    assert decode(users.messages)[2]["weights"] == [1.0, 3.0]


def test_a_comment_on_a_new_item_is_its_positive_and_on_a_known_one_only_text() -> None:
    users = Users()
    users.learn([comment(0, "u", "a", 1.0), click(0, "u", "a", 2.0), comment(1, "u", "a", 3.0, seed=1)])
    seen = decode(users.messages)
    assert [e["item"] for e in seen] == [item_key("a")]
    assert users.row("u").comment_count == 2


def test_a_text_is_seen_only_once_the_users_time_has_advanced() -> None:
    users = Users()
    users.learn([comment(0, "u", None, 5.0), click(0, "u", "a", 5.0), click(1, "u", "b", 5.0), click(2, "u", "c", 5.1)])
    texts = [e["text"] for e in decode(users.messages)]
    assert texts[0] is None and texts[1] is None
    vector = comment(0, "u", None, 5.0).vector
    assert vector is not None
    np.testing.assert_allclose(texts[2], vector, atol=0.01)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 20])
def test_the_text_of_an_example_is_the_decayed_mean(count: int) -> None:
    users = Users()
    users.learn([comment(n, "u", None, float(n), seed=n) for n in range(count)])
    users.learn([click(0, "u", "a", 100.0)])
    (example,) = decode(users.messages)
    decays = 0.9 ** np.arange(count)[::-1]
    vectors = np.stack([v for n in range(count) if (v := comment(0, "u", None, 0, seed=n).vector) is not None])
    np.testing.assert_allclose(example["text"], decays @ vectors / decays.sum(), atol=0.01)
    assert example["text_weight"] == pytest.approx(decays.sum(), rel=1e-5)


def test_what_falls_out_of_the_history_stays_consumed() -> None:
    users = Users(replace(EVIDENCE, rank_sample=1.0))
    total = rows.HISTORY_MAX + 7
    users.learn([click(n, "u", f"i{n}", float(n)) for n in range(total)])
    users.learn([click(total, "u", "i0", 1e6), click(total + 1, "u", "new", 1e6)])
    last = decode(users.messages)[-1]
    assert last["item"] == item_key("new")
    assert len(last["history"]) == rows.HISTORY_MAX
    assert last["seen"] == [item_key(f"i{n}") for n in range(7)]


def test_the_rank_sample_is_a_function_of_the_position() -> None:
    def sampled(share: float) -> list[int]:
        users = Users(replace(EVIDENCE, rank_sample=share))
        users.learn([click(n, f"u{n}", "a") for n in range(2000)])
        return [e["source"] for e in decode(users.messages) if e["ranked"]]

    assert sampled(0.0) == []
    assert len(sampled(1.0)) == 2000
    quarter = sampled(0.25)
    assert 400 < len(quarter) < 600
    assert quarter == sampled(0.25)
    assert set(quarter) <= set(sampled(0.5))


def test_an_erasure_ends_the_row_and_tells_what_it_held() -> None:
    users = Users()
    users.learn([click(0, "u", "a"), comment(0, "u", None, 1.0), click(1, "v", "a")])
    other = users.rows[b"v"]
    batch = users.learn([erasure(7, "u", 2.0)])
    assert batch.rows == {b"u": None}
    assert batch.erased == [pipeline.Erased(7, "u", False, events=2, behaviours=1, seen=0, comments=1)]
    assert users.rows == {b"v": other}


def test_an_erasure_of_nobody_and_of_this_batchs_events_alone_writes_no_row_that_would_name_the_user() -> None:
    users = Users()
    assert users.learn([erasure(0, "u")]).rows == {}
    batch = users.learn([click(0, "u", "a"), erasure(1, "u")])
    assert batch.rows == {}
    assert [e.events for e in batch.erased] == [1]
    assert len(decode(batch.messages)) == 1


def test_who_comes_back_after_an_erasure_begins_anew() -> None:
    users, fresh = Users(), Users()
    users.learn([click(0, "u", "a"), comment(0, "u", "b", 1.0)])
    users.messages = []
    users.learn([erasure(0, "u", 2.0), click(1, "u", "a", 3.0), click(2, "u", "c", 4.0)])
    fresh.learn([click(1, "u", "a", 3.0), click(2, "u", "c", 4.0)])
    assert users.rows == fresh.rows
    assert users.messages == fresh.messages


KINDS = st.sampled_from(["click", "low", "text", "erasure"])
EVENTS = st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from("abcdefg"), st.integers(0, 9), KINDS), max_size=60)


@given(EVENTS, st.integers(0, 10_000))
@settings(max_examples=60)
def test_rows_and_examples_do_not_depend_on_the_batch_cuts(events: list[Any], seed: int) -> None:
    stream = []
    for n, (user, item, ts, kind) in enumerate(events):
        if kind == "erasure":
            stream.append(erasure(n, user, float(ts)))
        elif kind == "text":
            stream.append(comment(n, user, item, float(ts), seed=n))
        else:
            stream.append(click(n, user, item, float(ts), "rating" if kind == "low" else "click"))
    whole, cut = Users(), Users()
    whole.learn(stream)
    rng = random.Random(seed)
    while stream:
        size = rng.randrange(1, 9)
        cut.learn(stream[:size])
        stream = stream[size:]
    assert whole.rows == cut.rows
    for one, other in zip(decode(whole.messages), decode(cut.messages), strict=True):
        assert str(one) == str(other)


def test_examples_at_or_below_the_applied_offset_are_dropped() -> None:
    users = Users()
    users.learn([click(n, "u", f"i{n}") for n in range(5)])
    buffer = new_examples(CONFIG)
    applied = np.array([2, -1, -1])
    batch = examples.unpack_examples(users.messages[0], buffer, applied)
    assert batch.count == 2
    assert batch.item[:2].tolist() == [item_key("i3"), item_key("i4")]
    assert applied.tolist() == [4, -1, -1]


@given(st.binary(max_size=300), st.integers(0, 3))
def test_torn_messages_raise_and_touch_nothing_outside(noise: bytes, count: int) -> None:
    head = examples.HEADER.pack(examples.MESSAGE_VERSION, examples.KIND_EXAMPLES, 0, count, 0)
    buffer = new_examples(CONFIG)
    try:
        batch = examples.unpack_examples(head + noise, buffer, np.full(3, -1, np.int64))
    except ValueError:
        return
    assert batch.count <= count


def test_messages_are_bounded_in_examples_and_in_bytes() -> None:
    small = examples.pack_messages(0, [b"x" * 40] * (2 * examples.MESSAGE_EXAMPLES_MAX + 1))
    assert [examples.read_header(m)[2] for m in small] == [64, 64, 1]
    large = examples.pack_messages(0, [b"x" * 35_000] * 30)
    assert sum(examples.read_header(m)[2] for m in large) == 30
    assert max(map(len, large)) <= examples.MESSAGE_BYTES_MAX + examples.HEADER.size < BATCH_BYTES_MAX
    assert examples.pack_messages(0, []) == []


def test_every_cut_of_a_message_is_refused() -> None:
    users = Users(replace(EVIDENCE, rank_sample=1.0))
    users.learn([comment(0, "u", "a", 0.0), *[click(n, "u", f"i{n}", n + 1.0) for n in range(3)]])
    (message,) = users.messages
    for cut in range(examples.HEADER.size, len(message)):
        with pytest.raises(ValueError):
            examples.unpack_examples(message[:cut], new_examples(CONFIG, 100), np.full(3, -1, np.int64))


def test_a_newer_message_version_is_refused() -> None:
    with pytest.raises(examples.MessageVersionError, match="version 9"):
        examples.read_header(examples.HEADER.pack(9, 1, 0, 0, 0))


def test_golden_bytes_of_an_example() -> None:
    users = Users()
    users.learn([click(5, "u", "a", 1.5), click(6, "u", "b", 2.5)], partition=3)
    key = {i: examples.key_bytes(i).hex() for i in "ab"}
    assert users.messages[0].hex() == (
        "01" "01" "0300" "0200" "0000"
        + key["a"] + "000000000000f83f" "0500000000000000" "01" "00" "00" "95" "0000803f"
        + key["b"] + "0000000000000440" "0600000000000000" "01" "01" "00" "95" "0000803f"
        + key["a"] + "01000000" "003c" "02" "00"
    )  # fmt: skip


def unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def catalogue(count: int) -> list[bytes]:
    entries: list[Any] = [(n, Item(f"i{n}", f"item {n}"), unit(n)) for n in range(count)]
    return pipeline.learn_catalogue(0, entries, DIM).messages


def log_of(seed: int, count: int = 300) -> list[bytes]:
    """An examples log of two partitions, with items, texts and a withdrawal."""
    rng = random.Random(seed)
    users = Users(replace(EVIDENCE, rank_sample=0.3))
    messages = catalogue(30)
    for at in range(0, count, 20):
        for partition in (0, 1):
            users.messages = []
            users.learn([
                comment(n, f"{partition}-{rng.randrange(9)}", f"i{rng.randrange(35)}", float(n), seed=n)
                if rng.random() < 0.2
                else click(n, f"{partition}-{rng.randrange(9)}", f"i{rng.randrange(35)}", float(n))
                for n in range(at, at + 20)
            ], partition)  # fmt: skip
            messages += users.messages
    gone: list[Any] = [(30, Withdrawn("i3", 0.0), None)]
    return messages + pipeline.learn_catalogue(0, gone, DIM).messages


def test_the_same_log_gives_the_same_digest_and_repeats_change_nothing() -> None:
    log = log_of(1)
    straight, repeated = ItemLearner(CONFIG, DIM), ItemLearner(CONFIG, DIM)
    for offset, message in enumerate(log):
        straight.learn(offset, message)
        repeated.learn(offset, message)
        if offset % 3 == 0:
            learnt = repeated.learn(offset, message)  # a retry doubled it
            assert learnt.examples == learnt.entries == 0
    assert straight.learner.digest() == repeated.learner.digest()


@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_a_learner_loaded_from_its_rows_goes_on_to_the_same_bytes(cut: int) -> None:
    log = log_of(2)
    straight, first = ItemLearner(CONFIG, DIM), ItemLearner(CONFIG, DIM)
    stored: dict[bytes, bytes] = {}

    def flush(learner: ItemLearner) -> None:
        for key, value in learner.take_dirty().items():
            if value is None:
                stored.pop(key, None)
            else:
                stored[key] = value

    for offset, message in enumerate(log):
        straight.learn(offset, message)
    for offset in range(cut):
        first.learn(offset, log[offset])
        if offset % 4 == 0:
            flush(first)
    flush(first)
    second = ItemLearner(CONFIG, DIM)
    second.load(stored.items())
    assert second.learner.digest() == first.learner.digest()
    for offset in range(cut, len(log)):
        second.learn(offset, log[offset])
    assert second.learner.digest() == straight.learner.digest()


@pytest.mark.parametrize("size", [2, 9, 100])
def test_messages_of_all_kinds_at_once_are_applied_as_one_after_another(size: int) -> None:
    log = list(enumerate(log_of(3)))
    straight, at_once = ItemLearner(CONFIG, DIM), ItemLearner(CONFIG, DIM)
    learnt = [straight.learn(offset, message) for offset, message in log]
    told: list[Any] = []
    while len(told) < len(log):
        told += at_once.learn_many(log[len(told) : len(told) + size])
    assert [(one.examples, one.entries, one.newest_ts) for one in told] == [
        (one.examples, one.entries, one.newest_ts) for one in learnt
    ]
    assert at_once.learner.digest() == straight.learner.digest()
    assert at_once.offset == straight.offset == len(log) - 1


def test_catalogue_rows_and_withdrawals() -> None:
    entries: list[Any] = [
        (0, Item("a", "x" * 600, ts=5.0), unit(0)),
        (1, Item("b", ""), None),
        (2, Withdrawn("a", 0.0), None),
    ]
    batch = pipeline.learn_catalogue(4, entries, DIM)
    assert batch.rows[b"a"] is None
    assert rows.unpack_catalogue(batch.rows[b"b"] or b"").vector == bytes(2 * DIM)
    entered = examples.unpack_items(batch.messages[0])
    assert [e.withdrawn for e in entered] == [False, False, True]
    assert len(entered[0].text) == pipeline.SNIPPET_CHARS_MAX and entered[0].ts == 5.0
