"""Real Apache Kafka (KRaft: each node is broker and controller in one JVM) on loopback, for tests and benchmarks.

The jars are those of HEADWATER_TEST_KAFKA, a folder with `libs/` as every unpacked Kafka distribution has; java comes
from the system. Kafka's own command line clients run from the same jars.
"""

import base64
import shlex
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from streams.broker import HOST, end_with_parent, free_port

HEAP: Final = "512m"
START_S_MAX: Final = 60.0
STOP_S_MAX: Final = 20.0
CLIENT_S_MAX: Final = 60.0
POLL_S: Final = 0.05
LOG_CONFIG: Final = """\
Configuration:
  Appenders:
    Console:
      name: STDOUT
      PatternLayout:
        pattern: "[%d] %p %m (%c)%n"
  Loggers:
    Root:
      level: {level}
      AppenderRef:
        - ref: STDOUT
"""


class KafkaNode:
    """`with KafkaNode(kafka_dir, data_dir) as node:` runs it on free ports; `node.address` is host:port."""

    def __init__(
        self, kafka_dir: Path, data_dir: Path, *, number: int = 1, cluster: str = "", proxy_port: int = 0,
        **properties: str,
    ) -> None:  # fmt: skip
        """number, cluster: of a node of several (`nodes`). proxy_port: where `proxied_port` is told to be found.

        properties: of the broker, with underscores for dots (`log_retention_ms="2000"`).
        """
        self.libs = kafka_dir / "libs"
        assert any(self.libs.glob("kafka-clients-*.jar")), f"{self.libs} has no Kafka jars"
        assert shutil.which("java"), "real Kafka needs java 17 or newer (Debian: default-jre-headless)"
        self.data_dir = data_dir
        self.port, self.proxied_port, self._controller_port = free_port(), free_port(), free_port()
        self.number = number
        self._cluster = cluster or new_cluster()
        self._proxy_port = proxy_port
        self._voters = [self]
        self._properties = {name.replace("_", "."): value for name, value in properties.items()}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """host:port, for clients."""
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        """Formats the folder when it is new; returns once the node accepts connections."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """As `start`, without waiting."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        config = self.data_dir / "server.properties"
        config.write_text("".join(f"{name}={value}\n" for name, value in self._server_properties().items()))
        with (self.data_dir / "broker.log").open("ab") as log:
            if not (self.data_dir / "logs" / "meta.properties").exists():
                subprocess.run(
                    self._java("kafka.tools.StorageTool", "format", "-t", self._cluster, "-c", str(config)),
                    check=True, stdout=log, stderr=log,
                )  # fmt: skip
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(config), level="INFO"), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=end_with_parent(),
            )  # fmt: skip

    def wait(self) -> None:
        """Until it accepts connections."""
        assert self._process is not None
        deadline = time.monotonic() + START_S_MAX
        while not self._answers():
            try:
                self._process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                assert time.monotonic() < deadline, f"Kafka does not answer: {self.data_dir / 'broker.log'}"
            else:
                raise AssertionError(f"Kafka ended at its start: {self.data_dir / 'broker.log'}")

    def kill(self) -> None:
        """As by kill -9; `start` brings it back on its logs and port."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ends it; a second call does nothing."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()

    def client(self, main: str, *arguments: str, typed: str = "") -> str:
        """Runs one of Kafka's own clients to its end with `typed` on its input: what it prints."""
        done = subprocess.run(
            self._java(main, *arguments, heap="128m"), input=typed, capture_output=True, text=True, timeout=CLIENT_S_MAX
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def type_records(self, topic: str, lines: list[str]) -> None:
        """Kafka's console producer: each line is `key<TAB>value`."""
        self.client(
            "org.apache.kafka.tools.ConsoleProducer", "--bootstrap-server", self.address, "--topic", topic,
            "--reader-property", "parse.key=true", "--reader-property", "key.separator=\t",
            typed="".join(f"{line}\n" for line in lines),
        )  # fmt: skip

    def read_records(self, topic: str, count: int) -> list[str]:
        """Kafka's console consumer: the first `count` records as `headers<TAB>key<TAB>value` lines."""
        printed = self.client(
            "org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", self.address, "--topic", topic,
            "--from-beginning", "--max-messages", str(count), "--timeout-ms", "30000",
            "--formatter-property", "print.key=true", "--formatter-property", "print.headers=true",
        )  # fmt: skip
        return printed.splitlines()

    def console_producer(self, folder: Path) -> Path:
        """Kafka's console producer under its usual name in this folder; the folder, for a PATH."""
        folder.mkdir()
        script = folder / "kafka-console-producer.sh"
        command = shlex.join(self._java("org.apache.kafka.tools.ConsoleProducer", heap="128m"))
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
        return folder

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _java(self, main: str, *arguments: str, heap: str = HEAP, level: str = "ERROR") -> list[str]:
        log_config = self.data_dir / f"log4j2-{level}.yaml"
        log_config.write_text(LOG_CONFIG.format(level=level))
        return [
            "java", f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            f"-Dlog4j2.configurationFile={log_config}", "-cp", f"{self.libs}/*", main, *arguments,
        ]  # fmt: skip

    def _answers(self) -> bool:
        try:
            socket.create_connection((HOST, self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def _server_properties(self) -> dict[str, str]:
        copies, in_sync = str(min(3, len(self._voters))), str(min(2, len(self._voters)))
        own = f"PLAINTEXT://{self.address}"
        heard = f",PROXIED://{HOST}:{self.proxied_port}" if self._proxy_port else ""
        told = f",PROXIED://{HOST}:{self._proxy_port}" if self._proxy_port else ""
        return {
            "process.roles": "broker,controller",
            "node.id": str(self.number),
            "listeners": f"{own}{heard},CONTROLLER://{HOST}:{self._controller_port}",
            "advertised.listeners": own + told,
            "controller.listener.names": "CONTROLLER",
            "controller.quorum.voters": ",".join(f"{n.number}@{HOST}:{n._controller_port}" for n in self._voters),
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(self.data_dir / "logs"),
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": copies,
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": in_sync,
            "group.initial.rebalance.delay.ms": "0",
            "auto.create.topics.enable": "false",
            **self._properties,
        }


def new_cluster() -> str:
    """A cluster id, as Kafka's StorageTool makes them; without a leading dash, which it would take for an option."""
    return "K" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]


def nodes(kafka_dir: Path, data_dir: Path, proxy_ports: Sequence[int], **properties: str) -> list[KafkaNode]:
    """The nodes of one cluster, one a proxy port (0: without a proxied listener), all `launch`ed and waited for."""
    cluster = new_cluster()
    found = [
        KafkaNode(kafka_dir, data_dir / f"node-{n}", number=n, cluster=cluster, proxy_port=port, **properties)
        for n, port in enumerate(proxy_ports, 1)
    ]
    for node in found:
        node._voters = found
    for node in found:
        node.launch()
    for node in found:
        node.wait()
    return found
