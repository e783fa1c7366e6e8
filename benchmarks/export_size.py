"""Export at real size: wall time and memory of a 2B checkpoint to q4, beside llama.cpp's two-step way in the same run.

    python benchmarks/export_size.py --convert LLAMA_CPP/convert_hf_to_gguf.py

Weights are random, seeded, made block by block on disk. llama.cpp's way: its converter makes an f16 GGUF of a
phi-2-shaped checkpoint with as many weights (it has no converter for moondream2), then `llama_model_quantize` makes
Q4_K_M of it with as many threads. Without --convert, the converter's step is a plain loop over `gguf.GGUFWriter`.
The converter needs transformers and sentencepiece. Every timed step is a process of its own, after a sync of the
disk. The last line on stdout is JSON; `ratio` compares what both do (weights to quantized files); with --whole,
`ratio_export` counts our whole command with hashes and self-test too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from real_size import Size, open_random, say, write_checkpoint, write_moondream

from vlmedge.checkpoint import open_folder


def main() -> None:
    """Make both checkpoints, time both ways, print the numbers."""
    options = _options()
    if options.step:
        _step(options)
        return
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    # A folder of our own inside, so that nothing of the user's is removed with it.
    options.work = Path(tempfile.mkdtemp(prefix="export-size-", dir=options.work))
    try:
        result = _compare(options)
    finally:
        if options.keep:
            say(f"kept: {options.work}")
        else:
            shutil.rmtree(options.work)
    print(json.dumps(result))


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    ours, theirs = options.work / "moondream2", options.work / "phi-2"
    size = Size(layers=options.layers, vision_layers=options.layers) if options.layers else Size()
    weights = write_moondream(ours, size, options.seed)
    same = make_phi(theirs, weights, options.seed)
    result: dict[str, Any] = {"weights": weights, "weights_two_step": same, "threads": options.threads}
    result |= {"profile": options.profile, "converter": "script" if options.convert else "plain loop"}
    for step in ("exporter", *(("export",) if options.whole else ()), "convert", "quantize"):
        say(f"timing: {step}")
        result[step] = _timed(options, step)
    two_steps = result["convert"]["seconds"] + result["quantize"]["seconds"]
    result["ratio"] = round(result["exporter"]["seconds"] / two_steps, 3)
    if options.whole:
        result["ratio_export"] = round(result["export"]["seconds"] / two_steps, 3)
    say(f"one pass {result['exporter']['seconds']:.1f} s, two steps {two_steps:.1f} s, ratio {result['ratio']}")
    say(f"peak RSS {result['exporter']['peak_rss_mb']:.0f} MB")
    return result


def make_phi(folder: Path, weights: int, seed: int) -> int:
    """Write a phi-2-shaped checkpoint of about `weights` weights, with moondream2's widths; return its number."""
    width, inner, vocab = 2048, 8192, 51200
    layer = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width), "self_attn.v_proj": (width, width)}
    layer |= {"self_attn.dense": (width, width), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    each = sum(rows * columns + rows for rows, columns in layer.values()) + 2 * width
    layers = max(1, round((weights - 2 * vocab * width) / each))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(layers):
        for name, shape in layer.items():
            shapes |= {f"model.layers.{i}.{name}.weight": shape, f"model.layers.{i}.{name}.bias": shape[:1]}
        at = f"model.layers.{i}.input_layernorm"
        shapes |= {f"{at}.weight": (width,), f"{at}.bias": (width,)}
    shapes |= {"model.final_layernorm.weight": (width,), "model.final_layernorm.bias": (width,)}
    shapes |= {"lm_head.weight": (vocab, width), "lm_head.bias": (vocab,)}
    config = {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": vocab,
        "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
        "hidden_act": "gelu_new", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    count = write_checkpoint(folder, config, shapes, seed)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return count


def _timed(options: argparse.Namespace, step: str) -> dict[str, float]:
    """Run one step in a process of its own; return its seconds, its peak RSS and the bytes that it left."""
    os.sync()
    # Of two --work the last counts.
    command = [sys.executable, __file__, *sys.argv[1:], "--work", str(options.work), "--step", step]
    command += ["--started", str(time.time())]
    log = options.work / f"{step}.log"
    with log.open("w") as file:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True)
    if run.returncode:
        raise SystemExit(f"the step {step} failed: {log.read_text()[-2000:]}")
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return result


def _step(options: argparse.Namespace) -> None:
    work: Path = options.work
    out = work / f"{options.step}.out"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    if options.step == "exporter":
        open_random(work / "moondream2").export("gguf", options.profile, out, options.threads)
    elif options.step == "export":
        import vlmedge

        vlmedge.export(work / "moondream2", "gguf", options.profile, out, verify=False, threads=options.threads)
    elif options.step == "convert":
        out.mkdir()
        _convert(work / "phi-2", out / "f16.gguf", options.convert)
    else:
        out.mkdir()
        _quantize(work / "convert.out" / "f16.gguf", out / "q4_k_m.gguf", options.threads)
    # Ours counts Python's start and imports, as the converter's script does; the bare C call has none to count.
    seconds = time.perf_counter() - start if options.step == "quantize" else time.time() - options.started
    unit = 1 if sys.platform == "darwin" else 1024
    who = resource.RUSAGE_CHILDREN if options.step == "convert" and options.convert else resource.RUSAGE_SELF
    usage = resource.getrusage(who)
    numbers = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    numbers |= {"peak_rss_mb": usage.ru_maxrss * unit / 1e6, "bytes": sum(p.stat().st_size for p in out.rglob("*.*"))}
    print(json.dumps({name: round(value, 2) for name, value in numbers.items()}))


# Random tokenizers have no known hash; what the script asks of them afterwards is the name alone.
_SCRIPT = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
sys.argv = sys.argv[1:]
sys.path.insert(1, str(Path(sys.argv[0]).parent / "gguf-py"))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _convert(source: Path, out: Path, script: Path | None) -> None:
    if script is not None:
        command = [sys.executable, "-c", _SCRIPT, *map(str, (script, source, "--outfile", out, "--outtype", "f16"))]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return
    _plain_convert(source, out)


def _plain_convert(source: Path, out: Path) -> None:
    """Do what the converter does, with nothing around it: read, cast to f16, write."""
    import gguf

    from vlmedge.exporters.gguf.vocabulary import read_vocabulary

    checkpoint = open_folder(source)
    config = checkpoint.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI2, config["num_hidden_layers"])
    vocabulary = read_vocabulary((source / "tokenizer.json").read_bytes(), config["vocab_size"])
    writer = gguf.GGUFWriter(out, "phi2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_rope_dimension_count(32)
    writer.add_file_type(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    kinds = {name: np.float32 if len(t.shape) == 1 else np.float16 for name, t in checkpoint.tensors.items()}
    for name, tensor in checkpoint.tensors.items():
        size = tensor.size * np.dtype(kinds[name]).itemsize
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor_info(target, tensor.shape, np.dtype(kinds[name]), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in checkpoint.tensors.items():
        writer.write_tensor_data(tensor.read().astype(kinds[name]))
    writer.close()


def _quantize(source: Path, out: Path, threads: int) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    parameters.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise SystemExit("llama_model_quantize failed")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="where checkpoints and exports go, about 15 GB [default: the system's]"
    )
    parser.add_argument("--convert", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--layers", type=int, default=0, help="layers of tower and decoder; 0: the real number")
    parser.add_argument("--profile", default="q4")
    parser.add_argument("--whole", action="store_true", help="time the whole command too: hashes, self-test, manifest")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and exports there")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
