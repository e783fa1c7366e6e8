"""What came of a job: the reply that a worker prints, and the record that the runner keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from vlmedge.device_bench.job import JobKind, Variant, Work
from vlmedge.schema import json_schema

SCHEMA: Final = "vlmedge.bench/1"

# ok; unavailable: it cannot run there (a runtime or unit that is not present), with what to do; failed: an error with a
# reason; crashed: the process ended by a signal or a code of its own; hung: it took too long and was ended;
# out_of_memory; rubbish: its last line is no reply; lost: the host went away.
Status = Literal["ok", "unavailable", "failed", "crashed", "hung", "out_of_memory", "rubbish", "lost"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One ask answered once. `at`: seconds since the measuring began.

    `ms`, each in milliseconds, where it was measured: `image` (file -> RGB), `preprocess` (crops), `vision` (all
    crops), `project`, `tokenize`, `prefill` (the picture's positions), `prompt` (the question's), `first_token` (TTFT:
    image file in hand to first token out, all of these), `decode` (per token, the first excluded: the mean),
    `detokenize` (the whole answer, measured apart), `next_first_token` (TTFT of another question about the same
    picture, which is in the KV cache), `end_to_end`. `token_ms`: each token after the first.
    """

    ask: str
    at: float
    ms: dict[str, float]
    token_ms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one ask: crops cut, crops encoded (one that equals another is encoded once), positions, tokens generated."""

    ask: str
    crops: int
    encoded_crops: int
    image_tokens: int
    prompt_tokens: int
    generated: int


@dataclass(frozen=True, slots=True)
class Load:
    """Opening the model. `files`: were they in the page cache: "cold" (dropped), "warm" (just read), "" where unknown.

    `import_ms`: the runtime's libraries, before that.
    """

    ms: float
    import_ms: float
    files: Literal["cold", "warm", ""]


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the worker's own process, in MB (10^6 bytes); None where the system does not tell.

    `baseline`: resident, libraries imported, before opening. `peak`: the highest. `loaded`: resident after opening.
    `anonymous` and `mapped`: at the end, what the system cannot drop, and pages of files. `gpu_peak`: None off GPUs.
    """

    baseline: float | None
    loaded: float | None
    peak: float | None
    anonymous: float | None
    mapped: float | None
    gpu_peak: float | None

    @property
    def above_baseline(self) -> float | None:
        """What the model added."""
        return None if self.peak is None or self.baseline is None else self.peak - self.baseline


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of the measured samples, from `counter`; None with the reason where there is no counter.

    It is what the whole package or device took, idle included, and the next question about each picture
    (`Sample.ms["next_first_token"]`).
    """

    joules: float | None
    per_answer: float | None
    seconds: float
    counter: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AskAgreement:
    """One ask against the original's float32 answer to it.

    Positions count up to the original's first stop token: behind it an answer goes on only because it is forced to.
    `first_divergent`: the index of the first token that differs, None where all are equal. `top1`: share of positions
    with the same best token, along the original's tokens (teacher forced). `kl`: mean Kullback-Leibler divergence there
    in nats, from the original's 64 most likely tokens and the rest. `same_answer`: equal up to the first stop token.
    `text`: up to there.
    """

    ask: str
    first_divergent: int | None
    top1: float
    kl: float
    same_answer: bool
    text: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement with the original over all asks: means of what `AskAgreement` has.

    `tokens`: positions that count. `text_sha256` hashes all texts.
    """

    asks: tuple[AskAgreement, ...]
    tokens: int
    top1: float
    kl: float
    same_answers: float
    text_sha256: str


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the machine can do with so many threads, measured: GB/s (10^9) of a streaming read, GFLOP/s of products.

    `gemm`: by type of the factors, "f32", "bf16", "int8", as far as a library here has it.
    """

    threads: int
    bandwidth: float
    gemm: dict[str, float]


@dataclass(frozen=True, slots=True)
class Costs:
    """What the model asks of the machine, from its spec and its stored sizes.

    FLOPs (a multiply-add is 2) of one crop's tower and of one picture's prefill; bytes of weights and of the KV cache
    that a token reads at the middle of the answer.
    """

    flops_per_crop: float
    flops_prefill: float
    weight_bytes_per_token: float
    kv_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker prints as the last line of its output.

    `environment`: processor, system, versions, threads, affinity, governor, ...: for reading, not for computing with.
    `others`: processors that other processes took meanwhile, in mean; None where the system does not tell.
    `ceiling` is an anchor's only, everything else a model's.
    """

    status: Status
    reason: str = ""
    load: Load | None = None
    samples: tuple[Sample, ...] = ()
    counts: tuple[Counts, ...] = ()
    memory: Memory | None = None
    energy: Energy | None = None
    agreement: Agreement | None = None
    costs: Costs | None = None
    ceiling: Ceiling | None = None
    others: float | None = None
    threads: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a run's file.

    `job` is `Job.id`. `started`: UTC, ISO 8601. `seconds`: of the whole process. `ceiling`: the last anchor's of the
    same device and thread count. `reached`: fractions of it by stage: "vision", "prefill" (of the fastest product's
    rate), "decode" (of the bandwidth). `drift`: how much slower than at the start the last anchor before the job was
    (0.03: 3 %), None without anchors. `again`: how often the job was run before, because the anchor after it had
    drifted.
    """

    schema: Literal["vlmedge.bench/1"]
    run: str
    job: str
    kind: JobKind
    device: str
    host: str
    round: int
    variant: Variant | None
    work: Work
    started: str
    seconds: float
    reply: Reply
    ceiling: Ceiling | None = None
    reached: dict[str, float] = field(default_factory=dict)
    drift: float | None = None
    again: int = 0


def schema() -> dict[str, Any]:
    """The JSON schema of a record, as it ships in `bench.schema.json`."""
    return json_schema(Record, SCHEMA)
