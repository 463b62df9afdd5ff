"""Brokers for the tests: `broker` is each kind that is here, started once a session and ended by its own pid."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from bench.kafka_node import KafkaNode
from streams import broker as embedded
from streams.settings import PREFIX, Settings, kafka_test_dir

EMBEDDED: Final = "embedded"
KAFKA: Final = "kafka"
LONG: Final = "long"
# The long ones, which begin first, in this order. The tests of most share nothing, so that the processes of a run share
# them out; those of others stay in one process, as those of all modules do that are not named here.
FIRST: Final = (
    "test_damage", "test_worker_simulation", "test_migrate", "test_worker", "test_switch", "test_forget", "test_demo",
    "test_cli", "test_bench", "test_pressure", "test_encoder_training", "test_page", "test_asking", "test_privacy",
    "test_stop", "test_verify", "test_trainer",
)  # fmt: skip
IN_ONE_PROCESS: Final = {"test_damage", "test_pressure", "test_encoder_training", "test_page", "test_asking"}
_numbers = itertools.count()

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile(
    "headwater", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("headwater")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `broker` runs on the embedded one, and on Apache Kafka where HEADWATER_TEST_KAFKA names its jars.

    Not so what no broker can make a difference to, and which is marked so: `embedded`. What is `long` runs on one kind,
    the real one where it is here.
    """
    if "broker" in metafunc.fixturenames:
        kinds = [EMBEDDED, KAFKA] if kafka_test_dir() else [EMBEDDED]
        if metafunc.definition.get_closest_marker(EMBEDDED) is not None:
            kinds = [EMBEDDED]
        elif metafunc.definition.get_closest_marker(LONG) is not None:
            kinds = kinds[-1:]
        metafunc.parametrize("broker", kinds, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for `kafka_node` exist only where Kafka's jars do: they are the same promises on more software."""
    if kafka_test_dir() is None:
        items[:] = [item for item in items if KAFKA + "_node" not in getattr(item, "fixturenames", ())]
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


class ByModule(LoadScopeScheduling):
    """A module's tests stay in one process, which shares what it has started, but for those that share nothing.

    In the order of the collection. (Marks of groups would do, but xdist 3.8 does not get them across in pytest 9.2.)
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        stem = Path(module).stem
        return nodeid if stem in FIRST and stem not in IN_ONE_PROCESS else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByModule:
    """How `-n` shares the tests out."""
    return ByModule(config, log)


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of an embedded broker."""
    with embedded.EmbeddedBroker(log_file=tmp_path_factory.mktemp("broker") / "broker.log") as running:
        yield running.address


@pytest.fixture(scope="session")
def kafka_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """A running node of Apache Kafka, with its own command line clients."""
    folder = kafka_test_dir()
    assert folder is not None
    with KafkaNode(folder, tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> str:
    """host:port of a broker of each kind, in turn."""
    if request.param == KAFKA:
        node: KafkaNode = request.getfixturevalue("kafka_node")
        return node.address
    address: str = request.getfixturevalue("embedded_broker")
    return address


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HEADWATER_ variable is set, whatever the machine has."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    return embedded.free_port()


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """`make_settings(broker=address)`: settings with topics, group, state folder and port of their own."""

    def make(**overrides: Any) -> Settings:
        number = next(_numbers)
        own: dict[str, Any] = {
            "topic_prefix": f"t{number}.",
            "app_id": f"app{number}",
            "state_dir": tmp_path / f"state-{number}",
            "http_port": embedded.free_port(),
            "partitions": 2,
        }
        return Settings(**{**own, **overrides})

    return make
