"""Where the keys come from that seal users' rows: the environment, a file, or a command (a KMS's, a vault's).

Each gives one base64 key of 32 bytes a line (`openssl rand -base64 32` makes one). The first is the root; the one that
seals has a `*` before it, or is the last.
"""

import base64
import binascii
import shlex
import subprocess
from typing import Final

from state.sealing import DATA_KEY_BYTES, Sealer
from streams.settings import Fault, Settings

COMMAND_S_MAX: Final = 30.0
MARK: Final = "*"
RING_MAX: Final = 64


class DataKeysError(Fault):
    """The data keys cannot be had, or are none. No message holds any part of a key."""


def sealer_of(settings: Settings) -> Sealer | None:
    """What seals under these settings; None: no data keys are set. Raises DataKeysError."""
    if settings.data_keys.get_secret_value():
        return _sealer(settings.data_keys.get_secret_value(), "HEADWATER_DATA_KEYS")
    if settings.data_keys_file is not None:
        try:
            text = settings.data_keys_file.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as failure:
            detail = f"HEADWATER_DATA_KEYS_FILE {settings.data_keys_file}: {type(failure).__name__}"
            raise DataKeysError(f"{detail}; it has to be a text file that this user can read") from None
        return _sealer(text, "HEADWATER_DATA_KEYS_FILE")
    if settings.data_keys_command:
        return _sealer(_output_of(settings.data_keys_command), "HEADWATER_DATA_KEYS_COMMAND")
    return None


def _output_of(command: str) -> str:
    try:
        done = subprocess.run(
            shlex.split(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S_MAX
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as failure:
        detail = f"HEADWATER_DATA_KEYS_COMMAND cannot be run ({type(failure).__name__})"
        raise DataKeysError(f"{detail}: it has to print the keys within {COMMAND_S_MAX:.0f} s") from None
    if done.returncode != 0:
        raise DataKeysError(f"HEADWATER_DATA_KEYS_COMMAND ended with {done.returncode}: run it by hand to see why")
    return done.stdout


def _sealer(text: str, source: str) -> Sealer:
    lines = [line.strip() for line in text.replace(",", "\n").splitlines() if line.strip()]
    marked = [number for number, line in enumerate(lines) if line.startswith(MARK)]
    ring = []
    for number, line in enumerate(lines, 1):
        try:
            key = base64.b64decode(line.removeprefix(MARK).strip(), validate=True)
        except binascii.Error:
            key = b""
        if len(key) != DATA_KEY_BYTES:
            raise DataKeysError(f"{source}: line {number} is not the base64 of {DATA_KEY_BYTES} bytes")
        ring.append(key)
    if not 1 <= len(ring) <= RING_MAX or len(marked) > 1 or len(set(ring)) < len(ring):
        raise DataKeysError(f"{source} has to have 1 to {RING_MAX} different keys, one of them marked {MARK} at most")
    return Sealer(ring, marked[0] if marked else -1)
