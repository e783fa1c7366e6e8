"""An ONNX bundle in headless Chromium: onnxruntime-web and transformers.js give the native run's tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.browser import chromium
from tests.web import jobs
from vlmedge import imaging
from vlmedge.bundle import open_bundle
from vlmedge.demo import attention
from vlmedge.exporters.onnx.consumers import configs
from vlmedge.loading import describe
from vlmedge.pipeline import export
from vlmedge.spec import Text

PICTURES = Path(attention.__file__).parent / "pictures"
QUESTION = "How many shapes do you see?"
PROFILES = ("f32", "w8a8", "w8a8-kv8", "q4")


@pytest.fixture(scope="module")
def browser():
    jobs.install()
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", params=PROFILES)
def bundle(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("web") / f"{request.param}.onnx"
    return export("demo:moondream2", "onnx", request.param, out, verify=False, threads=1).path


def run(browser, bundle, folder, asked, function, *, isolated):
    """Call the page's function with the job; the page must not complain or ask another host."""
    with jobs.serve({"bundle": bundle, "job": folder}, isolated=isolated) as address:
        page = browser.open(f"{address}/index.html")
        found = page.evaluate(f"{function}({json.dumps(asked.job)})", timeout=300)
        assert page.errors == []
        assert all(url.startswith((address, "data:", "blob:")) for url in page.requests)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("picture", ["shapes.png", "wide.png"])
def test_onnxruntime_web_gives_the_native_tokens(browser, bundle, tmp_path, picture, threads):
    asked = jobs.ask(bundle, PICTURES / picture, QUESTION, tmp_path, threads=threads)
    found = run(browser, bundle, tmp_path, asked, "driverRun", isolated=threads > 1)
    assert found["isolated"] == (threads > 1)
    assert found["picture"] == asked.picture
    assert found["text"] == asked.text


@pytest.mark.slow
@pytest.mark.parametrize("build", ["", ".asyncify"])  # without WebGPU, and with it: the library's default
def test_transformers_js_gives_the_native_tokens(browser, bundle, tmp_path, build):
    asked = jobs.ask(bundle, PICTURES / "wide.png", QUESTION, tmp_path)
    asked.job["build"] = build
    found = run(browser, bundle, tmp_path, asked, "transformersRun", isolated=False)
    assert found["picture"] == asked.picture
    assert found["text"] == asked.text
    assert found["plain"] == asked.text  # the files alone, without our driver
    assert found["words"].strip() == asked.words.strip()
    assert (
        found["ids"] == asked.job["prompts"][0][-2 - len(found["ids"]) : -2]
    )  # as native: the template ends in two ids
    spec = open_bundle(bundle).manifest.model
    assert found["pixels"]["dims"] == [1, 3, spec.image.size, spec.image.size]
    size = 3 * spec.image.size**2
    pixels = np.frombuffer((tmp_path / "pixels").read_bytes()[:size], np.uint8)
    expected = imaging.normalise(pixels.reshape(1, spec.image.size, spec.image.size, 3), spec.image)
    assert np.allclose(found["pixels"]["data"], expected.ravel()[:64], atol=1e-6)
    assert "Number of tokens and features do not match" in found["refused"]  # never a silently wrong picture


@pytest.fixture(scope="module")
def found():
    return describe("demo:moondream2")


def texts(spec, tokenizer, data_files):
    return {name: json.loads(text) for name, text in configs(spec, tokenizer, data_files).items()}


def test_configs_say_what_transformers_js_reads(found):
    spec = found.spec
    files = texts(spec, found.tokenizer, {"decoder_model_merged": 2, "embed_tokens": 1, "vision_encoder": 0})
    config = files["config.json"]
    assert config["transformers.js_config"] == {
        "dtype": "fp32",
        "use_external_data_format": {"decoder_model_merged": 2, "embed_tokens": 1},
    }
    assert config["model_type"] == "llava"
    assert config["text_config"]["model_type"] == "phi"
    read = ("num_key_value_heads", "num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    decoder = spec.decoder
    expected = [decoder.kv_heads, decoder.layers, decoder.width, decoder.heads, decoder.head_dim]
    assert [config["text_config"][key] for key in read] == expected
    assert files["generation_config.json"] == {
        "bos_token_id": 0,
        "eos_token_id": list(spec.prompt.stop),
        "pad_token_id": spec.prompt.stop[0],
        "max_new_tokens": spec.prompt.max_tokens,
        "do_sample": False,
        "suppress_tokens": list(spec.prompt.banned),
    }
    assert files["preprocessor_config.json"]["size"] == {"height": spec.image.size, "width": spec.image.size}
    assert files["tokenizer_config.json"]["eos_token"] == "<|endoftext|>"


def test_configs_of_another_decoder(found):
    """Gated, root mean square norms, templates without a common first token, a tokenizer without added ones."""
    decoder = replace(found.spec.decoder, norm="rms", gated=True, parallel_residual=False, activation="silu")
    prompt = replace(found.spec.prompt, templates={"query": (Text("{question}"),)}, banned=())
    files = texts(replace(found.spec, decoder=decoder, prompt=prompt), b"{}", {})
    assert files["config.json"]["text_config"]["model_type"] == "llama"
    assert files["config.json"]["text_config"]["rms_norm_eps"] == decoder.norm_eps
    assert files["config.json"]["text_config"]["hidden_act"] == "silu"
    assert files["generation_config.json"]["bos_token_id"] is None
    assert files["generation_config.json"]["suppress_tokens"] is None
    assert "bos_token" not in files["tokenizer_config.json"]
