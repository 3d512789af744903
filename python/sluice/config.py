"""What the user may set, in one frozen object that is checked when it is made."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from sluice import _core
from sluice.errors import ConfigError
from sluice.text import nearest

BACKINGS = ("auto", "ram", "disk")
HOST_TIERS = ("inclusive", "none")
PREFILLS = ("stream", "cache")
PRESETS = {"edgemoe": ("edge", "path-table"), "expertflow": ("plec", "routing-path")}
"""Preset → policy, kind of predictor."""
VERIFICATIONS = ("first", "always", "never")
MAX_IO_THREADS = 64
CHUNK_RANGE = (4096, 4 << 20)
MAX_BOUNCE_BYTES = 16 << 20
HOST_SHARE_PERCENT = 80
NO_CAP = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """How much memory to spend on experts, and how they are kept and brought.

    Nothing here changes a model's output but by name: results do not depend on the budget, the
    policy or the timing.

    Args:
        device_memory: Bytes for resident experts, or a size: "12GiB", "6GB", "25%" of the slots of
            all offloaded experts. No default: what fits is the user's to say. More holds more
            experts, so fewer are read.
        host_memory: Beside a GPU: bytes of RAM for experts, as `device_memory` is written. None: 80
            % of the RAM that is free, at most all experts; said on stderr. More reads the disk
            less.
        host_tier: Beside a GPU: "inclusive" (default) keeps in RAM what fits, whether or not it is
            on the GPU as well; "none" reads every miss from the disk, through three slots of RAM
            per size of expert, whatever they take; `host_memory` is refused beside it.
        pinned_cap: Beside a GPU: how much of the host tier may be pinned, bytes or a size, used in
            whole slots. None: all of it. Copies from the rest go through staging, which costs a
            core and is counted.
        prefill: What a call of more than half of a layer's experts may take: "stream" (default) the
            empty slots and a ring of an eighth of all (at least two), so that a prompt does not
            empty them, or all where they hold less than a quarter of the layer; "cache" all.
        policy: Who leaves when a slot is needed: "decayed-lfu" (`"decayed-lfu:16"` sets the
            half-life in steps), "lru", "lfu", "fifo", "lfru", "s3-fifo", "least-stale", "static",
            "edge", "edge:printed", or, by a predictor, "forecast" (who stays) and "plec" (who
            comes). "auto" is "decayed-lfu", for routing is skewed and the skew drifts; beside a
            predictor it is "forecast", which is the same until the predictor proves better.
        predictor: What guesses who comes next: a folder that `sluice train` wrote, a name of
            `sluice.predict.names()`, or an object of one's own; or a list of these, as a
            "forecaster" that says who should stay and a "next-gate" that says who comes. None:
            nothing is guessed. Wrong guesses cost a little of the link and never change a result.
        preset: A published system out of these parts: "edgemoe" (policy "edge", a trained
            "path-table") or "expertflow" (policy "plec", a trained "routing-path"); `predictor`
            is then a folder of that kind. None: as the other fields say.
        pack: Where packed experts come from. "auto" reads a pack beside the checkpoint, or one made
            before, and makes one where weights need arithmetic first; "none" never makes one; a
            path names one. A pack costs its size on disk, and reads without gaps.
        offload_dir: Folder for files that sluice has to write. None: the cache folder that
            `sluice doctor` names. It needs as much free disk as the experts take.
        backing: What holds the experts of a model that is in memory already: "disk" spills them,
            "ram" keeps them in RAM (counted; saves nothing but the memory of a GPU that they lay
            on), "auto" is "disk".
        io_threads: Reads in flight on the disk. Default 4: most disks deliver their rate there.
            Each more costs a bounce buffer of `chunk_bytes` + 8 KiB.
        chunk_bytes: Largest single read, 4 KiB to 4 MiB. Default "1MiB": larger delays a demand
            behind a guess, smaller costs rate.
        verify: When a pack's checksums are compared: "first" read of each expert (default),
            "always", or "never". Always costs one pass over each loaded byte.
        direct: Read past the page cache (O_DIRECT). Default True: the cache would hold the experts
            a second time. False leaves the memory budget to the kernel's mercy.
        exclude: Regular expressions over the names of experts modules that stay as they are. What
            they match stays resident, outside of the budget.
        strict: Refuse a model of which some experts module is not supported. False leaves such
            modules as they are, counted.
        timeline: Record spans for `session.timeline(path)`, the newest 65,536 of them. Costs 3 MB
            and about 0.1 us per span.

    Raises:
        ConfigError: A value that can never work; the message says what would.
    """

    device_memory: int | str | None = None
    host_memory: int | str | None = None
    host_tier: str = "inclusive"
    pinned_cap: int | str | None = None
    prefill: str = "stream"
    policy: str = "auto"
    predictor: Any = None
    preset: str | None = None
    pack: str = "auto"
    offload_dir: str | None = None
    backing: str = "auto"
    io_threads: int = 4
    chunk_bytes: int | str = "1MiB"
    verify: str = "first"
    direct: bool = True
    exclude: tuple[str, ...] = ()
    strict: bool = True
    timeline: bool = True

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the normal forms of paths and of a lone pattern
        if self.offload_dir is not None:
            set_field(self, "offload_dir", os.fspath(self.offload_dir))
        set_field(self, "pack", _path(self.pack, "pack"))
        set_field(self, "exclude", _patterns(self.exclude))
        _check_device_memory(self.device_memory)
        _check_host_memory(self.host_memory)
        if self.pinned_cap is not None and _size("pinned_cap", self.pinned_cap)[0] != "bytes":
            raise ConfigError(f'pinned_cap: got {self.pinned_cap!r}, expected bytes, as in "8GiB"')
        _check_choice("host_tier", self.host_tier, HOST_TIERS)
        if self.host_tier == "none" and self.host_memory is not None:
            raise ConfigError(
                f"host_memory: got {self.host_memory!r} beside host_tier='none', expected none: no "
                "expert stays in RAM; leave one of them out"
            )
        _check_choice("prefill", self.prefill, PREFILLS)
        set_field(self, "policy", _policy(self.policy, self.predictor, self.preset))
        set_field(self, "predictor", _predictor(self.predictor))
        _check_choice("backing", self.backing, BACKINGS)
        _check_choice("verify", self.verify, VERIFICATIONS)
        _check_threads(self.io_threads)
        if (bounce := self.io_threads * self.chunk_bytes_as_int()) > MAX_BOUNCE_BYTES:
            raise ConfigError(
                f"io_threads: got {self.io_threads} with chunk_bytes {self.chunk_bytes}, {bounce} "
                f"bytes of reads at once, expected at most {MAX_BOUNCE_BYTES}; lower one of them"
            )
        for name in ("direct", "strict", "timeline"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected True or False")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OffloadOptions:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: An unknown key, with the nearest name there is.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise ConfigError(f"{key}: there is no such option{nearest(key, known)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON can hold them; a predictor that is an object by its name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["exclude"] = list(self.exclude)
        named = tuple(each if isinstance(each, str) else each.name for each in self.predictors)
        if named:
            fields["predictor"] = named if isinstance(self.predictor, tuple) else named[0]
        return fields

    @property
    def predictors(self) -> tuple[Any, ...]:
        """All that follow the model: none, one or several."""
        if self.predictor is None:
            return ()
        return self.predictor if isinstance(self.predictor, tuple) else (self.predictor,)

    def budget_bytes(self, total_slot_bytes: int) -> int:
        """The budget in bytes, where a percentage is taken of `total_slot_bytes`."""
        assert self.device_memory is not None  # refused when the options were made
        return _bytes_of(self.device_memory, total_slot_bytes)

    def host_tier_bytes(self, total_slot_bytes: int, free_bytes: int) -> int:
        """The host tier's bytes, of `free_bytes` of RAM; never more than all experts take."""
        if self.host_memory is None:
            return min(total_slot_bytes, free_bytes * HOST_SHARE_PERCENT // 100)
        return min(total_slot_bytes, _bytes_of(self.host_memory, total_slot_bytes))

    def pinned_cap_bytes(self) -> int:
        """`pinned_cap` in bytes; without one, more than there is."""
        return NO_CAP if self.pinned_cap is None else _bytes_of(self.pinned_cap, 0)

    def chunk_bytes_as_int(self) -> int:
        """`chunk_bytes` in bytes.

        Raises:
            ConfigError: It is no size, or outside of what a read may be.
        """
        least, most = CHUNK_RANGE
        kind, amount = _size("chunk_bytes", self.chunk_bytes)
        if kind != "bytes" or not least <= amount <= most:
            raise ConfigError(
                f"chunk_bytes: got {self.chunk_bytes!r}, expected {least} to {most} bytes"
            )
        if amount % least:
            raise ConfigError(
                f"chunk_bytes: got {self.chunk_bytes!r}, expected whole {least} bytes"
            )
        return int(amount)


def _size(name: str, value: object) -> tuple[str, float]:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f'{name}: got {value!r}, expected bytes or a size such as "6GiB"')
    try:
        return _core.parse_size(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _check_device_memory(value: object) -> None:
    if value is None:
        raise ConfigError(
            'device_memory: missing, and it has no default; pass bytes or a size, "12GiB" or '
            '"25%" of the experts\' slots (`sluice plan` prints what a model needs)'
        )
    if isinstance(value, Mapping):
        raise ConfigError(
            "device_memory: got a mapping, but this build offloads to one device; pass one size"
        )
    kind, amount = _size("device_memory", value)
    if amount <= 0 or (kind == "share" and amount > 1):
        raise ConfigError(f'device_memory: got {value!r}, expected more than 0, at most "100%"')


def _bytes_of(size: int | str, whole: int) -> int:
    kind, amount = _core.parse_size(size)
    if kind == "bytes":
        return int(amount)
    # As the decimal that was written: 30 % of ten slots is three, whatever 0.3 is in binary.
    return int(whole * Fraction(amount).limit_denominator(10**9))


def _check_host_memory(value: object) -> None:
    if value is None:
        return
    kind, amount = _size("host_memory", value)
    if amount <= 0 or (kind == "share" and amount > 1):
        raise ConfigError(f'host_memory: got {value!r}, expected more than 0, at most "100%"')


def _policy(value: object, predictor: object, preset: object) -> str:
    """The policy's name, where none was given the one that goes with the rest."""
    if preset is not None:
        _check_choice("preset", preset, tuple(PRESETS))
        policy, kind = PRESETS[str(preset)]
        if predictor is None:
            raise ConfigError(
                f"preset: got {preset!r} without predictor=, expected a folder of a trained one: "
                f"`sluice train {kind} --trace FILE --out FOLDER`"
            )
        if value not in ("auto", policy):
            raise ConfigError(
                f"policy: got {value!r} beside preset={preset!r}, expected none or {policy!r}"
            )
        return policy
    if value == "auto":
        return "decayed-lfu" if predictor is None else "forecast"
    _check_policy(value)
    return str(value)


def _predictor(value: Any) -> Any:
    """A name, a path, or an object that speaks the protocol; or several of them, as a tuple."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        several = cast("list[Any] | tuple[Any, ...]", value)
        if not several:
            raise ConfigError("predictor: got no one in a list, expected None or at least one")
        return tuple(_predictor(each) for each in several)
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    made = value() if isinstance(value, type) else value
    missing = [
        name
        for name in ("name", "begin_step", "observe", "plan", "forecast")
        if not hasattr(made, name)
    ]
    if missing:
        raise ConfigError(
            f"predictor: got {made!r} without {', '.join(missing)}, expected a folder, a name, or "
            "an object with name, begin_step, observe, plan and forecast"
        )
    return made


def _check_policy(value: object) -> None:
    if isinstance(value, type):
        raise ConfigError(
            f"policy: got the class {value.__name__}, but live policies are named; a class of your "
            "own runs in the simulator"
        )
    if not isinstance(value, str):
        raise ConfigError(f"policy: got {value!r}, expected a name")
    try:
        _core.check_policy(value)
    except ConfigError as error:
        raise ConfigError(f"{error}{nearest(value, _core.policy_names())}") from None


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{name}: got {value!r}, expected one of {', '.join(choices)}"
            f"{nearest(str(value), choices)}"
        )


def _check_threads(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_IO_THREADS:
        raise ConfigError(f"io_threads: got {value!r}, expected 1 to {MAX_IO_THREADS}")


def _path(value: object, name: str) -> str:
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        path = None
    if not isinstance(path, str) or not path:
        raise ConfigError(f'{name}: got {value!r}, expected "auto", "none" or a path')
    return path


def _patterns(value: object) -> tuple[str, ...]:
    given: Iterable[Any] = (value,) if isinstance(value, str) else value  # type: ignore[assignment]
    try:
        patterns = tuple(given)
        for pattern in patterns:
            re.compile(pattern)
    except (TypeError, re.error) as error:
        raise ConfigError(
            f"exclude: got {value!r}, expected regular expressions: {error}"
        ) from None
    return patterns
