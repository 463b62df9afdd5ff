"""The merge of clicks and comments: one order, whatever the order of arrival."""

import random

import pytest

from streams.inbox import AWAKE_S, LAG_WAIT_MAX_S, LATE_MAX_S, LOOK_AGAIN_S, UNHEARD_WAIT_MAX_S, Inbox

HOLD_S = 0.02


def inbox() -> Inbox[str]:
    return Inbox({"clicks": 0, "comments": 0}, HOLD_S)


def drain(box: Inbox[str], now: float, ends: dict[str, int], count_max: int = 1000) -> list[str]:
    taken, _ = box.take(now, ends.get, count_max)
    return [entry.work or "" for _, entry in taken]


def test_entries_leave_by_time_then_topic_then_offset() -> None:
    box = inbox()
    box.put("comments", [(2.0, 0, "b0"), (3.0, 1, "b1")], 2, now=10)
    box.put("clicks", [(1.0, 0, "a0"), (2.0, 1, "a1"), (4.0, 2, "a2")], 3, now=10)
    assert drain(box, 11, {"clicks": 3, "comments": 2}) == ["a0", "a1", "b0", "b1", "a2"]


def test_a_silent_third_topic_delays_nothing_and_its_entry_goes_after_those_of_its_time() -> None:
    box = Inbox[str]({"clicks": 0, "comments": 0, "erasures": 0}, HOLD_S)
    ends = {"clicks": 1, "comments": 0, "erasures": 0}
    box.put("clicks", [(5.0, 0, "a0")], 1, now=10)
    assert drain(box, 10 + HOLD_S + 0.001, ends) == ["a0"]
    box.put("erasures", [(6.0, 0, "x0")], 1, now=11)
    box.put("clicks", [(6.0, 1, "a1"), (7.0, 2, "a2")], 3, now=11)
    assert drain(box, 12, {"clicks": 3, "comments": 0, "erasures": 1}) == ["a1", "x0", "a2"]


def test_a_topic_keeps_its_own_order() -> None:
    box = inbox()
    box.put("clicks", [(5.0, 0, "a0"), (1.0, 1, "a1")], 2, now=10)
    box.put("comments", [(3.0, 0, "b0")], 1, now=10)
    assert drain(box, 11, {"clicks": 2, "comments": 1}) == ["b0", "a0", "a1"]


@pytest.mark.parametrize("seed", range(40))
def test_a_merge_that_begins_in_the_middle_goes_on_as_the_one_before(seed: int) -> None:
    """A worker that restarts, or is given a partition, has seen nothing of what is applied."""
    rng = random.Random(seed)
    logs = {t: [float(rng.randrange(6)) for _ in range(rng.randrange(1, 12))] for t in ("clicks", "comments")}
    ends = {t: len(log) for t, log in logs.items()}

    def merged(start: dict[str, int]) -> list[tuple[str, int]]:
        box: Inbox[str] = Inbox(start, HOLD_S)
        for topic, log in logs.items():
            box.put(topic, [(log[n], n, "") for n in range(start[topic], len(log))], len(log), now=1)
        taken, _ = box.take(2, ends.get, 1000)
        return [(topic, entry.offset) for topic, entry in taken]

    whole = merged({"clicks": 0, "comments": 0})
    for done in range(len(whole)):
        start = {topic: sum(t == topic for t, _ in whole[:done]) for topic in logs}
        assert merged(start) == whole[done:]


def test_a_topic_that_is_behind_is_waited_for() -> None:
    box = inbox()
    box.put("clicks", [(1.0, 0, "a0")], 1, now=10)
    assert drain(box, 10.5, {"clicks": 1, "comments": 7}) == []
    box.put("comments", [(0.5, 0, "b0")], 1, now=10.6)
    assert drain(box, 10.6, {"clicks": 1, "comments": 1}) == ["b0", "a0"]


def test_a_topic_that_ran_empty_a_moment_ago_is_waited_for_as_long_as_any() -> None:
    """Its queue was full, so it was paused: what lies behind could not come until now."""
    box = inbox()
    box.put("clicks", [(1.0, 0, "a0")], 1, now=10)
    box.put("comments", [(2.0, 0, "b0")], 1, now=10)
    ends = {"clicks": 2, "comments": 1}
    assert drain(box, 15, ends) == ["a0"]
    assert drain(box, 15.5, ends) == []
    box.put("clicks", [(1.5, 1, "a1")], 2, now=15.6)
    assert drain(box, 15.6, ends) == ["a1", "b0"]


def test_a_topic_that_nobody_tells_of_is_waited_for_but_not_for_ever() -> None:
    box = inbox()
    box.put("clicks", [(1.0, 0, "a0")], 1, now=10)
    assert drain(box, 10 + UNHEARD_WAIT_MAX_S - 0.01, {}) == []
    assert drain(box, 10 + UNHEARD_WAIT_MAX_S + 0.01, {}) == ["a0"]


@pytest.mark.parametrize(("known", "wait_s"), [(0, AWAKE_S), (1, LAG_WAIT_MAX_S)])
def test_a_process_that_stood_still_has_waited_for_nothing(known: int, wait_s: float) -> None:
    """It wakes with what it knew, and what it hears first was told before it slept."""
    box = inbox()
    box.put("clicks", [(1.0, 0, "a0")], 1, now=10)
    ends = {"clicks": 1, "comments": known}
    assert drain(box, 10, ends) == [] == drain(box, 20, ends) == drain(box, 20 + wait_s - 0.01, ends)
    box.put("comments", [(0.5, 0, "b0")], 1, now=20 + wait_s)
    assert drain(box, 20 + wait_s, ends) == ["b0", "a0"]


