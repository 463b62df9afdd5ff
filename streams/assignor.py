"""Who gets which partitions: the same partition number of every co-partitioned topic goes to the same worker.

A user's clicks, comments and erasures meet in one row, so their partitions of one number must meet in one process. Each
member tells its HTTP address when it joins; the leader's answer tells every member who has which partition, so that any
worker can forward a request to the one that holds a user.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

_encode = msgspec.json.encode
_decode_member = msgspec.json.Decoder(dict[str, Any]).decode
_decode_owners = msgspec.json.Decoder(dict[str, dict[str, str]]).decode


class CopartitionedAssignor(AbstractPartitionAssignor):
    """Sticky by partition number: a member keeps what it had as far as the shares stay even.

    `owners` is {topic: {partition: url}} as of the last assignment, for all members of the group.
    """

    name = "headwater-copartitioned"
    version = 0

    def __init__(self, url: str) -> None:
        self.url = url
        self.owners: dict[str, dict[int, str]] = {}
        self._held: list[int] = []

    def owner_of(self, topic: str, partition: int) -> str | None:
        """The address of the member that has this partition, as of the last assignment."""
        return self.owners.get(topic, {}).get(partition)

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member tells when it joins: its address, and the partition numbers that it holds."""
        return ConsumerProtocolMemberMetadata(
            self.version, sorted(topics), _encode({"url": self.url, "held": self._held})
        )

    def assign(
        self, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """The leader's work: {member: its partitions of every topic}."""
        topics = sorted({t for m in members.values() for t in m.subscription})
        counts = {t: len(cluster.partitions_for_topic(t) or ()) for t in topics}
        told = {member: _decode_member(metadata.user_data or b"{}") for member, metadata in members.items()}
        numbers = share(max(counts.values(), default=0), {m: t.get("held", []) for m, t in told.items()})
        owners: dict[str, dict[int, str]] = {t: {} for t in topics}
        given: dict[str, dict[str, list[int]]] = {m: defaultdict(list) for m in members}
        for number, member in sorted(numbers.items()):
            for topic in topics:
                if number < counts[topic]:
                    given[member][topic].append(number)
                    owners[topic][number] = told[member].get("url", "")
        table = _encode(owners)
        return {
            member: ConsumerProtocolMemberAssignment(self.version, sorted(parts.items()), table)
            for member, parts in given.items()
        }

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """What this member is told: its own partitions, and everybody's addresses."""
        table = _decode_owners(assignment.user_data or b"{}")
        self.owners = {topic: {int(p): url for p, url in parts.items()} for topic, parts in table.items()}
        self._held = sorted({p for _, parts in assignment.assignment for p in parts})


def share(partitions: int, held: Mapping[str, Iterable[int]]) -> dict[int, str]:
    """{partition number: member}: even to within one, everybody keeping what it held as far as that allows.

    >>> share(4, {"a": [0, 1, 2, 3], "b": []})
    {0: 'a', 1: 'a', 2: 'b', 3: 'b'}
    """
    members = sorted(held)
    least, extra = divmod(partitions, len(members))
    owner: dict[int, str] = {}
    load = dict.fromkeys(members, 0)
    for member in members:
        for number in sorted(held[member]):
            room = least + (1 if extra > sum(load[m] > least for m in members) else 0)
            if number < partitions and number not in owner and load[member] < room:
                owner[number] = member
                load[member] += 1
    for number in range(partitions):
        if number not in owner:
            member = min(members, key=lambda m: (load[m], m))
            owner[number] = member
            load[member] += 1
    return dict(sorted(owner.items()))
