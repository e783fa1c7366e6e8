"""What a stock llama.cpp app gets from a bundle: its own chat handler beside our runtime, on single-crop questions.

    python benchmarks/stock_app.py [--profile q8] [--pictures 100]

The stock path letterboxes and resizes bicubically, decodes the picture causally and knows nothing of crops.
Prints both shares and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

import vlmedge
from vlmedge import imaging
from vlmedge.demo.evaluate import unseen
from vlmedge.demo.questions import questions
from vlmedge.demo.scene import draw
from vlmedge.session import U8

SOURCE = "demo:moondream2"


def stock(folder: Path, context: int) -> Callable[[U8, str], str]:
    """A function that asks llama-cpp-python's own multimodal chat handler."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    handler = MTMDChatHandler(clip_model_path=str(folder / "mmproj.gguf"), verbose=False)
    options = {"n_ctx": context, "n_batch": context, "n_ubatch": context, "n_threads": 1, "verbose": False}
    llama = Llama(str(folder / "text.gguf"), chat_handler=handler, **options)

    def ask(picture: U8, question: str) -> str:
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        with quiet():
            answer: Any = llama.create_chat_completion(
                [{"role": "user", "content": content}], temperature=0, max_tokens=32
            )
        return str(answer["choices"][0]["message"]["content"]).strip()

    return ask


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The handler's notes on duplicate BOS tokens are not ours to print."""
    with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Export, ask both, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="q8")
    parser.add_argument("--pictures", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = vlmedge.export(SOURCE, "gguf", given.profile, Path(temporary) / "out", verify=False, threads=1)
        spec = bundle.manifest.model
        ask = stock(bundle.path, spec.decoder.context)
        counts = {"questions": 0, "ours": 0, "stock": 0}
        with vlmedge.load(bundle.path, threads=1) as model:
            for content in unseen(given.pictures):
                if imaging.tiling_of(content.height, content.width, spec.image) != (1, 1):
                    continue
                picture = draw(content)
                for question in questions(content):
                    if question.skill != "query" or question.refers is not None:
                        continue
                    right = ask(picture, question.text) in question.answers
                    counts["questions"] += 1
                    counts["stock"] += right
                    counts["ours"] += model.query(picture, question.text).text.strip() in question.answers
                print(f"{counts['stock']} of {counts['questions']}", file=sys.stderr, end="\r", flush=True)
    total = counts["questions"]
    print(f"profile {given.profile}: {total} questions about single-crop pictures")
    print(f"our runtime {counts['ours'] / total:.1%}, stock chat handler {counts['stock'] / total:.1%}")
    print(json.dumps({"profile": given.profile, **counts}))


if __name__ == "__main__":
    main()
