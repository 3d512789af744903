"""The torch-free core: sessions, stores, packs, kernels on raw pointers.

Addresses are integers (`tensor.data_ptr()`); whoever passes one keeps the memory alive. Every call
that can take long releases the GIL. Errors are the classes of `sluice.errors`, which live here.
"""

from collections.abc import Callable, Sequence
from typing import Any

class SluiceError(Exception): ...
class ConfigError(SluiceError, ValueError): ...
class CheckpointError(SluiceError, ValueError): ...

class IoError(SluiceError, OSError):
    path: str
    offset: int

class CapacityError(SluiceError, MemoryError): ...
class DeviceError(SluiceError, RuntimeError): ...
class InternalError(SluiceError, AssertionError): ...

def version() -> str: ...
def build_info() -> dict[str, Any]:
    """compiler, cpu_isa, cuda ("none", "runtime" or "emulated")."""

def num_cuda_devices() -> int:
    """0 in a build without CUDA and without a driver."""

def cuda_device_facts(ordinal: int) -> dict[str, Any]:
    """pci_address, compute_capability (major · 10 + minor), num_multiprocessors,
    driver_cuda_version (1000 · major + 10 · minor); no context is made. Errors: DeviceError."""

def has_slots_apart(device: str) -> bool:
    """Whether a session on this torch device ("cpu", "cuda:N") has memory of its own for slots."""

def parse_size(text: str | int) -> tuple[str, float]:
    """("bytes", n) or ("share", 0.25) of "6GiB", "6GB", "25%", 123. Errors: ConfigError."""

def drain_log() -> list[tuple[float, int, str]]:
    """Takes the core's log: (time_s, level, text), oldest first."""

def policy_names() -> list[str]: ...
def check_policy(name: str) -> None:
    """ConfigError unless a session can have this policy."""

