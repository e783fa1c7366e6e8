"""selftest(): a bundle runs over its own vectors in seconds, without the checkpoint and without PyTorch.

What an app does on the device, done here by the bundle's own runtime.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Final, Literal

from vlmedge.bundle import Bundle, open_bundle
from vlmedge.generate import Conversation, Embedded, Prefix
from vlmedge.loading import open_model
from vlmedge.parity.causes import usual_cause
from vlmedge.parity.metrics import centred
from vlmedge.parity.report import TITLES, StageResult
from vlmedge.parity.selftest_checks import names, with_model, without_model
from vlmedge.parity.selftest_file import ModelVectors, ReadingVector, Vectors, read_vectors
from vlmedge.parity.trace import Reading, Trace, caption_ids, needed_context, trace
from vlmedge.parity.vectors import chosen_from
from vlmedge.progress import Progress
from vlmedge.prompt import Tokenizer
from vlmedge.records import encode
from vlmedge.session import F32
from vlmedge.skills import Model

SCHEMA: Final = "vlmedge.selftest-result/1"
# In the order in which they are made, with a title.
CHECKS = {
    "files": TITLES["files"],
    "tokenizer": "token ids",
    "preprocess": TITLES["preprocess"],
    "pixels": "normalised pixels",
    **{name: TITLES[name] for name in ("features", "projected", "logits", "tokens", "regions", "boxes")},
}
_PIXELS = "a product with a reciprocal for a division, a fused multiply-add, channels last, BGR for RGB"
_NOT_RECORDED = "nothing was recorded of the model: the bundle was exported where its runtime is not installed"


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What came of a self-test.

    `checks` in the order of `CHECKS`; of a model without region heads there are no regions and boxes. `runtime`: ""
    where no model was run. `failing`: index into `checks` of the first that failed, None where none did; `cause`: what
    usually causes a failure there. `notes`: what could not be checked and why. `seconds`: hashing included.
    """

    schema: Literal["vlmedge.selftest-result/1"]
    bundle: str
    format: str
    flavour: str
    profile: str
    runtime: str
    recorded_with: str | None
    checks: tuple[StageResult, ...]
    failing: int | None
    cause: str
    notes: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Did no check fail?"""
        return self.failing is None

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        data: dict[str, Any] = encode(self)
        return data


def selftest(
    bundle: str | os.PathLike[str],
    runtime: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    *,
    progress: Progress | None = None,
) -> SelfTest:
    """Run a bundle's self-test and say at which check it parts from what was recorded.

    Raises BundleError for a file whose hash is wrong, before anything runs, and for vectors of another schema;
    RuntimeFailedError without the bundle's runtime. A check that fails is no exception: see `SelfTest.passed`.
    """
    start, progress = time.perf_counter(), progress or Progress()
    opened = open_bundle(bundle)
    progress.stage("comparing hashes")
    opened.check()
    vectors, manifest = read_vectors(opened), opened.manifest
    progress.stage("token ids and pixels")
    tokenizer = Tokenizer((opened.path / manifest.tokenizer.file).read_bytes())
    checks = [StageResult("files", None, "passed", numbers={"files": len(manifest.files)})]
    checks += without_model(vectors, manifest.model, tokenizer)
    if vectors.model is None:
        skipped = [StageResult(n, None, "skipped", why="nothing was recorded") for n in names(manifest.model)]
        return _result(opened, vectors, "", checks + skipped, start)
    progress.stage("running the model")
    context = needed_context(manifest.model)
    with open_model(opened, runtime, threads, memory="lean", context=context, provider=provider) as model:
        found, ran = trace(model), model.session.runtime
        rows = [_answer(model, found, *pair) for pair in _readings(vectors.model, found)]
    checks += with_model(vectors, vectors.model, found, rows, manifest.model)
    return _result(opened, vectors, ran, checks, start)


def _readings(model: ModelVectors, found: Trace) -> tuple[tuple[ReadingVector, Reading], ...]:
    return (model.small, found.small), (model.stitched, found.stitched)


def _answer(model: Model, found: Trace, wanted: ReadingVector, ours: Reading) -> list[F32]:
    """The logits behind each of the recorded tokens; where ours became others, once more with the recorded ones fed."""
    if ours.tokens == wanted.tokens or not all(0 <= token < model.spec.decoder.vocab for token in wanted.tokens):
        return chosen_from(found, ours, model.spec)
    talk = Conversation(model.session, model.spec.decoder.bidirectional_prefix)
    start, ids = caption_ids(model.spec.prompt)
    step = talk.begin(Prefix(((start,), Embedded("selftest", ours.projected))))
    assert step is not None, "a new conversation holds nothing"
    rows = [(talk.ask([ids]) if ids else step).logits.copy()]
    rows += [talk.ask([(token,)]).logits.copy() for token in wanted.tokens[:-1]]
    return [centred(row) for row in rows]


def _result(bundle: Bundle, vectors: Vectors, runtime: str, checks: list[StageResult], start: float) -> SelfTest:
    manifest = bundle.manifest
    failing = next((i for i, check in enumerate(checks) if check.outcome == "failed"), None)
    return SelfTest(
        schema=SCHEMA,
        bundle=bundle.path.name,
        format=manifest.format,
        flavour=manifest.flavour,
        profile=manifest.profile.name,
        runtime=runtime,
        recorded_with=vectors.recorded_with,
        checks=tuple(checks),
        failing=failing,
        cause="" if failing is None else _cause(checks[failing].stage),
        notes=() if vectors.model is not None else (_NOT_RECORDED,),
        seconds=round(time.perf_counter() - start, 2),
    )


def _cause(check: str) -> str:
    return _PIXELS if check == "pixels" else usual_cause("prompt" if check == "tokenizer" else check, None, ())
