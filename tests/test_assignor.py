"""Co-partitioned assignment: one worker a partition number, even, sticky, and everybody knows everybody's address."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streams.assignor import CopartitionedAssignor, share

MEMBERS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.lists(st.integers(0, 15)), min_size=1, max_size=6
)


@given(st.integers(0, 12), MEMBERS)
def test_every_partition_has_one_owner_and_shares_are_even(partitions: int, held: dict[str, list[int]]) -> None:
    owners = share(partitions, held)
    assert list(owners) == list(range(partitions))
    loads = [list(owners.values()).count(m) for m in held]
    assert max(loads) - min(loads) <= 1


@given(st.integers(1, 12), st.integers(1, 5))
def test_nothing_moves_when_nobody_comes_or_goes(partitions: int, members: int) -> None:
    first = share(partitions, {f"m{n}": [] for n in range(members)})
    held: dict[str, list[int]] = {f"m{n}": [p for p, m in first.items() if m == f"m{n}"] for n in range(members)}
    assert share(partitions, held) == first


def test_a_newcomer_takes_only_its_share() -> None:
    owners = share(6, {"a": [0, 1, 2], "b": [3, 4, 5], "c": []})
    assert [owners[p] for p in range(6)] == ["a", "a", "c", "b", "b", "c"]


def test_the_leader_gives_partitions_and_tells_addresses() -> None:
    topics = {"clicks": 4, "comments": 4, "examples": 1}
    cluster: Any = SimpleNamespace(partitions_for_topic=lambda t: set(range(topics[t])))
    one, two = CopartitionedAssignor("http://one:1"), CopartitionedAssignor("http://two:2")
    told = {"m1": one.metadata(topics), "m2": two.metadata(topics)}
    given_ = one.assign(cluster, told)
    for assignor, member in ((one, "m1"), (two, "m2")):
        assignor.on_assignment(given_[member])
    assert one.owners == two.owners
    assert one.owners["clicks"] == one.owners["comments"]
    assert set(one.owners["clicks"].values()) == {"http://one:1", "http://two:2"}
    mine = {(t, p) for t, parts in given_["m1"].assignment for p in parts}
    assert mine == {(t, p) for t, parts in one.owners.items() for p, url in parts.items() if url == "http://one:1"}
    again = one.assign(cluster, {"m1": one.metadata(topics), "m2": two.metadata(topics)})
    assert {m: a.assignment for m, a in again.items()} == {m: a.assignment for m, a in given_.items()}