class Routes:
    """Events of a trace: visits of layers, by step."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        steps: Any,
        layers: Any,
        begins: Any,
        experts: Any,
        weights: Any | None,
    ) -> None: ...

def replay(
    routes: Routes,
    slots: Sequence[int],
    policy: Any,
    bypass: bool,
    unscored_events: int,
    preloaded: Sequence[tuple[int, int]],
    scores: Any | None,
) -> dict[str, Any]:
    """Replays routes through slot caches, event by event: per layer requests, hits, first_uses and
    returns; event_hits, events, waves, evictions."""

def run_timed(
    routes: Routes,
    *,
    expert_bytes: int,
    chunk_bytes: int,
    bytes_per_second: float,
    seconds_per_chunk: float,
    depth: int,
    dense_seconds: float,
    expert_seconds: float,
    num_slots: int,
    policy: str,
    guess_begins: Any | None = None,
    guess_layers: Any | None = None,
    guess_experts: Any | None = None,
    guess_probabilities: Any | None = None,
    guess_steps: Any | None = None,
    scores: Any | None = None,
) -> dict[str, Any]:
    """Runs routes through a session's engine on a virtual clock: stats, step_ends_ns, and per event
    the sums demand_bytes and wasted_bytes."""

def gate_names() -> list[str]: ...
def fingerprint_files(paths: Sequence[str]) -> str: ...
def file_identity(fd: int, path: str) -> str:
    """What `read_safetensors_header` gives as "identity", of an open file."""

def read_safetensors_header(path: str) -> dict[str, Any]:
    """{"tensors": [(name, dtype, shape, offset, bytes)], "metadata": {…}, "identity": str}; offset
    in the file, identity for `StoreBuilder.add_file`."""

class Store:
    """Expert bytes at rest (immutable).

    Attributes:
        adopted: Set by whoever builds one over adopted memory: what that memory belongs to, alive
            for as long as the store.
    """

    adopted: list[Any]

    @property
    def num_layers(self) -> int: ...
    def layer(self, layer: int) -> dict[str, Any]:
        """name, num_experts, dtype ("F32"|"BF16"|"F16"), hidden, intermediate, gated, has_bias,
        slot_bytes, expert_bytes."""
    @property
    def total_slot_bytes(self) -> int: ...
    @property
    def adopted_bytes(self) -> int: ...
    @property
    def description(self) -> str: ...
    def read_expert_into(self, layer: int, expert: int, address: int, nbytes: int) -> None:
        """Canonical bytes of one expert, to memory of exactly that size."""

class StoreBuilder:
    def __init__(
        self,
        *,
        chunk_bytes: int = ...,
        verify: str = "first",
        direct: bool = True,
        read_rate: int = 0,
    ) -> None: ...
    def add_file(self, path: str, identity: str = "") -> int:
        """With an identity: CheckpointError when the path names another file by now."""
    def add_layer(
        self,
        name: str,
        num_experts: int,
        dtype: str,
        hidden: int,
        intermediate: int,
        gated: bool,
        has_bias: bool,
    ) -> int: ...
    def add_piece(
        self,
        layer: int,
        expert: int,
        section: str,
        *,
        file: int = -1,
        offset: int,
        nbytes: int,
        section_offset: int = 0,
        transform: str = "copy",
        rows: int = 0,
        columns: int = 0,
        dtype: str = "F32",
    ) -> None:
        """One source range of an expert. `section`: "w13", "w2", "b13", "b2"; `section_offset`:
        bytes from its start; `transform`: "copy", "transpose" (source [rows, columns]), "widen"
        (from `dtype` to fp32). file −1: `offset` is an address (adopted memory)."""
    def build(self, description: str = "") -> Store: ...

class PackWriter:
    """`layers`: dicts as `Store.layer` gives them."""

    def __init__(
        self,
        path: str,
        layers: Sequence[dict[str, Any]],
        *,
        model_id: str = "",
        revision: str = "",
        config_sha256: str = "",
        source_fingerprint: str = "",
        fresh: bool = False,
    ) -> None: ...
    @property
    def resumed_experts(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    def append_from(self, store: Store, layer: int, expert: int) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...

def open_pack(
    path: str,
    *,
    chunk_bytes: int = ...,
    verify: str = "first",
    direct: bool = True,
    read_rate: int = 0,
) -> tuple[Store, dict[str, Any]]:
    """The store and the manifest: model_id, revision, config_sha256, source_fingerprint, layers."""

def verify_pack(path: str, progress: Callable[[int, int], None] | None = None) -> None: ...
def plan_memory(budget_bytes: int, layers: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """`layers`: (slot_bytes, num_experts). → budget_bytes, slab_bytes, classes
    [{slot_bytes, num_slots, num_experts}], class_of_layer. Errors: CapacityError."""

class Session:
    """One engine in the registry of sessions; `handle` is what the op takes."""

    def __init__(
        self,
        store: Store,
        *,
        device: str = "cpu",
        device_memory: int,
        host_memory: int = 0,
        host_tier: str = "inclusive",
        pinned_cap: int = ...,
        prefill: str = "stream",
        policy: str,
        io_threads: int,
        timeline: bool = True,
        nvtx: bool = False,
        gates: Sequence[dict[str, Any]],
    ) -> None:
        """`gates`, one per layer: kind, interleaved, alpha, limit, gate_callback, post_callback.
        A callback is called as fn(layer, dtype, rows, in_columns, out_columns, in_address,
        out_address) with the GIL; its exception ends the forward and is raised there."""
    @property
    def handle(self) -> int: ...
    def add_scorer(self, kind: str, tables: dict[str, Any]) -> int:
        """Has it guess and rank inside of forwards; the number to remove it by."""
    def remove_scorer(self, number: int) -> None: ...
    def begin_step(self, requests: Any, tokens: int, token_ids: Any) -> None:
        """Tells the scorers whose rows the next layers are of, as `Scorer.begin_step` takes
        them."""
    def forecast(self, first_layer: int, scores: Any, age_steps: int = 0) -> None:
        """Keep-scores [layers, experts] float32 of whole layers, made so many steps ago."""
    def hint(self, hints: Sequence[tuple[int, int, float, float]]) -> None:
        """(layer, expert, probability, seconds from now until worthless; inf: never)."""
    def stats(self) -> dict[str, Any]:
        """The fields of EngineStats; `degradations` is a dict."""
    def plan(self) -> dict[str, Any]: ...
    def host_tier(self) -> tuple[int, int, int, int]:
        """(capacity, filled, pinned, unpinned for good) bytes; zeros without one."""
    def timeline(self) -> list[tuple[str, float, float, int, int, int, int]]:
        """(kind, begin_s, end_s, layer, expert, bytes, tokens), oldest first."""
    def residency(self) -> list[list[tuple[str, int, int, int]]]:
        """Per size class, per slot: (state, layer, expert, leases)."""
    def drain(self) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def inside(self) -> bool:
        """Whether this thread is in a callback of one of its forwards."""
    def take_error(self) -> BaseException | None:
        """As the function of that name; also of a session that was closed meanwhile."""

class Scorer:
    """What guesses and ranks inside of forwards, without one: "pairs", "gates" or "forecast" with
    its tables by name."""
    def __init__(self, kind: str, tables: dict[str, Any]) -> None: ...
    def begin_step(self, requests: Any, tokens: int, token_ids: Any) -> None:
        """The rows of the layers that follow: int64 [B], tokens of each, int64 [B x tokens] or
        empty."""
    def layer(
        self, layer: int, ids: Any, weights: Any, hidden: Any
    ) -> tuple[int, Any, list[tuple[int, int, float, int]]]:
        """One call of int64 [T, K], float32 [T, K] and float32 [T, H] or empty: first layer and
        float32 [n, E] of keep-scores; guesses as (layer, expert, probability, layers ahead)."""

def take_error(handle: int) -> BaseException | None:
    """The exception that the calling thread's last failed forward left; taken once."""

