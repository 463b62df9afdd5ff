"""Checkpoints of the encoder's adapter in a folder, on this machine or shared (an fsspec URL).

    NAME.safetensors   left (T, R), right (T, R) float32; metadata: base, scale
    NAME.json          the manifest: written last, replaced whole, so that what has a manifest is complete

A name is the offset of the examples log that the adapter was trained up to, and the adapter's digest.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import fsspec
import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from model.adapter import Adapter, AdapterError
from streams.settings import Fault

MANIFEST_VERSION: Final = 1
SUFFIX: Final = ".safetensors"
SHADOW, DROPPED, CURRENT, RETIRED, TAKEN_BACK = "shadow", "dropped", "current", "retired", "taken back"
TRIAL, TRIAL_ENDED = "trial", "trial ended"  # kinds of decisions


class CheckpointError(Fault):
    """A checkpoint that is not there, or cannot be used as it is."""


class Manifest(msgspec.Struct, kw_only=True):
    """What is known of a checkpoint. Fields that are not known here are passed over when read."""

    name: str
    adapter: str  # its digest: the version of the text space
    base: str  # the encoder that it stands behind, with the digest of its weights
    parent: str  # checkpoint that was in use when it was made; "" for the encoder as it is
    offset: int  # of the examples log, the last that it was trained on
    rank: int
    digest: str  # blake2b of the weights' file
    created: float  # Unix s
    state: str = SHADOW  # shadow, dropped, current, retired, taken back
    training: dict[str, Any] = {}  # messages, examples, losses, seed
    decisions: list[dict[str, Any]] = []  # kind, position, evidence; in order
    version: int = MANIFEST_VERSION

    @property
    def trial(self) -> int | None:
        """The offset of the trial's message, while one is on as far as its decisions tell."""
        told = [one for one in self.decisions if one["kind"] in (TRIAL, TRIAL_ENDED)]
        return int(told[-1]["position"]) if told and told[-1]["kind"] == TRIAL else None


