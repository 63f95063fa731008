from collections.abc import Sequence
from typing import TypedDict

class KernelRow(TypedDict):
    format: str
    ggml_type: int
    activation: str
    isa: str
    name: str
    tile: int
    block_cols: int
    supported: bool

class ThreadPool:
    def __init__(self, num_threads: int, cpus: list[int] = ..., groups: list[int] = ...) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def moe_s(self) -> float: ...
    @property
    def moe_experts(self) -> int: ...
    def split(self, num_units: int) -> list[int]: ...

class NumaNode(TypedDict):
    node: int
    cpus: list[int]
    cores: list[int]
    memory_allowed: bool
    total_bytes: int
    free_bytes: int
    available_bytes: int

class PageCount(TypedDict):
    pages: dict[int, int]
    absent: int
    method: str
    problem: str

class MatrixPart(TypedDict):
    node: int
    address: int
    nbytes: int
    batch: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]
    problem: str

class PackedMatrix:
    def __init__(
        self,
        ggml_type: int,
        batch: int,
        rows: int,
        cols: int,
        division: str = ...,
        nodes: list[int] = ...,
        cuts: list[int] = ...,
    ) -> None: ...
    @property
    def ggml_type(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def division(self) -> str: ...
    @property
    def parts(self) -> list[MatrixPart]: ...
    def pack_rows(
        self, pool: ThreadPool, batch_index: int, row_start: int, num_rows: int, src: int
    ) -> None: ...
    def pack_ranges(
        self, pool: ThreadPool, ranges: Sequence[tuple[int, int, int]], src: int, packed: bool = ...
    ) -> None: ...
    @staticmethod
    def over(ggml_type: int, batch: int, rows: int, cols: int, packed: int) -> PackedMatrix: ...
    def unpack_rows(self, batch_index: int, row_start: int, num_rows: int, dst: int) -> None: ...

class Handoff:
    submit_address: int
    wait_address: int
    def __init__(self, pool: ThreadPool, cpu: int = ..., limit_s: float = ...) -> None: ...
    def add(
        self,
        layer: int,
        gate: PackedMatrix,
        up: PackedMatrix,
        down: PackedMatrix,
        max_tokens: int,
        k: int,
        num_tokens: int,
        x: int,
        topk_ids: int,
        topk_weights: int,
        out: int,
    ) -> int: ...
    def check(self) -> None: ...
    @property
    def busy_s(self) -> float: ...
    @property
    def num_done(self) -> int: ...
    def record(self, on: bool) -> None: ...
    def take_recorded(self) -> list[tuple[int, int, int]]: ...
    @staticmethod
    def submit(job: int) -> None: ...
    @staticmethod
    def wait(job: int) -> None: ...

def supported_isas() -> list[str]: ...
def isas() -> list[str]: ...
def isa_missing(name: str) -> list[str]: ...
def select_isa(name: str | None) -> str: ...
def current_isa() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def kernel_rows() -> list[KernelRow]: ...
def has_kernel(ggml_type: int, isa: str) -> bool: ...
def kernel_name(ggml_type: int, isa: str) -> str | None: ...
def physical_cores() -> list[int]: ...
def numa_nodes(root: str = ..., cpus: list[int] | None = ...) -> list[NumaNode]: ...
def count_pages(start: int, bytes: int) -> PageCount: ...
def read_mapped(start: int, bytes: int) -> int: ...
def end_on_bus_error(message: str) -> None: ...
def parse_numa_maps(text: str, start: int) -> dict[int, int]: ...
def linear(
    pool: ThreadPool, matrix: PackedMatrix, x: int, num_tokens: int, x_stride: int, out: int, out_stride: int
) -> None: ...
def linear_batched(
    pool: ThreadPool,
    matrix: PackedMatrix,
    x: int,
    num_tokens: int,
    x_token_stride: int,
    x_batch_stride: int,
    out: int,
    out_token_stride: int,
    out_batch_stride: int,
) -> None: ...
def linear_transposed_batched(
    pool: ThreadPool,
    matrix: PackedMatrix,
    x: int,
    num_tokens: int,
    x_token_stride: int,
    x_batch_stride: int,
    out: int,
    out_token_stride: int,
    out_batch_stride: int,
) -> None: ...
def gather_rows(pool: ThreadPool, matrix: PackedMatrix, ids: int, num_tokens: int, out: int) -> None: ...
def code_book(format: str) -> bytes: ...
def quantize_activations(x: int, cols: int, codes: int, scales: int, sums: int) -> None: ...
def rms_norm(
    pool: ThreadPool, x: int, num_tokens: int, dim: int, weight: int, eps: float, residual: int, out: int
) -> None: ...
def mla_append(
    pool: ThreadPool,
    q: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    kv: int,
    kv_norm: int,
    eps: float,
    rope: int,
    max_positions: int,
    cache: int,
    cache_format: str,
    num_blocks: int,
    latent_dim: int,
    rope_dim: int,
    positions: int,
    slot_mapping: int,
) -> None: ...
def mla_attention(
    pool: ThreadPool,
    q: int,
    q_latent: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    cache: int,
    cache_format: str,
    num_blocks: int,
    latent_dim: int,
    rope_dim: int,
    num_sequences: int,
    positions: int,
    query_start: int,
    seq_lens: int,
    block_tables: int,
    block_table_stride: int,
    scale: float,
    out: int,
) -> None: ...
def gqa_append(
    pool: ThreadPool,
    q: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    k: int,
    v: int,
    rope: int,
    rope_dim: int,
    max_positions: int,
    halves: bool,
    keys: int,
    values: int,
    cache_format: str,
    num_blocks: int,
    positions: int,
    slot_mapping: int,
) -> None: ...
def gqa_attention(
    pool: ThreadPool,
    q: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    keys: int,
    values: int,
    cache_format: str,
    num_blocks: int,
    num_sequences: int,
    positions: int,
    query_start: int,
    seq_lens: int,
    block_tables: int,
    block_table_stride: int,
    scale: float,
    out: int,
) -> None: ...
def route(
    pool: ThreadPool,
    router: PackedMatrix,
    x: int,
    num_tokens: int,
    bias: int,
    scoring: str,
    num_groups: int,
    topk_groups: int,
    k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    topk_ids: int,
    topk_weights: int,
) -> None: ...
def moe(
    pool: ThreadPool,
    gate: PackedMatrix,
    up: PackedMatrix,
    down: PackedMatrix,
    x: int,
    num_tokens: int,
    topk_ids: int,
    topk_weights: int,
    k: int,
    out: int,
) -> None: ...
def mlp(
    pool: ThreadPool,
    gate: PackedMatrix,
    up: PackedMatrix,
    down: PackedMatrix,
    x: int,
    num_tokens: int,
    out: int,
) -> None: ...
def count_experts(ids: int, num_ids: int, num_experts: int, counts: int) -> None: ...
def add(pool: ThreadPool, x: int, num_tokens: int, dim: int, sums: int) -> None: ...

class Recording:
    def __init__(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def run(self) -> None: ...
    def __len__(self) -> int: ...

def measure_read_bandwidth(pool: ThreadPool, bytes: int, seconds: float, num_threads: int = 0) -> float: ...
def measure_int8_rate(pool: ThreadPool, seconds: float) -> float: ...
def scratch_bytes() -> int: ...
def release_scratch() -> None: ...
def fill_scratch(byte: int) -> None: ...