def forward(
    handle: int,
    layer: int,
    num_tokens: int,
    top_k: int,
    columns: int,
    activations: str,
    weights_dtype: str,
    hidden: int,
    expert_ids: int,
    weights: int,
    out: int,
    device: int = -1,
    stream: int = 0,
) -> None:
    """What the bridge calls, by handle; errors are raised as they are."""

def core_table() -> int:
    """Address of the SluiceCoreTable, for `torch.ops.sluice.bind`."""

def set_torch_table(address: int) -> None:
    """Address of _ops's SluiceTorchTable (0: forget it)."""

def set_python_gemm(fn: Callable[[str, int, int, int, int, int, int, int], None] | None) -> None:
    """Without _ops: gemm(dtype, m, n, k, a, b, c, ldc) in Python, called with the GIL."""

def num_threads() -> int:
    """Threads that kernels use now."""

class Parallel:
    """Threads of kernels that are called one by one: "default" is torch's pool where `_ops` is
    bound, else (and for "own") one of the core's own. One call at a time."""

    def __init__(self, kind: str = "default") -> None: ...
    @property
    def num_threads(self) -> int: ...

def expert_decode(
    parallel: Parallel,
    isa: str,
    weights_dtype: str,
    activations: str,
    hidden: int,
    intermediate: int,
    gate: dict[str, Any],
    experts: Sequence[tuple[int, int, int, int]],
    inputs: int,
    outputs: int,
    num_tokens: int,
) -> None:
    """One call of the few-token kernel on raw pointers, for tests and micro-benchmarks.

    Shapes: inputs `[num_tokens, hidden]`, outputs `[experts, num_tokens, hidden]`, both f32. An
    expert is (w13, w2, b13, b2), 0 for a bias that it lacks; isa "" = the machine's best."""

def read_bandwidth(parallel: Parallel, address: int, nbytes: int, repeats: int) -> float:
    """Bytes/s of the read loop over memory."""

def disk_bandwidth(path: str, offset: int, nbytes: int, chunk_bytes: int, threads: int) -> float:
    """Bytes/s of O_DIRECT reads of a file range, `threads` deep."""

def disk_bandwidth_extents(
    path: str, extents: Sequence[tuple[int, int]], chunk_bytes: int, threads: int
) -> float:
    """The same over many ranges (offset, nbytes), in their order."""

def measure_device(
    device: str,
    *,
    copy_bytes: Sequence[int],
    copy_total_bytes: int,
    depths: Sequence[int],
    read_bytes: int,
    host_bytes: int,
    pin_bytes: int,
    repeats: int,
) -> dict[str, Any]:
    """What the link, the memory and the launches of "cuda:N" take, with bytes in RAM beside them.

    → device, copies [{direction ("to device" | "to host"), memory ("pinned" | "pageable"), depth,
    bytes, seconds (of one copy)}], memory_bytes_per_s, read_bytes, launch_s, round_trip_s,
    pin_bytes_per_s, staging_bytes_per_s, host_bytes_per_s, host_beside_copies_bytes_per_s,
    link_beside_reads_bytes_per_s. Errors: ConfigError for another name or a size of 0; DeviceError
    without such a device; CapacityError."""