class Checkpoints:
    """The folder. Every write replaces a whole file; readers never see half of one."""

    def __init__(self, url: str, crash: Callable[[str], None] = lambda step: None) -> None:
        """url: a path, or what fsspec takes (s3://, gs:// with their packages). Raises CheckpointError.

        crash: called between the writes of one change, for tests that end the process there.
        """
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as problem:
            raise CheckpointError(f"HEADWATER_CHECKPOINTS={url}: {problem}") from None
        self.url = url
        self._crash = crash

    def add(self, adapter: Adapter, manifest: Manifest) -> None:
        """Writes both files; one that is there already stays as it is."""
        if self._fs.exists(self._path(manifest.name + ".json")):
            return
        weights = _weights(adapter)
        manifest.digest = hashlib.blake2b(weights, digest_size=16).hexdigest()
        self._write(manifest.name + SUFFIX, weights)
        self._crash("weights")
        self.put(manifest)
        self._crash("manifest")

    def put(self, manifest: Manifest) -> None:
        """Replaces the manifest."""
        self._write(manifest.name + ".json", msgspec.json.format(msgspec.json.encode(manifest), indent=2))

    def manifests(self) -> list[Manifest]:
        """All manifests, by name: so in the order of the log."""
        return list(self._manifests())

    def _manifests(self) -> Iterator[Manifest]:
        for name in self._names(".json"):
            yield self.get(name)

    def _names(self, suffix: str) -> list[str]:
        """Of the whole files with this suffix, in order."""
        if not self._fs.isdir(self._root):
            return []
        files = sorted(path.rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))
        return [file.removesuffix(suffix) for file in files if file.endswith(suffix) and not file.startswith(".")]

    def get(self, name: str) -> Manifest:
        """The manifest of a checkpoint, by its name or its adapter's. Raises CheckpointError."""
        try:
            raw = self._fs.cat_file(self._path(name + ".json"))
        except (FileNotFoundError, OSError):
            found = [manifest for manifest in self._manifests() if manifest.adapter == name]
            if not found:
                raise CheckpointError(
                    f"no checkpoint {name!r} in {self.url}: `headwater checkpoints list` shows them"
                ) from None
            return found[-1]
        try:
            return msgspec.json.decode(raw, type=Manifest)
        except msgspec.DecodeError as problem:
            raise CheckpointError(f"{self._path(name)}.json is no manifest: {problem}") from None

    def adapter(self, manifest: Manifest) -> Adapter:
        """The adapter of a checkpoint. Raises CheckpointError where the file is not what the manifest says."""
        path = self._path(manifest.name + SUFFIX)
        try:
            weights = self._fs.cat_file(path)
        except (FileNotFoundError, OSError) as problem:
            raise CheckpointError(f"{path}: {problem}") from None
        if hashlib.blake2b(weights, digest_size=16).hexdigest() != manifest.digest:
            raise CheckpointError(f"{path} is not what its manifest says: copy it again, or take another checkpoint")
        return read_weights(weights)

    def current(self) -> Manifest | None:
        """The one in use; None: the encoder as it is."""
        found = [manifest for manifest in self._manifests() if manifest.state == CURRENT]
        return found[-1] if found else None

    def switched(self, adapter: str, taken_back: bool) -> list[Manifest]:
        """The log has switched to the adapter ("": none): who is current, and who was. The manifests that changed."""
        changed = []
        for manifest in self._manifests():
            before = manifest.state
            if manifest.adapter == adapter:
                manifest.state = CURRENT
            elif manifest.state == CURRENT:
                manifest.state = TAKEN_BACK if taken_back else RETIRED
            if manifest.state != before:
                self.put(manifest)
                self._crash("retire")
                changed.append(manifest)
        return changed

    def tried(self, name: str, position: int, challenger: str, share: float) -> Manifest:
        """A trial has begun at this position of the log: told by the manifest of this name, of the challenger, or of
        the one in use where that is none (""). Raises CheckpointError."""
        manifest = self.get(name)
        told = {"kind": TRIAL, "position": position, "challenger": challenger, "share": share}
        manifest.decisions.append(told)
        self.put(manifest)
        return manifest

    def trial_ended(self, position: int) -> list[Manifest]:
        """No trial is on from this position of the log on: the manifests that told of one from before."""
        changed = []
        for manifest in self._manifests():
            if manifest.trial is not None and manifest.trial < position:
                manifest.decisions.append({"kind": TRIAL_ENDED, "position": position})
                self.put(manifest)
                changed.append(manifest)
        return changed

    def prune(self, keep: int) -> list[str]:
        """Deletes the oldest but `keep` that are not in use, in shadow, in a trial or the parent of such; the names of
        those.

        Weights that a pruning left behind when it was killed go with them.
        """
        manifests = self.manifests()
        used = {m.name for m in manifests if m.state in (CURRENT, SHADOW) or m.trial is not None}
        used |= {m.parent for m in manifests if m.name in used}
        free = [m.name for m in manifests if m.name not in used]
        gone = free[: max(0, len(free) - keep)]
        for name in gone:
            self._fs.rm_file(self._path(name + ".json"))  # first: without it there is no checkpoint
            self._crash("prune")
        kept = {manifest.name for manifest in manifests} - set(gone)
        newest = manifests[-1].name if manifests else ""  # weights beyond it may be of one that is being written
        for name in self._names(SUFFIX):
            if name not in kept and name <= newest:
                self._fs.rm_file(self._path(name + SUFFIX))
        return gone

    def _path(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}"

    def _write(self, file: str, content: bytes) -> None:
        self._fs.makedirs(self._root, exist_ok=True)
        fresh = self._path(f".{file}.new")
        self._fs.pipe_file(fresh, content)
        self._fs.mv(fresh, self._path(file))


def name_of(offset: int, adapter: Adapter) -> str:
    """A checkpoint's name."""
    return f"{offset:012d}-{adapter.name}"


def _weights(adapter: Adapter) -> bytes:
    told = {"base": adapter.base, "scale": repr(adapter.scale)}
    return bytes(save({"left": adapter.left, "right": adapter.right}, told))


def read_weights(weights: bytes) -> Adapter:
    """The adapter of a safetensors file. Raises CheckpointError."""
    try:
        tensors = load(weights)
        size = int.from_bytes(weights[:8], "little")
        told = msgspec.json.decode(weights[8 : 8 + size])["__metadata__"]
        return Adapter(told["base"], np.array(tensors["left"]), np.array(tensors["right"]), float(told["scale"]))
    except (SafetensorError, AdapterError, KeyError, ValueError, msgspec.DecodeError) as problem:
        raise CheckpointError(f"these weights are no adapter: {problem}") from None


def find(url: str, name: str) -> Adapter:
    """The adapter of a checkpoint by name, or of a .safetensors file. Raises CheckpointError."""
    if name.endswith(SUFFIX):
        try:
            with fsspec.open(name, "rb") as file:
                return read_weights(file.read())
        except (OSError, ValueError, ImportError) as problem:
            raise CheckpointError(f"{name}: {problem}") from None
    folder = Checkpoints(url)
    return folder.adapter(folder.get(name))