def test_a_topic_that_is_in_reach_again_is_waited_for_as_at_first() -> None:
    """A new leader may tell an end that is too low, for a moment."""
    box = inbox()
    ends = {"clicks": 1, "comments": 0}
    box.put("clicks", [(1.0, 0, "a0")], 1, now=10)
    assert drain(box, 15, {}) == []
    assert drain(box, 15 + HOLD_S / 2, ends) == []
    box.put("comments", [(0.5, 0, "b0")], 1, now=15 + HOLD_S / 2)
    assert drain(box, 15 + HOLD_S, ends) == ["b0", "a0"]


def test_an_end_that_never_comes_is_waited_for_once() -> None:
    box = inbox()
    box.put("clicks", [(1.0, 0, "a0"), (2.0, 1, "a1")], 2, now=10)
    ends = {"clicks": 9, "comments": 3}  # three offsets of an aborted transaction
    assert drain(box, 10 + LAG_WAIT_MAX_S - 0.01, ends) == []
    assert drain(box, 10 + LAG_WAIT_MAX_S + 0.01, ends) == ["a0", "a1"]
    box.put("clicks", [(3.0, 2, "a2")], 3, now=12)
    assert drain(box, 12 + HOLD_S, ends) == ["a2"]


def test_at_the_end_an_event_is_held_for_the_hold_time() -> None:
    box = inbox()
    box.put("clicks", [(1.0, 0, "a0")], 1, now=10)
    ends = {"clicks": 1, "comments": 0}
    taken, wait = box.take(10 + HOLD_S / 2, ends.get, 10)
    assert taken == [] and wait == pytest.approx(HOLD_S / 2)
    assert drain(box, 10 + HOLD_S, ends) == ["a0"]


def test_one_topic_alone_is_never_held() -> None:
    box: Inbox[str] = Inbox({"items": 5}, HOLD_S)
    box.put("items", [(0.0, 5, "x")], 6, now=1)
    assert drain(box, 1, {}) == ["x"]


def test_no_more_than_asked_for() -> None:
    box: Inbox[str] = Inbox({"items": 0}, 0)
    box.put("items", [(0.0, n, str(n)) for n in range(5)], 5, now=1)
    assert drain(box, 1, {}, 2) == ["0", "1"]
    assert len(box) == 3


def test_bytes_wait_as_long_as_an_entry_of_their_put() -> None:
    box: Inbox[str] = Inbox({"items": 0}, 0)
    source = box.sources["items"]
    box.put("items", [(0.0, 0, "a"), (0.0, 1, "b")], 3, now=1, size=100)  # the record at 2 holds nothing
    box.put("items", [(0.0, 3, "c")], 4, now=1, size=10)
    assert source.bytes_waiting() == 110
    drain(box, 1, {}, 1)
    assert source.bytes_waiting() == 110
    drain(box, 1, {}, 1)
    assert source.bytes_waiting() == 10
    drain(box, 1, {}, 1)
    assert source.bytes_waiting() == 0


@pytest.mark.parametrize("seed", range(40))
def test_the_order_does_not_depend_on_how_the_logs_arrive(seed: int) -> None:
    """Both logs are there (a backlog): any cut into batches gives the same order."""
    rng = random.Random(seed)
    logs = {t: sorted(rng.choice(range(40)) / 2 for _ in range(rng.randrange(30))) for t in ("clicks", "comments")}
    ends = {t: len(log) for t, log in logs.items()}

    def run(cuts: random.Random) -> list[str]:
        box, at, now, order = inbox(), dict.fromkeys(logs, 0), 100.0, []
        while any(at[t] < len(log) for t, log in logs.items()):
            topic = cuts.choice([t for t, log in logs.items() if at[t] < len(log)])
            end = min(len(logs[topic]), at[topic] + cuts.randrange(1, 8))
            box.put(topic, [(logs[topic][n], n, f"{topic}{n}") for n in range(at[topic], end)], end, now)
            at[topic] = end
            order += drain(box, now, ends)
            now += 0.001
        for _ in range(10):
            order += drain(box, now, ends)
            now += LATE_MAX_S / 2
        return order

    orders = [run(random.Random(f"{seed}-{n}")) for n in range(4)]
    assert all(order == orders[0] for order in orders)
    assert len(orders[0]) == sum(ends.values())


def test_a_topic_that_was_out_of_reach_and_is_behind_is_waited_for_from_its_return() -> None:
    box = Inbox[str]({"clicks": 0, "comments": 4}, HOLD_S)
    box.put("clicks", [(1.0, 0, "click")], 1, now=1.0)
    unheard, behind = {"clicks": 1, "comments": None}, {"clicks": 1, "comments": 5}
    for tenth in range(10, 26):  # for longer than a topic that is behind is waited for
        taken, wait = box.take(tenth / 10, unheard.get, 10)
        assert taken == [] and wait == pytest.approx(LOOK_AGAIN_S)
    taken, wait = box.take(2.6, behind.get, 10)
    assert taken == [] and wait == pytest.approx(2.5 + LAG_WAIT_MAX_S - 2.6)
    box.put("comments", [(0.9, 4, "comment")], 5, now=2.7)
    assert drain(box, 2.8, {"clicks": 1, "comments": 5}) == ["comment", "click"]
